"""pack deploy."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lite.cli.options import OUTPUT
from mergekit_lite.text import plain

__all__ = ["command"]

_OWN = Path("dist/registry.sqlite")


@click.command("deploy", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("release", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--to", "target", type=click.Choice(["vllm", "llama.cpp"]), required=True,
    help="The server.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=OUTPUT, metavar="DIR",
    help="Where the files go.  [default: dist/NAME/deploy/VERSION-SERVER]",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(1, 1 << 24), default=8192, show_default=True,
    help="Tokens that a request may have.",
)  # fmt: skip
@click.option("--file", metavar="GGUF", help="Which GGUF llama.cpp serves.  [default: the first]")
@click.option("--image", metavar="NAME", help="Image that the Dockerfile starts from.")
@click.option(
    "--registry", metavar="FILE|mlflow://…",
    help="Registry that tells what is in production now: the version to go back to.  "
    "[default: dist/registry.sqlite]",
)  # fmt: skip
def command(
    release: Path,
    target: str,
    output: Path | None,
    context: int,
    file: str | None,
    image: str | None,
    registry: str | None,
) -> None:
    """Write what it takes to serve the release in folder RELEASE.

    A Dockerfile, a script that starts the server, and a checklist, filled in as far as pack can
    tell: signature, format, memory, pinned versions, the version to go back to, licences.
    """
    from mergekit_lite.merge.run import default_threads
    from mergekit_lite.release.deploy import deploy_release
    from mergekit_lite.release.manifest import MANIFEST, read_manifest

    document = read_manifest(release / MANIFEST)[0]
    name, version = str(document["name"]), str(document["version"])
    folder = output or Path("dist") / name / "deploy" / f"{version}-{target}"
    if registry is None and _OWN.is_file():
        registry = str(_OWN)
    rollback = _in_production(registry, name, version) if registry else None
    made = deploy_release(
        release, target, folder, context, file, image, rollback, default_threads()
    )
    click.echo(plain(f"{', '.join(made.files)} → {made.folder}"))
    for line in made.open:
        click.echo(plain(f"to check: {line}"))


def _in_production(registry: str, name: str, version: str) -> str | None:
    """The version that is in production now, unless it is this one."""
    from mergekit_lite.release.registry import open_registry

    book = open_registry(registry)
    try:
        event = book.current(name).get("production")
    finally:
        book.close()
    return event.version if event and event.version != version else None
