"""Mixtures of experts as one operator of onnxruntime, which computes chosen experts only.

transformers asks a function for what its experts give; while a model is traced that is the operator
MoE of onnxruntime. It chooses experts itself, from logits; as the model has chosen already, it is
given logits that lead to the same choice and the same weights.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["EXPERTS", "interleaved", "register_experts"]

EXPERTS = "pack"
"""Name of the function in transformers' registry."""

_ACTIVATIONS = ("SiLU", "SiLUActivation")
_LEAST = 1e-30


def _forward(module: Any, hidden: Any, index: Any, weights: Any) -> Any:
    """What transformers calls in the place of experts.

    Args:
        module: Holds the experts' matrices.
        hidden: ``(tokens, hidden)``.
        index: ``(tokens, chosen)``, which experts.
        weights: ``(tokens, chosen)``, of what they give.
    """
    from transformers.integrations.moe import batched_mm_experts_forward

    plain = (
        module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
        and type(module)._apply_gate.__name__ == "_default_apply_gate"  # noqa: SLF001
        and type(module.act_fn).__name__ in _ACTIVATIONS
    )
    if not plain:
        return batched_mm_experts_forward(module, hidden, index, weights)
    wide = weights.float()
    total = wide.sum(-1, keepdim=True)
    none = torch.full((index.shape[0], module.gate_up_proj.shape[0]), _LEAST)
    logits = none.scatter(1, index, wide / total).log().to(hidden.dtype)
    given = torch.onnx.ops.symbolic(
        "com.microsoft::MoE",
        (hidden, logits, module.gate_up_proj, None, module.down_proj),
        {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0,
         "activation_beta": 0.0, "k": index.shape[1], "normalize_routing_weights": 1},
        dtype=hidden.dtype, shape=hidden.shape, version=1,
    )  # fmt: skip
    return given * total.to(hidden.dtype)


def register_experts() -> None:
    """Make the function known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _forward)


def interleaved(gate_up: Any) -> Any:
    """Rows of gate and of up in turn, as the operator wants them: ``(experts, 2 · inner, in)``."""
    count, rows, columns = gate_up.shape
    return gate_up.reshape(count, 2, rows // 2, columns).transpose(1, 2).reshape(gate_up.shape)
