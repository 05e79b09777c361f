"""GPT-NeoX and Falcon, which keep queries, keys and values of a head or a group together."""

from __future__ import annotations

from exporters.gguf.families.base import Family, Hyperparameters, Settings
from exporters.gguf.metadata import f32, flag, u32

__all__ = ["FALCON", "GPT_NEOX"]


def _gpt_neox(settings: Settings) -> Hyperparameters:
    settings.expect("hidden_act", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
    found = settings.rope()
    settings.expect("attention_bias", True)
    partial = float(settings.get("rotary_pct", found["partial_rotary_factor"]))
    return {
        "block_count": u32(settings.whole("num_hidden_layers")),
        "context_length": u32(settings.whole("max_position_embeddings")),
        "embedding_length": u32(settings.whole("hidden_size")),
        "feed_forward_length": u32(settings.whole("intermediate_size")),
        "attention.head_count": u32(settings.heads),
        "attention.layer_norm_epsilon": f32(settings.number("layer_norm_eps", default=1e-5)),
        "use_parallel_residual": flag(bool(settings.get("use_parallel_residual", True))),
        "rope.dimension_count": u32(int(settings.width * partial)),
        "rope.freq_base": f32(float(settings.get("rotary_emb_base", found["rope_theta"]))),
        "vocab_size": u32(settings.whole("vocab_size")),
    }


def _by_heads(settings: Settings) -> tuple[int, ...]:
    """All queries, then all keys, then all values, out of one triple for each head."""
    return tuple(3 * head + part for part in range(3) for head in range(settings.heads))


def _kv_heads(settings: Settings) -> int:
    """Groups of keys and values; models before the 40B one have a single group for all heads."""
    if settings.get("new_decoder_architecture", False):
        return settings.whole("num_kv_heads", "n_head_kv", default=settings.heads)
    return 1 if settings.get("multi_query", True) else settings.heads


def _falcon(settings: Settings) -> Hyperparameters:
    settings.expect("alibi", False)
    settings.expect("bias", False)
    settings.expect("parallel_attn", True)
    settings.expect("activation", "gelu")
    width = settings.whole("hidden_size")
    return {
        "block_count": u32(settings.whole("num_hidden_layers", "n_layer")),
        "context_length": u32(settings.whole("max_position_embeddings", default=2048)),
        "embedding_length": u32(width),
        "feed_forward_length": u32(settings.whole("ffn_hidden_size", default=4 * width)),
        "attention.head_count": u32(settings.heads),
        "attention.head_count_kv": u32(_kv_heads(settings)),
        "attention.layer_norm_epsilon": f32(settings.number("layer_norm_epsilon", default=1e-5)),
        "rope.freq_base": f32(float(settings.rope()["rope_theta"])),
        "vocab_size": u32(settings.whole("vocab_size")),
    }


def _by_groups(settings: Settings) -> tuple[int, ...]:
    """All queries, then all keys, then all values, out of groups of queries with one of each."""
    groups = _kv_heads(settings)
    queries = settings.heads // groups
    size = queries + 2
    order = [group * size + query for group in range(groups) for query in range(queries)]
    order += [group * size + queries for group in range(groups)]
    order += [group * size + queries + 1 for group in range(groups)]
    return tuple(order)


GPT_NEOX = Family(
    "gptneox", _gpt_neox, order=_by_heads,
    dropped=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)  # fmt: skip
FALCON = Family("falcon", _falcon, order=_by_groups, tied=True)
