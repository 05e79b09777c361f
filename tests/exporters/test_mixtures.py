"""Types of tensors, against tables recorded from llama-quantize; and what overrides them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from exporters.gguf.export import GgufModel
from exporters.gguf.mixtures import (
    MIXTURES,
    Facts,
    Overrides,
    choose_types,
    find_mixture,
    find_type,
)
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.blocks.types import TYPES
from tests.exporters.record_mixtures import MODELS, RECORDED, by_role, gguf_model, packed

TABLES = json.loads(RECORDED.read_text())["tables"]


def _types(model: GgufModel, mixture: str, **keys: Any) -> dict[str, str]:
    shapes = {name: model.tensors.spec(name).shape for name in model.names}
    found = choose_types(shapes, model.facts, find_mixture(mixture), **keys)
    return {name: kind.name for name, kind in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_as_llama_quantize(name: str) -> None:
    """For every mixture, with and without an importance matrix, the type of every tensor."""
    model = gguf_model(name)
    order = by_role(list(model.names))
    assert {n.partition(" ")[0] for n in TABLES[name]} == MIXTURES.keys() - {"f32", "f16", "bf16"}
    for mixture in MIXTURES.keys() - {"f32", "f16", "bf16"}:
        plain = TABLES[name][mixture]
        weighted = TABLES[name].get(f"{mixture} with importance", plain)
        assert packed(_types(model, mixture, importance=True), order) == weighted, mixture
        try:
            assert packed(_types(model, mixture), order) == plain, mixture
        except PackError as error:
            assert "needs an importance matrix" in error.message  # noqa: PT017
            assert mixture.startswith(("iq1", "iq2", "iq3", "q2_k_s"))


def test_floats() -> None:
    """Matrices in 16 bits; vectors, and what llama.cpp adds to activations, in 32."""
    types = _types(gguf_model("gpt2"), "f16")
    assert types["position_embd.weight"] == "F32"
    assert types["blk.0.attn_qkv.bias"] == "F32"
    assert types["blk.0.attn_qkv.weight"] == "F16"
    assert set(_types(gguf_model("gpt2"), "f32").values()) == {"F32"}


def test_overrides() -> None:
    model = gguf_model("llama")
    overrides = Overrides(
        [(r"blk\.[01]\..*ffn_down", TYPES["Q8_0"]), ("ffn_down", TYPES["Q3_K"])],
        output=TYPES["Q5_K"], embedding=TYPES["F16"],
    )  # fmt: skip
    types = _types(model, "q4_k_m", overrides=overrides)
    assert types["blk.1.ffn_down.weight"] == "Q8_0"
    assert types["blk.2.ffn_down.weight"] == "Q3_K"
    assert types["output.weight"] == "Q5_K"
    assert types["token_embd.weight"] == "F16"
    pure = _types(model, "q4_k_m", overrides=Overrides(pure=True))
    assert set(pure.values()) == {"F32", "Q4_K"}
    tied = _types(gguf_model("llama, tied"), "q4_k_m", overrides=Overrides(output=TYPES["Q8_0"]))
    assert tied["token_embd.weight"] == "Q8_0"


def test_mistakes() -> None:
    with pytest.raises(PackError, match="'q4_k_n': no type of GGUF; did you mean 'q4_k_"):
        find_mixture("q4_k_n")
    with pytest.raises(PackError, match="no type of a tensor"):
        find_type("q9")
    with pytest.raises(PackError, match="fits no tensor"):
        _types(gguf_model("gpt2"), "q8_0", overrides=Overrides([("attn_x", TYPES["Q8_0"])]))
    facts = Facts("llama", 1, 1, 1)
    with pytest.raises(PackError, match=r"needs an importance matrix: 'blk\.0\.ffn_up\.weight'"):
        choose_types({"blk.0.ffn_up.weight": (256, 256)}, facts, find_mixture("iq2_xxs"))
