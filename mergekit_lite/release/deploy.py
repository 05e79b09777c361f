"""What it takes to serve a release: a Dockerfile, a script that starts the server, a checklist.

They are written beside the release, not into it: what a machine needs, and which version one would
go back to, changes while the release does not.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.errors import PackError, nearest
from mergekit_lite.merge.lock import LOCK_NAME
from mergekit_lite.merge.writer import explained, write_durably
from mergekit_lite.release.card import render
from mergekit_lite.release.facts import cache_bytes, file_size
from mergekit_lite.release.licences.combine import Parent, combine
from mergekit_lite.release.licences.table import find_licence
from mergekit_lite.release.manifest import (
    MANIFEST,
    SIGNATURE,
    Entry,
    read_manifest,
    read_object,
)
from mergekit_lite.release.verify import verify_release
from mergekit_lite.release.version import is_before
from mergekit_lite.release.writer import new_folder
from mergekit_lite.resources import resource_folder

__all__ = ["TARGETS", "Deployment", "deploy_release"]

TARGETS: Mapping[str, tuple[str, str]] = {
    "vllm": ("vllm/vllm-openai:v0.11.0", "deploy-vllm.sh.jinja"),
    "llama.cpp": ("ghcr.io/ggml-org/llama.cpp:server", "deploy-llama-server.sh.jinja"),
}
"""Programs that serve: the image that a Dockerfile starts from, and the template of the script."""

_PORT = 8000


@dataclass(frozen=True)
class Deployment:
    """What was written.

    Attributes:
        folder: Where it lies.
        files: Names of its files.
        open: What is left for a person to check.
    """

    folder: Path
    files: tuple[str, ...]
    open: tuple[str, ...]


@dataclass(frozen=True)
class _Check:
    """A line of the checklist: what, whether pack could tell that it is so, and what it found."""

    what: str
    done: bool
    found: str = ""


def deploy_release(
    release: Path,
    target: str,
    folder: Path,
    context: int,
    file: str | None = None,
    image: str | None = None,
    rollback: str | None = None,
    threads: int = 1,
) -> Deployment:
    """Write what it takes to serve a release.

    Args:
        release: Its folder.
        target: Of `TARGETS`.
        folder: Where the result goes.
        context: Tokens that a request may have.
        file: The GGUF to serve with llama.cpp; the first if None.
        image: To start from, instead of the usual one.
        rollback: Version to go back to; the release before this one if None.
        threads: Files that are hashed side by side.

    Raises:
        PackError: The release is damaged, or holds nothing for this target.
    """
    document, entries, digest = read_manifest(release / MANIFEST)
    found = verify_release(release, threads)
    if found.problems:
        raise PackError(
            f"{release}: is not as it was released: {found.problems[0]}",
            f"See all of it: pack verify {release}",
        )
    if folder.exists():
        raise PackError(f"{folder}: already exists", "Remove it, or choose another: -o DIR")
    served = _served(release, entries, target, file)
    config = read_object(release / "config.json")
    longest = (config.get("text_config") or config).get("max_position_embeddings")
    if isinstance(longest, int) and longest > 0:
        context = min(context, longest)
    size = sum(entries[name].size for name in served if name.endswith((".safetensors", ".gguf")))
    cache = cache_bytes(config) * context // 1024
    previous = rollback or _before(release)
    chosen = image or TARGETS[target][0]
    checks = [
        _Check("the release holds, byte by byte", True, f"sha256:{digest}"),
        _Check("it is signed", (release / SIGNATURE).is_file(),
               "check whose signature it is: --public-key" if (release / SIGNATURE).is_file()
               else "run: pack release --sign KEY"),
        _Check("its format fits the target", True, f"{target} reads {_kind(served)}"),
        *_measured(release, served),
        _Check("memory is enough", False,
               f"{file_size(size)} of weights" + (f" and {file_size(cache)} for {context} tokens "
               "of context in 16 bit, for each request that runs" if cache else "")),
        _Check("the server is pinned", "@sha256:" in chosen,
               f"{chosen}" if "@sha256:" in chosen else f"{chosen} is a tag, which may move; take "
               "its digest: docker buildx imagetools inspect"),
        _Check("it is known what to go back to", previous is not None,
               f"version {previous}" if previous else "this is the first version here"),
        *_obligations(release),
        _Check("requests are answered", False, f"curl -fsS localhost:{_PORT}/health"),
    ]  # fmt: skip
    values: dict[str, Any] = {
        "name": str(document["name"]), "version": str(document["version"]), "digest": digest,
        "target": target, "image": chosen, "files": served, "port": _PORT, "context": context,
        "gguf": next((name for name in served if name.endswith(".gguf")), ""),
        "checks": checks, "quoted": shlex.quote,
    }  # fmt: skip
    files = {
        "Dockerfile": "deploy-dockerfile.jinja",
        "start.sh": TARGETS[target][1],
        "CHECKLIST.md": "deploy-checklist.md.jinja",
    }
    with new_folder(folder) as partial, explained(folder):
        for name, template in files.items():
            text = (resource_folder("templates") / template).read_text("utf-8")
            write_durably(partial / name, render(text, values, name).encode())
        (partial / "start.sh").chmod(0o755)
    return Deployment(folder, tuple(files), tuple(c.what for c in checks if not c.done))


def _served(
    release: Path, entries: Mapping[str, Entry], target: str, file: str | None
) -> list[str]:
    """The files that the server needs, within the release."""
    kinds = {
        r.get("kind") for r in (read_object(release / LOCK_NAME).get("results") or {}).values()
    }
    if kinds & {"adapter", "adapters", "extract"}:
        raise PackError(
            f"{release}: holds adapters, which are served beside their base",
            "See ADAPTERS.md in it and its folder serving/, or merge one into its base first.",
        )
    if target == "llama.cpp":
        ggufs = sorted(name for name in entries if name.endswith(".gguf"))
        if file is not None and file not in ggufs:
            raise PackError(f"{release}: holds no '{file}'{nearest(file, ggufs)}",
                            f"Its GGUF files: {', '.join(ggufs) or 'none'}")  # fmt: skip
        if not ggufs:
            raise PackError(
                f"{release}: holds no GGUF, which llama.cpp needs",
                "Add quantize: [{scheme: q4_k_m}] to the recipe, or serve it with vllm.",
            )
        chosen = file or ggufs[0]
        first, marker, rest = chosen.partition("-00001-of-")
        return [n for n in ggufs if n.startswith(f"{first}-0") and n.endswith(rest[-10:])] \
            if marker else [chosen]  # fmt: skip
    top = sorted(name for name in entries if "/" not in name)
    if "config.json" not in top or not any(name.endswith(".safetensors") for name in top):
        raise PackError(
            f"{release}: holds no whole model in safetensors, which {target} needs",
            "Serve its GGUF: --to llama.cpp",
        )
    papers = (".md", ".cdx.json", ".intoto.json", ".lock", ".yaml")
    return [n for n in top if not n.endswith(papers) and n not in ("NOTICE", "LICENSE", MANIFEST)]


def _kind(served: Sequence[str]) -> str:
    return "GGUF" if any(name.endswith(".gguf") for name in served) else "safetensors"


def _measured(release: Path, served: Sequence[str]) -> list[_Check]:
    """What quantizing the served file did, where that was measured."""
    results = read_object(release / LOCK_NAME).get("results") or {}
    for result in results.values():
        outputs = {str(o["path"]) for o in result.get("outputs", [])}
        if result.get("kind") != "quantize" or not outputs & {n.rpartition("/")[2] for n in served}:
            continue
        found = (result.get("verification") or {}).get("divergence")
        told = "not measured" if found is None else f"KL divergence {found:.2e}"
        return [_Check("what quantizing did is known", found is not None, told)]
    return []


def _before(release: Path) -> str | None:
    """The newest version beside a release that is older than it."""
    found = [path.parent.name for path in release.parent.glob(f"*/{MANIFEST}")]
    try:
        older = [version for version in found if is_before(version, release.name)]
        best = None
        for version in older:
            best = version if best is None or is_before(best, version) else best
    except AssertionError:  # folders that are no versions
        return None
    return best


def _obligations(release: Path) -> list[_Check]:
    """What whoever serves it must do by the licences of its parents."""
    bill = read_object(release / "sbom.cdx.json")
    ancestors = bill.get("metadata", {}).get("component", {}).get("pedigree", {})
    names = {
        str(licence.get("license", {}).get("id") or licence.get("license", {}).get("name"))
        for parent in ancestors.get("ancestors", []) for licence in parent.get("licenses", [])
    }  # fmt: skip
    parents = [Parent(name, find_licence(name), name) for name in sorted(names)]
    kinds = ("display", "policy", "users", "noncommercial", "source", "restrictions")
    return [
        _Check(f"licence: {o.what}", False, ", ".join(o.because))
        for o in combine(parents).obligations if o.kind in kinds
    ]  # fmt: skip
