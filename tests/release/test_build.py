"""pack build: all that a recipe asks for, each step once; and a release made again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from tests.conftest import ROOT, digests
from tests.release.test_release import _keys

Pack = Callable[..., Any]


@pytest.fixture
def home(example_models: Path, tmp_path: Path) -> Path:
    """A folder with the example models and the recipe that releases a merge of them."""
    folder = tmp_path / "home"
    (folder / "examples").mkdir(parents=True)
    shutil.copytree(example_models, folder / "examples" / "models")
    recipe = yaml.safe_load((ROOT / "recipes" / "ties-release.yaml").read_text())
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def _steps(ran: Any) -> list[tuple[str, bool]]:
    assert ran.code == 0, ran.err
    return [(step["name"], step["done"]) for step in json.loads(ran.out)["steps"]]


def _edit(home: Path, **keys: object) -> None:
    path = home / "r.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def test_a_whole_recipe(pack: Pack, home: Path) -> None:
    """Merged, quantized twice, released; a second time nothing is done."""
    ran = pack("build", "r.yaml", "--json", cwd=home)
    names = ["merge", "gguf q4_k_m", "gguf q8_0", "evaluate", "compare", "release 1.0.0"]
    assert _steps(ran) == [(name, True) for name in names]
    assert json.loads(ran.out)["warnings"] == []
    folder = home / "dist" / "ties-release" / "release" / "1.0.0"
    assert (folder / "gguf" / "ties-release-Q4_K_M.gguf").is_file()
    assert pack("verify", folder, "-q").code == 0
    again = pack("build", "r.yaml", cwd=home)
    assert again.code == 0, again.err
    assert "nothing was to be done" in again.out
    assert json.loads(ran.out)["digest"] in again.out
    card = (folder / "README.md").read_text()
    assert "KL divergence" in card
    assert "| parameters | 2.2M |" in card
    assert "| examples/models/code | - | apache-2.0 |" in card


def test_made_again(pack: Pack, home: Path) -> None:
    """The same digest, bit by bit; another input is named."""
    assert pack("build", "r.yaml", "-q", cwd=home).code == 0
    folder = Path("dist") / "ties-release" / "release" / "1.0.0"
    ran = pack("reproduce", folder, cwd=home)
    assert ran.code == 0, ran.err
    assert "the same, bit by bit" in ran.out
    path = home / "examples" / "models" / "code" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    ran = pack("reproduce", folder, cwd=home)
    assert ran.code == 1
    assert "examples/models/code: model.safetensors is not what it was" in ran.err


def test_what_changed_is_done(pack: Pack, home: Path) -> None:
    """A card alone makes no weight; an input makes all of it; a version never changes."""
    assert pack("build", "r.yaml", "-q", cwd=home).code == 0
    before = digests(home / "dist" / "ties-release" / "merged")
    card = yaml.safe_load((home / "r.yaml").read_text())["card"]
    _edit(home, version="1.0.1", card={**card, "summary": "Another text."})
    ran = pack("build", "r.yaml", "--json", cwd=home)
    assert [done for _, done in _steps(ran)] == [False, False, False, False, False, True]
    assert digests(home / "dist" / "ties-release" / "merged") == before
    readme = home / "dist" / "ties-release" / "release" / "1.0.1" / "README.md"
    assert "Another text." in readme.read_text()
    releases = home / "dist" / "ties-release" / "release"
    ran = pack("diff", releases / "1.0.0", releases / "1.0.1")
    assert ran.code == 0, ran.err
    assert "ties-release 1.0.0 → ties-release 1.0.1" in ran.out
    assert 'card.summary: "A small Llama' in ran.out
    assert "parents: nothing changed" in ran.out
    assert "README.md: changed" in ran.out
    assert "model.safetensors" not in ran.out
    _edit(home, parameters={"lambda": 0.5})
    ran = pack("build", "r.yaml", "--json", cwd=home)
    assert ran.code == 1
    assert "version 1.0.1 was released of another recipe (changed: parameters)" in ran.err
    _edit(home, version="1.1.0", quantize=[{"scheme": "q8_0"}], evaluate=None)
    ran = pack("build", "r.yaml", "--json", cwd=home)
    steps = [("merge", True), ("gguf q8_0", True), ("compare", False), ("release 1.1.0", True)]
    assert _steps(ran) == steps


def test_licences_come_first(pack: Pack, home: Path) -> None:
    """A conflict is found before any weight is read."""
    _edit(home, licenses={"examples/models/base": "gpl-3.0"})
    ran = pack("build", "r.yaml", cwd=home)
    assert ran.code == 1
    assert "cannot be released as apache-2.0" in ran.err
    assert not (home / "dist").exists()
    _edit(home, licenses={"examples/models/base": "apache-2.0"}, quantize=[{"scheme": "q9"}])
    ran = pack("build", "r.yaml", cwd=home)
    assert ran.code == 1
    assert "'q9': no type of GGUF" in ran.err
    _edit(home, output="adapter", rank=4, quantize=None)
    assert pack("build", "r.yaml", cwd=home).code == 1


RELEASED = sorted(
    path.name for path in (ROOT / "recipes").glob("*.yaml")
    if "version" in yaml.safe_load(path.read_text())
)  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_recipes_that_come_along(pack: Pack, home: Path, tmp_path: Path, name: str) -> None:
    """Each ends in a release that holds, without a warning, and comes out the same again."""
    shutil.copyfile(ROOT / "recipes" / name, home / name)
    recipe = yaml.safe_load((home / name).read_text())
    private, public = _keys(tmp_path)
    ran = pack("build", name, "--sign", private, "--json", cwd=home)
    steps = _steps(ran)
    assert all(done for _, done in steps)
    assert steps[-1] == ("sign", True)
    assert json.loads(ran.out)["warnings"] == []
    folder = Path("dist") / recipe["name"] / "release" / recipe["version"]
    ran = pack("verify", folder, "--public-key", public, cwd=home)
    assert ran.code == 0, ran.err
    again = pack("build", name, "--sign", private, cwd=home)
    assert again.code == 0, again.err
    assert "nothing was to be done" in again.out
    ran = pack("reproduce", folder, cwd=home)
    assert ran.code == 0, ran.err


def test_adapters_of_a_release_load(pack: Pack, home: Path) -> None:
    """In PEFT, by the lines that the card shows."""
    shutil.copyfile(ROOT / "recipes" / "adapters-beside-base.yaml", home / "a.yaml")
    ran = pack("build", "a.yaml", "-q", cwd=home)
    assert ran.code == 0, ran.err
    folder = home / "dist" / "adapters-beside-base" / "release" / "1.0.0"
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "peft"
    assert (folder / "ADAPTERS.md").is_file()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/base", str(home / "examples" / "models" / "base"))
    done = subprocess.run([sys.executable, "-c", f"{code}\nprint(model.active_adapter)"],
                          cwd=folder, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "lora-code"


def test_the_plot(pack: Pack, home: Path) -> None:
    """A picture that is whole XML, of two layers and three models; left out where asked."""
    assert pack("build", "r.yaml", "-q", cwd=home).code == 0
    folder = home / "dist" / "ties-release" / "release" / "1.0.0"
    assert "](compared/deltas.svg)" in (folder / "README.md").read_text()
    tree = ET.fromstring((folder / "compared" / "deltas.svg").read_text())
    space = "{http://www.w3.org/2000/svg}"
    assert len(tree.findall(f"{space}polyline")) == 3
    data = json.loads((folder / "compared" / "deltas.json").read_text())
    assert [layer["layer"] for layer in data["layers"]] == [0, 1]
    assert all(0 < value < 1 for layer in data["layers"] for value in layer["change"])
    _edit(home, version="1.0.1", compare=False)
    ran = pack("build", "r.yaml", "--json", cwd=home)
    assert "compare" not in [name for name, _ in _steps(ran)]
    folder = home / "dist" / "ties-release" / "release" / "1.0.1"
    assert "deltas.svg" not in (folder / "README.md").read_text()


def test_by_hand_and_again(pack: Pack, home: Path) -> None:
    """What was merged and quantized by hand is told in the recipe, so that it can be made again."""
    _edit(home, quantize=None, compare=True)
    assert pack("merge", "r.yaml", "-q", cwd=home).code == 0
    merged = "dist/ties-release/merged"
    assert pack("quantize", "--to", "gguf", "q8_0", merged, "-q", cwd=home).code == 0
    ran = pack("release", "-q", cwd=home)
    assert ran.code == 0, ran.err
    folder = home / "dist" / "ties-release" / "release" / "1.0.0"
    stated = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert stated["quantize"] == [{"to": "gguf", "scheme": "q8_0"}]
    ran = pack("reproduce", folder, cwd=home)
    assert ran.code == 0, ran.err
    _edit(home, parameters={"lambda": 0.5}, version="1.0.1")
    assert pack("merge", "r.yaml", "-q", "--force", cwd=home).code == 0
    ran = pack("release", cwd=home)
    assert ran.code == 1
    assert "was made of an earlier merged" in ran.err


def test_papers_alone(pack: Pack, home: Path) -> None:
    """By hand, too, the newest card and licence are taken; a template that changed is noticed."""
    card = yaml.safe_load((home / "r.yaml").read_text())["card"]
    (home / "card.jinja").write_text("---\n{{ front_matter }}---\nFirst")
    _edit(home, quantize=None, card={**card, "template": "card.jinja"})
    assert pack("build", "r.yaml", "-q", cwd=home).code == 0
    (home / "card.jinja").write_text("---\n{{ front_matter }}---\nSecond")
    ran = pack("build", "r.yaml", cwd=home)
    assert ran.code == 1
    assert "version 1.0.0 was released with other content" in ran.err
    _edit(home, version="1.1.0", license="mit", card={**card, "summary": "Newer."})
    assert pack("build", "r.yaml", "-q", cwd=home).code == 0
    ran = pack("release", "ties-release", "--bump", "auto", cwd=home)
    assert ran.code == 0, ran.err
    folder = home / "dist" / "ties-release" / "release" / "1.1.1"
    assert "Newer." in (folder / "README.md").read_text()
    assert "license: mit" in (folder / "README.md").read_text()


def test_a_format_that_was_not_released(pack: Pack, home: Path) -> None:
    """A run that was killed between the two releases is finished by the next."""
    _edit(home, hub={"repo": "org/x", "per_format": True}, quantize=[{"scheme": "q8_0"}])
    assert pack("build", "r.yaml", "-q", cwd=home).code == 0
    made = home / "dist" / "ties-release"
    before = digests(made / "release-gguf")
    shutil.rmtree(made / "release-gguf")
    ran = pack("build", "r.yaml", cwd=home)
    assert ran.code == 0, ran.err
    assert digests(made / "release-gguf") == before


def test_formats_for_gpus(pack: Pack, home: Path) -> None:
    """GPTQ and AWQ in repositories of their own, with a text of the user's; a second time nothing.

    By hand with the same settings it is the same recipe.
    """
    (home / "text.txt").write_text((ROOT / "README.md").read_text())
    calibration = {"text": "text.txt", "context": 64, "windows": 16}
    quantize = [
        {"to": "gptq", "scheme": "w4g128", "calibration": calibration},
        {"to": "int8", "scheme": "w8a16"},
    ]
    _edit(home, hub={"repo": "org/x", "per_format": True}, quantize=quantize, evaluate=None)
    ran = pack("build", "r.yaml", "--json", cwd=home)
    assert ("gptq w4g128", True) in _steps(ran)
    assert ("int8 w8a16", True) in _steps(ran)
    made = home / "dist" / "ties-release"
    folder = made / "release-gptq-w4g128" / "1.0.0"
    assert (folder / "model.safetensors").is_file()
    assert (folder / "QUANTIZED.md").is_file()
    card = (folder / "README.md").read_text()
    assert "base_model_relation: quantized" in card
    assert "vllm serve ." in card
    for one in (folder, made / "release-int8-w8a16" / "1.0.0", made / "release" / "1.0.0"):
        assert pack("verify", one, "-q").code == 0
    assert ("gptq w4g128", False) in _steps(pack("build", "r.yaml", "--json", cwd=home))
    ran = pack("reproduce", folder, cwd=home)
    assert ran.code == 0, ran.err
    before = digests(made / "gptq-w4g128")
    words = ("--calibration", "text.txt", "--context", 64, "--windows", 16, "--force", "-q")
    ran = pack("quantize", "--to", "gptq", "w4g128", "dist/ties-release/merged", *words, cwd=home)
    assert ran.code == 0, ran.err
    now = digests(made / "gptq-w4g128")
    assert {k: v for k, v in now.items() if k != "pack.lock"} == {
        k: v for k, v in before.items() if k != "pack.lock"
    }
    (home / "text.txt").write_text((ROOT / "CONTRIBUTING.md").read_text())
    ran = pack("build", "r.yaml", cwd=home)  # of another text it is another model
    assert ran.code == 1
    assert "was released with other content" in ran.err


def test_entries_that_do_not_go_together(pack: Pack, home: Path) -> None:
    for quantize, told in (
        ([{"to": "gptq", "scheme": "w4g128"}, {"to": "gptq", "scheme": "W4G128"}], "twice"),
        ([{"scheme": "q8_0", "calibration": {"windows": 4}}], "not for GGUF"),
        ([{"to": "bnb", "scheme": "nf4", "calibration": {"windows": 4}}], "has no effect"),
        ([{"to": "gptq", "scheme": "w4g128", "calibration": {"text": "gone"}}], "no such text"),
        ([{"to": "awq", "scheme": "w4g128", "calibrate": False}], "looking at activations"),
    ):
        _edit(home, quantize=quantize)
        ran = pack("build", "r.yaml", cwd=home)
        assert ran.code == 1
        assert told in ran.err
        assert not (home / "dist").exists()


def test_what_was_changed_by_hand(pack: Pack, home: Path) -> None:
    """A result whose bytes changed is made again; a release is not kept, and told."""
    _edit(home, quantize=None)
    assert pack("build", "r.yaml", "-q", cwd=home).code == 0
    merged = home / "dist" / "ties-release" / "merged"
    before = digests(merged)
    raw = bytearray((merged / "config.json").read_bytes())
    raw[5] ^= 1
    (merged / "config.json").write_bytes(raw)  # the same file as in the release
    ran = pack("build", "r.yaml", cwd=home)
    assert ran.code == 1
    assert "config.json: is not what was released; something changed it" in ran.err
    assert digests(merged) == before
    shutil.rmtree(home / "dist" / "ties-release" / "release")
    assert pack("build", "r.yaml", "-q", cwd=home).code == 0


def test_evaluated(pack: Pack, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, plot and command in the card, the Hub's own form in its head; limits stop it."""
    assert pack("build", "r.yaml", "-q", cwd=home).code == 0
    folder = home / "dist" / "ties-release" / "release" / "1.0.0"
    card = (folder / "README.md").read_text()
    assert "](evaluated/evaluation.svg)" in card
    ET.fromstring((folder / "evaluated" / "evaluation.svg").read_text())
    head = yaml.safe_load(card.split("---\n")[1])
    data = json.loads((folder / "evaluated" / "evaluation.json").read_text())
    names = ["examples/models/base", "the model", "q4_k_m", "q8_0"]
    assert [one["name"] for one in data["measured"]] == names
    value = head["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert value == data["measured"][1]["perplexity"]
    for line in card.split("with:\n\n```\n")[1].split("```")[0].splitlines():
        (folder / "examples").symlink_to(home / "examples")
        ran = pack(*line.split()[1:], "--json", cwd=folder)
        (folder / "examples").unlink()
        assert ran.code == 0, ran.err
        again = {one["name"]: one for one in json.loads(ran.out)["models"]}
        for one in data["measured"]:
            place = next((n for n in again if one["name"].upper() in n), None)
            if place is not None:
                assert again[place]["perplexity"] == pytest.approx(one["perplexity"], rel=1e-2)
                assert again[place]["kl_mean"] == pytest.approx(one["kl_mean"], rel=1e-2)
    section = yaml.safe_load((home / "r.yaml").read_text())["evaluate"]
    _edit(home, version="1.0.1", evaluate={**section, "max_kl": 1e-4})
    ran = pack("build", "r.yaml", cwd=home)
    assert ran.code == 1
    assert "q4_k_m: kl_mean" in ran.err
    assert "q8_0: kl_mean" not in ran.err
    assert not (home / "dist" / "ties-release" / "release" / "1.0.1").exists()
    _edit(home, evaluate={**section, "max_perplexity_increase": 1e-6})
    ran = pack("build", "r.yaml", cwd=home)
    assert ran.code == 1
    assert "perplexity_change" in ran.err
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "transformers", None)
        ran = pack("build", "r.yaml", cwd=home)
        assert ran.code == 1
        assert "pip install 'pack-models[eval]'" in ran.err
    _edit(home, evaluate={**section, "text": "nowhere.txt"})
    ran = pack("build", "r.yaml", cwd=home)
    assert ran.code == 1
    assert "nowhere.txt: there is no such text" in ran.err


def test_a_build_anywhere(
    pack: Pack, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder, locale, time zone, umask and thread count give the same release."""
    ran = pack("build", "r.yaml", "--json", cwd=home)
    assert ran.code == 0, ran.err
    other = tmp_path / "další složka"
    other.mkdir()
    shutil.copytree(home / "examples", other / "examples")
    shutil.copyfile(home / "r.yaml", other / "r.yaml")
    for name, value in {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    before = os.umask(0o077)
    try:
        again = pack("build", "r.yaml", "--threads", 1, "--json", cwd=other)
    finally:
        os.umask(before)
    assert again.code == 0, again.err
    assert json.loads(again.out)["digest"] == json.loads(ran.out)["digest"]
