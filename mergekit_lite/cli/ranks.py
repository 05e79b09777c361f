"""How much of each kind of module an adapter keeps, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_lite.adapters.factor import Factored

__all__ = ["rank_table"]


def rank_table(modules: Sequence[tuple[str, Factored]]) -> Iterator[str]:
    """One line per kind of module: how many, ranks, and the share of energy that is kept.

    Args:
        modules: Path and factors of each.
    """
    kinds: dict[str, list[Factored]] = {}
    for path, factored in modules:
        kinds.setdefault(path.rpartition(".")[2], []).append(factored)
    width = max([len(kind) for kind in kinds] + [6])
    yield f"{'module':<{width}}  count  rank       energy kept (lowest)"
    for kind, found in sorted(kinds.items()):
        ranks = sorted({f.rank for f in found})
        said = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        mean = sum(f.kept for f in found) / len(found)
        lowest = min(f.kept for f in found)
        yield f"{kind:<{width}}  {len(found):>5}  {said:<10} {mean:.4f} ({lowest:.4f})"
