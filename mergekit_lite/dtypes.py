"""The element types of safetensors, and how their bits are held in numpy.

numpy has no bfloat16 and no float8, so their bits travel as unsigned integers of the same width
and are decoded by the kernels (see `mergekit_lite.kernels.cast`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["DTYPES", "Array", "DType", "by_config_name"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        name: As in a safetensors header, for example ``BF16``.
        storage: The numpy type that holds its bits.
        is_float: Whether its values can be averaged; others are only ever copied.
        config_name: As in ``config.json`` and in recipes, for example ``bfloat16``.
    """

    name: str
    storage: np.dtype[Any]
    is_float: bool
    config_name: str

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.storage.itemsize


def _table(*rows: tuple[str, str, bool, str]) -> dict[str, DType]:
    return {
        name: DType(name, np.dtype(storage), real, config) for name, storage, real, config in rows
    }


DTYPES = _table(
    ("F64", "<f8", True, "float64"),
    ("F32", "<f4", True, "float32"),
    ("F16", "<f2", True, "float16"),
    ("BF16", "<u2", True, "bfloat16"),
    ("F8_E4M3", "u1", True, "float8_e4m3fn"),
    ("F8_E5M2", "u1", True, "float8_e5m2"),
    ("F8_E8M0", "u1", False, "float8_e8m0fnu"),
    ("I64", "<i8", False, "int64"),
    ("U64", "<u8", False, "uint64"),
    ("I32", "<i4", False, "int32"),
    ("U32", "<u4", False, "uint32"),
    ("I16", "<i2", False, "int16"),
    ("U16", "<u2", False, "uint16"),
    ("I8", "i1", False, "int8"),
    ("U8", "u1", False, "uint8"),
    ("BOOL", "u1", False, "bool"),
    ("C64", "<c8", False, "complex64"),
)
"""Element types by their safetensors name."""

_BY_CONFIG_NAME = {dtype.config_name: dtype for dtype in DTYPES.values()}


def by_config_name(name: str) -> DType | None:
    """Find a type by the name that PyTorch and recipes give it, for example ``bfloat16``."""
    return _BY_CONFIG_NAME.get(name.removeprefix("torch."))
