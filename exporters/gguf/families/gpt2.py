"""GPT-2, whose layers store their weights ``(in, out)`` and whose positions are embedded."""

from __future__ import annotations

from exporters.gguf.families.base import Family, Hyperparameters, Settings
from exporters.gguf.metadata import f32, u32

__all__ = ["GPT2"]


def _gpt2(settings: Settings) -> Hyperparameters:
    settings.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
    settings.expect("scale_attn_weights", True)
    settings.expect("scale_attn_by_inverse_layer_idx", False)
    width = settings.whole("n_embd")
    return {
        "block_count": u32(settings.whole("n_layer")),
        "context_length": u32(settings.whole("n_positions", "n_ctx", default=1024)),
        "embedding_length": u32(width),
        "feed_forward_length": u32(settings.whole("n_inner", default=4 * width)),
        "attention.head_count": u32(settings.heads),
        "attention.layer_norm_epsilon": f32(settings.number("layer_norm_epsilon", default=1e-5)),
        "vocab_size": u32(settings.whole("vocab_size")),
    }


GPT2 = Family(
    "gpt2", _gpt2, tied=True,
    transposed=(".c_attn.weight", ".c_proj.weight", ".c_fc.weight"),
    dropped=(".attn.bias", ".attn.masked_bias"),
)  # fmt: skip
