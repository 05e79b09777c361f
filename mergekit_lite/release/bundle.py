"""A release: what was made under a name, gathered, described and sealed, under a version.

Weights are linked, not copied, and not read: their digests were computed as they were written. All
else follows from locks, cards and licences, so the same results give the same release.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from exporters.gguf.about import size_label
from mergekit_lite.analyse.look import look_at
from mergekit_lite.checkpoint.locate import open_checkpoint
from mergekit_lite.errors import PackError
from mergekit_lite.merge.config import to_json
from mergekit_lite.merge.lock import LOCK_NAME
from mergekit_lite.merge.writer import (
    explained,
    partial_of,
    refuse_existing,
    replace_folder,
    write_durably,
)
from mergekit_lite.release.card import ASKED, front_matter, render_card, standard_template
from mergekit_lite.release.gather import Artifact, Made
from mergekit_lite.release.licences.combine import Parent, Verdict, combine
from mergekit_lite.release.licences.find import find_parent, licence_files
from mergekit_lite.release.licences.table import find_licence
from mergekit_lite.release.manifest import MANIFEST, Entry, make_manifest
from mergekit_lite.release.provenance import make_provenance
from mergekit_lite.release.sbom import make_sbom

__all__ = ["Release", "make_release"]

_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?")


@dataclass(frozen=True)
class Release:
    """What was released.

    Attributes:
        folder: Where it lies.
        name: Of the release.
        version: Of the release.
        digest: Of the release: that of its manifest.
        entries: Its files but the manifest.
        notes: What the user should know.
        warnings: What a good release would have.
    """

    folder: Path
    name: str
    version: str
    digest: str
    entries: Sequence[Entry]
    notes: Sequence[str]
    warnings: Sequence[str]


@dataclass(frozen=True)
class _Source:
    """A parent, as a lock names it, and where its small files lie."""

    entry: Mapping[str, Any]
    parent: Parent
    folder: Path | None

    @property
    def digest(self) -> str:
        """Of the list of its files' digests."""
        files = sorted(f"{f['sha256']}  {f['path']}" for f in self.entry["files"])
        return hashlib.sha256("\n".join(files).encode()).hexdigest()


def make_release(
    made: Made,
    dist: Path,
    home: Path,
    version: str | None = None,
    template: str | None = None,
    production: bool = False,
) -> Release:
    """Make a release, which appears when it is whole.

    Args:
        made: What was made.
        dist: Folder of all results.
        home: Folder that the locks' relative paths start from.
        version: Semantic version; the recipe's if None.
        template: Text of the card's template; pack's own if None.
        production: Whether what a good release would have is an error where it lacks.

    Raises:
        PackError: Licences conflict, the version exists, or something is missing.
    """
    recipe = made.recipe
    chosen = version or recipe.get("version")
    if chosen is None:
        raise PackError(
            "the release has no version", "Give one: --version 1.0.0, or version: in the recipe."
        )
    if not _VERSION.fullmatch(chosen):
        raise PackError(f"'{chosen}' is no semantic version", "Write for example 1.2.0.")
    folder = dist / made.name / "release" / chosen
    if folder.exists():
        raise PackError(
            f"{folder}: version {chosen} was released already; a version never changes",
            "Give the next one, for example --version with a higher number.",
        )
    refuse_existing(folder, force=False)
    sources, notes = _sources(made, home, recipe.get("licenses") or {})
    licence = recipe.get("license") or _only_licence(sources)
    verdict = combine([s.parent for s in sources], licence, made.name)
    warnings = _judge(verdict, recipe, licence, production=production)
    writer = _Writer(folder)
    try:
        _gather_files(made, writer)
        _small_files(made, recipe, licence, sources, verdict, chosen, template, writer)
        manifest = make_manifest(made.name, chosen, writer.entries)
        writer.publish(manifest)
    finally:
        writer.drop()
    digest = hashlib.sha256(manifest).hexdigest()
    return Release(folder, made.name, chosen, digest, writer.entries, notes, warnings)


def _sources(
    made: Made, home: Path, by_recipe: Mapping[str, str]
) -> tuple[list[_Source], list[str]]:
    """The parents of all results, but for what was made on the way."""
    own = {entry.sha256 for artifact in made.artifacts for entry in artifact.files}
    found: dict[str, _Source] = {}
    notes: list[str] = []
    for artifact in made.artifacts:
        for entry in artifact.lock.get("inputs", []):
            reference = entry["model"]
            digests = {file["sha256"] for file in entry["files"]}
            if reference in found or digests <= own:
                continue
            folder, config = _place(reference, home)
            kind = "adapter" if _is_adapter(entry) else "model"
            parent, more = find_parent(reference, folder, config, by_recipe.get(reference), kind)
            notes += more
            found[reference] = _Source(entry, parent, folder)
    return [found[name] for name in sorted(found)], notes


def _is_adapter(entry: Mapping[str, Any]) -> bool:
    names = {file["path"] for file in entry["files"]}
    return "adapter_config.json" in names and "config.json" not in names


