"""pack inspect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.cli.table import echo_table, window
from mergekit_lite.text import human_bytes, plain

if TYPE_CHECKING:
    from mergekit_lite.analyse.adapter import AdapterView
    from mergekit_lite.analyse.inspect import ModelView
    from mergekit_lite.analyse.recipe import InputView, RecipeView
    from mergekit_lite.analyse.tokenizer import TokenizerView

__all__ = ["command"]

_LABEL = 14
_WORDS = frozenset({1, 4})
_SHOWN = 4


@click.command("inspect", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path")
@click.option("--tensors", is_flag=True, help="List every tensor: type, shape, bytes, file.")
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
def command(path: str, tensors: bool, as_json: bool) -> None:
    """Show what PATH is: a checkpoint, an adapter, base+adapter, or a recipe.

    PATH is a folder, a file, a Hub id org/name[@revision], or a recipe's .yaml. Only headers and
    small files are read, from the Hub too; no weights are.
    """
    if path.endswith((".yaml", ".yml")) and not Path(path).is_dir():
        if tensors:
            raise click.UsageError(f"--tensors of a recipe's result: pack plan --tensors {path}")
        _recipe(Path(path), as_json=as_json)
        return
    from mergekit_lite.analyse.adapter import AdapterView, adapter_data, view_adapter
    from mergekit_lite.analyse.inspect import list_tensors, model_data, view_model
    from mergekit_lite.analyse.look import holds_adapter, look_at

    source = look_at(path, Path())
    try:
        view = view_adapter(source) if holds_adapter(source) else view_model(source)
        listed = list_tensors(source.checkpoint) if tensors else None
    finally:
        source.checkpoint.close()
    if as_json:
        data = adapter_data(view) if isinstance(view, AdapterView) else model_data(view)
        click.echo(json.dumps(data if listed is None else {**data, "tensor_list": listed}))
        return
    if isinstance(view, AdapterView):
        _show_adapter(view)
    else:
        _show(view.name, _model_lines(view))
    if listed is not None:
        click.echo()
        echo_table(
            ["tensor", "type", "shape", "size", "file"], [_tensor(t) for t in listed], _WORDS
        )


def _tensor(tensor: Mapping[str, Any]) -> list[str]:
    shape = "×".join(map(str, tensor["shape"])) or "scalar"
    file = tensor["file"] or "computed"
    return [tensor["name"], tensor["dtype"], shape, human_bytes(tensor["bytes"]), file]


def _show(title: str, lines: Iterator[tuple[str, str]]) -> None:
    """A bold title, then what is known in two columns, wrapped on a terminal."""
    click.secho(plain(title), bold=True)
    width = window()
    for label, text in lines:
        clean = plain(text)
        room = max(24, width - _LABEL) if width else 0
        parts = wrap(clean, room, break_on_hyphens=False) if room else [clean]
        for number, part in enumerate(parts or [""]):
            name = "" if number else label
            click.echo(
                click.style(name, fg="cyan") * bool(name) + " " * (_LABEL - len(name)) + part
            )


def _model_lines(view: ModelView) -> Iterator[tuple[str, str]]:
    if view.revision:
        yield "revision", view.revision
    yield "architecture", view.architecture or "not known (no config.json)"
    numbers = [f"{view.layers} layers"] if view.layers else []
    numbers += [f"{what} {count}" for what, count in view.dimensions.items()]
    if numbers:
        yield "", ", ".join(numbers)
    tied = ", embeddings tied" if view.tied else ""
    tensors = f"{view.tensors} tensor{'s' * (view.tensors != 1)}"
    yield "parameters", f"{_count(view.parameters)} in {tensors}{tied}"
    yield "size", f"{human_bytes(view.size)} ({_types(view.dtypes)})"
    yield "files", _some(view.files) or "none"
    if view.quantized:
        yield "quantized", view.quantized
    yield from _tokenizer_lines(view.tokenizer)
    yield "licence", view.licence or "not stated"
    if view.base:
        yield "made from", ", ".join(view.base)
    if view.metadata:
        yield "metadata", _some([f"{k}={_brief(v)}" for k, v in sorted(view.metadata.items())])
    for note in view.notes:
        yield "note", note


def _tokenizer_lines(view: TokenizerView) -> Iterator[tuple[str, str]]:
    template = "chat template" if view.chat_template else "no chat template"
    if view.kind is None:
        yield "tokenizer", "none" + (f", {template}" if view.chat_template else "")
        return
    added = f" ({view.added} added)" if view.added else ""
    parts = [view.kind, f"{view.tokens} tokens{added}" if view.tokens else "", template]
    yield "tokenizer", ", ".join(part for part in parts if part)
    if view.special:
        yield "", ", ".join(f"{role} {_brief(text)}" for role, text in view.special.items())


def _show_adapter(view: AdapterView) -> None:
    _show(view.name, _adapter_lines(view))
    if not view.modules:
        return
    click.echo()
    if view.adapter_type == "LORA":
        rows = [
            [g.kind, str(g.modules), str(g.rank), _number(g.alpha), _number(g.scale)]
            for g in view.modules
        ]
        echo_table(["module", "count", "rank", "alpha", "scale"], rows)
    else:
        echo_table(["module", "count"], [[g.kind, str(g.modules)] for g in view.modules])


def _adapter_lines(view: AdapterView) -> Iterator[tuple[str, str]]:
    if view.commit:
        yield "revision", view.commit
    task = f" for {view.task}" if view.task else ""
    yield "adapter", f"{view.adapter_type}{task}" + (f", PEFT {view.peft}" if view.peft else "")
    merges = {"streamed": "yes", "by PEFT's layers": "yes, by PEFT's own layers"}
    yield "merges", merges.get(view.merges, view.merges)
    revision = f" @ {view.revision}" if view.revision else ""
    yield "base", f"{view.base}{revision}" if view.base else "not stated"
    modules = sum(group.modules for group in view.modules)
    within = f" for {modules} module{'s' * (modules != 1)}" if modules else ""
    yield "parameters", f"{_count(view.parameters)} in {view.tensors} tensors{within}"
    yield "size", f"{human_bytes(view.size)} ({_types(view.dtypes)})"
    if view.options:
        yield "options", ", ".join(f"{k}={_brief(json.dumps(v))}" for k, v in view.options.items())
    if view.whole:
        yield "carries whole", _some(view.whole)
    yield "licence", view.licence or "not stated"
    for note in view.notes:
        yield "note", note


def _recipe(path: Path, *, as_json: bool) -> None:
    from mergekit_lite.analyse.recipe import recipe_data, view_recipe
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe import read_recipe

    recipe = read_recipe(path, METHODS, ALIASES)
    view = view_recipe(recipe, METHODS[recipe.merge_method].formula, path.parent)
    if as_json:
        click.echo(json.dumps(recipe_data(view)))
        return
    _show(f"{view.name} {view.version or ''}".rstrip(), _recipe_lines(view))
    click.echo()
    echo_table(["model", "role", "what", "parameters", "type"], [_row(i) for i in view.inputs],
               frozenset({1, 2, 4}))  # fmt: skip
    for each in view.inputs:
        if each.problem:
            click.secho(plain(f"{each.name}: {each.problem}"), fg="yellow")
    click.echo()
    does = {"adapter": "Run it: pack merge", "adapters": "Run it: pack adapters"}
    click.echo(plain(f"{does.get(view.output, 'What it would do: pack plan')} {path}"))


def _recipe_lines(view: RecipeView) -> Iterator[tuple[str, str]]:
    if view.output != "adapters":
        yield "method", f"{view.method}, {view.formula}"
    yield "makes", view.output + (f" of {view.slices} slices" if view.slices else "")
    if view.parameters:
        yield "parameters", _settings(view.parameters)
    for each in view.inputs:
        for parameters in each.parameters:
            yield "", f"{each.name}: {_settings(parameters)}"
    yield "type", view.dtype or "that of the inputs"


def _row(view: InputView) -> list[str]:
    role = "base" if view.base else "model"
    if view.problem or view.elements is None:
        return [view.name, role, "cannot be opened", "-", "-"]
    return [view.name, role, view.what or "-", _count(view.elements), view.dtype or "-"]


def _settings(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={_brief(json.dumps(v))}" for k, v in parameters.items())


def _types(dtypes: Mapping[str, tuple[int, int]]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{name} {human_bytes(size)}" for name, (_, size) in dtypes.items())


def _some(texts: tuple[str, ...] | list[str]) -> str:
    """The first few, and how many more there are."""
    more = f" … (+{len(texts) - _SHOWN})" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _brief(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _count(number: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number}"
