"""Options and types that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from mergekit_lite.engines.protocol import Engine
    from mergekit_lite.merge.address import Address

__all__ = [
    "ACCEPT", "CACHE", "ENGINE", "OUTPUT", "OUTPUT_ANYWHERE", "PROFILE", "REASON", "SIZE", "TEXT",
    "Output", "RecipePath", "Size", "TextSource", "accepted_licences", "complete_merge",
    "engine_options", "make_engine", "split_method",
]  # fmt: skip

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Size(click.ParamType[int]):
    """A number of bytes: ``512MB``, ``2GiB``, ``1000000``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a size, or fail with an example."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is not a size; write for example 512MB or 2GiB", param, ctx)
        unit = match[2] or ""
        return int(float(match[1]) * (_UNITS.get(unit) or _BINARY[unit]))


class Output(click.ParamType["Path | Address"]):
    """Where a result goes: a folder, and for commands that can upload, S3 or the Hub.

    Args:
        remote: Whether the command can.
    """

    name = "output"

    def __init__(self, remote: bool = False) -> None:
        self._remote = remote

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | Address:
        """Tell a folder from an address, or fail where only a folder will do."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        if "://" not in value:
            return Path(value)
        from mergekit_lite.errors import PackError
        from mergekit_lite.merge.address import Address

        if not self._remote:
            self.fail(
                f"{value!r}: this command writes to this machine only; give a path, and upload the "
                "result with your own tool, or with: pack release --push-hub",
                param, ctx,
            )  # fmt: skip
        try:
            return Address.parse(value)
        except PackError as error:
            self.fail(f"{error.message}. {error.hint}", param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Folders."""
        return [CompletionItem(incomplete, type="dir")]


class TextSource(click.ParamType[Path]):
    """A text file, or a file of a data set on the Hub."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Find the file; one on the Hub is fetched."""
        from mergekit_lite.evaluate.text import find_text

        found = value if isinstance(value, Path) else find_text(str(value), Path())
        if found is None:
            self.fail(
                f"there is no file {value!r}; of the Hub: hf://datasets/ORG/NAME/FILE", param, ctx
            )
        return found


OUTPUT = Output()
OUTPUT_ANYWHERE = Output(remote=True)
SIZE = Size()
TEXT = TextSource()
RecipePath = click.Path(path_type=Path)


PROFILE = click.option(
    "--profile", type=click.Choice(["research", "community", "production"]),
    help="What it must hold; under production what lacks is an error.  "
    "[default: the recipe's, or community]",
)  # fmt: skip


def _set_cache(_ctx: click.Context, _param: click.Parameter, value: int | None) -> None:
    if value is not None:
        from mergekit_lite.checkpoint.far.fetcher import FETCHER

        FETCHER.cache_bytes = value


CACHE = click.option(
    "--cache", type=SIZE, metavar="SIZE", expose_value=False, callback=_set_cache,
    help="Keep so many bytes of what is fetched from hf://, s3://, gs://, https:// on this disk.",
)  # fmt: skip
ACCEPT = click.option(
    "--accept-license", "accept", multiple=True, metavar="ID",
    help="Answer for a licence that is not known or conflicts, by its id or its model's name.",
)  # fmt: skip
REASON = click.option(
    "--reason", "reasons", multiple=True, metavar="TEXT",
    help="Why, for each --accept-license; it is written into lock and card.",
)  # fmt: skip


ENGINE = click.Choice(["local", "ray"])

_ENGINE = click.option(
    "--engine", "engine_name", type=ENGINE, default="local",
    show_default=True,
    help="Where it is computed: this process, or a Ray cluster, a task per output file and layer.",
)  # fmt: skip
_ADDRESS = click.option(
    "--address", metavar="ADDRESS",
    help="With --engine ray: the cluster's, or auto for that of this machine.  [default: "
    "RAY_ADDRESS, or one that is started for the run]",
)  # fmt: skip


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --engine and --address to a command; `make_engine` takes them."""
    return _ENGINE(_ADDRESS(command))


def make_engine(name: str, address: str | None, threads: int | None) -> Engine:
    """The engine of a command, to be entered as a context.

    Raises:
        click.UsageError: An address is given to an engine that has none.
        PackError: What the engine needs is not installed.
    """
    if name == "ray":
        from mergekit_lite.engines.ray import RayEngine

        return RayEngine(address, threads)
    if address is not None:
        raise click.UsageError("--address goes with --engine ray")
    from mergekit_lite.engines.local import LocalEngine

    return LocalEngine()


def accepted_licences(accept: tuple[str, ...], reasons: tuple[str, ...]) -> dict[str, str]:
    """Licences with the reasons for accepting them.

    Raises:
        click.UsageError: A licence has no reason, or a reason no licence.
    """
    if len(accept) != len(reasons) or any(len(reason.strip()) < 3 for reason in reasons):
        raise click.UsageError(
            "every --accept-license needs its --reason, for example: --accept-license cc-by-nc-4.0 "
            "--reason 'agreement with its author of 2026-03-01'"
        )
    return dict(zip(accept, reasons, strict=True))


_METHOD_WORDS = (
    "adapter", "dare", "dare_linear", "dare_ties", "linear", "passthrough", "slerp",
    "task_arithmetic", "ties",
)  # fmt: skip


def complete_merge(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete METHOD and RECIPE: words first, then files; without importing the methods."""
    words = ctx.params.get(param.name or "") or ()
    found = [] if words else [CompletionItem(w) for w in _METHOD_WORDS if w.startswith(incomplete)]
    return [*found, CompletionItem(incomplete, type="file")]


def split_method(words: tuple[str, ...]) -> tuple[str | None, Path]:
    """Tell METHOD and RECIPE apart; METHOD may be left out.

    Raises:
        click.UsageError: There are not one or two words.
    """
    if len(words) == 1:
        if not words[0].endswith((".yaml", ".yml")) and not Path(words[0]).is_file():
            raise click.UsageError(
                f"missing RECIPE, for example: pack merge {words[0]} recipe.yaml"
            )
        return None, Path(words[0])
    if len(words) != 2:
        raise click.UsageError(
            "expected METHOD and RECIPE, for example: pack merge ties recipe.yaml"
        )
    return words[0], Path(words[1])
