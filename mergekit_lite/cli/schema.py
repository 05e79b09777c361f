"""pack schema."""

from __future__ import annotations

import json

import click

__all__ = ["command"]

EXAMPLE = """\
# yaml-language-server: $schema=recipe.schema.json   (made by: pack schema > recipe.schema.json)
name: my-merge
merge_method: ties
base_model: path/to/base
models:
  - model: path/to/first
    parameters: {weight: 1.0, density: 0.5}
  - model: path/to/second
    parameters: {weight: 1.0, density: 0.5}
dtype: bfloat16
"""


@click.command("schema", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--example", is_flag=True, help="Print a recipe to start from instead.")
def command(example: bool) -> None:
    """Print the JSON Schema of recipes, so that an editor completes and checks them."""
    if example:
        click.echo(EXAMPLE, nl=False)
        return
    from mergekit_lite.methods import ALIASES, METHODS
    from mergekit_lite.recipe.json_schema import json_schema

    click.echo(json.dumps(json_schema(METHODS, ALIASES), indent=2, ensure_ascii=False))
