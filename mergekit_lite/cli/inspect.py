"""pack inspect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.cli.options import human_bytes
from mergekit_lite.text import plain

if TYPE_CHECKING:
    from mergekit_lite.analyse.inspect import AdapterView, ModelView
    from mergekit_lite.checkpoint.protocol import Checkpoint
    from mergekit_lite.recipe import Recipe

__all__ = ["command"]


@click.command("inspect", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
def command(path: str, tensors: bool, as_json: bool) -> None:
    """Show what PATH is: a checkpoint, an adapter, base+adapter, or a recipe. Reads headers only.

    PATH is a folder, a file, a Hub id, or a recipe's .yaml.
    """
    from mergekit_lite.adapters.locate import is_adapter, open_adapter, open_model
    from mergekit_lite.analyse.inspect import as_data, refuse_gguf, view_adapter, view_model

    if path.endswith((".yaml", ".yml")):
        _recipe(Path(path), as_json=as_json)
        return
    refuse_gguf(Path(path))
    adapter = is_adapter(path, Path())
    source = open_adapter(path, Path()) if adapter else open_model(path, Path())
    try:
        view = view_adapter(source) if adapter else view_model(source)
        if as_json:
            data = {"kind": "adapter" if adapter else "model", **as_data(view)}
            if tensors:
                data["tensor_list"] = _list(source.checkpoint)
            click.echo(json.dumps(data))
            return
        lines = _adapter_lines(view) if adapter else _model_lines(view)  # type: ignore[arg-type]
        for line in lines:
            click.echo(plain(line))
        if tensors:
            for entry in _list(source.checkpoint):
                shape = "×".join(map(str, entry["shape"])) or "scalar"
                size = human_bytes(entry["bytes"])
                click.echo(plain(f"  {entry['name']}  {entry['dtype']}  {shape}  {size}"))
    finally:
        source.checkpoint.close()


def _list(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    found = []
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        found.append(
            {
                "name": name,
                "dtype": spec.dtype.name,
                "shape": list(spec.shape),
                "bytes": spec.nbytes,
            }
        )
    return found


def _line(what: str, text: str) -> str:
    return f"{what:<13} {text}"


def _model_lines(view: ModelView) -> Iterator[str]:
    yield view.name
    yield _line("architecture", view.architecture or "not known (no config.json)")
    numbers = [f"{view.layers} layers"] if view.layers else []
    numbers += [f"{what} {count}" for what, count in view.dimensions.items()]
    if numbers:
        yield _line("", ", ".join(numbers))
    yield _line("parameters", f"{_count(view.parameters)} in {view.tensors} tensors"
                + (", embeddings tied" if view.tied else ""))  # fmt: skip
    yield _line("types", _types(view.dtypes))
    files = f"{len(view.files)} file{'s' * (len(view.files) != 1)}"
    yield _line("size", f"{human_bytes(view.size)} in {files}")
    if view.quantized:
        yield _line("quantized", view.quantized)
    template = ", chat template" if view.chat_template else ", no chat template"
    yield _line("tokenizer", f"{view.tokenizer}{template}" if view.tokenizer else "none")
    yield _line("licence", view.licence or "not stated")
    if view.base:
        yield _line("made from", ", ".join(view.base))
    for note in view.notes:
        yield _line("note", note)


def _adapter_lines(view: AdapterView) -> Iterator[str]:
    yield view.name
    merges = "" if view.merges == "streamed" else f" (merged {view.merges})"
    yield _line("adapter", f"{view.kind}{merges}" + (f", {view.task}" if view.task else ""))
    revision = f" @ {view.revision}" if view.revision else ""
    yield _line("base", f"{view.base}{revision}" if view.base else "not stated")
    yield _line("parameters", f"{_count(view.parameters)} in {view.tensors} tensors")
    yield _line("types", _types(view.dtypes))
    yield _line("size", human_bytes(view.size))
    for key, value in view.options.items():
        yield _line("option", f"{key} = {json.dumps(value)}")
    if view.whole:
        more = f" … (+{len(view.whole) - 3})" if len(view.whole) > 3 else ""
        yield _line("carries whole", ", ".join(view.whole[:3]) + more)
    yield _line("licence", view.licence or "not stated")
    if view.ranks:
        width = max(len(group.kind) for group in view.ranks)
        yield f"{'module':<{max(width, 6)}}  count  rank  scale"
        for group in view.ranks:
            yield (
                f"{group.kind:<{max(width, 6)}}  {group.modules:>5}  {group.rank:>4}  "
                f"{group.scale:.4g}"
            )


def _types(dtypes: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{name} {human_bytes(size)}" for name, (_, size) in dtypes.items())


def _count(number: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number}"


def _recipe(path: Path, *, as_json: bool) -> None:
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe import read_recipe

    recipe = read_recipe(path, METHODS, ALIASES)
    models = _models_of(recipe, path.parent)
    if as_json:
        data = recipe.model_dump(exclude_none=True)
        click.echo(json.dumps({"kind": "recipe", "recipe": data, "models": models}))
        return
    click.echo(
        plain(f"{recipe.name}: {recipe.merge_method}, {METHODS[recipe.merge_method].formula}")
    )
    if recipe.output != "model":
        click.echo(_line("output", recipe.output))
    for name, what in models.items():
        role = "base" if name == recipe.base_model else "model"
        click.echo(plain(_line(role, f"{name}: {what}")))
    for key, value in (recipe.parameters or {}).items():
        click.echo(plain(_line("parameter", f"{key} = {json.dumps(value)}")))
    dtype = recipe.out_dtype or recipe.dtype
    click.echo(_line("type", dtype or "that of the inputs"))
    click.echo(f"What it would do: pack plan {path}")


def _models_of(recipe: Recipe, home: Path) -> dict[str, str]:
    """Every model of a recipe and what it is, or why it cannot be opened."""
    from mergekit_lite.adapters.locate import is_adapter, open_adapter, open_model
    from mergekit_lite.analyse.inspect import view_adapter, view_model
    from mergekit_lite.errors import PackError

    names = [recipe.base_model] if recipe.base_model else []
    names += [entry.model for entry in recipe.models or []]
    names += [source.model for part in recipe.slices or [] for source in part.sources]
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            adapter = is_adapter(name, home)
            source = open_adapter(name, home) if adapter else open_model(name, home)
        except PackError as error:
            found[name] = f"cannot be opened ({error.message.splitlines()[0]})"
            continue
        try:
            if adapter:
                found[name] = f"adapter, {view_adapter(source).kind}"
            else:
                view = view_model(source)
                found[name] = (
                    f"{view.architecture or 'a file'}, {_count(view.parameters)} parameters"
                )
        finally:
            source.checkpoint.close()
    return found
