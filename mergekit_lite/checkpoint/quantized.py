"""Checkpoints whose linear layers lie on grids of whole numbers, seen as floats.

What is read: GPTQ (versions 1 and 2), AWQ's GEMM, compressed-tensors' ``pack-quantized`` and
``int-quantized``, NF4 of bitsandbytes without double quantization. A config states which it is
under ``quantization_config``.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mergekit_lite.checkpoint.protocol import Checkpoint, InputFile, Rows, TensorReader, TensorSpec
from mergekit_lite.checkpoint.safetensors import SafetensorsCheckpoint
from mergekit_lite.dtypes import DTYPES, Array, by_config_name
from mergekit_lite.errors import FileFormatError, PackError
from mergekit_lite.kernels.bits import unpack, words_of
from mergekit_lite.kernels.cast import decode

__all__ = [
    "AWQ_ORDER",
    "QuantizedCheckpoint",
    "as_floats",
    "is_packed",
    "quantization_of",
    "refuse_unread",
]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in each four bits of a word, lowest first."""

_AGAIN = "Download the model again, or quantize it again."


def quantization_of(config: Mapping[str, object]) -> Mapping[str, Any] | None:
    """What a config says of how its weights are quantized; None if they are not."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else None


def as_floats(
    stored: SafetensorsCheckpoint, settings: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A folder as it is; or, if it is quantized in a way that is read here, as floats.

    Args:
        stored: The folder, or a file.
        settings: How it is quantized; None for what its config says.

    Raises:
        FileFormatError: It is, and its tensors do not fit one another.
    """
    settings = settings or quantization_of(stored.config)
    kind = None if settings is None else _FORMS.get(str(settings.get("quant_method")))
    if settings is None or kind is None:
        return stored
    try:
        form = kind(settings)
    except _Unread:
        return stored
    return QuantizedCheckpoint(stored, form, settings)


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's numbers are codes that are not read here; GGUF's are."""
    settings = quantization_of(checkpoint.config)
    known = isinstance(checkpoint, QuantizedCheckpoint) and checkpoint.matrices > 0
    return settings is not None and settings.get("quant_method") != "gguf" and not known


def refuse_unread(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose numbers are codes that are not read here.

    Raises:
        PackError: It is one.
    """
    settings = quantization_of(checkpoint.config)
    if settings is not None and is_packed(checkpoint):
        kind = settings.get("format") or settings.get("version") or ""
        raise PackError(
            f"{checkpoint.label}: its weights are quantized in a way that is not read here "
            f"({settings.get('quant_method')!s:.40}{f', {kind!s:.40}' if kind else ''})",
            "Give the model that it was made of.",
        )


class _Unread(Exception):
    """A layout is one of those that are not read here."""


@dataclass(frozen=True)
class _Stored:
    """One linear layer as it is stored, decoded once.

    Attributes:
        codes: ``(in, out)`` whole numbers.
        scales: ``(groups, out)`` float32.
        zeros: ``(groups, out)`` whole numbers.
        group_of: ``(in,)``.
        table: Values that codes stand for, where they are no grid.
    """

    codes: Array
    scales: Array
    zeros: Array
    group_of: Array
    table: Array | None = None

    def values(self, rows: Rows) -> Array:
        """Rows of the weights ``(out, in)``, float32."""
        part = slice(rows.start, rows.stop)
        if self.table is None:
            found = self.codes[:, part].astype(np.float32)
            found -= self.zeros[:, part].astype(np.float32)[self.group_of]
        else:
            found = self.table[self.codes[:, part]]
        found *= self.scales[:, part][self.group_of]
        return found.T


class _Reader(TensorReader):
    def __init__(self, spec: TensorSpec, load: Callable[[], _Stored], transposed: bool) -> None:
        self.spec = spec
        self._load = load
        self._transposed = transposed
        self._held: _Stored | None = None
        self._loading = threading.Lock()

    def read(self, rows: Rows, out: Array) -> None:
        with self._loading:  # once, by the first of several threads
            held = self._held
            if held is None:
                held = self._held = self._load()
        shape = rows.size, self.spec.columns
        if self._transposed:
            every = held.values(Rows(0, self.spec.columns)).T
            out.reshape(shape)[:] = every[rows.start : rows.stop]
        else:
            out.reshape(shape)[:] = held.values(rows)

    def close(self) -> None:
        self._held = None


