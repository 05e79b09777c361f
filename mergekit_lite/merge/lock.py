"""pack.lock: what went in, what was asked, what computed it, what came out.

Nothing in it tells one run from another that gives the same bytes: no times, no thread counts, no
absolute paths. It is canonical JSON, so equal locks are equal files.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mergekit_lite
from mergekit_lite.checkpoint.digest import sha256_of
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.checkpoint.protocol import InputFile
from mergekit_lite.merge.config import COMES_ALONG, to_json
from mergekit_lite.merge.inputs import Inputs
from mergekit_lite.merge.plan import Plan
from mergekit_lite.merge.writer import OutputFile
from mergekit_lite.methods import METHODS
from mergekit_lite.recipe import Recipe
from mergekit_lite.tokenizer.vocabulary import TOKENIZER_FILES

__all__ = [
    "LOCK_NAME",
    "environment",
    "lock_file",
    "lock_inputs",
    "make_lock",
    "resolved_recipe",
    "stated_recipe",
]

LOCK_NAME = "pack.lock"
_VERSION = 1
_SMALL = (
    *TOKENIZER_FILES,
    *COMES_ALONG,
    "config.json",
    "adapter_config.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
)


def make_lock(
    plan: Plan,
    inputs: Inputs,
    weights: Mapping[str, Sequence[InputFile]],
    outputs: Sequence[OutputFile],
    nonfinite: Mapping[str, int],
) -> bytes:
    """Write the lock of a merge.

    Args:
        plan: What was computed.
        inputs: The models.
        weights: Hashed weight files by reference of a source.
        outputs: Every file of the result but the lock.
        nonfinite: Number of NaN and infinite elements, by tensor that has some.
    """
    return lock_file(
        "merge",
        {
            "name": plan.recipe.name,
            "version": plan.recipe.version,
            "recipe": resolved_recipe(plan.recipe, plan.method.symmetric),
            "seed": plan.recipe.seed,
            "notes": plan.notes.lines,
            "nonfinite": dict(nonfinite),
        },
        list(inputs.sources.values()),
        weights,
        outputs,
    )


def lock_file(
    kind: str,
    fields: Mapping[str, Any],
    sources: Sequence[Source],
    weights: Mapping[str, Sequence[InputFile]],
    outputs: Sequence[OutputFile],
) -> bytes:
    """Write the lock of any result.

    Args:
        kind: What was done: ``merge``, ``adapter``, ``extract`` …
        fields: What else tells how it was made.
        sources: What went in.
        weights: Their hashed weight files, by reference.
        outputs: Every file of the result but the lock.
    """
    return to_json(
        {
            "lock_version": _VERSION,
            "kind": kind,
            "tool": {"name": "pack-models", "version": mergekit_lite.__version__},
            "environment": environment(),
            **fields,
            "inputs": lock_inputs(sources, weights),
            "outputs": [
                {"path": o.path, "bytes": o.size, "sha256": o.sha256}
                for o in sorted(outputs, key=lambda o: o.path)
            ],
        }
    )


def lock_inputs(
    sources: Sequence[Source], weights: Mapping[str, Sequence[InputFile]]
) -> list[dict[str, Any]]:
    """What went in, as a lock names it: every file that matters, with its digest."""
    return [
        _input(source, weights[source.reference])
        for source in sorted(sources, key=lambda source: source.reference)
    ]


def environment() -> dict[str, str]:
    """Versions of what computes the bytes of a result."""
    import llvmlite
    import numba

    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
    }


def _input(source: Source, weights: Sequence[InputFile]) -> dict[str, Any]:
    files = list(weights)
    folder = source.checkpoint.folder
    for pattern in _SMALL:
        if folder is None:
            break
        files += [_hashed(folder, path) for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {
        "model": source.reference,
        "revision": source.revision,
        "files": [
            {"path": f.path, "bytes": f.size, "sha256": f.sha256}
            for f in sorted(files, key=lambda f: f.path)
        ],
    }


def _hashed(folder: Path, path: Path) -> InputFile:
    return InputFile(str(path.relative_to(folder)), path.stat().st_size, sha256_of(path))


def resolved_recipe(recipe: Recipe, symmetric: bool) -> dict[str, Any]:
    """The recipe as data, defaults left out; models sorted where their order means nothing."""
    data = recipe.model_dump(exclude_none=True)
    for key, usual in (("output", "model"), ("compare", True)):
        if data[key] == usual:
            del data[key]
    if symmetric:
        order = lambda entry: (entry["model"], repr(entry))  # noqa: E731
        data.get("models", []).sort(key=order)
        for part in data.get("slices", []):
            part["sources"].sort(key=order)
    return data


def stated_recipe(recipe: Recipe) -> dict[str, Any]:
    """The same of a recipe whose method is known, as it is read from a lock."""
    resolved = resolved_recipe(recipe, METHODS[recipe.merge_method].symmetric)
    stated: dict[str, Any] = json.loads(json.dumps(resolved))
    return stated
