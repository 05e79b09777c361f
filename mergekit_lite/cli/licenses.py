"""pack licenses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_lite.cli.options import ACCEPT, PROFILE, REASON, accepted_licences
from mergekit_lite.cli.table import echo_table
from mergekit_lite.text import plain

if TYPE_CHECKING:
    from mergekit_lite.release.licences.combine import Verdict
    from mergekit_lite.release.licences.judge import Judged

__all__ = ["command"]


@click.command("licenses", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("words", nargs=-1, required=True, metavar="RECIPE | MODEL...")
@click.option("--as", "released_as", metavar="LICENCE", help="Licence of the release.")
@click.option("--name", help="Name of the release.")
@click.option("--check", is_flag=True, help="Exit with an error if something conflicts.")
@PROFILE
@ACCEPT
@REASON
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
def command(
    words: tuple[str, ...],
    released_as: str | None,
    name: str | None,
    check: bool,
    profile: str | None,
    accept: tuple[str, ...],
    reasons: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what licences of models ask of what is made of them, and what conflicts.

    Licences are taken from the recipe (licenses:), the models' cards, configs and LICENSE files, in
    this order. This is no legal advice.
    """
    from mergekit_lite.errors import PackError
    from mergekit_lite.release.licences.judge import judge_models, judge_recipe

    accepted = accepted_licences(accept, reasons)
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")) and Path(words[0]).is_file():
        judged = judge_recipe(Path(words[0]), released_as, name, accepted)
    else:
        judged = judge_models(words, Path(), released_as, name, accepted=accepted)
    verdict = judged.verdict
    if as_json:
        click.echo(json.dumps(judged.describe(), indent=2))
    else:
        _show(judged)
    problems = [conflict.sentence for conflict in verdict.conflicts]
    if profile == "production":
        problems += [f"the licence of {p.name} is not known" for p in verdict.unknown]
    if check and problems:
        more = "".join(f"\n  {problem}" for problem in problems)
        raise PackError(
            f"{len(problems)} problem{'s' * (len(problems) != 1)} with licences:{more}",
            "Leave out a model, choose another licence for the release, or ask its author.",
        )


def _show(judged: Judged) -> None:
    rows = [
        [parent.name, " AND ".join(one.id for one in parent.terms) or parent.stated or "-",
         ", ".join(one.kind for one in parent.terms) or "not known"]
        for parent in judged.parents
    ]  # fmt: skip
    echo_table(["parent", "licence", "kind"], rows)
    verdict = judged.verdict
    if verdict.obligations:
        click.echo()
        echo_table(
            ["obligation", "what", "because of"],
            [[o.kind, o.what, ", ".join(o.because)] for o in verdict.obligations],
        )
    click.echo()
    _conclude(verdict)
    for note in judged.notes:
        click.echo(plain(f"note: {note}"))
    click.echo("This is no legal advice.")


def _conclude(verdict: Verdict) -> None:
    for conflict in verdict.conflicts:
        click.secho(plain(f"conflict: {conflict.sentence}"), fg="red")
    for line in verdict.accepted:
        click.secho(plain(f"accepted: {line}"), fg="yellow")
    if not verdict.conflicts:
        under = " or ".join(verdict.release_as) or "any licence that keeps the obligations"
        known = ", as far as licences are known" if verdict.unknown else ""
        click.echo(f"may be released under: {under}{known}")
