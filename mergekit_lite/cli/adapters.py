"""pack adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_lite.cli.options import OUTPUT
from mergekit_lite.text import human_bytes

if TYPE_CHECKING:
    from mergekit_lite.recipe import Recipe
    from mergekit_lite.release.adapters import NamedAdapter

__all__ = ["command"]


@click.command("adapters", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("words", nargs=-1, required=True, metavar="BASE [NAME=]ADAPTER... | RECIPE")
@click.option(
    "-o", "--output", type=OUTPUT, metavar="DIR",
    help="Where the bundle goes.  [default: dist/NAME/adapters]",
)  # fmt: skip
@click.option("--no-gguf", is_flag=True, help="Make no GGUF files for llama.cpp.")
@click.option("--force", is_flag=True, help="Replace an existing result.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    words: tuple[str, ...],
    output: Path | None,
    no_gguf: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Package adapters beside their base, to switch among them while it runs.

    \b
    pack adapters BASE ADAPTER NAME=ADAPTER
    pack adapters BASE+ADAPTER BASE+OTHER
    pack adapters RECIPE             (with base_model, models and output: adapters)

    The bundle holds each adapter as PEFT saves it and as GGUF for llama.cpp, and scripts that
    start vLLM and llama.cpp with all of them.
    """  # noqa: D301 (click reads the character)
    from mergekit_lite.merge.lock import stated_recipe
    from mergekit_lite.release.adapters import bundle_adapters, describe

    stated = None
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        base, adapters, home, recipe = _of_recipe(Path(words[0]))
        name, stated = str(recipe.name), stated_recipe(recipe)
    else:
        base, adapters = _of_words(words)
        home, name = Path(), re.sub(r"[^A-Za-z0-9._-]+", "-", Path(base).name).strip("-._")
    folder = output or Path("dist") / (name or "base") / "adapters"
    result = bundle_adapters(
        base, adapters, home, folder, gguf=not no_gguf, force=force, recipe=stated
    )
    if as_json:
        click.echo(describe(result))
        return
    if quiet:
        return
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    for adapter in result.adapters:
        rank = f"rank {adapter.rank}" if adapter.rank else adapter.kind
        formats = ["PEFT", *(["vLLM"] if adapter.not_vllm is None else [])]
        formats += ["GGUF"] if adapter.not_gguf is None else []
        click.echo(f"{adapter.name}: {rank}, for {', '.join(formats)}")
        for reason in (adapter.not_vllm, adapter.not_gguf):
            if reason is not None and reason != "not asked for":
                click.echo(f"  {reason}")
    size = sum(o.size for o in result.outputs)
    click.echo(f"adapters: {len(result.adapters)} for {base}, {human_bytes(size)} → {folder}")


def _of_words(words: tuple[str, ...]) -> tuple[str, list[NamedAdapter]]:
    """Base and adapters of a command line."""
    from mergekit_lite.recipe.reference import parse_reference
    from mergekit_lite.release.adapters import NamedAdapter, adapter_name

    joined = ["+" in word and not Path(word).exists() for word in words]
    if not any(joined):
        if len(words) < 2:
            raise click.UsageError("expected BASE and adapters: pack adapters base lora-a lora-b")
        return words[0], [_named(word) for word in words[1:]]
    if not all(joined):
        raise click.UsageError("write BASE ADAPTER..., or BASE+ADAPTER for every adapter")
    references = [parse_reference(word) for word in words]
    if len({reference.base for reference in references}) > 1:
        raise click.UsageError("all adapters of a bundle are for one base")
    every = [adapter for reference in references for adapter in reference.adapters]
    if any(adapter.weight != 1.0 for adapter in every):
        raise click.UsageError("adapters beside a base have no weights; scale them at run time")
    return references[0].base, [
        NamedAdapter(adapter_name(adapter.name), adapter.name, adapter.any_base)
        for adapter in every
    ]


def _named(word: str) -> NamedAdapter:
    from mergekit_lite.release.adapters import NamedAdapter, adapter_name

    name, equals, reference = word.partition("=")
    if not equals or Path(word).exists():
        name, reference = "", word
    any_base = reference.startswith("!")
    reference = reference.removeprefix("!")
    return NamedAdapter(name or adapter_name(reference), reference, any_base)


def _of_recipe(path: Path) -> tuple[str, list[NamedAdapter], Path, Recipe]:
    """Base and adapters of a recipe."""
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe import read_recipe
    from mergekit_lite.release.adapters import adapters_of

    recipe = read_recipe(path, METHODS, ALIASES)
    return *adapters_of(recipe), path.parent, recipe