def _place(reference: str, home: Path) -> tuple[Path | None, Mapping[str, object]]:
    try:
        source = look_at(reference, home)
    except PackError:
        return None, {}
    source.checkpoint.close()
    return source.checkpoint.folder, source.checkpoint.config


def _only_licence(sources: Sequence[_Source]) -> str | None:
    """The licence of all parents, if they have one and the same."""
    ids = {s.parent.licence.id if s.parent.licence else None for s in sources}
    return ids.pop() if len(ids) == 1 else None


def _judge(
    verdict: Verdict, recipe: Mapping[str, Any], licence: str | None, *, production: bool
) -> list[str]:
    if verdict.conflicts:
        listed = "".join(f"\n  {conflict.sentence}" for conflict in verdict.conflicts)
        raise PackError(
            f"licences conflict:{listed}",
            "See: pack licenses RECIPE. Choose other models, another licence or another name.",
        )
    card = recipe.get("card") or {}
    warnings = [f"the licence of {p.name} is not known" for p in verdict.unknown]
    warnings += [] if licence else ["the release states no licence (license: in the recipe)"]
    warnings += [
        f"the card lacks '{key}' (card: in the recipe)" for key in ASKED if not card.get(key)
    ]
    if production and warnings:
        listed = "".join(f"\n  {warning}" for warning in warnings)
        raise PackError(f"not ready for production:{listed}", "Add what is missing to the recipe.")
    return warnings


class _Writer:
    """Gathers a release beside its final folder."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.entries: list[Entry] = []
        self._partial = partial_of(final)
        with explained(final):
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def link(self, source: Path, entry: Entry) -> None:
        """Put in a file whose digest is known, without reading it."""
        target = self._partial / entry.path
        with explained(self.final):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.resolve(), target)
            except OSError:
                shutil.copyfile(source, target)
        self.entries.append(entry)

    def write(self, path: str, content: bytes) -> None:
        """Put in a small file."""
        with explained(self.final):
            write_durably(self._partial / path, content)
        self.entries.append(Entry(path, len(content), hashlib.sha256(content).hexdigest()))

    def publish(self, manifest: bytes) -> None:
        """Give the release its name."""
        with explained(self.final):
            write_durably(self._partial / MANIFEST, manifest)
            replace_folder(self._partial, self.final)

    def drop(self) -> None:
        """Remove what did not become a release."""
        shutil.rmtree(self._partial, ignore_errors=True)


def _gather_files(made: Made, writer: _Writer) -> None:
    for artifact in made.artifacts:
        for entry in artifact.files:
            path = _path(made, artifact, entry.path)
            writer.link(artifact.folder / entry.path, Entry(path, entry.size, entry.sha256))


def _path(made: Made, artifact: Artifact, path: str) -> str:
    """The model itself lies at the top, so that programs load the folder; the rest below."""
    if artifact is made.main:
        return path
    return f"{artifact.lock.get('format', artifact.folder.name)}/{path}"


def _small_files(
    made: Made,
    recipe: Mapping[str, Any],
    licence: str | None,
    sources: Sequence[_Source],
    verdict: Verdict,
    version: str,
    template: str | None,
    writer: _Writer,
) -> None:
    weights = list(writer.entries)
    locks = {artifact.folder.name: artifact.lock for artifact in made.artifacts}
    writer.write(LOCK_NAME, to_json({"lock_version": 1, "kind": "release", "results": locks}))
    if recipe:
        writer.write("recipe.yaml", yaml.safe_dump(dict(recipe), sort_keys=True).encode())
    for path, content in _licence_texts(sources, licence):
        writer.write(path, content)
    notice = _notice(made, sources, verdict)
    writer.write("NOTICE", notice.encode())
    values = _card_values(made, recipe, licence, sources, verdict, version, weights)
    writer.write("README.md", render_card(template or standard_template(), values))
    inputs = [source.entry for source in sources]
    parents = [source.parent for source in sources]
    architecture = values["architecture"] or None
    sbom = make_sbom(made.name, version, licence, architecture, inputs, parents, weights)
    provenance = make_provenance(made, weights)
    writer.write("sbom.cdx.json", sbom)
    writer.write("provenance.intoto.json", provenance)


def _licence_texts(sources: Sequence[_Source], licence: str | None) -> Iterator[tuple[str, bytes]]:
    """Texts of the parents' licences, and LICENSE: one of them, or where the text is."""
    found = find_licence(licence) if licence else None
    own: bytes | None = None
    for source in sources:
        for path in licence_files(source.folder):
            content = path.read_bytes()
            yield f"licenses/{_safe(source.parent.name)}/{path.name}", content
            if found is not None and source.parent.licence is found and own is None:
                own = content
    if own is not None:
        yield "LICENSE", own
    elif licence is not None:
        where = f"{found.title}\n{found.url}\n" if found else f"{licence}\n"
        yield "LICENSE", f"This model is released under:\n{where}".encode()


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name if "/" in name else name).strip("-.")


