"""pack registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_lite.cli.table import echo_table
from mergekit_lite.text import plain

if TYPE_CHECKING:
    from mergekit_lite.release.registry import Registry

__all__ = ["command"]

_FILE = click.option(
    "--registry", "path", default="dist/registry.sqlite", show_default=True,
    metavar="FILE|mlflow://…",
    help="The registry: a file, or MLflow's at mlflow://HOST:PORT.",
)  # fmt: skip


@click.group("registry", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Keep book of versions: which is in canary, staging, production, and which were."""


def _open(word: str, create: bool = False) -> Registry:
    from mergekit_lite.release.registry import open_registry

    return open_registry(word, create)


@command.command("add")
@click.argument("folder", type=click.Path(path_type=Path))
@_FILE
def add(folder: Path, path: str) -> None:
    """Add the release in FOLDER, after checking it."""
    from mergekit_lite.errors import PackError
    from mergekit_lite.merge.run import default_threads
    from mergekit_lite.release.verify import verify_release

    found = verify_release(folder, default_threads())
    if found.problems:
        raise PackError(f"{folder}: {found.problems[0]}", f"See all of it: pack verify {folder}")
    card = (folder / "README.md").read_text("utf-8") if (folder / "README.md").is_file() else ""
    registry = _open(path, create=True)
    try:
        metrics = {"bytes": found.size, **_measured(folder)}
        new = registry.add(found.name, found.version, found.digest, metrics, card)
    finally:
        registry.close()
    what = "added" if new else "was there already"
    click.echo(plain(f"{found.name} {found.version}: {what}; sha256:{found.digest}"))


def _measured(folder: Path) -> dict[str, float]:
    """What was measured when quantized files were verified."""
    results = json.loads((folder / "pack.lock").read_text("utf-8")).get("results", {})
    found = {}
    for name, lock in sorted(results.items()):
        checked = lock.get("verification") or {}
        if checked.get("divergence") is not None:
            found[f"{name} divergence"] = checked["divergence"]
    return found


@command.command("list")
@click.argument("name", required=False)
@_FILE
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
def show(name: str | None, path: str, as_json: bool) -> None:
    """List versions, where they are, and the history of NAME."""
    registry = _open(path)
    try:
        versions = registry.versions(name)
        names = list(dict.fromkeys(v.name for v in versions))
        current = {n: registry.current(n) for n in names}
        history = registry.history(name) if name else []
    finally:
        registry.close()
    rows = []
    for v in versions:
        at = [f"{s} {e.share:.0%}" for s, e in current[v.name].items() if e.version == v.version]
        rows.append([v.name, v.version, ", ".join(at) or "-", v.digest[:16], v.added])
    if as_json:
        click.echo(json.dumps({
            "versions": [
                {"name": v.name, "version": v.version, "digest": v.digest, "added": v.added,
                 "metrics": dict(v.metrics),
                 "stages": {s: e.share for s, e in current[v.name].items()
                            if e.version == v.version}}
                for v in versions
            ],
            "history": [
                {"number": e.number, "stage": e.stage, "version": e.version, "share": e.share,
                 "reason": e.reason, "at": e.at} for e in history
            ],
        }))  # fmt: skip
        return
    echo_table(["name", "version", "stage", "sha256", "added"], rows)
    if history:
        click.echo()
        echo_table(
            ["", "stage", "version", "share", "by", "at"],
            [[str(e.number), e.stage, e.version or "-", f"{e.share:.0%}", e.reason, e.at]
             for e in history],
        )  # fmt: skip


@command.command("promote")
@click.argument("name")
@click.argument("version")
@click.option("--to", "stage", required=True, metavar="STAGE", help="canary, staging, production")
@click.option("--share", type=float, default=1.0, show_default=True, help="Of the traffic.")
@_FILE
def promote(name: str, version: str, stage: str, share: float, path: str) -> None:
    """Put a version into a stage."""
    registry = _open(path)
    try:
        event = registry.promote(name, version, stage, share)
    finally:
        registry.close()
    click.echo(plain(f"{name}: {event.version} is in {stage}, {event.share:.0%} of the traffic"))


@command.command("rollback")
@click.argument("name")
@click.option("--from", "stage", default="production", show_default=True, metavar="STAGE")
@_FILE
def rollback(name: str, stage: str, path: str) -> None:
    """Put back what was in a stage before."""
    registry = _open(path)
    try:
        event = registry.rollback(name, stage)
    finally:
        registry.close()
    click.echo(plain(f"{name}: {event.version} is in {stage} again"))


@command.command("current")
@click.argument("name")
@click.option("--stage", default="production", show_default=True)
@_FILE
def current(name: str, stage: str, path: str) -> None:
    """Print the version that is in a stage."""
    from mergekit_lite.errors import PackError

    registry = _open(path)
    try:
        found = registry.current(name).get(stage)
    finally:
        registry.close()
    if found is None or found.version is None:
        raise PackError(f"{name}: nothing is in {stage}", "See: pack registry list")
    click.echo(found.version)
