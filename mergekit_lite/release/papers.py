"""Licence texts and NOTICE: what licences want to go along with a release."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mergekit_lite.release.card import render
from mergekit_lite.release.draft import Draft
from mergekit_lite.release.gather import Made
from mergekit_lite.release.licences.find import licence_files, papers_of, standard_text
from mergekit_lite.release.licences.table import find_licence
from mergekit_lite.release.sources import ParentSource
from mergekit_lite.resources import resource_folder

__all__ = ["licence_texts", "made_by", "make_notice"]

_PASSED_ON = (
    ("policy", "Acceptable use"), ("restrictions", "Restrictions"), ("link", "Licence"),
    ("limit", "Limit"),
)  # fmt: skip


def licence_texts(draft: Draft) -> Iterator[tuple[str, bytes]]:
    """Texts of the parents' licences, and LICENSE.

    A parent's own text comes first; where it brings none, the standard one, as far as pack has it.
    """
    found = find_licence(draft.licence) if draft.licence else None
    own: bytes | None = None
    for source, folder in zip(draft.sources, _folders(draft.sources), strict=True):
        terms = source.parent.terms
        for name, content in _texts(source):
            yield f"licenses/{folder}/{name}", content
            if found is not None and terms == (found,) and own is None:
                own = content
    if own is None and found is not None:
        own = standard_text(found)
    if own is None and draft.licence is not None:
        where = f"{found.title}\n{found.url}\n" if found else f"{draft.licence}\n"
        own = f"This model is released under:\n{where}".encode()
    if own is not None:
        yield "LICENSE", own


def _texts(source: ParentSource) -> Iterator[tuple[str, bytes]]:
    files = licence_files(source.folder)
    for path in [*files, *papers_of(source.folder, r"use_?policy|acceptable_?use")]:
        yield path.name, path.read_bytes()
    terms = source.parent.terms if not files else ()
    for licence in terms:
        standard = standard_text(licence)
        if standard is not None:
            yield "LICENSE" if len(terms) == 1 else f"LICENSE-{licence.id}", standard


def _folders(sources: Sequence[ParentSource]) -> list[str]:
    """A folder's name for each parent, no two alike."""
    found: list[str] = []
    for source in sources:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", source.parent.name).strip("-.") or "parent"
        names = (plain, *(f"{plain}-{number}" for number in range(2, len(sources) + 2)))
        found.append(next(name for name in names if name not in found))
    return found


def make_notice(draft: Draft) -> bytes:
    """Lines that licences want, what was changed, and the parents' own notices."""
    values = {
        "name": draft.made.title,
        "made_by": made_by(draft.made),
        "wanted": [
            o.what for o in draft.verdict.obligations
            if o.kind in ("notice", "display") and not o.what.startswith("notices of")
        ],
        "parents": [
            {"name": s.parent.name,
             "licence": " and ".join(one.title for one in s.parent.terms) or "licence not known",
             "notice": _own_notice(s)}
            for s in draft.sources
        ],
        "obligations": [
            f"{what}: {o.what}" for kind, what in _PASSED_ON for o in draft.verdict.obligations
            if o.kind == kind
        ],
    }  # fmt: skip
    template = (resource_folder("templates") / "NOTICE.jinja").read_text("utf-8")
    return render(template, values, "NOTICE").rstrip().encode() + b"\n"


def _own_notice(source: ParentSource) -> str:
    found = papers_of(source.folder, r"notice(\.|$)")
    return "\n".join(path.read_text("utf-8", "replace").rstrip() for path in found)


def made_by(made: Made) -> str:
    """How it was made, in words."""
    recipe = made.recipe
    if made.model.kind == "adapters":
        return "packing adapters beside their base"
    if recipe:
        return f"merging with {recipe['merge_method']}"
    return {"quantize": "quantizing", "extract": "extracting an adapter"}.get(
        made.model.kind, "merging"
    )
