"""A LoRA adapter as GGUF, which llama.cpp loads beside a GGUF of its base with ``--lora``.

The factors keep PEFT's shapes, but those of an embedding, whose A is stored by token. llama.cpp
multiplies their product by ``alpha / rank``, with one alpha for the whole file, and by nothing
where alpha is 0; so where modules differ in scale, each one's scale is multiplied into its B.
Source: ``llama_adapter_lora_init_impl`` and ``get_scale`` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from exporters.gguf.arrange import AS_IS, ArrangedCheckpoint, Constant, Placed, Scaled, Transposed
from exporters.gguf.families import FAMILIES, Model
from exporters.gguf.families.base import Settings
from exporters.gguf.metadata import Value, f32, text
from exporters.gguf.write import write_file
from mergekit_lite.adapters.config import AdapterConfig, LoraSettings
from mergekit_lite.adapters.contents import LoraContents, LoraModule, sort_tensors
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.blocks.types import TYPES
from mergekit_lite.merge.writer import OutputFile

__all__ = ["why_not", "write_gguf_lora"]

_ELSE = "Merge it into its base, or extract a plain LoRA from the merged model: pack extract"


def why_not(
    config: AdapterConfig, contents: LoraContents, base_config: Mapping[str, object]
) -> str | None:
    """Why an adapter cannot be GGUF; None if it can."""
    if config.kind != "LORA":
        return f"llama.cpp knows LoRA only, this is {config.kind}"
    family = FAMILIES.get(str(base_config.get("model_type")))
    if family is None:
        return f"models of type '{base_config.get('model_type')}' have no GGUF names here"
    settings = LoraSettings.of(config)
    parts = {part for module in contents.modules for part in module.parts}
    reasons = {
        "DoRA": settings.dora,
        "tensors saved whole": bool(contents.whole),
        "trained rows of embeddings": bool(contents.rows),
        "biases": "lora_B.bias" in parts,
        "replicated layers": bool(settings.replication),
        "adapted parameters (experts)": bool(settings.parameters),
        "an initialisation that changed the base": settings.initial in ("pissa", "olora"),
        "tensors of an unknown part": bool(contents.leftovers),
        "change to an embedding or a head that share one tensor": _shared(
            contents.modules, Settings(base_config, config.label, tied=family.tied).tied
        ),
    }
    found = [what for what, there in reasons.items() if there]
    return f"llama.cpp applies no {' and no '.join(found)}" if found else None


def _shared(modules: Sequence[LoraModule], tied: bool) -> bool:
    """Whether one of two tensors is changed that are one in GGUF.

    llama.cpp would apply the change of the embedding to the head as well, in the wrong shape; and
    there is no tensor of the head that an adapter could name.
    """
    ends = ("embed_tokens", "wte", "lm_head")
    return tied and any(module.path.endswith(ends) for module in modules)


def write_gguf_lora(
    config: AdapterConfig,
    tensors: Checkpoint,
    base_config: Mapping[str, object],
    path: Path,
    name: str,
) -> OutputFile:
    """Write an adapter as GGUF; it appears when it is whole.

    Args:
        config: Of the adapter.
        tensors: Of the adapter.
        base_config: config.json of the base.
        path: Where it goes.
        name: For ``general.name``.

    Raises:
        PackError: GGUF cannot carry it, or the base's family is not known.
    """
    contents = sort_tensors(tensors)
    reason = why_not(config, contents, base_config)
    if reason is not None:
        raise PackError(f"{config.label}: cannot be written as GGUF; {reason}", _ELSE)
    model = Model(base_config, config.label)
    settings = LoraSettings.of(config)
    scales = {module.path: settings.scale_of(module.path) for module in contents.modules}
    ranks = {settings.rank_of(module.path) for module in contents.modules}
    uniform = len(set(scales.values())) == 1 and len(ranks) == 1
    metadata: dict[str, Value] = {
        "general.architecture": text(model.family.architecture),
        "general.type": text("adapter"),
        "general.name": text(name),
        "adapter.type": text("lora"),
        "adapter.lora.alpha": f32(scales[contents.modules[0].path] * ranks.pop() if uniform else 0),
    }
    placed: list[Placed | Constant] = []
    for module in sorted(contents.modules, key=lambda module: module.path):
        placed += _factors(module, model, None if uniform else scales[module.path])
    arranged = ArrangedCheckpoint(tensors, placed)
    return write_file(path, metadata, arranged, {entry.name: TYPES["F32"] for entry in placed})


def _factors(module: LoraModule, model: Model, scale: float | None) -> list[Placed]:
    """Both factors of a module under GGUF's names; rows of B in the order of the weight's."""
    weight = f"{module.path}.weight"
    key = model.name(weight)
    a, b = (module.parts[part] for part in module.factors)
    rows = model.rows_layout(weight)
    return [
        Placed(f"{key}.lora_a", a, Transposed() if module.embedding else AS_IS),
        Placed(f"{key}.lora_b", b, rows if scale is None else Scaled(rows, scale)),
    ]
