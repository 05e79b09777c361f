"""pack schema."""

from __future__ import annotations

import json

import click

__all__ = ["command"]


@click.command("schema", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Print the JSON Schema of recipes, so that an editor completes and checks them.

    With the YAML extension of most editors, put this line at the top of a recipe, after running
    `pack schema > recipe.schema.json` beside it:

    # yaml-language-server: $schema=recipe.schema.json
    """
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe.json_schema import json_schema

    click.echo(json.dumps(json_schema(METHODS, ALIASES), indent=2, ensure_ascii=False))
