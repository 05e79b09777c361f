"""Stacks of layers from several models, and the config that goes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.conftest import load


def _model(folder: Path, layers: int, seed: int, **more: object) -> Path:
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, **more,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def _recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_passthrough_stacks_layers(pack: Callable, tmp_path: Path) -> None:
    _model(tmp_path / "a", 4, 1)
    _model(tmp_path / "b", 4, 2)
    recipe = _recipe(
        tmp_path / "r.yaml",
        """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
dtype: float32
""",
    )
    ran = pack("merge", "passthrough", recipe, "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    first, second, merged = (load(tmp_path / n) for n in ("a", "b", "out"))
    for new, (source, old) in enumerate(
        [(first, 0), (first, 1), (first, 2), (second, 1), (second, 2), (second, 3)]
    ):
        for part in ("self_attn.q_proj.bias", "mlp.down_proj.weight"):
            np.testing.assert_array_equal(
                merged[f"model.layers.{new}.{part}"], source[f"model.layers.{old}.{part}"]
            )
    np.testing.assert_array_equal(
        merged["model.embed_tokens.weight"], first["model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(merged["model.norm.weight"], second["model.norm.weight"])
    np.testing.assert_array_equal(merged["lm_head.weight"], second["lm_head.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert len(config["layer_types"]) == 6
    loaded = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 96)


def test_per_layer_lists_follow_their_layers(pack: Callable, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    _model(tmp_path / "a", 4, 1, layer_types=kinds, use_sliding_window=True)
    recipe = _recipe(
        tmp_path / "r.yaml",
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: a, layer_range: [1, 2]}]\n"
        "  - sources: [{model: a, layer_range: [1, 4]}]\n",
    )
    assert pack("merge", recipe, "-o", tmp_path / "out", "-q").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == [kinds[1], kinds[1], kinds[2], kinds[3]]


def test_slerp_of_slices_with_gradients(pack: Callable, tmp_path: Path) -> None:
    """The recipe that most people start from, gradients and filters included."""
    _model(tmp_path / "a", 4, 1)
    _model(tmp_path / "b", 4, 2)
    recipe = _recipe(
        tmp_path / "r.yaml",
        """
slices:
  - sources:
      - model: a
        layer_range: [0, 4]
      - model: b
        layer_range: [0, 4]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 1]
    - filter: mlp
      value: [1, 0]
    - value: 0.5
dtype: float32
""",
    )
    assert pack("merge", "slerp", recipe, "-o", tmp_path / "out", "-q").code == 0
    first, second, merged = (load(tmp_path / n) for n in ("a", "b", "out"))
    for layer, attention, mlp in ((0, 0.0, 1.0), (3, 1.0, 0.0)):
        for part, t in (("self_attn.q_proj.weight", attention), ("mlp.up_proj.weight", mlp)):
            name = f"model.layers.{layer}.{part}"
            expected = second[name] if t else first[name]
            np.testing.assert_allclose(merged[name], expected, atol=1e-6)
    ran = pack("plan", recipe, "--tensors")
    row = next(line for line in ran.out.splitlines() if "layers.1.mlp.up_proj" in line)
    assert "t=0.6667" in row


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{model: a, layer_range: [2, 5]}]", "goes beyond its 4 layers"),
        ("[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]", "takes 1 model"),
    ],
)
def test_ranges_that_do_not_fit(pack: Callable, tmp_path: Path, text: str, words: str) -> None:
    _model(tmp_path / "a", 4, 1)
    _model(tmp_path / "b", 4, 2)
    recipe = _recipe(
        tmp_path / "r.yaml", f"merge_method: passthrough\nslices:\n  - sources: {text}\n"
    )
    ran = pack("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 1
    assert words in ran.err


def test_gradients_outside_the_layers(pack: Callable, tmp_path: Path) -> None:
    """The embedding stands at the first anchor, final norm and head at the last one."""
    _model(tmp_path / "a", 3, 1)
    _model(tmp_path / "b", 3, 2)
    recipe = _recipe(
        tmp_path / "r.yaml",
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: [1, 0]}}\n"
        "  - {model: b, parameters: {weight: [0, 1]}}\ndtype: float32\n",
    )
    assert pack("merge", recipe, "-o", tmp_path / "out", "-q").code == 0
    first, second, merged = (load(tmp_path / n) for n in ("a", "b", "out"))
    for name, source in (
        ("model.embed_tokens.weight", first),
        ("model.layers.0.mlp.up_proj.weight", first),
        ("model.layers.2.mlp.up_proj.weight", second),
        ("lm_head.weight", second),
    ):
        np.testing.assert_allclose(merged[name], source[name], atol=1e-7)
    middle = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_allclose(merged[middle], (first[middle] + second[middle]) / 2, atol=1e-7)
