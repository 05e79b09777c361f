"""From what a user writes to a checkpoint, adapters included; the way in for every command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mergekit_lite.adapters.base import check_base
from mergekit_lite.adapters.checkpoint import AdaptedCheckpoint, Adapter, LoraAdapter, PeftAdapter
from mergekit_lite.adapters.config import (
    CONFIG_NAME,
    AdapterConfig,
    LoraSettings,
    read_adapter_config,
)
from mergekit_lite.adapters.lora import plan_lora
from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.adapters.replicate import ReplicatedCheckpoint
from mergekit_lite.adapters.types import check_mergeable, is_streamed
from mergekit_lite.checkpoint.far.address import is_far
from mergekit_lite.checkpoint.far.locate import fetch_adapter
from mergekit_lite.checkpoint.hub import parse_reference as parse_hub_reference
from mergekit_lite.checkpoint.hub import snapshot
from mergekit_lite.checkpoint.locate import Source, find_local, not_found, open_checkpoint
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.checkpoint.pytorch import PytorchCheckpoint
from mergekit_lite.checkpoint.safetensors import SafetensorsCheckpoint
from mergekit_lite.errors import PackError
from mergekit_lite.recipe.reference import AdapterReference, parse_reference

__all__ = ["is_adapter", "open_adapter", "open_model", "put_on"]

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def open_model(reference: str, home: Path, opened: dict[str, Source] | None = None) -> Source:
    """Open a model: whatever `open_checkpoint` opens, or a base with adapters on it.

    Args:
        reference: As the user wrote it; see `mergekit_lite.recipe.reference`.
        home: Folder that relative paths start from; the current folder is tried next.
        opened: What is open already, taken from and added to, so that a base that several
            models share is read and hashed as one.

    Raises:
        PackError: Something is not there, or an adapter does not fit the base.
    """
    if opened is None:
        opened = {}
    if "+" not in reference or find_local(reference, home) is not None:
        return _once(reference, home, opened, open_checkpoint)
    parsed = parse_reference(reference)
    held = set(opened)
    try:
        base = _once(parsed.base, home, opened, open_checkpoint)
        if not parsed.adapters:
            return base
        adapters = [_once(a.name, home, opened, open_adapter) for a in parsed.adapters]
        return put_on(reference, base, adapters, parsed.adapters, home)
    except BaseException:
        for name in opened.keys() - held:
            opened.pop(name).checkpoint.close()
        raise


def _once(
    reference: str,
    home: Path,
    opened: dict[str, Source],
    opens: Callable[[str, Path], Source],
) -> Source:
    key = f"adapter {reference}" if opens is open_adapter else reference
    if key not in opened:
        opened[key] = opens(reference, home)
    return opened[key]


def is_adapter(reference: str, home: Path) -> bool:
    """Whether a reference names a folder on this disk that holds an adapter alone."""
    local = find_local(reference, home)
    return (
        local is not None
        and (local / CONFIG_NAME).is_file()
        and not (local / "config.json").is_file()
    )


def open_adapter(reference: str, home: Path) -> Source:
    """Open an adapter's tensors: a folder that PEFT saved, or a Hub id with revision.

    Raises:
        PackError: There is nothing of that name, or it is no adapter.
    """
    local = find_local(reference, home)
    commit = None
    if local is None and is_far(reference) and not reference.startswith("hf://"):
        local = fetch_adapter(reference)
    if local is None:
        hub = parse_hub_reference(reference)
        if hub is None or reference.startswith((".", "/", "~")):
            raise PackError(
                not_found(reference, home), "Check the path; it starts from the recipe's folder."
            )
        local, commit = snapshot(hub)
    if local.is_file() and local.name in _WEIGHTS:
        local = local.parent
    config = read_adapter_config(local, reference)
    file = next((local / name for name in _WEIGHTS if (local / name).is_file()), None)
    if file is None:
        raise PackError(
            f"{reference}: holds {CONFIG_NAME} but no {' or '.join(_WEIGHTS)}",
            "Finish the download, or save the adapter again.",
        )
    tensors: Checkpoint
    if file.suffix == ".bin":
        tensors = PytorchCheckpoint([file], None, reference)
    else:
        tensors = SafetensorsCheckpoint(file, reference)
    tensors.folder = local
    tensors.config = dict(config.data)
    return Source(reference, commit, local, tensors)


def put_on(
    label: str,
    base: Source,
    adapters: Sequence[Source],
    references: Sequence[AdapterReference],
    home: Path,
) -> Source:
    """Put opened adapters on an opened base, each as its reference says.

    Raises:
        PackError: An adapter cannot be merged, or does not fit the base.
    """
    configs = [read_adapter_config(a.path, a.reference) for a in adapters]
    notes: list[str] = []
    for config, adapter, reference in zip(configs, adapters, references, strict=True):
        check_mergeable(config)
        if not reference.any_base:
            notes += check_base(config, adapter, base, home)
    stack = _replicated(base.checkpoint, configs)
    names = ModelNames(stack)
    planned = [
        (_planned(config, adapter.checkpoint, stack, names), reference.weight)
        for config, adapter, reference in zip(configs, adapters, references, strict=True)
    ]
    checkpoint = AdaptedCheckpoint(label, stack, planned)
    return Source(
        label, base.revision, base.path, checkpoint, (base, *adapters),
        (*notes, *checkpoint.notes),
    )  # fmt: skip


def _planned(
    config: AdapterConfig, tensors: Checkpoint, base: Checkpoint, names: ModelNames
) -> Adapter:
    if is_streamed(config):
        plan = plan_lora(config, tensors, base, names.find, names.output_embedding)
        return LoraAdapter(config, tensors, base, plan)
    return PeftAdapter(config, tensors, base, names)


def _replicated(base: Checkpoint, configs: Sequence[AdapterConfig]) -> Checkpoint:
    """The base with its layers stacked as the adapters want; they must want the same."""
    wanted = {
        LoraSettings.of(config).replication if config.kind == "LORA" else () for config in configs
    }
    if len(wanted) > 1:
        raise PackError(
            f"the adapters want the base's layers replicated differently: {sorted(wanted)}",
            "Only adapters with the same 'layer_replication' can be on one base together.",
        )
    ranges = wanted.pop()
    return ReplicatedCheckpoint(base, ranges) if ranges else base
