"""Models that are headers and holes: any size, no disk, for plans that read no weight."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from benchmarks.shapes import _header

Shapes = dict[str, tuple[int, ...]]


def trillion_shapes(layers: int = 60, experts: int = 384) -> Shapes:
    """A mixture of experts of 1.03 trillion weights, however many experts they are split into."""
    hidden, inner, heads, vocabulary = 7168, 384 * 2048 // experts, 8192, 163840
    shapes: Shapes = {
        "lm_head.weight": (vocabulary, hidden),
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate.weight": (experts, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads),
            f"{prefix}.self_attn.q_proj.weight": (heads, hidden),
            f"{prefix}.self_attn.k_proj.weight": (1024, hidden),
            f"{prefix}.self_attn.v_proj.weight": (1024, hidden),
        }
        for expert in range(experts):
            name = f"{prefix}.mlp.experts.{expert}"
            shapes |= {
                f"{name}.down_proj.weight": (hidden, inner),
                f"{name}.gate_proj.weight": (inner, hidden),
                f"{name}.up_proj.weight": (inner, hidden),
            }
    return shapes


def write_hollow(folder: Path, shapes: Shapes, shard_bytes: int = 2 * 10**9) -> None:
    """Write a bfloat16 model whose weights are holes, with its index.

    Args:
        folder: Made here.
        shapes: Of its tensors, by name.
        shard_bytes: Most bytes of a file of more than one tensor.
    """
    folder.mkdir(parents=True)
    groups = list(_cut(shapes, shard_bytes))
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = folder / f"model-{number:05}-of-{len(groups):05}.safetensors"
        head = _header(group, "BF16")
        with file.open("wb") as target:
            target.write(head)
            target.truncate(len(head) + 2 * sum(map(math.prod, group.values())))
        weight_map |= dict.fromkeys(group, file.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    layers = len({name.split(".")[2] for name in shapes if name.startswith("model.layers.")})
    (folder / "config.json").write_text(
        json.dumps({"model_type": "hollow", "num_hidden_layers": layers})
    )


def _cut(shapes: Shapes, shard_bytes: int) -> Iterator[Shapes]:
    group: Shapes = {}
    held = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if group and held + size > shard_bytes:
            yield group
            group, held = {}, 0
        group[name] = shape
        held += size
    yield group
