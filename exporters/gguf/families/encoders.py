"""BERT and nomic's BERT: encoders, whose files give embeddings of texts."""

from __future__ import annotations

from exporters.gguf.families.base import Family, Hyperparameters, Settings
from exporters.gguf.metadata import f32, flag, u32

__all__ = ["BERT", "NOMIC_BERT"]

_NEEDS = ("token_embd.weight", "token_embd_norm.weight")
_DROPPED = (
    "embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias",
    "cls.predictions.bias", "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias", "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias", "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias", "cls.seq_relationship.weight", "cls.seq_relationship.bias",
)  # fmt: skip
"""Heads for training, and what a BERT adds on top of its embeddings of tokens."""


def _bert(settings: Settings) -> Hyperparameters:
    settings.expect("hidden_act", "gelu")
    settings.expect("position_embedding_type", "absolute")
    settings.expect("is_decoder", False)
    return _encoder(settings) | {
        "context_length": u32(settings.whole("max_position_embeddings")),
    }


def _encoder(settings: Settings) -> Hyperparameters:
    width = settings.whole("hidden_size", "n_embd")
    return {
        "block_count": u32(settings.whole("num_hidden_layers", "n_layer")),
        "embedding_length": u32(width),
        "feed_forward_length": u32(settings.whole("intermediate_size", "n_inner")),
        "attention.head_count": u32(settings.heads),
        "attention.layer_norm_epsilon": f32(
            settings.number("layer_norm_eps", "layer_norm_epsilon", default=1e-12)
        ),
        "attention.causal": flag(False),
        "tokenizer.ggml.token_type_count": u32(settings.whole("type_vocab_size", default=2)),
        "vocab_size": u32(settings.whole("vocab_size")),
    }


def _nomic_bert(settings: Settings) -> Hyperparameters:
    settings.expect("hidden_act", "silu")
    return _encoder(settings) | {
        "context_length": u32(settings.whole("max_position_embeddings", "n_positions")),
        "rope.freq_base": f32(float(settings.rope()["rope_theta"])),
    }


BERT = Family(
    "bert", _bert, needs=(*_NEEDS, "position_embd.weight"), head=False, dropped=_DROPPED,
    unprefixed="bert.",
)  # fmt: skip
NOMIC_BERT = Family("nomic-bert", _nomic_bert, needs=_NEEDS, head=False, dropped=_DROPPED)
