"""A comparison as data for programs: every number, under keys that do not change."""

from __future__ import annotations

from math import isfinite
from typing import Any

from mergekit_lite.analyse.diff import Diff
from mergekit_lite.analyse.sums import Sums

__all__ = ["diff_data"]


def diff_data(diff: Diff) -> dict[str, Any]:
    """Describe a comparison.

    Returns:
        What JSON can hold: a number that is not defined, or not finite, is None. Lists have an
        entry per model.
    """
    models = range(len(diff.models))
    return {
        "base": diff.base,
        "models": list(diff.models),
        "total": _measures(diff.sums),
        "modules": {
            diff.label(group): {
                "stack": group.stack,
                "layers": len(group.layers),
                **_measures(group.sums),
                "by_layer": {
                    "relative_change": _by_layer(group.layers, len(models)),
                    **(
                        {"sign_conflict": {i: number(s.conflict) for i, s in group.layers.items()}}
                        if len(models) > 1
                        else {}
                    ),
                },
            }
            for group in diff.groups
        },
        "tensors": {
            t.name: {
                "stack": t.layer.prefix if t.layer else None,
                "layer": t.layer.index if t.layer else None,
                "shape": list(t.shape),
                **_measures(t.sums),
            }
            for t in diff.tensors
        },
        "left_out": dict(diff.others),
        "notes": list(diff.notes),
    }


def number(value: float | None) -> float | None:
    """A number for JSON, which has no NaN and no infinity."""
    return value if value is not None and isfinite(value) else None


def _by_layer(layers: dict[int, Sums], models: int) -> list[dict[int, float | None]]:
    return [{at: number(s.relative(i)) for at, s in layers.items()} for i in range(models)]


def _measures(sums: Sums) -> dict[str, Any]:
    models = range(len(sums.each))
    data: dict[str, Any] = {
        "elements": sums.elements,
        "relative_change": [number(sums.relative(i)) for i in models],
        "cosine": [number(sums.cosine(i)) for i in models],
        "largest_change": [number(sums.largest(i)) for i in models],
        "changed_share": [number(sums.changed(i)) for i in models],
        "not_finite": {
            "base": sums.not_finite(None),
            "models": [sums.not_finite(i) for i in models],
        },
    }
    if len(models) > 1:
        data["sign_conflict"] = number(sums.conflict)
        data["change_cosine"] = [[number(sums.agreement(i, k)) for k in models] for i in models]
    return data
