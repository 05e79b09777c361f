"""The small files of a result: config.json, mended for what was merged, and what comes along."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint.layers import layer_count_keys
from mergekit_lite.dtypes import DTYPES
from mergekit_lite.merge.inputs import Inputs
from mergekit_lite.merge.plan import Plan, Shard

__all__ = ["COMES_ALONG", "index_file", "small_files", "to_json"]

COMES_ALONG = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_*_config.json",
)


def to_json(document: Mapping[str, Any]) -> bytes:
    """JSON as a person would want to read it, the same bytes every time."""
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def small_files(plan: Plan, inputs: Inputs) -> dict[str, bytes]:
    """Contents of config.json, the index, and files that come along unchanged, by name."""
    files: dict[str, bytes] = {}
    template = inputs.template
    if template.checkpoint.config:
        files["config.json"] = to_json(_mended(plan, inputs))
    folder = template.checkpoint.folder
    if folder is not None:
        for pattern in COMES_ALONG:
            for path in sorted(folder.glob(pattern)):
                files[str(path.relative_to(folder))] = path.read_bytes()
        if template.checkpoint.config.get("auto_map"):
            plan.notes.lines.append(
                f"{template.name} names Python code of its own (auto_map); pack does not copy code"
            )
    index = index_file(plan.shards)
    if index:
        files["model.safetensors.index.json"] = index
    return files


def index_file(shards: Sequence[Shard]) -> bytes | None:
    """The index of a result of several shards; None for a single file."""
    if len(shards) == 1:
        return None
    weight_map = {name: shard.name for shard in shards for name in shard.header.entries}
    total = sum(e.end - e.start for shard in shards for e in shard.header.entries.values())
    return to_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _mended(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    config = json.loads(json.dumps(inputs.template.checkpoint.config))
    config.pop("_name_or_path", None)
    dtype = _main_dtype(plan)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype
    if plan.notes.unties:
        config["tie_word_embeddings"] = False
    if plan.notes.layer_sources is not None:
        _restack(config, plan, inputs)
    return dict(config)


def _main_dtype(plan: Plan) -> str:
    """The type of most bytes."""
    weights: dict[str, int] = {}
    for tensor in plan.tensors.values():
        if tensor.spec.dtype.is_float:
            name = tensor.spec.dtype.name
            weights[name] = weights.get(name, 0) + tensor.spec.nbytes
    return DTYPES[max(weights, key=lambda n: (weights[n], n), default="F32")].config_name


def _restack(config: dict[str, Any], plan: Plan, inputs: Inputs) -> None:
    """Set the layer count, and pick per-layer lists by the layers that were taken."""
    sources = plan.notes.layer_sources or []
    template = inputs.template.checkpoint.config
    nested = isinstance(config.get("text_config"), dict) and not layer_count_keys(config)
    target = config["text_config"] if nested else config
    for key in layer_count_keys(target):
        count = target[key]
        for name, value in list(target.items()):
            if not isinstance(value, list) or len(value) != count or count < 2:
                continue
            picked = []
            for model, layer in sources:
                own: Any = model.checkpoint.config
                own = own.get("text_config", {}) if nested else own
                per_layer = own.get(name)
                if isinstance(per_layer, list) and layer < len(per_layer):
                    picked.append(per_layer[layer])
            if len(picked) == len(sources):
                target[name] = picked
        target[key] = len(sources)
    if not layer_count_keys(target) and template:
        plan.notes.lines.append("config.json has no layer count that pack knows; check it by hand")
