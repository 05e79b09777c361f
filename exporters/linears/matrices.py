"""Which matrices of a model are put on a grid: linear layers of its decoder layers, experts too.

Embeddings, the head, norms and routers stay as they are, which is what the programs that load such
checkpoints expect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from exporters.linears.scheme import Scheme
from mergekit_lite.adapters.names import ModelNames
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.inputs import Place

__all__ = ["Found", "Matrix", "by_place", "check_fits", "find_matrices", "is_router"]

_ROUTERS = ("gate", "router", "shared_expert_gate", "router_gate")
_CONV = "Conv1D"
_PACKED = 32


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weights.

    Attributes:
        tensor: Their name in the checkpoint, ending in ``.weight``.
        layer: Number of the decoder layer.
        parameter: Path of the parameter below the layer that holds them.
        expert: Where the parameter holds several, which; None elsewhere.
        rows: First and one past the last row there; None for all.
        shape: ``(out, in)``.
        transposed: Whether they are stored as ``(in, out)``.
    """

    tensor: str
    layer: int
    parameter: str
    expert: int | None
    rows: tuple[int, int] | None
    shape: tuple[int, int]
    transposed: bool = False

    @property
    def module(self) -> str:
        """Name of the linear layer."""
        return self.tensor.removesuffix(".weight")

    @property
    def place(self) -> Place:
        """Where its inputs are seen."""
        return self.parameter, self.expert

    def of(self, layer: Any) -> Any:
        """The weights in a filled layer: a view ``(out, in)``."""
        found = layer.get_parameter(self.parameter)
        if self.expert is not None:
            found = found[self.expert]
        if self.rows is not None:
            found = found[self.rows[0] : self.rows[1]]
        return found.T if self.transposed else found


@dataclass(frozen=True)
class Found:
    """The matrices of a model.

    Attributes:
        matrices: To be put on a grid, layer by layer.
        left: Names of linear layers in the decoder layers that stay as they are.
        notes: Why, for the user.
    """

    matrices: Sequence[Matrix]
    left: Sequence[str]
    notes: Sequence[str]


def find_matrices(checkpoint: Checkpoint, model: Any, paths: Sequence[str]) -> Found:
    """Find the matrices of a model's decoder layers.

    Args:
        checkpoint: Of the model.
        model: transformers' model on the meta device.
        paths: Of its decoder layers.

    Raises:
        PackError: There is none.
    """
    names = ModelNames(checkpoint)
    found: list[Matrix] = []
    left: list[str] = []
    notes: list[str] = []
    for index, path in enumerate(paths):
        layer = model.get_submodule(path)
        for parameter, tensor, transposed in _candidates(layer):
            full = f"{path}.{parameter}"
            places = names.find(full)
            module = parameter.removesuffix(".weight")
            if is_router(module):
                left.append(full.removesuffix(".weight"))
                continue
            split = [p for p in places if p.tensor.endswith(".weight")]
            if not split or (tensor.ndim == 3 and any(p.expert is None for p in split)):
                left.append(full.removesuffix(".weight"))
                if index == 0:
                    notes.append(f"'{parameter}' is not stored matrix by matrix; left as it is")
                continue
            for part in split:
                shape = checkpoint.spec(part.tensor).shape
                shape = shape[::-1] if transposed else shape
                found.append(
                    Matrix(part.tensor, index, parameter, part.expert, part.rows,
                           (shape[0], shape[1]), transposed)
                )  # fmt: skip
    if not found:
        raise PackError(
            f"{checkpoint.label}: no linear layers were found in its decoder layers",
            "Models of this kind can be quantized with --to gguf.",
        )
    return Found(found, left, notes)


def is_router(module: str) -> bool:
    """Whether a module, by its path, chooses experts."""
    return module.rpartition(".")[2] in _ROUTERS


def _candidates(layer: Any) -> Iterator[tuple[str, Any, bool]]:
    """Parameters that hold the weights of linear layers; whether they are stored transposed."""
    import torch

    for name, module in layer.named_modules():
        conv = type(module).__name__ == _CONV
        if isinstance(module, torch.nn.Linear) or conv:
            yield f"{name}.weight".lstrip("."), module.weight, conv
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 3:
            yield name, parameter, False


def by_place(matrices: Sequence[Matrix]) -> dict[Place, list[Matrix]]:
    """Matrices of a layer by where their inputs are seen."""
    found: dict[Place, list[Matrix]] = {}
    for matrix in matrices:
        found.setdefault(matrix.place, []).append(matrix)
    return found


def check_fits(found: Found, scheme: Scheme, label: str) -> None:
    """Check that a scheme fits all matrices.

    Raises:
        PackError: A group does not divide the inputs, or the outputs cannot be packed.
    """
    for matrix in found.matrices:
        rows, columns = matrix.shape
        if scheme.group is not None and columns % scheme.group:
            fitting = [g for g in (128, 64, 32) if columns % g == 0]
            raise PackError(
                f"{label}: '{matrix.tensor}' has {columns} inputs, which groups of {scheme.group} "
                "do not divide",
                f"Choose w{scheme.bits}g{fitting[0]}" if fitting else "Use --to gguf.",
            )
        if rows % _PACKED or columns % _PACKED:
            raise PackError(
                f"{label}: '{matrix.tensor}' is {rows} by {columns}; both must be multiples of "
                f"{_PACKED} to be packed",
                "Use --to gguf.",
            )
