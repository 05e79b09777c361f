"""A LoRA adapter as GGUF, which llama.cpp loads beside a GGUF of its base with ``--lora``.

The factors keep PEFT's shapes, but those of an embedding, whose A is stored by token. llama.cpp
multiplies their product by ``alpha / rank``, with one alpha for the whole file, and by nothing
where alpha is 0; so where modules differ in scale, each one's scale is multiplied into its B.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from exporters.gguf.families import FAMILIES, Naming
from mergekit_lite.adapters.config import AdapterConfig, LoraSettings
from mergekit_lite.adapters.contents import LoraContents, sort_tensors
from mergekit_lite.adapters.tensors import read_float
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["why_not", "write_gguf_lora"]

_ELSE = "Merge it into its base, or extract a plain LoRA from the merged model: pack extract"


def why_not(
    config: AdapterConfig, contents: LoraContents, base_config: Mapping[str, object]
) -> str | None:
    """Why an adapter cannot be GGUF; None if it can."""
    if config.kind != "LORA":
        return f"llama.cpp knows LoRA only, this is {config.kind}"
    if base_config.get("model_type") not in FAMILIES:
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
    }
    found = [what for what, there in reasons.items() if there]
    return f"llama.cpp applies no {' and no '.join(found)}" if found else None


def write_gguf_lora(
    config: AdapterConfig,
    tensors: Checkpoint,
    base_config: Mapping[str, object],
    path: Path,
    name: str,
) -> None:
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
    try:
        import gguf
    except ImportError:
        raise PackError("GGUF needs the package gguf", "pip install 'pack-models[gguf]'") from None
    naming = Naming(base_config, config.label)
    settings = LoraSettings.of(config)
    scales = {module.path: settings.scale_of(module.path) for module in contents.modules}
    ranks = {settings.rank_of(module.path) for module in contents.modules}
    uniform = len(set(scales.values())) == 1 and len(ranks) == 1
    beside = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(beside, naming.family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = next(iter(scales.values())) * next(iter(ranks)) if uniform else 0.0
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module in sorted(contents.modules, key=lambda module: module.path):
        a, b = (read_float(tensors, module.parts[part]) for part in module.factors)
        weight = f"{module.path}.weight"
        if not uniform:
            b = b * np.float32(scales[module.path])
        key = naming.name(weight)
        writer.add_tensor(f"{key}.lora_a", _stored(a.T if module.embedding else a))
        writer.add_tensor(f"{key}.lora_b", _stored(naming.ordered(weight, b)))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


def _stored(values: Array) -> Array:
    return np.ascontiguousarray(values, np.float32)
