"""The types that a tensor can have in GGUF.

A type is a table entry: how many elements share a block, how many bytes a block takes, and how rows
of float32 become blocks and come back. Source of numbers and sizes: ``ggml_type`` of ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mergekit_lite.dtypes import DTYPES, Array
from mergekit_lite.kernels.blocks import codebook, kquants, legacy, nonlinear, small
from mergekit_lite.kernels.cast import decode, encode

__all__ = ["TYPES", "Decode", "Encode", "TensorType"]

Encode = Callable[[Array, Array | None, Array], None]
"""From float32 ``(rows, columns)``, contiguous and finite, and the importance of each column,
float32 ``(columns,)`` and not negative, or None, to uint8 ``(rows, row_bytes)``. The bytes of a row
depend on that row and the importance alone. Releases the interpreter lock; uses one thread."""

Decode = Callable[[Array, Array], None]
"""From uint8 ``(rows, row_bytes)`` to float32 ``(rows, columns)``."""


@dataclass(frozen=True)
class TensorType:
    """One type.

    Attributes:
        name: As gguf and llama.cpp print it.
        number: In the file.
        block: Elements of a block; the length of a row is a multiple of it.
        block_bytes: Bytes of a block.
        encode: Makes blocks.
        decode: Gives back what blocks stand for.
    """

    name: str
    number: int
    block: int
    block_bytes: int
    encode: Encode
    decode: Decode

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many elements."""
        return columns // self.block * self.block_bytes


def _float_type(name: str, number: int) -> TensorType:
    dtype = DTYPES[name]

    def write(values: Array, _importance: Array | None, out: Array) -> None:
        encode(values.reshape(-1), dtype, out.reshape(-1).view(dtype.storage))

    def read(stored: Array, out: Array) -> None:
        decode(stored.reshape(-1).view(dtype.storage), dtype, out.reshape(-1))

    return TensorType(name, number, 1, dtype.itemsize, write, read)


_Q = 32
_K = 256
_CODEBOOK = {
    "IQ2_XXS": (16, 66), "IQ2_XS": (17, 74), "IQ3_XXS": (18, 98), "IQ1_S": (19, 50),
    "IQ3_S": (21, 110), "IQ2_S": (22, 82), "IQ1_M": (29, 56),
}  # fmt: skip

TYPES: Mapping[str, TensorType] = {
    kind.name: kind
    for kind in (
        _float_type("F32", 0),
        _float_type("F16", 1),
        _float_type("BF16", 30),
        TensorType("Q4_0", 2, _Q, 18, legacy.encode_q4_0, legacy.decode_q4_0),
        TensorType("Q4_1", 3, _Q, 20, legacy.encode_q4_1, legacy.decode_q4_1),
        TensorType("Q5_0", 6, _Q, 22, legacy.encode_q5_0, legacy.decode_q5_0),
        TensorType("Q5_1", 7, _Q, 24, legacy.encode_q5_1, legacy.decode_q5_1),
        TensorType("Q8_0", 8, _Q, 34, legacy.encode_q8_0, legacy.decode_q8_0),
        TensorType("Q2_K", 10, _K, 84, kquants.encode_q2_k, kquants.decode_q2_k),
        TensorType("Q3_K", 11, _K, 110, kquants.encode_q3_k, kquants.decode_q3_k),
        TensorType("Q4_K", 12, _K, 144, kquants.encode_q4_k, kquants.decode_q4_k),
        TensorType("Q5_K", 13, _K, 176, kquants.encode_q5_k, kquants.decode_q5_k),
        TensorType("Q6_K", 14, _K, 210, kquants.encode_q6_k, kquants.decode_q6_k),
        TensorType("IQ4_NL", 20, _Q, 18, nonlinear.encode_iq4_nl, nonlinear.decode_iq4_nl),
        TensorType("IQ4_XS", 23, _K, 136, nonlinear.encode_iq4_xs, nonlinear.decode_iq4_xs),
        TensorType("TQ1_0", 34, _K, 54, small.encode_tq1_0, small.decode_tq1_0),
        TensorType("TQ2_0", 35, _K, 66, small.encode_tq2_0, small.decode_tq2_0),
        TensorType("MXFP4", 39, _Q, 17, small.encode_mxfp4, small.decode_mxfp4),
        *(
            TensorType(name, n, _K, size, codebook.encoder(name, n), codebook.decoder(n))
            for name, (n, size) in _CODEBOOK.items()
        ),
    )
}
"""By name."""