def _notice(made: Made, sources: Sequence[_Source], verdict: Verdict) -> str:
    """Lines that licences want, what was changed, and the parents' own notices."""
    wanted = [o.what for o in verdict.obligations if o.kind in ("notice", "display")]
    lines = [made.name, ""]
    lines += [line for line in wanted if not line.startswith("notices of")]
    lines += ["", f"This is a changed model: made by {_made_by(made)} of:"]
    for source in sources:
        licence = source.parent.licence.title if source.parent.licence else "licence not known"
        lines.append(f"- {source.parent.name} ({licence})")
    for kind, what in (("policy", "Acceptable use"), ("restrictions", "Restrictions"),
                       ("link", "Licence"), ("limit", "Limit")):  # fmt: skip
        lines += [f"{what}: {o.what}" for o in verdict.obligations if o.kind == kind]
    for source in sources:
        path = source.folder / "NOTICE" if source.folder else None
        if path is not None and path.is_file():
            lines += ["", f"Notice of {source.parent.name}:", path.read_text("utf-8", "replace")]
    return "\n".join(lines).rstrip() + "\n"


def _made_by(made: Made) -> str:
    recipe = made.recipe
    if recipe:
        return f"merging with {recipe['merge_method']}"
    return {"quantize": "quantizing", "extract": "extracting an adapter"}.get(
        made.main.kind, "merging"
    )


def _card_values(
    made: Made,
    recipe: Mapping[str, Any],
    licence: str | None,
    sources: Sequence[_Source],
    verdict: Verdict,
    version: str,
    weights: Sequence[Entry],
) -> dict[str, Any]:
    config = _config(made)
    card = dict.fromkeys(
        ("summary", "intended_use", "out_of_scope", "training_data", "evaluation", "limitations",
         "ethics", "citation", "authors", "contact"), None
    ) | dict(recipe.get("card") or {})  # fmt: skip
    architectures = config.get("architectures")
    architecture = (
        str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    )
    bases = [s.parent.name for s in sources if s.entry.get("revision")]
    kinds = {artifact.kind for artifact in made.artifacts}
    relation = "merge" if "merge" in kinds else "quantized" if kinds == {"quantize"} else "adapter"
    ggufs = [entry.path for entry in weights if entry.path.endswith(".gguf")]
    found = find_licence(licence) if licence else None
    head = front_matter(
        licence, bases, relation, card.get("languages") or [], card.get("tags") or [],
        "peft" if relation == "adapter" else "transformers" if "merge" in kinds else "gguf",
    )  # fmt: skip
    return {
        "front_matter": head,
        "name": made.name,
        "version": version,
        "card": card,
        "display": [o.what for o in verdict.obligations if o.kind == "display"],
        "made_by": _made_by(made),
        "architecture": architecture,
        "parameters": _parameters(made),
        "base": recipe.get("base_model") or "",
        "licence": found.title if found else licence or "",
        "licence_url": found.url if found else "",
        "parents": [
            {"name": s.parent.name, "revision": s.entry.get("revision"), "digest": s.digest,
             "licence": s.parent.licence.id if s.parent.licence else s.parent.stated}
            for s in sources
        ],
        "recipe": yaml.safe_dump(_without_card(recipe), sort_keys=True) if recipe else "",
        "quantized": list(_quantized(made)),
        "files": [{"path": e.path, "size": _size(e.size)} for e in weights if e.size > 1 << 16],
        "in_transformers": made.main.kind == "merge",
        "ggufs": ggufs,
        "obligations": [
            o.what for o in verdict.obligations if o.kind not in ("display", "prefix", "not_first")
        ],
    }  # fmt: skip


def _parameters(made: Made) -> str:
    """How many weights the model has, from headers; nothing where it is no whole model."""
    if made.main.kind != "merge":
        return ""
    checkpoint = open_checkpoint(str(made.main.folder), Path()).checkpoint
    try:
        return size_label(sum(checkpoint.spec(name).elements for name in checkpoint.names()))
    finally:
        checkpoint.close()


def _config(made: Made) -> Mapping[str, Any]:
    path = made.main.folder / "config.json"
    found: Any = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _without_card(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "card"}


def _quantized(made: Made) -> Iterator[dict[str, str]]:
    for artifact in made.artifacts:
        if artifact.kind != "quantize":
            continue
        types = artifact.lock.get("types") or {}
        counts: dict[str, int] = {}
        for kind in types.values():
            counts[kind] = counts.get(kind, 0) + 1
        checked = artifact.lock.get("verification") or {}
        measured = "not measured"
        if checked.get("divergence") is not None:
            measured = (
                f"KL divergence {checked['divergence']:.2e}, the same top token at "
                f"{checked['top_token_agreement']:.1%} of {checked['positions']} positions"
            )
        elif checked.get("largest_relative_error") is not None:
            measured = f"largest error of a tensor {checked['largest_relative_error']:.2%}"
        yield {
            "path": _path(made, artifact, artifact.files[0].path),
            "types": ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())),
            "bits": str(artifact.lock.get("bits_per_weight", "-")),
            "measured": measured,
        }


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
