"""An importance matrix of a model, measured on text, in llama.cpp's own form.

For every matrix of the decoder layers: the sums of its squared inputs by column, and how many
tokens came in. Source of the form: tools/imatrix of llama.cpp (GGUF with ``NAME.in_sum2`` and
``NAME.counts``, since 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf.arrange import ArrangedCheckpoint, Placed, Scaled, Stacked
from exporters.gguf.export import GgufModel
from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.forward import require_torch
from mergekit_lite.evaluate.inputs import ColumnSums, squared_inputs, stacked
from mergekit_lite.evaluate.text import Windows, cut, read_text, tokenizer_of
from mergekit_lite.merge.model import WholeModel, open_whole
from mergekit_lite.merge.run import Progress

__all__ = ["Importance", "importance_of", "measure_importance", "write_imatrix"]


@dataclass(frozen=True)
class Importance:
    """What was measured of a model.

    Attributes:
        sums: By name of the weight in GGUF: ``(experts or 1, columns)`` float32.
        counts: By the same name: ``(experts or 1,)`` float32, tokens.
        windows: The text.
    """

    sums: Mapping[str, Array]
    counts: Mapping[str, Array]
    windows: Windows

    def means(self) -> dict[str, Array]:
        """As quantizing takes it: mean squares, all alike for an expert that was never asked."""
        found = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][:, None]
            mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
            found[name] = np.ascontiguousarray(mean[0] if len(mean) == 1 else mean, np.float32)
        return found


def measure_importance(
    model: WholeModel, windows: Windows, progress: Progress, device: str = "cpu"
) -> Importance:
    """Run a model on text, and measure what goes into its weights.

    Args:
        model: Any model but a GGUF file.
        windows: The text.
        progress: Told how far it is.
        device: torch's device.

    Raises:
        PackError: The model has no form in GGUF, or cannot be run.
    """
    gguf = GgufModel.convert(model.checkpoint, model.files)
    found = squared_inputs(model.checkpoint, windows.batches(), progress, device=device)
    sums, counts = {}, {}
    for name in gguf.names:
        pair = _of_tensor(gguf, name, found)
        if pair is not None:
            sums[name], counts[name] = (part.astype(np.float32) for part in pair)
    if not sums:
        raise PackError(
            f"{model.reference}: no product with a matrix of weights was seen while it ran",
            "Models of this kind have to be measured by llama-imatrix.",
        )
    return Importance(sums, counts, windows)


def _of_tensor(
    gguf: GgufModel, name: str, found: Mapping[str, Mapping[int | None, ColumnSums]]
) -> tuple[Array, Array] | None:
    """Sums and counts of a tensor of GGUF; None where nothing went into it, or not all is known."""
    assert isinstance(gguf.tensors, ArrangedCheckpoint)  # noqa: S101 (convert gives one)
    entry = gguf.tensors.tensors[name]
    spec = gguf.tensors.spec(name)
    if len(spec.shape) < 2 or not name.endswith(".weight"):
        return None
    if isinstance(entry, Stacked):
        parts: dict[int | None, ColumnSums] = {
            n: found[source][None] for n, source in enumerate(entry.sources)
            if None in found.get(source, {})
        }  # fmt: skip
        return stacked(parts, len(entry.sources)) if parts else None
    if not isinstance(entry, Placed) or isinstance(entry.layout, Scaled):
        return None
    own = found.get(entry.source)
    if not own or next(iter(own.values())).sums.size != spec.columns:
        return None
    return stacked(own, spec.shape[0] if len(spec.shape) == 3 else 1)


def importance_of(
    reference: str | None,
    text: Path | None,
    context: int,
    windows: int,
    progress: Progress,
    device: str = "cpu",
    seed: int = 0,
) -> Importance:
    """Open a model, and measure it on a text.

    Args:
        reference: See `open_whole`.
        text: A file; None for the text that comes along.
        context: Tokens of a window.
        windows: Windows at most.
        progress: Told how far it is.
        device: torch's device.
        seed: Of the choice of windows.

    Raises:
        PackError: There is no such model, it is a GGUF file, or it cannot be run on the text.
    """
    require_torch("calibration")
    model = open_whole(reference)
    try:
        if isinstance(model.checkpoint, GgufCheckpoint):
            raise PackError(
                f"{model.reference}: is a GGUF file, whose inputs cannot be looked at",
                "Give the model that it was made of.",
            )
        model.observe_alone(progress)
        with tokenizer_of(model.files, model.reference) as tokenizer:
            pieces = cut(read_text(text), tokenizer, model.reference, context, windows, seed)
        return measure_importance(model, pieces, progress, device)
    finally:
        model.close()


def write_imatrix(importance: Importance, path: Path) -> None:
    """Write what was measured as llama.cpp reads it; the file appears when it is whole.

    Raises:
        PackError: There is such a file, or it cannot be written.
    """
    import gguf

    if path.exists():
        raise PackError(f"{path}: already exists", "Remove it, or choose another: -o FILE")
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer: Any = gguf.GGUFWriter(beside, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [importance.windows.text.name])
        writer.add_uint32("imatrix.chunk_count", len(importance.windows.ids))
        writer.add_uint32("imatrix.chunk_size", importance.windows.context)
        for name in sorted(importance.sums):
            sums, counts = importance.sums[name], importance.counts[name]
            one = len(sums) == 1
            writer.add_tensor(f"{name}.in_sum2", sums[0] if one else sums)
            writer.add_tensor(f"{name}.counts", counts if one else counts[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        beside.replace(path)
    except OSError as error:
        raise PackError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        beside.unlink(missing_ok=True)
