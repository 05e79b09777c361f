"""Whatever a user may mean by a model, opened for an exporter: tensors and small files.

A folder, a file, a Hub id, a base with adapters, or a recipe that has not run: an exporter gets a
checkpoint, the files that would lie beside its weights, and does not know which kind it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.adapters.locate import is_adapter, open_model
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.checkpoint.protocol import Checkpoint, InputFile
from mergekit_lite.checkpoint.safetensors import load_json
from mergekit_lite.errors import PackError
from mergekit_lite.merge.checkpoint import MergeCheckpoint
from mergekit_lite.merge.config import COMES_ALONG
from mergekit_lite.merge.lock import LOCK_NAME, resolved_recipe
from mergekit_lite.merge.run import Prepared, Progress, default_threads, observing, prepare
from mergekit_lite.merge.stream import Job, run_jobs
from mergekit_lite.methods import ALIASES, METHODS
from mergekit_lite.recipe import Recipe, read_recipe
from mergekit_lite.tokenizer.vocabulary import TOKENIZER_FILES

__all__ = ["WholeModel", "last_result", "open_whole", "small_files_of"]

_HELD_BYTES = 256 * 10**6
"""That may be held between the passes of all tensors."""
_TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja", "chat_template.json")


@dataclass(frozen=True)
class WholeModel:
    """A model to be exported.

    Attributes:
        reference: As the user wrote it.
        name: For files and folders.
        checkpoint: Its tensors.
        files: Contents of the small files beside its weights, config.json among them, by name.
        sources: What is read for it, each once.
        notes: What the user should know of it.
        recipe: What it is a merge by; None where it is none.
        prepared: The merge that has not run; None where there is none.
        home: Folder that the reference starts from.
    """

    reference: str
    name: str
    checkpoint: Checkpoint
    files: Mapping[str, bytes]
    sources: Sequence[Source]
    notes: Sequence[str]
    recipe: Recipe | None = None
    prepared: Prepared | None = None
    home: Path = Path()

    def observe(self, run: Callable[[Iterator[Job]], None], progress: Progress) -> None:
        """Show a merge whose statistic spans the model all tensors; once, before the first read."""
        if isinstance(self.checkpoint, MergeCheckpoint):
            observing(self.checkpoint, run, progress)

    def observe_alone(self, progress: Progress) -> None:
        """The same on all cores, for whoever reads tensors one by one."""
        self.observe(
            lambda jobs: run_jobs(jobs, default_threads(), _HELD_BYTES, progress.advance), progress
        )

    def describe(self) -> dict[str, Any]:
        """How it was made, for a lock."""
        if self.recipe is None or self.prepared is None:
            return {"model": self.reference}
        symmetric = self.prepared.plan.method.symmetric
        return {
            "recipe": resolved_recipe(self.recipe, symmetric),
            "seed": self.recipe.seed,
            "version": self.recipe.version,
        }

    def fingerprint(self) -> str:
        """What must be the same for a stopped run to be continued."""
        if self.prepared is not None:
            return self.prepared.plan.fingerprint(self.prepared.inputs)
        parts = [self.checkpoint.fingerprint(), *(s.checkpoint.fingerprint() for s in self.sources)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def input_files(self) -> dict[str, list[InputFile]]:
        """The weight files that were read, hashed, by reference."""
        return {source.reference: source.checkpoint.input_files() for source in self.sources}

    def close(self) -> None:
        """Close all files."""
        if self.prepared is not None:
            self.prepared.inputs.close()
        self.checkpoint.close()


def open_whole(reference: str | None, home: Path = Path()) -> WholeModel:
    """Open a model; reads headers and small files only.

    Args:
        reference: A folder, a file, a Hub id, base+adapter, or a recipe's file; None for what was
            last made below ``dist``.
        home: Folder that relative paths start from.

    Raises:
        PackError: There is no such model, or it cannot be used.
    """
    if reference is None:
        last = last_result(home)
        reference, home = last.name, home / last.parent  # a name that is the same in any folder
    path = home / reference
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _merge(reference, home)
    if is_adapter(reference, home):
        base = load_json(path / "adapter_config.json").get("base_model_name_or_path") or "BASE"
        raise PackError(
            f"{reference}: is an adapter, not a whole model",
            f"Write it after its base: {base}+{reference}",
        )
    source = open_model(reference, home)
    try:
        files = small_files_of(source.checkpoint.folder)
    except BaseException:
        source.checkpoint.close()
        raise
    return WholeModel(
        reference, _name_of(reference, home), source.checkpoint, files, source.sources,
        source.notes, home=home,
    )  # fmt: skip


def _merge(reference: str, home: Path) -> WholeModel:
    path = home / reference
    recipe = read_recipe(path, METHODS, ALIASES)
    if recipe.output != "model":
        command = "merge" if recipe.output == "adapter" else "adapters"
        raise PackError(
            f"{reference}: gives {recipe.output}, not a model",
            f"Run it with: pack {command} {reference}",
        )
    prepared = prepare(recipe, path.parent)
    checkpoint = MergeCheckpoint(prepared.plan, prepared.inputs)
    checkpoint.config = json.loads(prepared.files.get("config.json", b"{}"))
    sources = list(prepared.inputs.sources.values())
    return WholeModel(
        reference, str(recipe.name), checkpoint, prepared.files, sources, prepared.notes, recipe,
        prepared, home,
    )  # fmt: skip


def small_files_of(folder: Path | None) -> dict[str, bytes]:
    """Contents of a model's config, tokenizer and template files, by name."""
    if folder is None:
        return {}
    patterns = ("config.json", *TOKENIZER_FILES, *_TEMPLATES, *COMES_ALONG)
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def last_result(home: Path) -> Path:
    """The model that was last made below ``dist``.

    Raises:
        PackError: None was made there.
    """
    locks = [
        path
        for path in (home / "dist").glob(f"*/*/{LOCK_NAME}")
        if any(path.parent.glob("*.safetensors"))
        and not path.parent.name.startswith(".")  # of a run that was killed
        and not (path.parent / "adapter_config.json").is_file()
        and load_json(path).get("kind") != "quantize"
    ]
    if not locks:
        raise PackError(
            "no model was made here yet (dist holds none)",
            "Name one: a folder, a Hub id, base+adapter or a recipe; or run pack merge first.",
        )
    return max(locks, key=lambda path: (path.stat().st_mtime_ns, path)).parent.relative_to(home)


def _name_of(reference: str, home: Path) -> str:
    """A name for what is made of a model: that of the result it is, or its last part."""
    path = (home / reference).resolve()
    if (path / LOCK_NAME).is_file():
        stated = load_json(path / LOCK_NAME).get("name")
        if isinstance(stated, str) and stated:
            return stated
    last = re.split(r"(?<!\\)\+", reference)[-1].replace("\\+", "+").partition("@")[0]
    last = last.rpartition("*")[2].removeprefix("!")
    name = path.name if path.exists() else Path(last).name
    for suffix in (".safetensors", ".gguf", ".bin"):
        name = name.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"
