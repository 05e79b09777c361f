"""The models of a recipe, each opened once, in an order that does not depend on the recipe's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_lite.adapters.locate import open_model
from mergekit_lite.checkpoint.layers import LayerMap, map_layers
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.checkpoint.protocol import Checkpoint, TensorSpec
from mergekit_lite.errors import PackError
from mergekit_lite.recipe import Recipe

__all__ = ["Inputs", "Model", "open_inputs"]


@dataclass(frozen=True)
class Model:
    """One input model.

    Attributes:
        name: As the recipe writes it.
        source: Where it came from, and its tensors.
        layers: Which of its tensors belong to which layer.
    """

    name: str
    source: Source
    layers: LayerMap

    @property
    def checkpoint(self) -> Checkpoint:
        """Its tensors."""
        return self.source.checkpoint

    @property
    def ties_embeddings(self) -> bool:
        """Whether its config says that input and output embeddings are one tensor."""
        return self.checkpoint.config.get("tie_word_embeddings") is True

    def find(self, name: str, like: TensorSpec | None = None) -> str | None:
        """The model's own name for a tensor: the same, or that of the tensor it is tied to.

        A model whose output embedding is tied to the input embedding carries only the latter. It is
        recognised as the one two-dimensional tensor outside the layers that has the shape that the
        missing one has elsewhere.

        Args:
            name: Of the tensor.
            like: Its spec in a model that has it; without it, only the name itself is looked for.
        """
        names = self.checkpoint.names()
        if name in self._set:
            return name
        if like is None or len(like.shape) != 2 or name in self.layers.layers:
            return None
        twins = [
            other
            for other in names
            if other not in self.layers.layers and self.checkpoint.spec(other).shape == like.shape
        ]
        return twins[0] if len(twins) == 1 else None

    @cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(self.checkpoint.names())


class Inputs(Mapping[str, Model]):
    """All models of a recipe by the name that the recipe gives them."""

    def __init__(self, models: Mapping[str, Model], template: str) -> None:
        self._models = dict(models)
        self.template = self._models[template]

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def sources(self) -> Mapping[str, Source]:
        """Everything that was opened, by reference: models, bases and adapters, each once."""
        every = (part for model in self._models.values() for part in model.source.sources)
        return {source.reference: source for source in every}

    @property
    def notes(self) -> list[str]:
        """What the user should know of the models."""
        notes = [note for model in self._models.values() for note in model.source.notes]
        if not self.template.checkpoint.config:
            notes.append("no model has a config.json, so the result has none")
        return notes

    def close(self) -> None:
        """Close all files."""
        for model in self._models.values():
            model.checkpoint.close()


def open_inputs(recipe: Recipe, home: Path) -> Inputs:
    """Open every model of a recipe, reading headers and configs only.

    The template, whose config and tensor names the result takes, is the base model; without one,
    the first source of the first slice, or of the models with a config the one whose name sorts
    first, so that the order of a list of models means nothing.

    Raises:
        PackError: A model is not there, is broken, or is quantized.
    """
    names = [entry.model for entry in recipe.models or []]
    names += [source.model for part in recipe.slices or [] for source in part.sources]
    opened: dict[str, Source] = {}
    try:
        models = _open_all(sorted({*names, *filter(None, [recipe.base_model])}), home, opened)
        if recipe.base_model:
            _refuse_second_name(models, recipe.base_model)
            template = recipe.base_model
        elif recipe.slices:
            template = names[0]
        else:
            ordered = sorted(set(names))
            with_config = [name for name in ordered if models[name].checkpoint.config]
            template = (with_config or ordered)[0]
    except BaseException:
        for source in opened.values():
            source.checkpoint.close()
        raise
    return Inputs(models, template)


def _open_all(names: Sequence[str], home: Path, opened: dict[str, Source]) -> dict[str, Model]:
    """Open models; what is wrong with any of them comes in one report."""
    models: dict[str, Model] = {}
    wrong: list[PackError] = []
    for name in names:
        try:
            source = open_model(name, home, opened)
            checkpoint = source.checkpoint
            models[name] = Model(name, source, map_layers(checkpoint.names(), checkpoint.config))
            _refuse_quantized(models[name])
        except PackError as error:
            wrong.append(error)
    if len(wrong) > 1:
        listed = "".join(f"\n  {line}" for e in wrong for line in e.message.splitlines())
        hints = dict.fromkeys(e.hint for e in wrong if e.hint)
        raise PackError(f"{len(wrong)} models cannot be used:{listed}", "\n".join(hints))
    if wrong:
        raise wrong[0]
    return models


def _refuse_second_name(models: Mapping[str, Model], base: str) -> None:
    """The base under another name would be merged as if it were a fine-tune of itself."""
    path = models[base].source.path.resolve()
    for name, model in models.items():
        if name != base and not model.source.parts and model.source.path.resolve() == path:
            raise PackError(
                f"'{name}' and the base model '{base}' are the same model",
                "Write it in one way.",
            )


def _refuse_quantized(model: Model) -> None:
    quantization = model.checkpoint.config.get("quantization_config")
    if isinstance(quantization, dict):
        kind = quantization.get("quant_method", "an unnamed method")
        raise PackError(
            f"{model.name}: its weights are quantized ({kind}); averaging codes would be noise",
            "Use the model in 16 or 32 bits.",
        )
    if not model.checkpoint.names():
        raise PackError(f"{model.name}: holds no tensor", "Check that this is the model you mean.")
