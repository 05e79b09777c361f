"""Layers are found by counting, whatever a model calls them."""

from __future__ import annotations

import pytest

from mergekit_lite.checkpoint.layers import is_input_side, main_stack, map_layers
from mergekit_lite.errors import PackError


def _names(*patterns: str, count: int = 3) -> list[str]:
    return [p.replace("#", str(i)) for p in patterns for i in range(count if "#" in p else 1)]


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (_names("model.layers.#.mlp.weight", "model.norm.weight"), "model.layers."),
        (_names("transformer.h.#.attn.bias", "transformer.wte.weight"), "transformer.h."),
        (_names("bert.encoder.layer.#.output.weight"), "bert.encoder.layer."),
        (_names("model.layers.#.experts.7.w1.weight"), "model.layers."),
        (_names("encoder.block.#.w", count=2) + _names("decoder.block.#.w"), "decoder.block."),
    ],
)
def test_the_main_stack(names: list[str], prefix: str) -> None:
    found = map_layers(names, {"num_hidden_layers": 3})
    assert found.main == prefix
    assert found.counts[prefix] == 3


def test_what_does_not_count_from_zero_is_no_stack() -> None:
    found = map_layers(["classifier.0.weight", "classifier.2.weight", "x.1.w"], {})
    assert found.counts == {}
    with pytest.raises(PackError, match="cannot tell which stack"):
        main_stack(found, "model")


def test_positions() -> None:
    found = map_layers(
        [*_names("layers.#.w", count=5), "embed_tokens.weight", "norm.weight", "lm_head.weight"], {}
    )
    assert [found.position(f"layers.{i}.w") for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found.position("embed_tokens.weight") == 0.0
    assert found.position("norm.weight") == found.position("lm_head.weight") == 1.0
    assert map_layers(["layers.0.w"], {}).position("layers.0.w") == 0.0


@pytest.mark.parametrize(
    ("name", "embeds"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("transformer.wpe.weight", True),
        ("bert.embeddings.word_embeddings.weight", True),
        ("word_embeddings_layernorm.bias", True),
        ("gpt_neox.embed_out.weight", False),
        ("embed_out.weight", False),
        ("lm_head.weight", False),
        ("model.norm.weight", False),
        ("remember.weight", False),
    ],
)
def test_what_embeds_the_input(name: str, embeds: bool) -> None:
    assert is_input_side(name) == embeds