class QuantizedCheckpoint(Checkpoint):
    """A folder of quantized safetensors, with the names and shapes of the model it was made of.

    Args:
        stored: The folder.
        form: Its layout.
        settings: What its config says of that.

    Raises:
        FileFormatError: Tensors do not fit one another.
    """

    def __init__(
        self, stored: SafetensorsCheckpoint, form: _Form, settings: Mapping[str, Any]
    ) -> None:
        self.label = stored.label
        self.folder = stored.folder
        self.config = stored.config
        self._stored = stored
        self._form = form
        names = frozenset(stored.names())
        ends, key = self._form.parts, f".{self._form.key}"
        self._modules = {
            f"{module}.weight": module
            for module in (n.removesuffix(key) for n in names if n.endswith(key))
        }
        for module in self._modules.values():
            for end, kinds in self._form.kinds.items():
                if f"{module}.{end}" not in names:
                    if end in ends:
                        raise _refuse(module, stored.label, f"has no '{end}'")
                elif (kind := stored.spec(f"{module}.{end}").dtype.name) not in kinds:
                    raise _refuse(module, stored.label, f"has '{end}' of the type {kind}")
        parts = {
            f"{module}.{end}"
            for module in self._modules.values() for end in (*ends, *self._form.extras)
        }  # fmt: skip
        self._plain = [name for name in stored.names() if name not in parts]
        meta = settings.get("meta")
        turned = meta.get("transposed") if isinstance(meta, dict) else None
        listed = turned if isinstance(turned, list) else []
        self._turned = frozenset(name for name in listed if isinstance(name, str))
        self._specs = {name: self._spec_of(name) for name in self._modules}

    def _spec_of(self, name: str) -> TensorSpec:
        module = self._modules[name]
        shape = self._form.shape(self._stored, module)
        if name in self._turned:
            shape = shape[::-1]
        return TensorSpec(shape, DTYPES["F32"])

    @property
    def matrices(self) -> int:
        """How many of its matrices lie on a grid."""
        return len(self._modules)

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return sorted([*self._plain, *self._modules])

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor; float32 for those that are on a grid."""
        return self._specs[name] if name in self._specs else self._stored.spec(name)

    def kept_dtype(self, name: str) -> Any:
        """The model's own type for what is on a grid."""
        if name not in self._specs:
            return self._stored.spec(name).dtype
        stated = self.config.get("dtype") or self.config.get("torch_dtype")
        return by_config_name(str(stated)) or DTYPES["F16"]

    def stored(self, name: str) -> tuple[str, int]:
        """The method, and the bytes of all parts."""
        if name not in self._modules:
            return self._stored.stored(name)
        module, known = self._modules[name], frozenset(self._stored.names())
        ends = [e for e in (*self._form.parts, *self._form.extras) if f"{module}.{e}" in known]
        return self._form.name, sum(self._stored.spec(f"{module}.{e}").nbytes for e in ends)

    def file_of(self, name: str) -> str | None:
        """The shard that holds a tensor, or the first part of it."""
        if name in self._modules:
            return self._stored.file_of(f"{self._modules[name]}.{self._form.parts[0]}")
        return self._stored.file_of(name)

    def elsewhere(self) -> Mapping[str, tuple[int, int]]:
        """That of the shards."""
        return self._stored.elsewhere()

    def metadata(self) -> Mapping[str, str]:
        """That of the shards."""
        return self._stored.metadata()

    def open(self, name: str) -> TensorReader:
        """Open a tensor; what is on a grid is read whole with its first rows."""
        if name not in self._modules:
            return self._stored.open(name)
        module = self._modules[name]
        load = lambda: self._form.load(self._stored, module)  # noqa: E731
        return _Reader(self._specs[name], load, name in self._turned)

    def grid(self, name: str) -> tuple[Array, Array, Array, Array] | None:
        """Codes, scales, zero points and the group of each input, of a matrix on a grid.

        Returns:
            ``(in, out)``, ``(groups, out)`` twice and ``(in,)``, whichever way the model stores the
            matrix; None for a tensor that is stored as it is, or whose codes are no grid.
        """
        if name not in self._modules:
            return None
        held = self._form.load(self._stored, self._modules[name])
        return None if held.table is not None else (
            held.codes, held.scales, held.zeros, held.group_of
        )  # fmt: skip

    def prefetch(self, name: str) -> None:
        """Ask for the bytes of a tensor that is stored as it is."""
        if name not in self._modules:
            self._stored.prefetch(name)

    def fingerprint(self) -> str:
        """That of the files."""
        return self._stored.fingerprint()

    def input_files(self) -> list[InputFile]:
        """The shards, hashed."""
        return self._stored.input_files()

    def close(self) -> None:
        """Close the shards."""
        self._stored.close()


