"""pack methods."""

from __future__ import annotations

import json

import click

__all__ = ["command"]


@click.command("methods", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print them for programs.")
def command(name: str | None, as_json: bool) -> None:
    """List merge methods, or explain the one called NAME."""
    from mergekit_lite.errors import PackError, nearest
    from mergekit_lite.methods import ALIASES, METHODS

    if name is not None and name not in METHODS and name not in ALIASES:
        raise PackError(
            f"there is no merge method '{name}'{nearest(name, METHODS)}", "See: pack methods"
        )
    wanted = ALIASES.get(name, (name,)) if name else tuple(METHODS)
    if as_json:
        click.echo(json.dumps([_data(str(m)) for m in wanted], indent=2))
        return
    for each in wanted:
        method = METHODS[str(each)]
        click.secho(method.name, bold=True, nl=False)
        click.echo(f"  {method.summary}")
        click.echo(f"    {method.formula}")
        for parameter in method.parameters.values():
            default = "required" if parameter.default is None else f"{parameter.default}".lower()
            scope = ", per model" if parameter.each else ""
            click.echo(f"    {parameter.name:<10} [{default}{scope}] {parameter.summary}")
        needs = "needs a base_model; " if method.base else ""
        click.echo(f"    {needs}{method.paper}\n")


def _data(name: str) -> dict[str, object]:
    from mergekit_lite.methods import METHODS

    method = METHODS[name]
    return {
        "name": method.name,
        "summary": method.summary,
        "formula": method.formula,
        "paper": method.paper,
        "needs_base": method.base,
        "order_matters": not method.symmetric,
        "parameters": [
            {
                "name": p.name,
                "type": p.kind,
                "default": p.default,
                "per_model": p.each,
                "choices": list(p.choices),
                "range": [p.bounds.low, p.bounds.high] if p.bounds else None,
                "summary": p.summary,
            }
            for p in method.parameters.values()
        ],
    }
