"""pack build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_lite.cli.hub import planned
from mergekit_lite.cli.options import (
    ACCEPT,
    CACHE,
    PROFILE,
    REASON,
    SIZE,
    accepted_licences,
    engine_options,
    make_engine,
)
from mergekit_lite.text import plain

if TYPE_CHECKING:
    from mergekit_lite.release.hub import HubPlan

__all__ = ["command"]


@click.command("build", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@PROFILE
@ACCEPT
@REASON
@click.option(
    "--sign", "key", metavar="KEY",
    help="Sign the release with a private key (PEM), or without one: sigstore.",
)  # fmt: skip
@click.option(
    "--push-hub", "repo", is_flag=False, flag_value="", default=None, metavar="[ORG/NAME]",
    help="Push the release to the Hub.  [default: hub: of the recipe]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace results that pack made with other inputs.")
@CACHE
@click.option("--memory", type=SIZE, default="512MB", show_default=True, help="Memory for weights.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all cores]"
)
@engine_options
@click.option("--rehash", is_flag=True, help="Hash inputs again that were hashed before.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    recipe: Path,
    profile: str | None,
    accept: tuple[str, ...],
    reasons: tuple[str, ...],
    key: str | None,
    repo: str | None,
    force: bool,
    memory: int,
    threads: int | None,
    engine_name: str,
    address: str | None,
    rehash: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Do all that RECIPE asks for: check licences, merge, quantize, compare, release, sign, push.

    `quantize:` lists what it is quantized to; a `version:` makes it a release. Of adapters, with
    `output: adapter` or `output: adapters`, one adapter is made, or a bundle of them. A step whose
    inputs have not changed is kept; one that was stopped is continued.
    """
    from mergekit_lite.checkpoint.known import KNOWN
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.merge.run import Options, check_memory, default_threads
    from mergekit_lite.release.build import Afterwards, build
    from mergekit_lite.release.draft import Asked

    asked = Asked(profile=profile, accepted=accepted_licences(accept, reasons))
    afterwards = Afterwards(key, None if repo is None else _plan(recipe, repo))
    KNOWN.enabled = not rehash
    check_memory(memory)
    with (
        make_engine(engine_name, address, threads) as engine,
        make_progress(quiet or as_json) as progress,
    ):
        options = Options(threads or default_threads(), memory, force=force, engine=engine)
        built = build(recipe, Path("dist"), options, progress, asked, afterwards)
    if as_json:
        steps = [
            {"name": s.name, "done": s.done, "seconds": round(s.seconds, 3),
             "folder": str(s.folder)}
            for s in built.steps
        ]  # fmt: skip
        click.echo(json.dumps({"steps": steps, "digest": built.digest,
                               "warnings": list(built.warnings)}))  # fmt: skip
        return
    for warning in built.warnings:
        click.secho(plain(f"warning: {warning}"), fg="yellow", err=True)
    if quiet:
        return
    for step in built.steps:
        what = f"{step.seconds:6.1f} s" if step.done else "    kept"
        click.echo(plain(f"{step.name:<16}{what}  → {step.folder}"))
    if not any(step.done for step in built.steps):
        click.echo("nothing was to be done: no input has changed")
    if built.digest is not None:
        click.echo(f"sha256:{built.digest}")


def _plan(recipe: Path, repo: str) -> HubPlan:
    from mergekit_lite.merge.lock import stated_recipe
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe import read_recipe

    return planned(repo, stated_recipe(read_recipe(recipe, METHODS, ALIASES)))