_WORDS = ("I32", "U32")
_REAL = ("F16", "BF16", "F32")


class _Form:
    """A layout: the last parts of its names, and how they are read.

    Attributes:
        name: For people.
        key: A part by which a layer is known.
        parts: Each layer has all of them.
        extras: A layer may have them.
        kinds: Types that each may have.
    """

    name: str
    key: str
    kinds: Mapping[str, tuple[str, ...]]
    parts: tuple[str, ...]
    extras: tuple[str, ...] = ()

    def shape(self, stored: Checkpoint, module: str) -> tuple[int, int]:
        """``(out, in)`` of a layer, after checking that its parts fit one another."""
        raise NotImplementedError

    def load(self, stored: Checkpoint, module: str) -> _Stored:
        """Read a layer."""
        raise NotImplementedError


def _refuse(module: str, label: str, what: str) -> FileFormatError:
    return FileFormatError(f"{label}: '{module}' {what}", _AGAIN)


def _floats(stored: Checkpoint, name: str) -> Array:
    spec = stored.spec(name)
    out = np.empty(spec.elements, np.float32)
    decode(stored.read(name).reshape(-1), spec.dtype, out)
    return out.reshape(spec.shape)


def _check(stored: Checkpoint, module: str, wanted: Mapping[str, tuple[int, ...]]) -> None:
    for end, shape in wanted.items():
        found = stored.spec(f"{module}.{end}").shape
        if found != shape:
            raise _refuse(
                module, stored.label, f"has '{end}' of {list(found)}, expected {list(shape)}"
            )


class _Gptq(_Form):
    name = "gptq"
    key = "qweight"
    parts = ("qweight", "qzeros", "scales")
    extras = ("g_idx",)
    kinds = MappingProxyType(
        {"qweight": _WORDS, "qzeros": _WORDS, "scales": _REAL, "g_idx": _WORDS}
    )

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._bits = _whole(settings, "bits", (2, 3, 4, 8))
        # Version 1 stores zero points less one.
        self._less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1

    def shape(self, stored: Checkpoint, module: str) -> tuple[int, int]:
        words = stored.spec(f"{module}.qweight").shape
        scales = stored.spec(f"{module}.scales").shape
        if len(words) != 2 or len(scales) != 2:
            raise _refuse(module, stored.label, "is no matrix")
        columns, (groups, rows) = words[0] * 32 // self._bits, scales
        _check(stored, module, {
            "qweight": (words_of(columns, self._bits), rows),
            "qzeros": (groups, words_of(rows, self._bits)),
        })  # fmt: skip
        if groups == 0 or columns == 0 or columns % groups:
            raise _refuse(module, stored.label, f"has {groups} groups for {columns} inputs")
        return rows, columns

    def load(self, stored: Checkpoint, module: str) -> _Stored:
        rows, columns = self.shape(stored, module)
        codes = unpack(stored.read(f"{module}.qweight"), self._bits, columns)
        packed = np.ascontiguousarray(stored.read(f"{module}.qzeros").T)
        zeros = unpack(packed, self._bits, rows).T.astype(np.int16) + self._less
        scales = _floats(stored, f"{module}.scales")
        groups = len(scales)
        group_of = np.arange(columns) // (columns // groups)
        with contextlib.suppress(KeyError):
            group_of = stored.read(f"{module}.g_idx").astype(np.int64)
        if group_of.shape != (columns,) or group_of.min() < 0 or group_of.max() >= groups:
            raise _refuse(module, stored.label, "has groups in 'g_idx' that are not there")
        return _Stored(codes, scales, np.ascontiguousarray(zeros), group_of)


