"""Compare pack's numbers with mergekit's on a small model: `python -m benchmarks.agreement`.

Both programs merge the same random Llama in float32. For each tensor the largest absolute
difference is divided by the largest absolute value that mergekit wrote; more than `LIMIT` in any
tensor is a disagreement and the exit status is 1. DARE is left out: its masks are random.
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks import measure, peers, report
from benchmarks.paths import WORK
from benchmarks.recipes import JOBS
from benchmarks.shapes import TINY, make_family

LIMIT = 1e-5
METHODS = ("linear", "slerp", "task_arithmetic", "ties")

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Difference:
    """How far two outputs are apart.

    Attributes:
        tensors: Number of tensors compared.
        worst: Largest relative difference of any tensor.
        tensor: The tensor that has it.
        beyond: Number of elements whose difference is beyond `LIMIT`.
        elements: Number of elements compared.
    """

    tensors: int
    worst: float
    tensor: str
    beyond: int
    elements: int


def load(folder: Path) -> dict[str, Array]:
    """Load all tensors of a float32 checkpoint."""
    return {
        name: tensor for file in measure.weights(folder) for name, tensor in load_file(file).items()
    }


def compare(ours: dict[str, Array], theirs: dict[str, Array]) -> Difference:
    """Compare two checkpoints tensor by tensor.

    Raises:
        SystemExit: They do not hold the same names, shapes and types.
    """
    if {n: (t.shape, t.dtype) for n, t in ours.items()} != {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }:
        raise SystemExit("the two programs wrote different tensors; compare the headers")
    worst, which, beyond = -1.0, "", 0
    for name, expected in theirs.items():
        gap = np.abs(ours[name].astype(np.float64) - expected)
        gap /= max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
        # Not `gap > LIMIT`: a NaN has to count.
        beyond += int(np.count_nonzero(~(gap <= LIMIT)))
        largest = float(gap.max())
        if np.isnan(largest):
            largest = float("inf")
        if largest > worst:
            worst, which = largest, name
    elements = sum(tensor.size for tensor in theirs.values())
    return Difference(len(theirs), worst, which, beyond, elements)


def main() -> int:
    """Merge with both, print a table; return 1 if any tensor disagrees."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("--pack", type=Path, default=peers.installed_pack())
    pack = peers.Pack(parser.parse_args().pack)
    WORK.mkdir(exist_ok=True)
    environment = peers.mergekit_environment()
    family = make_family(WORK / "tiny-float32", TINY, "F32")
    recipe = WORK / "recipes" / "agreement.yaml"
    recipe.parent.mkdir(exist_ok=True)
    rows, agreed = [], True
    for method in METHODS:
        recipe.write_text(JOBS[method].recipe(family, "float32"))
        loaded = []
        for name, command in (
            ("pack", pack.command),
            ("mergekit", lambda _, *paths: peers.mergekit_command(environment, *paths)),
        ):
            output = WORK / f"out-agreement-{name}" / "merged"
            line = command(method, recipe, output)
            measure.run(line, output, f"agreement-{method}-{name}", peers.OFFLINE)
            loaded.append(load(output))
            shutil.rmtree(output.parent)
        found = compare(*loaded)
        same = found.worst <= LIMIT
        agreed &= same
        rows.append(
            [
                method,
                str(found.tensors),
                f"{found.worst:.1e}",
                found.tensor,
                f"{found.beyond} of {found.elements}",
                "agree" if same else "DIFFER",
            ]
        )
    head = ["float32", "tensors", "largest difference", "in", f"beyond {LIMIT:g}", ""]
    print(report.table(head, rows))
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
