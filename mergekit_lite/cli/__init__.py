"""The pack command: nothing but options, calls, and what the user sees.

Commands are imported when they run, so that ``pack --help`` loads neither numba nor torch.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

import mergekit_lite
from mergekit_lite import collector
from mergekit_lite.errors import Interrupted, PackError
from mergekit_lite.text import plain

__all__ = ["main"]

COMMANDS = {
    "build": "Do all that a recipe asks for: merge, quantize, release, sign, push.",
    "merge": "Merge models as a recipe says, or adapters into a base.",
    "quantize": "Quantize a model, base+adapter, or a recipe, to GGUF, GPTQ, AWQ, int8 or ONNX.",
    "eval": "Measure models on text: perplexity, and distance from a reference.",
    "imatrix": "Measure how much each column of a model's weights matters, for GGUF.",
    "extract": "Make an adapter of what a fine-tune changed in its base.",
    "adapters": "Package adapters beside their base, for switching while it runs.",
    "release": "Release what was made: card, licences, bill of materials, manifest.",
    "verify": "Check the files of a release against all that it says of them.",
    "registry": "Keep book of versions: canary, staging, production.",
    "deploy": "Write what it takes to serve a release: Dockerfile, script, checklist.",
    "reproduce": "Make a release again from its recipe, and compare it.",
    "inspect": "Show what a checkpoint, an adapter or a recipe is.",
    "diff": "Show what fine-tunes changed in their base, by layer and module.",
    "licenses": "Show what licences of models ask of what is made of them.",
    "plan": "Show what a recipe would do, without reading weights.",
    "methods": "List merge methods, their parameters, formulas and papers.",
    "recipes": "List recipes to start from, or print one.",
    "schema": "Print the JSON Schema of recipes, for editors.",
    "completion": "Print the script that completes pack's words in a shell.",
}
"""Every command and its one line; each lives in the module of its name."""


class _Group(click.Group):
    """Loads a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mergekit_lite.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, and propose the nearest one for a misspelled word."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from mergekit_lite.errors import nearest

            ctx.fail(f"no such command '{args[0]}'{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with:  pack recipes ties-three-finetunes > a.yaml;  pack merge ties a.yaml",
)
@click.version_option(mergekit_lite.__version__, "-V", "--version", prog_name="pack")
@click.option("--debug", is_flag=True, envvar="PACK_DEBUG", help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Merge models and adapters, quantize and release them, and prove what was done."""


def main() -> None:
    """Run the command line and turn every error into a message and an exit code.

    Exit codes: 0 done, 1 the input or the world is at fault, 2 wrong usage, 130 stopped.
    """
    signal.signal(signal.SIGTERM, _on_terminate)
    collector.put_off()
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("PACK_DEBUG"))
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--debug"]  # wherever it stands
    try:
        code: Any = cli.main(prog_name="pack", standalone_mode=False)
    except click.exceptions.Abort:
        _fail(Interrupted("stopped", "Run the same command to continue."), 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Interrupted as error:
        _fail(error, 130)
    except PackError as error:
        if debug:
            raise
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail(Interrupted("stopped", "Run the same command to continue."), 130)
    except BrokenPipeError:
        # Whoever read our output has gone; what is left to flush has no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        _fail(PackError("not enough memory", "Give a smaller budget: --memory 256MB"), 1)
    except OSError as error:
        if debug:
            raise
        _fail(PackError(f"{error.filename or 'the system'}: {error.strerror or error}"), 1)
    except Exception as error:
        if debug:
            raise
        text = f"{type(error).__name__}: {error}"
        _fail(
            PackError(f"pack itself failed ({text})", "Please report this with: pack --debug …"), 1
        )
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: PackError, code: int) -> None:
    click.secho("error: " if code == 1 else "", fg="red", bold=True, nl=False, err=True)
    for text in filter(None, (error.message, error.hint)):
        click.echo("\n".join(plain(line) for line in text.split("\n")), err=True)
    sys.exit(code)


def _on_terminate(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
