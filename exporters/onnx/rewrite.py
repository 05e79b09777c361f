"""From a graph in floating point to one whose products have smaller weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir

from exporters.linears.quantized import STEPS, Grid, Quantized, rounded
from exporters.linears.scheme import Scheme
from exporters.onnx.deferred import Deferred, Read, Rows, rows_of
from exporters.onnx.graph import Graph, leave_unset
from exporters.onnx.pieces import Piece, as_blocks, float_piece, whole_bytes
from exporters.onnx.schemes import OnnxScheme
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError

__all__ = ["Asked", "Codes", "Rewritten", "rewrite"]

_MS = "com.microsoft"
_HEAD_BITS, _HEAD_BLOCK = 8, 32
_FEWEST = 16
"""Outputs of a product that is worth rounding; heads of classifiers have fewer."""
_LARGEST_HALF = 65504.0
_MIDDLE = 8
"""Zero point of symmetric codes of 4 bits."""
_LEVEL = 4
"""``accuracy_level`` of MatMulNBits: inputs are multiplied as bytes where the processor can."""

Codes = Callable[[str], Quantized | None]
"""The codes that a parameter already has, ``(in, out)`` with its groups; None for floats."""


@dataclass(frozen=True)
class Asked:
    """How weights are rounded.

    Attributes:
        scheme: Kind of file.
        block: Weights that share a scale, of 4 bits.
        symmetric: Whether the zero point is the middle of the codes.
        exempt: Parameters that stay floats (routers of experts).
        head: Parameters that get 8 bits where others get 4: embedding and head.
        codes: Codes that parameters have already.
    """

    scheme: OnnxScheme
    block: int
    symmetric: bool
    exempt: frozenset[str]
    head: frozenset[str]
    codes: Codes


@dataclass(frozen=True)
class Rewritten:
    """A graph with all that its initializers are made of.

    Attributes:
        model: The graph.
        pieces: What makes initializers, in the order of the file.
        rounded: Number of matrices that became smaller.
        kept: Number of those whose codes were there already.
        notes: What the user should know.
    """

    model: Any
    pieces: Sequence[Piece]
    rounded: int
    kept: int
    notes: Sequence[str]


@dataclass(frozen=True)
class _Product:
    """A node that multiplies by a deferred matrix.

    Attributes:
        node: MatMul or Gemm.
        name: Of the initializer.
        matrix: The weights ``(out, in)``.
        bias: What Gemm adds.
    """

    node: Any
    name: str
    matrix: Deferred
    bias: Any


class _Rewriter:
    def __init__(self, graph: Graph, asked: Asked) -> None:
        self.graph = graph
        self.ir = graph.model.graph
        self.asked = asked
        self.pieces: dict[str, Piece] = {}
        self.rounded = 0
        self.kept = 0
        self.again = 0
        self._inputs: dict[int, tuple[Any, Any, Any]] = {}
        self._heads: dict[str, tuple[str, ...]] = {}

    def run(self) -> Rewritten:
        """Rewrite it."""
        scheme = self.asked.scheme
        if scheme.bits is not None:
            for product in list(self._products()):
                if self._wanted(product):
                    if scheme.dynamic:
                        self._dynamic(product)
                    else:
                        self._blocks(product)
            for node, name in list(self._lookups()):
                self._lookup(node, name)
            for node in [node for node in self.ir if node.op_type == "MoE"]:
                self._experts(node)
        self._drop_unused()
        for name, weight in self.graph.deferred.items():
            value = self.ir.initializers.get(name)
            if value is None or name in self.pieces:
                continue
            floats = value.dtype in (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16)
            if scheme.stored == "bfloat16" and floats:
                self._store_short(value, weight)
            else:
                kind = "float16" if value.dtype == onnx_ir.DataType.FLOAT16 else "float32"
                self.pieces[name] = float_piece(name, weight, kind)
        self.graph.model.opset_imports.setdefault(_MS, 1)
        self.ir.sort()
        order = self._order()
        return Rewritten(self.graph.model, order, self.rounded, self.kept, self._notes(order))

    def _order(self) -> list[Piece]:
        """Pieces as the graph needs them first, so that files are read from start to end."""
        first: dict[str, int] = {}
        for node in self.ir:
            for value in node.inputs:
                if value is not None and value.name in self.ir.initializers:
                    first.setdefault(value.name, len(first))
        pieces = [piece for name, piece in self.pieces.items() if name in self.ir.initializers]
        return sorted(
            pieces, key=lambda piece: min(first.get(name, len(first)) for name in piece.names)
        )

    def _notes(self, order: Sequence[Piece]) -> list[str]:
        if self.asked.scheme.bits is None:
            return []
        found = []
        if self.again:
            found.append(
                f"{self.again} matrices had codes already that do not fit here, and were rounded "
                "again"
            )
        floats = sum(piece.elements for piece in order if piece.names[0] in self.graph.deferred)
        every = sum(piece.elements for piece in order)
        if 2 * floats > every:
            found.append(
                f"{100 * floats / every:.0f} % of the weights stay floats: they are not in linear "
                "layers that are rounded here"
            )
        return found

    def _products(self) -> Iterator[_Product]:
        deferred = self.graph.deferred
        for node in self.ir:
            if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
                continue
            weight = node.inputs[1]
            turned = False
            maker = weight.producer()
            if maker is not None and maker.op_type == "Transpose":
                weight, turned = maker.inputs[0], True
            if weight.name not in deferred or deferred[weight.name].ndim != 2:
                continue
            if node.op_type == "Gemm":
                plain = all(node.attributes.get_float(n, 1.0) == 1.0 for n in ("alpha", "beta"))
                if not plain or node.attributes.get_int("transA", 0):
                    continue
                turned = turned != bool(node.attributes.get_int("transB", 0))
            matrix = deferred[weight.name]
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            yield _Product(node, weight.name, matrix if turned else matrix.t(), bias)

    def _wanted(self, product: _Product) -> bool:
        if product.matrix.shape[0] < _FEWEST:
            return False
        return not self.asked.exempt & set(product.matrix.parameters())

    def _add(self, name: str, dtype: onnx_ir.DataType, shape: Sequence[int]) -> onnx_ir.Value:
        """A new initializer, without values."""
        value = onnx_ir.Value(
            name=name, type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape(list(shape))
        )
        leave_unset(value)
        self.ir.initializers[name] = value
        return value

    @property
    def _float(self) -> onnx_ir.DataType:
        half = self.asked.scheme.half
        return onnx_ir.DataType.FLOAT16 if half else onnx_ir.DataType.FLOAT

    def _replace(self, node: Any, made: Sequence[Any], out: Any) -> None:
        """Put nodes in the place of one."""
        [old] = node.outputs
        out.type, out.shape = old.type, old.shape
        out.name, old.name = old.name, f"{old.name}/replaced"
        for at, value in enumerate(self.ir.outputs):
            if value is old:
                self.ir.outputs[at] = out
        old.replace_all_uses_with(out)
        self.ir.insert_after(node, list(made))
        self.ir.remove(node, safe=True)

    def _finish(self, product: _Product, nodes: list[Any], out: Any) -> None:
        """Add Gemm's bias, and replace the product."""
        if product.bias is not None:
            out.type = product.node.outputs[0].type
            nodes.append(onnx_ir.node("Add", [out, product.bias], name=f"{_name(product)}/bias"))
            out = nodes[-1].outputs[0]
        self._replace(product.node, nodes, out)
        self.rounded += 1

    def _blocks(self, product: _Product) -> None:
        """MatMulNBits in the place of a product."""
        rows, columns = product.matrix.shape
        bits, block = self._size(product.matrix)
        names = self._block_initializers(product.name, product.matrix, bits, block)
        values = [self.ir.initializers[name] for name in names]
        node = onnx_ir.node(
            "MatMulNBits", [product.node.inputs[0], *values], domain=_MS,
            attributes={"K": columns, "N": rows, "bits": bits, "block_size": block,
                        "accuracy_level": _LEVEL},
            name=f"{_name(product)}/MatMulNBits",
        )  # fmt: skip
        self._finish(product, [node], node.outputs[0])

    def _size(self, matrix: Deferred) -> tuple[int, int]:
        if self.asked.head & set(matrix.parameters()):
            return _HEAD_BITS, _HEAD_BLOCK
        return int(self.asked.scheme.bits or 4), self.asked.block

    def _block_initializers(
        self, name: str, matrix: Deferred, bits: int, block: int
    ) -> tuple[str, ...]:
        """Initializers of codes, scales and zero points of a matrix; made once."""
        if name in self._heads:
            return self._heads[name]
        rows, columns = matrix.shape
        count = -(-columns // block)
        symmetric = self.asked.symmetric or bits == _HEAD_BITS
        held = None
        if bits != _HEAD_BITS and (found := self._held(matrix, block)) is not None:
            held, centred = found
            symmetric = symmetric and centred
        names = [f"{name}_Q{bits}", f"{name}_scales"]
        self._add(names[0], onnx_ir.DataType.UINT8, (rows, count, block * bits // 8))
        self._add(names[1], self._float, (rows, count))
        if not symmetric:
            names.append(f"{name}_zero_points")
            self._add(names[2], onnx_ir.DataType.UINT8, (rows, -(-count * bits // 8)))
        grid = Grid(Scheme(bits, block, symmetric), 0, "F16" if self.asked.scheme.half else "F32")
        half = self.asked.scheme.half

        def make(read: Read) -> list[list[Array]]:
            parts = held() if held is not None else [_rounded(name, matrix.read(read), grid)]
            found = as_blocks(parts, bits, not symmetric)
            if half:
                found[1] = found[1].astype(np.float16)
            return [[array] for array in found]

        self.pieces[names[0]] = Piece(tuple(names), make, rows * columns, name)
        if held is not None:
            self.kept += 1
        self._heads[name] = tuple(names)
        return tuple(names)

    def _held(
        self, matrix: Deferred, block: int
    ) -> tuple[Callable[[], list[Quantized]], bool] | None:
        """Codes that all rows of a matrix have already, in blocks of this size.

        And whether their zero points are the middle of 4 bits. They are read again when they are
        written, so that those of one matrix at a time are in memory.
        """
        rows = rows_of(matrix)
        if rows is None:
            return None
        first = [self.asked.codes(part.parameter) for part in rows]
        fits = all(
            held is not None and held.in_order
            and len(held.codes) % (block * len(held.scales)) == 0
            and held.codes.shape[0] == matrix.shape[1] and held.codes.shape[1] >= part.end
            for held, part in zip(first, rows, strict=True)
        )  # fmt: skip
        if not fits:
            self.again += any(held is not None for held in first)
            return None
        centred = all(
            (held.zeros[:, part.begin : part.end] == _MIDDLE).all()
            for held, part in zip(first, rows, strict=True) if held is not None
        )  # fmt: skip
        parts = lambda: [_part(self.asked.codes(p.parameter), p, block) for p in rows]  # noqa: E731
        return parts, centred

    def _experts(self, node: Any) -> None:
        """QMoE in the place of MoE: a scale for a block, or of 8 bits for a row."""
        bits = int(self.asked.scheme.bits or _HEAD_BITS)
        block = 0 if bits == _HEAD_BITS else self.asked.block
        weights = [self.graph.deferred.get(node.inputs[at].name) for at in (2, 4)]
        if any(w is None or (block and w.shape[2] % block) or w.shape[2] % 2 for w in weights):
            return
        inputs = [*node.inputs[:2]]
        for at in (2, 4):
            name = node.inputs[at].name
            codes, scales = self._expert_initializers(name, bits, block)
            inputs += [codes, scales, None]
        attributes = {key: value.value for key, value in node.attributes.items()}
        attributes |= {"expert_weight_bits": bits, **({"block_size": block} if block else {})}
        made = onnx_ir.node(
            "QMoE", inputs, domain=_MS, attributes=attributes, name=f"{node.name}/QMoE"
        )
        self._replace(node, [made], made.outputs[0])
        self.rounded += 2

    def _expert_initializers(self, name: str, bits: int, block: int) -> tuple[Any, Any]:
        """Codes ``(experts, out, bytes)`` and scales of matrices that lie in one tensor."""
        weight = self.graph.deferred[name]
        count, rows, columns = weight.shape
        groups = [columns // block] if block else []
        codes = self._add(
            f"{name}_Q{bits}", onnx_ir.DataType.UINT8, (count, rows, columns * bits // 8)
        )
        scales = self._add(f"{name}_Q{bits}_scales", self._float, (count, rows, *groups))
        half = self.asked.scheme.half
        grid = Grid(Scheme(bits, block or None, True), 0, "F16" if half else "F32")

        def make(read: Read) -> list[list[Array]]:
            found: list[list[Array]] = [[], []]
            for matrix in weight.read(read):
                kept = as_blocks([_rounded(name, matrix, grid)], bits, False)
                found[0].append(kept[0])
                found[1].append(kept[1].astype(np.float16) if half else kept[1])
            return found

        self.pieces[codes.name or ""] = Piece(
            (codes.name or "", scales.name or ""), make, weight.numel(), name
        )
        return codes, scales

    def _dynamic(self, product: _Product) -> None:
        """A product of bytes in the place of one of floats."""
        rows, columns = product.matrix.shape
        name = product.name
        codes = self._add(f"{name}_uint8", onnx_ir.DataType.UINT8, (columns, rows))
        scales = self._add(f"{name}_uint8_scales", self._float, (rows,))
        matrix = product.matrix

        def make(read: Read) -> list[list[Array]]:
            found, scale = whole_bytes(_finite(name, matrix.read(read)).numpy())
            return [[found], [scale]]

        self.pieces[f"{name}_uint8"] = Piece(
            (f"{name}_uint8", f"{name}_uint8_scales"), make, rows * columns, name
        )
        given, factor, zero = self._bytes_of(product.node.inputs[0], product.node)
        middle = self._constant("zero_point_128", np.array(128, np.uint8))
        base = _name(product)
        multiply = onnx_ir.node(
            "MatMulInteger", [given, codes, zero, middle], name=f"{base}/MatMulInteger"
        )
        multiply.outputs[0].dtype = onnx_ir.DataType.INT32
        cast = onnx_ir.node(
            "Cast", multiply.outputs, attributes={"to": self._float}, name=f"{base}/Cast"
        )
        both = onnx_ir.node("Mul", [factor, scales], name=f"{base}/scale")
        scaled = onnx_ir.node("Mul", [cast.outputs[0], both.outputs[0]], name=f"{base}/scaled")
        for node in (cast, both):
            node.outputs[0].dtype = self._float
        self._finish(product, [multiply, cast, both, scaled], scaled.outputs[0])

    def _bytes_of(self, value: Any, before: Any) -> tuple[Any, Any, Any]:
        """A value as bytes, with scale and zero point; once for all products of it."""
        if id(value) not in self._inputs:
            node = onnx_ir.node(
                "DynamicQuantizeLinear", [value], num_outputs=3, name=f"{value.name}/bytes"
            )
            kinds = (onnx_ir.DataType.UINT8, self._float, onnx_ir.DataType.UINT8)
            for out, kind in zip(node.outputs, kinds, strict=True):
                out.dtype = kind
            self.ir.insert_before(before, [node])
            self._inputs[id(value)] = tuple(node.outputs)
        return self._inputs[id(value)]

    def _constant(self, name: str, array: Array) -> Any:
        if name not in self.ir.initializers:
            value = onnx_ir.Value(
                name=name, type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
                shape=onnx_ir.Shape(list(array.shape)),
            )  # fmt: skip
            value.const_value = onnx_ir.tensor(array, name=name)
            self.ir.initializers[name] = value
        return self.ir.initializers[name]

    def _lookups(self) -> Iterator[tuple[Any, str]]:
        """Nodes that take rows out of a deferred matrix, as embeddings do."""
        for node in self.ir:
            if node.op_type != "Gather" or node.domain not in ("", "ai.onnx"):
                continue
            table = node.inputs[0]
            maker = table.producer()
            turned = maker is not None and maker.op_type == "Transpose"
            name = maker.inputs[0].name if turned else table.name
            if name in self.graph.deferred and node.attributes.get_int("axis", 0) == 0:
                yield node, name

    def _lookup(self, node: Any, name: str) -> None:
        """An embedding of bytes, which a tied head shares."""
        weight = self.graph.deferred[name]
        tied = node.inputs[0].producer() is not None
        matrix = weight.t() if tied else weight
        if matrix.ndim != 2 or matrix.shape[1] % _HEAD_BLOCK or not self._is_head(matrix):
            return
        known = name in self._heads
        names = self._block_initializers(name, matrix, _HEAD_BITS, _HEAD_BLOCK)
        codes, scales = (self.ir.initializers[part] for part in names)
        self._replace(node, *self._rows(codes, scales, node.inputs[1], node.name or name))
        self.rounded += not known

    def _rows(self, codes: Any, scales: Any, ids: Any, base: str) -> tuple[list[Any], Any]:
        """Nodes that take rows out of blocks of bytes, and what they give.

        These are ONNX's own operators: onnxruntime's for browsers has GatherBlockQuantized for
        WebGPU only.
        """
        kind, int64 = self._float, onnx_ir.DataType.INT64
        half = np.float16 if self.asked.scheme.half else np.float32
        middle = self._constant("middle_of_bytes", np.array(1 << (_HEAD_BITS - 1), half))
        last = self._constant("last_dimension", np.array([-1], np.int64))
        columns = codes.shape[1] * codes.shape[2]
        width = self._constant(f"{codes.name}_columns", np.array([columns], np.int64))
        made: list[Any] = []

        def add(operator: str, inputs: Sequence[Any], dtype: Any, **attributes: Any) -> Any:
            node = onnx_ir.node(
                operator, inputs, attributes=attributes, name=f"{base}/{len(made)}/{operator}"
            )
            node.outputs[0].dtype = dtype
            made.append(node)
            return node.outputs[0]

        rows = add("Gather", [codes, ids], codes.dtype, axis=0)
        floats = add("Sub", [add("Cast", [rows], kind, to=kind), middle], kind)
        factors = add("Unsqueeze", [add("Gather", [scales, ids], kind, axis=0), last], kind)
        blocks = add("Mul", [floats, factors], kind)
        shape = add("Concat", [add("Shape", [ids], int64), width], int64, axis=0)
        return made, add("Reshape", [blocks, shape], kind)

    def _is_head(self, matrix: Any) -> bool:
        return bool(self.asked.head & set(matrix.parameters()))

    def _store_short(self, value: Any, weight: Deferred) -> None:
        """Store a weight in bfloat16, and widen it before it is used."""
        name = value.name
        uses = list(value.uses())
        users = {id(user) for user, _ in uses}
        first = next(node for node in self.ir if id(node) in users)
        node = onnx_ir.node(
            "Cast", [value], attributes={"to": onnx_ir.DataType.FLOAT}, name=f"{name}/Cast"
        )
        wide = node.outputs[0]
        wide.name, wide.shape = f"{name}/float", value.shape
        wide.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        for user, at in uses:
            user.replace_input_with(at, wide)
        value.dtype = onnx_ir.DataType.BFLOAT16
        leave_unset(value)
        self.ir.insert_before(first, [node])
        self.pieces[name] = float_piece(name, weight, "bfloat16")

    def _drop_unused(self) -> None:
        """Remove transposes and weights that nothing uses any more."""
        outputs = {id(value) for value in self.ir.outputs}
        changed = True
        while changed:
            changed = False
            for node in list(self.ir):
                if not any(out.uses() or id(out) in outputs for out in node.outputs):
                    self.ir.remove(node, safe=True)
                    changed = True
        for name, value in list(self.ir.initializers.items()):
            if not value.uses() and id(value) not in outputs:
                del self.ir.initializers[name]


def rewrite(graph: Graph, asked: Asked) -> Rewritten:
    """Rewrite a graph, which is changed.

    Raises:
        PackError: A scheme does not fit.
    """
    return _Rewriter(graph, asked).run()


def _name(product: _Product) -> str:
    return product.node.name or product.name


def _part(held: Quantized | None, rows: Rows, block: int) -> Quantized:
    """Some rows of a matrix; a group of several blocks gives each of them its scale."""
    assert held is not None  # noqa: S101 (all parts were asked for before)
    part = slice(rows.begin, rows.end)
    times = len(held.codes) // (block * len(held.scales))
    return Quantized(
        held.codes[:, part],
        np.repeat(held.scales[:, part], times, 0),
        np.repeat(held.zeros[:, part], times, 0),
        held.group_of,
    )


def _finite(name: str, weights: Any) -> Any:
    import torch

    if not bool(torch.isfinite(weights).all()):
        raise PackError(
            f"'{name}' holds NaN or infinity", "Quantize a model whose weights are finite."
        )
    return weights.float()


def _rounded(name: str, matrix: Any, grid: Grid) -> Quantized:
    """Round a matrix ``(out, in)`` of torch's to the nearest codes; its inputs are padded."""
    import torch

    weights = _finite(name, matrix)
    if grid.scale_dtype == "F16" and float(weights.abs().max()) > _LARGEST_HALF:
        raise PackError(f"'{name}' has values that float16 cannot hold", "Choose int4, or bf16.")
    rest = -weights.shape[1] % grid.scheme.size(weights.shape[1])
    if rest:
        weights = torch.nn.functional.pad(weights, (0, rest))
    laid = weights.t().contiguous().numpy()
    # With as many codes as 8 bits have, a search for scales finds nothing better. Matrices are
    # rounded side by side, so each takes one thread.
    return rounded(laid, None, grid, 1, STEPS if grid.scheme.bits < _HEAD_BITS else 1)
