"""What a build measured of its results: perplexity, and how far quantized files are from the model.

The model is compared with the recipe's reference, if it names one, and every quantized file with
the model. Numbers are rounded to what does not depend on a machine's libraries, as far as that
goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from exporters.subjects import open_subject, tokenizing
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.errors import PackError
from mergekit_lite.evaluate.forward import require_torch
from mergekit_lite.evaluate.measure import Measured, measure
from mergekit_lite.evaluate.text import Text, cut, find_text, tokenizer_of
from mergekit_lite.merge.config import to_json
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.writer import refuse_existing
from mergekit_lite.recipe import EvaluateSection
from mergekit_lite.release.card import render
from mergekit_lite.release.writer import write_result
from mergekit_lite.resources import resource_folder

__all__ = ["EVALUATION", "check_thresholds", "evaluate_results", "text_of"]

EVALUATION = "evaluation.svg"
_MODEL = "the model"
_COLUMN, _BAR, _WIDE = 300, 26, 340


def text_of(section: EvaluateSection, home: Path) -> Path | None:
    """The file of the text; None for the one that comes along.

    Raises:
        PackError: It is not there.
    """
    if section.text is None:
        return None
    path = find_text(section.text, home)
    if path is None:
        raise PackError(
            f"{section.text}: there is no such text", "Correct text: in the recipe's evaluate:."
        )
    return path


def evaluate_results(
    section: EvaluateSection,
    text: Text,
    home: Path,
    model: Path,
    quantized: Mapping[str, Path],
    fields: Mapping[str, Any],
    sources: Sequence[Source],
    folder: Path,
    force: bool,
    progress: Progress,
) -> None:
    """Measure, and write what was found.

    Args:
        section: What the recipe asks for.
        text: What the models are run on.
        home: Folder that relative paths of the recipe start from.
        model: Folder of the model.
        quantized: GGUF files of it, by the names that they go by.
        fields: What the lock says beside.
        sources: What goes in, each once.
        folder: Where the result goes.
        force: Whether an existing result of pack is replaced.
        progress: Told how far it is.

    Raises:
        PackError: A model cannot be run on the text.
    """
    require_torch("evaluate:")
    refuse_existing(folder, force)
    found = _measure(section, text, home, model, quantized, progress)
    data = {"text": text.name, "measured": [_rounded(one) for one in found]}
    files = {"evaluation.json": to_json(data), EVALUATION: _plot(found).encode()}
    write_result(folder, "evaluate", {**fields, **data}, sources, files)


def _measure(
    section: EvaluateSection,
    text: Text,
    home: Path,
    model: Path,
    quantized: Mapping[str, Path],
    progress: Progress,
) -> list[Measured]:
    """The model against the recipe's reference, then its files against it; it is run once."""
    with ExitStack() as stack:
        subject, beside = stack.enter_context(
            open_subject(model.name, model.parent, "float32", "cpu", progress)
        )
        files, label = tokenizing([beside], [model.name])
        with tokenizer_of(files, label) as tokenizer:
            pieces = cut(text, tokenizer, label, section.context, section.windows, section.seed)
        subject.name = _MODEL
        others = []
        for name, path in quantized.items():
            other, _ = stack.enter_context(
                open_subject(path.name, path.parent, "float32", "cpu", progress)
            )
            other.name = name
            others.append(other)
        itself, *files_of_it = measure(others, subject, pieces, progress)
        if section.reference is None:
            return [itself, *files_of_it]
        reference, _ = stack.enter_context(
            open_subject(section.reference, home, "float32", "cpu", progress)
        )
        return [*measure([subject], reference, pieces, progress), *files_of_it]


def _rounded(one: Measured) -> dict[str, Any]:
    """Three digits: the rest depends on the machine's libraries, and a lock should not."""
    return {
        key: float(f"{value:.3g}") if isinstance(value, float) else value
        for key, value in one.describe().items() if key != "by"
    }  # fmt: skip


def check_thresholds(section: EvaluateSection, measured: Sequence[Mapping[str, Any]]) -> None:
    """Stop what is too far from what it was made of.

    The divergence counts for quantized files, the perplexity also for the model against the
    reference.

    Raises:
        PackError: A threshold of the recipe is passed.
    """
    limits = {"kl_mean": section.max_kl, "perplexity_change": section.max_perplexity_increase}
    names = {"kl_mean": "max_kl", "perplexity_change": "max_perplexity_increase"}
    passed = [
        f"{one['name']}: {key} {one[key]:g} against {one['reference']}; {names[key]} is {limit:g}"
        for key, limit in limits.items() for one in measured
        if limit is not None and one.get(key) is not None and one[key] > limit
        and (key != "kl_mean" or one["reference"] == _MODEL)  # of the model to others it is far
    ]  # fmt: skip
    if passed:
        listed = "".join(f"\n  {line}" for line in passed)
        raise PackError(
            f"too far from what it was made of:{listed}",
            "Choose a finer scheme or another merge, or raise the limit in evaluate:.",
        )


def _plot(found: Sequence[Measured]) -> str:
    """Perplexities, each with its interval, as a picture (SVG 1.1)."""
    top = max(one.high for one in found) or 1.0
    bars = [
        {
            "y": 40 + at * _BAR,
            "name": one.name if len(one.name) <= 44 else f"…{one.name[-43:]}",
            "width": round(_WIDE * one.perplexity / top, 1),
            "low": round(_COLUMN + _WIDE * one.low / top, 1),
            "high": round(_COLUMN + _WIDE * one.high / top, 1),
            "text": f"{one.perplexity:.3g}",
        }
        for at, one in enumerate(found)
    ]
    template = (resource_folder("templates") / "evaluation.svg.jinja").read_text("utf-8")
    values = {"bars": bars, "left": _COLUMN, "width": _COLUMN + _WIDE + 80,
              "height": 52 + _BAR * len(found)}  # fmt: skip
    return render(template, values, "plot")
