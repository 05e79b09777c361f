"""Recipes that are wrong, each in its way: the line, the key, and the nearest known word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mergekit_lite.errors import RecipeError
from mergekit_lite.methods import ALIASES, METHODS
from mergekit_lite.recipe import parse_recipe

OK = "merge_method: ties\nbase_model: b\nmodels:\n  - model: a\n"

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)

CASES: dict[str, tuple[str, int | None, str]] = {
    "empty": ("", None, "the file is empty"),
    "only a comment": ("# nothing\n", None, "the file is empty"),
    "a list": ("- a\n- b\n", 1, "a recipe is a mapping"),
    "a word": ("ties\n", 1, "a recipe is a mapping"),
    "not YAML": ("a: [1, 2\nb: {", None, "not valid YAML"),
    "a tab": ("merge_method: ties\n\tmodels: x\n", 2, "not valid YAML"),
    "a tag that runs code": ("a: !!python/object/apply:os.system [ls]\n", 1, "tag"),
    "a tag of ours": ("a: !model x\n", 1, "tag"),
    "binary": ("a: !!binary aGVsbG8=\n", 1, "tag"),
    "a key twice": (OK + "seed: 1\nseed: 2\n", 6, "stands here twice"),
    "a key that is a list": (OK + "? [a]\n: 1\n", 5, "key must be plain text"),
    "a merge key": ("x: &x {a: 1}\n<<: *x\n" + OK, 2, "key must be plain text"),
    "nested deeply": ("a: " + "[" * 200 + "]" * 200, 1, "unfolds into more"),
    "nested very deeply": ("a: " + "[" * 50_000, None, ""),
    "billion laughs": (LAUGHS, None, "unfolds into more"),
    "too long": ("# " + "x" * 300_000, None, "longer than"),
    "a huge number": (OK + "seed: " + "9" * 400 + "\n", 5, "not a number that fits"),
    "a seed too large": (OK + "seed: 9223372036854775808\n", 5, "seed"),
    "a negative seed": (OK + "seed: -1\n", 5, "seed"),
    "a seed that is text": (OK + "seed: many\n", 5, "expected a whole number"),
    "an unknown key": (OK + "outdtype: float16\n", 5, "did you mean 'out_dtype'?"),
    "an unknown key in a model": (OK + "    paramters: {}\n", 5, "did you mean 'parameters'?"),
    "a method of mergekit": (OK.replace("ties", "model_stock"), 1, "that pack does not have yet"),
    "a parameter beside parameters": (OK + "    weight: 0.5\n", 5, "belongs under 'parameters:'"),
    "a parameter at the top": (OK + "density: 0.5\n", 5, "belongs under 'parameters:'"),
    "a seed by another name": (OK + "random_seed: 4\n", 5, "did you mean 'seed'?"),
    "half": (OK + "dtype: fp16\n", 5, "did you mean 'float16'?"),
    "a number in quotes": (OK + "    parameters: {weight: '0.5'}\n", 5, "remove the quotes"),
    "an adapter without a path": (
        OK + "  - {model: c, adapters: [{weight: 1}]}\n", 5, "path: is missing",
    ),
    "an adapter's key": (
        OK + "  - {model: c, adapters: [{path: x, wieght: 1}]}\n", 5, "did you mean 'weight'?",
    ),
    "lora": (OK + "    lora: x\n", 5, "base+adapter"),
    "an unknown method": (OK.replace("ties", "tis"), 1, "did you mean 'ties'?"),
    "a method that is a list": (OK.replace("ties", "[ties]"), 1, "no merge method"),
    "no method": ("models: [{model: a}]\n", 1, "has no 'merge_method'"),
    "no models": ("merge_method: linear\n", 1, "exactly one of 'models' and 'slices'"),
    "models and slices": (
        OK + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n", 1, "found both",
    ),
    "models empty": ("merge_method: linear\nmodels: []\n", 2, "at least 1"),
    "models is a word": ("merge_method: linear\nmodels: a\n", 2, "expected a list"),
    "a model is a word": ("merge_method: linear\nmodels: [a]\n", 2, "expected a mapping"),
    "a model without a name": ("merge_method: linear\nmodels: [{parameters: {}}]\n", 2,
        "is missing"),
    "a model's name is empty": ("merge_method: linear\nmodels: [{model: ''}]\n", 2, "empty"),
    "a model's name is a number": ("merge_method: linear\nmodels: [{model: 7}]\n", 2,
        "expected text"),
    "no base": ("merge_method: ties\nmodels: [{model: a}]\n", 1, "needs a 'base_model'"),
    "only the base": (OK.replace("model: a", "model: b"), 3, "at least 1 model beside the base"),
    "slerp of three": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}, {model: c}]\n", 3,
        "takes 1 model beside the base model, found 2",
    ),
    "unknown dtype": (OK + "dtype: bf16\n", 5, "did you mean 'bfloat16'?"),
    "an integer dtype": (OK + "dtype: int8\n", 5, "unknown floating-point type"),
    "a name that leads out": (OK + "name: ../../etc\n", 5, "letters, digits"),
    "an absolute name": (OK + "name: /tmp/x\n", 5, "letters, digits"),
    "a hidden name": (OK + "name: .x\n", 5, "letters, digits"),
    "an empty name": (OK + "name: ''\n", 5, "letters, digits"),
    "a version that is none": (OK + "version: '1.0'\n", 5, "semantic version"),
    "a version that is a number": (OK + "version: 1.0\n", 5, "expected text"),
    "another method's parameter": (OK + "parameters: {t: 0.5}\n", 5, "'ties' has no parameter 't'"),
    "a misspelled parameter": (OK + "parameters: {lamda: 1}\n", 5, "did you mean 'lambda'?"),
    "a parameter at the wrong level": (
        OK + "    parameters: {normalize: true}\n", 5, "belongs to the whole merge",
    ),
    "a density above one": (OK + "    parameters: {density: 1.5}\n", 5, "from 0 to 1"),
    "a weight that is text": (OK + "    parameters: {weight: much}\n", 5, "expected a number"),
    "a weight that is no number": (OK + "    parameters: {weight: .nan}\n", 5, "not a number"),
    "an infinite weight": (OK + "    parameters: {weight: .inf}\n", 5, "not a number"),
    "a gradient of words": (OK + "    parameters: {weight: [0, x]}\n", 5, "expected a number"),
    "an empty gradient": (OK + "    parameters: {weight: []}\n", 5, "at least one number"),
    "a filter without a value": (
        OK + "    parameters: {weight: [{filter: mlp}]}\n", 5, "has no 'value'",
    ),
    "a filter that is a number": (
        OK + "    parameters: {weight: [{filter: 3, value: 1}]}\n", 5, "part of a tensor's name",
    ),
    "a filter misspelled": (
        OK + "    parameters: {weight: [{fliter: mlp, value: 1}]}\n", 5, "unknown key 'fliter'",
    ),
    "a choice that is none": (OK + "parameters: {trim: some}\n", 5, "expected tensor or global"),
    "a flag that is text": (OK + "parameters: {normalize: maybe}\n", 5, "expected true or false"),
    "parameters is a list": (OK + "parameters: [1]\n", 5, "expected a mapping"),
    "a range reversed": (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [4, 2]}]}]\n",
        2, "holds no layer",
    ),
    "a negative range": (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [-1, 2]}]}]\n",
        2, "greater than or equal to 0",
    ),
    "a range of three": (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1, 2]}]}]\n",
        2, "at most 2",
    ),
    "tokenizer twice": (
        OK + "tokenizer_source: base\ntokenizer: {source: base}\n", 6, "not both",
    ),
    "what is not supported yet": (OK + "modules: {}\n", 5, "not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_mistake_one_line(name: str) -> None:
    text, line, said = CASES[name]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", "r", METHODS, ALIASES)
    assert caught.value.message.startswith("r.yaml: ")
    assert said in caught.value.message
    if line is not None:
        assert f"line {line}: " in caught.value.message


def test_all_mistakes_at_once_in_order() -> None:
    text = """\
