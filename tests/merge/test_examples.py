"""The recipes that users start from, on the trained example models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import transformers

from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NOT_MODELS = ("adapter-of-adapters", "adapters-beside-base")
MODELS = [path for path in RECIPES if "output: " not in path.read_text()]


@pytest.mark.parametrize("recipe", MODELS, ids=lambda p: p.stem)
def test_recipes_make_models_that_transformers_loads(
    pack: Callable, tmp_path: Path, example_models: Path, recipe: Path
) -> None:
    ran = pack("merge", recipe, "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def merge(models): return models"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert loaded.config.num_hidden_layers == (3 if "stack" in recipe.stem else 2)


def test_recipes_make_adapters_that_peft_loads(
    pack: Callable, tmp_path: Path, example_models: Path
) -> None:
    base = example_models / "base"
    one, bundle = (ROOT / "recipes" / f"{n}.yaml" for n in NOT_MODELS)
    assert pack("merge", "linear", one, "-o", tmp_path / "one", "-q", cwd=ROOT).code == 0
    assert pack("adapters", bundle, "-o", tmp_path / "bundle", "-q", cwd=ROOT).code == 0
    for folder in (tmp_path / "one", *(tmp_path / "bundle" / "adapters").iterdir()):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        loaded = peft.PeftModel.from_pretrained(model, folder)
        factors = [p for n, p in loaded.named_parameters() if "lora_B" in n]
        assert len(factors) == 14
        assert all(p.any() for p in factors)
    assert {p.stem for p in RECIPES} == {p.stem for p in MODELS} | set(NOT_MODELS)


def test_ties_beats_the_base_on_every_domain(
    pack: Callable, tmp_path: Path, example_models: Path
) -> None:
    import sys

    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from perplexity import held_out_perplexity
    finally:
        sys.path.pop(0)
    recipe = ROOT / "recipes" / "ties-three-finetunes.yaml"
    assert pack("merge", "ties", recipe, "-o", tmp_path / "out", "-q").code == 0
    merged = held_out_perplexity(tmp_path / "out")
    base = json.loads((example_models / "perplexity.json").read_text())
    base = base.get("models", base.get("perplexity", base))["base"]
    assert merged.keys() == base.keys()
    for domain, value in merged.items():
        assert value < base[domain], domain
