"""pack completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["command"]


@click.command("completion", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script that completes pack's words in SHELL.

    For bash, put this into ~/.bashrc:  eval "$(pack completion bash)"
    """
    from mergekit_lite.cli import cli

    complete = get_completion_class(shell)
    if complete is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(complete(cli, {}, "pack", "_PACK_COMPLETE").source())