merge_method: ties
base_modle: b
models:
  - model: a
    parameters: {weigth: 1, density: 2}
  - modle: c
dtype: bf16
name: ../x
version: one
seed: -4
parameters: {lamda: 1, normalize: perhaps}
"""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", "r", METHODS, ALIASES)
    lines = [m.line for m in caught.value.mistakes]
    assert lines == sorted(lines)
    assert {2, 5, 6, 7, 8, 9, 10, 11} <= set(lines)
    assert len(lines) >= 10


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe\x00\x01", "is not a text file"), (b"\x89PNG\r\n\x1a\n", "is not a text file"),
     (b"x" * (2 << 20), "too large to be a recipe"), (b"\x00\x01\x02", "not valid YAML")],
)  # fmt: skip
def test_files_that_are_no_recipes(
    pack: Callable, tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    ran = pack("merge", "r.yaml", cwd=tmp_path)
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_a_folder_for_a_recipe(pack: Callable, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").mkdir()
    ran = pack("merge", "r.yaml", cwd=tmp_path)
    assert ran.code == 1
    assert "r.yaml: cannot be read" in ran.err


def test_a_required_parameter_is_asked_for(pack: Callable, tmp_path: Path) -> None:
    from tests.conftest import random_models, write_recipe

    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "slerp", {"a": {}}, base_model="base")
    ran = pack("merge", recipe)
    assert ran.code == 1
    assert "'slerp' needs the parameter 't'" in ran.err


def test_weights_that_cancel(pack: Callable, tmp_path: Path) -> None:
    from tests.conftest import random_models, write_recipe

    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"a": {"weight": 1}, "b": {"weight": -1}})
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "the weights 1, -1 add up to zero" in ran.err
    assert "normalize: false" in ran.err
