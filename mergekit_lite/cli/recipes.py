"""pack recipes."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command("recipes", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List recipes to start from, or print the one called NAME.

    For example:  pack recipes ties-three-finetunes > recipe.yaml
    """
    from mergekit_lite.errors import PackError, nearest
    from mergekit_lite.resources import resource_folder

    found = {path.stem: path for path in sorted(resource_folder("recipes").glob("*.yaml"))}
    if name is None:
        for stem, path in found.items():
            first = path.read_text("utf-8").splitlines()[0].lstrip("# ")
            click.echo(f"{stem:<22} {first}")
        return
    if name not in found:
        raise PackError(f"there is no recipe '{name}'{nearest(name, found)}", "See: pack recipes")
    click.echo(found[name].read_text("utf-8"), nl=False)
