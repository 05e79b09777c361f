"""All that is known of a merge before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite.merge.config import small_files
from mergekit_lite.merge.inputs import Inputs, open_inputs
from mergekit_lite.merge.plan import Plan, make_plan
from mergekit_lite.recipe import Recipe
from mergekit_lite.tokenizer.choose import Tokenizer, choose_tokenizer

__all__ = ["DEFAULT_SHARD", "Prepared", "prepare"]

DEFAULT_SHARD = 2 * 10**9


@dataclass(frozen=True)
class Prepared:
    """A merge that is planned, its inputs open.

    Attributes:
        plan: What will be computed.
        inputs: The models.
        tokenizer: Of the result.
        files: Contents of the small files beside the weights, by name.
        home: Folder that relative paths start from.
        shard_bytes: Most bytes of an output file.
    """

    plan: Plan
    inputs: Inputs
    tokenizer: Tokenizer
    files: Mapping[str, bytes]
    home: Path
    shard_bytes: int

    @property
    def notes(self) -> list[str]:
        """Decisions that the user should know of."""
        return [*self.inputs.notes, *self.plan.notes.lines, *self.tokenizer.notes]


def prepare(recipe: Recipe, home: Path, shard_bytes: int = DEFAULT_SHARD) -> Prepared:
    """Open the models and plan the merge; reads headers and small files only.

    Args:
        recipe: A checked recipe.
        home: Folder that relative paths start from.
        shard_bytes: Most bytes of an output file.

    Raises:
        PackError: Whatever can be found wrong without reading weights.
    """
    inputs = open_inputs(recipe, home)
    try:
        plan = make_plan(recipe, inputs, shard_bytes)
        wanted = recipe.tokenizer.source if recipe.tokenizer else recipe.tokenizer_source
        folders = {name: model.checkpoint.folder for name, model in inputs.items()}
        tokenizer = choose_tokenizer(folders, plan.template, wanted, recipe.chat_template)
        files = {**small_files(plan, inputs), **tokenizer.files}
    except BaseException:
        inputs.close()
        raise
    return Prepared(plan, inputs, tokenizer, files, home, shard_bytes)