class _Awq(_Form):
    name = "awq"
    key = "qweight"
    parts = ("qweight", "qzeros", "scales")
    kinds = MappingProxyType({"qweight": _WORDS, "qzeros": _WORDS, "scales": _REAL})

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._bits = _whole(settings, "bits", (4,))
        if str(settings.get("version", "gemm")).lower() != "gemm":
            raise _Unread

    def shape(self, stored: Checkpoint, module: str) -> tuple[int, int]:
        words = stored.spec(f"{module}.qweight").shape
        scales = stored.spec(f"{module}.scales").shape
        if len(words) != 2 or len(scales) != 2:
            raise _refuse(module, stored.label, "is no matrix")
        columns, (groups, rows) = words[0], scales
        _check(stored, module, {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8)})
        if groups == 0 or columns % groups or rows % 8:
            raise _refuse(module, stored.label, f"has {groups} groups for {columns} inputs")
        return rows, columns

    def load(self, stored: Checkpoint, module: str) -> _Stored:
        _, columns = self.shape(stored, module)
        scales = _floats(stored, f"{module}.scales")
        group_of = np.arange(columns) // (columns // len(scales))
        codes = _from_awq_order(stored.read(f"{module}.qweight"))
        zeros = _from_awq_order(stored.read(f"{module}.qzeros"))
        return _Stored(codes, scales, zeros, group_of)


def _from_awq_order(words: Array) -> Array:
    shifts = (np.arange(8, dtype=np.uint32) * 4).astype(np.uint32)
    fours = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(15)
    out = np.empty(fours.shape, np.uint8)
    out[:, :, list(AWQ_ORDER)] = fours
    return out.reshape(len(words), -1)


