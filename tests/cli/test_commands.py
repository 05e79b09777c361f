"""What a user meets: help, spelled calls, mistakes, machine-readable output."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

import mergekit_lite
from tests.conftest import ROOT, load, pack_process, random_models, write_recipe

HEAVY = ("torch", "numba", "numpy", "pydantic", "rich", "huggingface_hub", "transformers")


def test_help_imports_nothing_heavy() -> None:
    """`pack --help` must stay instant: no library that takes long to import is loaded."""
    code = (
        "import sys; sys.argv = ['pack', '--help']\n"
        "from mergekit_lite.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("merge", "plan", "methods", "schema", "completion"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("word", "method"),
    [("ties", "ties"), ("slerp", "slerp"), ("linear", "linear"), ("dare", "dare_linear")],
)
def test_the_calls_as_spelled(pack: Callable, tmp_path: Path, word: str, method: str) -> None:
    """`pack merge ties a.yaml`, with no option, in the user's folder."""
    random_models(tmp_path)
    models = {"a": {}} if word == "slerp" else {"a": {}, "b": {}}
    keys: dict[str, object] = {"base_model": "base"} if word != "linear" else {}
    parameters = {"t": 0.5} if word == "slerp" else {}
    recipe = write_recipe(tmp_path / "a.yaml", "x", models, parameters=parameters, **keys)
    document = json.loads(recipe.read_text())
    del document["merge_method"]
    recipe.write_text(yaml.safe_dump(document))
    ran = pack("merge", word, "a.yaml", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"{method}: 6 tensors")
    assert ran.out.rstrip().endswith("dist/a/merged")
    assert load(tmp_path / "dist" / "a" / "merged").keys() == load(tmp_path / "a").keys()


def test_dare_agrees_with_both_of_its_family(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "dare_ties", {"a": {}}, base_model="base")
    ran = pack("merge", "dare", recipe, "-o", tmp_path / "out", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["method"] == "dare_ties"


def test_a_method_that_contradicts_the_recipe(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "slerp", {"a": {}}, base_model="base")
    ran = pack("merge", "ties", recipe)
    assert ran.code == 1
    assert "the recipe says 'slerp', the command says 'ties'" in ran.err
    assert "pack merge slerp" in ran.err
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["merge"], 2, "Missing argument"),
        (["merge", "ties"], 2, "missing RECIPE"),
        (["merge", "ties", "missing.yaml"], 1, "missing.yaml: no such file"),
        (["merge", "tiess", "r.yaml"], 1, "did you mean 'ties'?"),
        (["mrege", "ties", "r.yaml"], 2, "did you mean 'merge'?"),
        (["merge", "ties", "r.yaml", "--memory", "much"], 2, "is not a size"),
        (["merge", "ties", "r.yaml", "--memory", "1kB"], 1, "is too little"),
        (["merge", "ties", "r.yaml", "--threads", "0"], 2, "--threads"),
        (["methods", "tis"], 1, "did you mean 'ties'?"),
    ],
)
def test_mistakes_on_the_command_line(
    pack: Callable, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    random_models(tmp_path)
    write_recipe(tmp_path / "r.yaml", "ties", {"a": {}}, base_model="base")
    ran = pack(*words, cwd=tmp_path)
    assert ran.code == code
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_nothing_is_overwritten_without_force(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    ran = pack("merge", recipe, "-o", out)
    assert ran.code == 1
    assert "already exists" in ran.err
    assert "--force" in ran.err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    ran = pack("merge", recipe, "-o", out, "--force")
    assert ran.code == 1
    assert "holds 'mine.txt', which pack did not write" in ran.err
    assert (out / "mine.txt").read_text() == "precious"
    assert pack("merge", recipe, "-o", tmp_path / "two").code == 0
    assert pack("merge", recipe, "-o", tmp_path / "two").code == 1
    assert pack("merge", recipe, "-o", tmp_path / "two", "--force").code == 0


def test_plan_reads_no_weight(pack: Callable, tmp_path: Path) -> None:
    """The plan of models whose data is a hole on the disk: only headers can be read in time."""
    from mergekit_lite.checkpoint.header import write_header
    from mergekit_lite.dtypes import DTYPES

    for name in ("base", "a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        tensors = [(f"layers.{i}.w", DTYPES["BF16"], (65536, 65536)) for i in range(40)]
        prefix, header = write_header(tensors, {})
        with (folder / "model.safetensors").open("wb") as file:
            file.write(prefix)
            file.truncate(header.entries["layers.39.w"].end)
        (folder / "config.json").write_text('{"num_hidden_layers": 40}')
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties", {n: {"density": [0.2, 0.8]} for n in "ab"}, base_model="base"
    )
    ran = pack("plan", recipe)
    assert ran.code == 0, ran.err
    assert "reads   1.03 TB" in ran.out
    assert "writes  343.6 GB in" in ran.out
    document = json.loads(pack("plan", recipe, "--json").out)
    assert len(document["tensors"]) == 40
    assert document["tensors"][0]["parameters"]["density"] == [0.2, 0.2]
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    if ran.code:  # no disk here has 343 GB free, or else it would merge zeros for minutes
        assert "GB free" in ran.err


def test_methods_lists_all(pack: Callable) -> None:
    out = pack("methods").out
    for word in ("ties", "dare_linear", "slerp", "passthrough", "arXiv:2306.01708", "density"):
        assert word in out
    listed = json.loads(pack("methods", "--json").out)
    assert {m["name"] for m in listed} >= {"linear", "slerp", "ties", "dare_ties"}
    assert "dare_ties" in pack("methods", "dare").out


def test_recipes_are_listed_and_printed(pack: Callable) -> None:
    listed = [line.split()[0] for line in pack("recipes").out.splitlines()]
    assert listed == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert "merge_method: slerp" in pack("recipes", "slerp-by-layer").out
    assert "did you mean 'dare-ties'?" in pack("recipes", "dare-tie").err


def test_schema_accepts_recipes_and_rejects_mistakes(pack: Callable) -> None:
    schema = json.loads(pack("schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    example = yaml.safe_load(pack("recipes", "ties-three-finetunes").out)
    check.validate(example)
    for path in (ROOT / "recipes").glob("*.yaml"):
        check.validate(yaml.safe_load(path.read_text()))
    for change in (
        {"merge_metod": "ties"},
        {"parameters": {"t": 0.5}},
        {"merge_method": "tie"},
        {"parameters": {"lambda": "much"}},
    ):
        assert not check.is_valid({**example, **change}), change


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(pack: Callable, shell: str) -> None:
    assert "_PACK_COMPLETE" in pack("completion", shell).out


def test_version_and_no_arguments(pack: Callable) -> None:
    assert mergekit_lite.__version__ in pack("--version").out
    ran = pack()
    assert "Usage: pack" in ran.out + ran.err


def test_progress_is_plain_lines_in_a_log(tmp_path: Path) -> None:
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {}, "b": {}})
    process = pack_process("merge", recipe, "-o", tmp_path / "out", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "\x1b" not in out + err
    assert "\r" not in out + err
    quiet = pack_process("merge", recipe, "-o", tmp_path / "two", "-q", cwd=tmp_path)
    assert quiet.communicate(timeout=120) == ("", "")