class _Compressed(_Form):
    name = "compressed-tensors"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        groups = settings.get("config_groups")
        weights = [
            g["weights"] for g in (groups.values() if isinstance(groups, dict) else ())
            if isinstance(g, dict) and isinstance(g.get("weights"), dict)
        ]  # fmt: skip
        kinds = {str(settings.get("format"))}
        if len(weights) != 1 or weights[0].get("type") != "int" or not kinds <= {
            "pack-quantized", "int-quantized",
        }:  # fmt: skip
            raise _Unread
        self._bits = _whole(weights[0], "num_bits", (2, 3, 4, 8))
        self._packed = settings.get("format") == "pack-quantized"
        packed = ("weight_packed", "weight_scale", "weight_shape")
        self.parts = packed if self._packed else ("weight", "weight_scale")
        self.key = "weight_packed" if self._packed else "weight_scale"
        self.extras = ("weight_zero_point", "weight_g_idx", "input_scale")
        self.kinds = {
            "weight_packed" if self._packed else "weight": _WORDS if self._packed else ("I8",),
            "weight_scale": _REAL,
            **({"weight_shape": ("I64", "I32")} if self._packed else {}),
            "weight_zero_point": _WORDS if self._packed else ("I8",),
            "weight_g_idx": ("I32", "I64"),
        }

    def shape(self, stored: Checkpoint, module: str) -> tuple[int, int]:
        words = stored.spec(f"{module}.{self.parts[0]}").shape
        scales = stored.spec(f"{module}.weight_scale").shape
        if len(words) != 2 or len(scales) != 2 or words[0] != scales[0]:
            raise _refuse(module, stored.label, "has scales that do not fit its weights")
        rows, columns = words
        if self._packed:
            _check(stored, module, {"weight_shape": (2,)})
            stated = stored.read(f"{module}.weight_shape")
            columns = int(stated[1])
            if columns < 1 or int(stated[0]) != rows or \
                    words[1] != words_of(columns, self._bits):  # fmt: skip
                raise _refuse(module, stored.label, "has another size than it states")
        if scales[1] == 0 or columns % scales[1]:
            raise _refuse(module, stored.label, f"has {scales[1]} groups for {columns} inputs")
        return rows, columns

    def load(self, stored: Checkpoint, module: str) -> _Stored:
        rows, columns = self.shape(stored, module)
        known = frozenset(stored.names())
        scales = np.ascontiguousarray(_floats(stored, f"{module}.weight_scale").T)
        raw = stored.read(f"{module}.{self.parts[0]}")
        middle = 1 << (self._bits - 1)
        if self._packed:
            codes = unpack(np.ascontiguousarray(raw.T), self._bits, columns)
        else:
            codes = (raw.T.astype(np.int16) + middle).astype(np.uint8)
        zeros = np.full(scales.shape, middle, np.uint8)
        if f"{module}.weight_zero_point" in known:
            stated = stored.read(f"{module}.weight_zero_point")
            if self._packed:
                _check(stored, module, {
                    "weight_zero_point": (words_of(rows, self._bits), len(scales))
                })  # fmt: skip
                zeros = np.ascontiguousarray(unpack(stated, self._bits, rows).T)
            else:
                zeros = (stated.T.astype(np.int16) + middle).astype(np.uint8)
        group_of = np.arange(columns) // (columns // len(scales))
        if f"{module}.weight_g_idx" in known:
            group_of = stored.read(f"{module}.weight_g_idx").astype(np.int64)
            if group_of.shape != (columns,) or group_of.min() < 0 or group_of.max() >= len(scales):
                raise _refuse(module, stored.label, "has groups that are not there")
        return _Stored(codes, scales, zeros, group_of)


class _Nf4(_Form):
    name = "bitsandbytes"
    key = "weight.quant_state.bitsandbytes__nf4"
    kinds = MappingProxyType({
        "weight": ("U8",), "weight.absmax": ("F32",), "weight.quant_map": ("F32",), key: ("U8",),
    })  # fmt: skip
    parts = ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if settings.get("load_in_4bit") is not True or settings.get("bnb_4bit_use_double_quant"):
            raise _Unread

    def shape(self, stored: Checkpoint, module: str) -> tuple[int, int]:
        raw = stored.read(f"{module}.{self.parts[3]}").tobytes()
        try:
            state = json.loads(raw)
            rows, columns = (int(size) for size in state["shape"])
            block = int(state["blocksize"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise _refuse(module, stored.label, "does not state its shape") from None
        if block < 1 or rows < 1 or columns < 1 or columns % block or columns % 2:
            raise _refuse(module, stored.label, f"has blocks of {block} for {columns} inputs")
        _check(stored, module, {
            "weight": (rows * columns // 2, 1),
            "weight.absmax": (rows * columns // block,),
            "weight.quant_map": (16,),
        })  # fmt: skip
        return rows, columns

    def load(self, stored: Checkpoint, module: str) -> _Stored:
        rows, columns = self.shape(stored, module)
        pairs = stored.read(f"{module}.weight").reshape(-1)
        codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(rows, columns)
        scales = _floats(stored, f"{module}.weight.absmax").reshape(rows, -1)
        group_of = np.arange(columns) // (columns // scales.shape[1])
        table = _floats(stored, f"{module}.weight.quant_map")
        laid = np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T)
        return _Stored(*laid, np.zeros(laid[1].shape, np.uint8), group_of, table)


def _whole(settings: Mapping[str, Any], key: str, allowed: Sequence[int]) -> int:
    found = settings.get(key)
    if not isinstance(found, int) or found not in allowed:
        raise _Unread
    return found


_FORMS: Mapping[str, Callable[[Mapping[str, Any]], _Form]] = {
    "gptq": _Gptq,
    "awq": _Awq,
    "compressed-tensors": _Compressed,
    "bitsandbytes": _Nf4,
}
