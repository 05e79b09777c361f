"""What may be made of models under several licences: obligations add up, conflicts are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from mergekit_lite.errors import PackError, nearest
from mergekit_lite.release.licences.expression import find_licences
from mergekit_lite.release.licences.table import KEEP, Licence, find_licence

__all__ = ["Conflict", "Obligation", "Parent", "Verdict", "combine"]


@dataclass(frozen=True)
class Parent:
    """Something that goes into a release.

    Attributes:
        name: As the user wrote it.
        licence: Its licence; None if it is not known.
        stated: The licence as it is stated; empty if nothing is.
        kind: ``model``, ``adapter`` or ``data``.
        family: Of the model, where it is known.
        also: More licences that hold together with the first.
        partly: Whether there is one more, which is not known.
    """

    name: str
    licence: Licence | None
    stated: str = ""
    kind: str = "model"
    family: str = ""
    also: tuple[Licence, ...] = ()
    partly: bool = False

    @property
    def terms(self) -> tuple[Licence, ...]:
        """All its licences; none if they are not known."""
        return () if self.licence is None else (self.licence, *self.also)

    @property
    def of_family(self) -> str:
        """The family of the model: as known, or as its licence tells."""
        return self.family or (self.licence.family if self.licence else "")


@dataclass(frozen=True)
class Obligation:
    """What a release must do.

    Attributes:
        kind: ``copy``, ``link``, ``notice``, ``changes``, ``display``, ``prefix``, ``not_first``,
            ``policy``, ``restrictions``, ``users``, ``noncommercial``, ``improve``, ``source``,
            ``same`` or ``limit``.
        what: In words, or the text itself.
        because: Ids of the licences that ask it.
    """

    kind: str
    what: str
    because: tuple[str, ...]


@dataclass(frozen=True)
class Conflict:
    """Why a release is not possible.

    Attributes:
        rule: Which rule it breaks, in a word.
        sentence: For a person.
        parents: Names of those that conflict.
    """

    rule: str
    sentence: str
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What follows for a release.

    Attributes:
        obligations: What it must do.
        conflicts: What stands against it.
        unknown: Parents whose licence is not known.
        release_as: Licences that it may be released under; empty for any that keeps the
            obligations.
        accepted: What whoever releases answers for, with the reason, a line each.
    """

    obligations: tuple[Obligation, ...]
    conflicts: tuple[Conflict, ...]
    unknown: tuple[Parent, ...]
    release_as: tuple[str, ...]
    accepted: tuple[str, ...] = ()


def combine(
    parents: Sequence[Parent],
    released_as: str | None = None,
    name: str | None = None,
    accepted: Mapping[str, str] | None = None,
) -> Verdict:
    """Judge a combination.

    Args:
        parents: Models, adapters and data that go in.
        released_as: The licence that the release states; None if it is still open.
        name: Of the release; None if it is still open.
        accepted: Reasons to accept a licence all the same, by its id or its model's name: what it
            stands against, or that it is not known, is then no hindrance, but told.

    Raises:
        PackError: Something is accepted that does not go in.
    """
    unknown = tuple(parent for parent in parents if parent.licence is None or parent.partly)
    conflicts = _conflicts(parents, released_as, name)
    known = _known(parents)
    verdict = Verdict(tuple(_obligations(known)), conflicts, unknown, _allowed(known))
    reasons = _reasons(parents, accepted or {})
    if not reasons:
        return verdict
    others = [parent for parent in parents if parent.name not in reasons]
    left = _conflicts(others, released_as, name)
    sentences = {conflict.sentence for conflict in left}
    told = [
        f"{p.name}: its licence is not known; accepted: {reasons[p.name]}"
        for p in unknown if p.name in reasons
    ] + [
        f"{conflict.sentence}; accepted: "
        f"{next((reasons[n] for n in conflict.parents if n in reasons), 'see above')}"
        for conflict in conflicts if conflict.sentence not in sentences
    ]  # fmt: skip
    still = tuple(parent for parent in unknown if parent.name not in reasons)
    return replace(verdict, conflicts=left, unknown=still, accepted=tuple(told))


def _known(parents: Sequence[Parent]) -> list[Parent]:
    """A parent for each licence that is known."""
    return [replace(p, licence=one, also=()) for p in parents for one in p.terms]


def _conflicts(
    parents: Sequence[Parent], released_as: str | None, name: str | None
) -> tuple[Conflict, ...]:
    known = _known(parents)
    conflicts = [
        *_prefixes(known), *_improving(parents), *_restricted(known), *_commercial(known),
        *_shared_alike(known),
    ]  # fmt: skip
    if released_as is not None:
        conflicts += _released(known, released_as, _allowed(known))
    if name is not None:
        conflicts += _named(known, name)
    return tuple(conflicts)


def _reasons(parents: Sequence[Parent], accepted: Mapping[str, str]) -> dict[str, str]:
    """Why parents are accepted, whatever their licence says, by their names."""
    reasons: dict[str, str] = {}
    for key, reason in accepted.items():
        found = find_licence(key)
        names = [
            p.name for p in parents
            if key in (p.name, p.stated) or (found is not None and found in p.terms)
        ]  # fmt: skip
        if not names:
            every = sorted({p.licence.id if p.licence else p.stated or p.name for p in parents})
            raise PackError(
                f"no parent has the licence '{key}' that is accepted{nearest(key, every)}",
                f"Licences here: {', '.join(every)}",
            )
        reasons |= dict.fromkeys(names, reason)
    return reasons


def _licence(parent: Parent) -> Licence:
    assert parent.licence is not None  # noqa: S101 (callers leave the unknown ones out)
    return parent.licence


def _each(parents: Sequence[Parent]) -> list[Licence]:
    """Every licence once, in the order of the table's ids."""
    return sorted({_licence(parent) for parent in parents}, key=lambda licence: licence.id)


def _obligations(parents: Sequence[Parent]) -> Iterator[Obligation]:
    gathered: dict[tuple[str, str], list[str]] = {}
    for licence in _each(parents):
        for kind, what in _asked(licence):
            gathered.setdefault((kind, what), []).append(licence.id)
    for (kind, what), because in gathered.items():
        yield Obligation(kind, what, tuple(because))


def _asked(licence: Licence) -> Iterator[tuple[str, str]]:
    if licence.copy:
        yield "copy", f"the text of {licence.title} goes along"
    if licence.link:
        yield "link", licence.url
    if licence.notice:
        keep = "notices of the parents are kept"
        yield "notice", keep if licence.notice == KEEP else licence.notice
    if licence.changes:
        yield "changes", "it is said that and how the model was changed"
    for kind in ("display", "prefix", "not_first", "policy", "limit"):
        if value := getattr(licence, kind):
            yield kind, value
    if licence.restrictions:
        yield "restrictions", f"the use restrictions of {licence.title} are passed on as a term"
    if licence.users:
        yield "users", f"at most {licence.users // 10**6} million monthly users without asking"
    if not licence.commercial:
        yield "noncommercial", "no commercial use"
    if not licence.improves_others:
        yield "improve", "no other language model is improved with it"
    if licence.source:
        yield "source", "the source goes along: recipe and inputs"
    if licence.same:
        yield "same", f"derivatives go under {licence.id}"


def _allowed(parents: Sequence[Parent]) -> tuple[str, ...]:
    """Licences for the release; empty where any will do."""
    binding = [licence for licence in _each(parents) if licence.same or not licence.commercial]
    if not binding:
        return ()
    if {licence.id for licence in binding} == {"gpl-3.0", "agpl-3.0"}:
        return ("agpl-3.0",)  # section 13 of either lets the whole go under the stricter one
    if len(binding) == 1:
        return (binding[0].id,)
    return (" AND ".join(licence.id for licence in binding),)


def _pairs(parents: Sequence[Parent]) -> Iterator[tuple[Parent, Parent]]:
    """Pairs of parents, each pair of licences once."""
    seen: set[frozenset[str]] = set()
    for first, second in combinations(parents, 2):
        key = frozenset((_licence(first).id, _licence(second).id))
        if len(key) == 2 and key not in seen:
            seen.add(key)
            yield first, second


def _prefixes(parents: Sequence[Parent]) -> Iterator[Conflict]:
    for first, second in _pairs(parents):
        a, b = _licence(first).prefix, _licence(second).prefix
        if a and b and not a.startswith(b) and not b.startswith(a):
            yield Conflict(
                "names",
                f"{_licence(first).id} ({first.name}) wants the name to begin with “{a}”, "
                f"{_licence(second).id} ({second.name}) with “{b}”; no name does both",
                (first.name, second.name),
            )


def _improving(parents: Sequence[Parent]) -> Iterator[Conflict]:
    models = [parent for parent in parents if parent.kind == "model"]
    told: set[str] = set()
    for parent in models:
        licence = parent.licence
        if licence is None or licence.improves_others or licence.id in told:
            continue
        others = [o for o in models if o is not parent and o.of_family != parent.of_family]
        if others:
            told.add(licence.id)
            yield Conflict(
                "improving others",
                f"{licence.id} ({parent.name}) must not improve other language models "
                f"({licence.clause}); {others[0].name} is of another family",
                (parent.name, others[0].name),
            )


def _restricted(parents: Sequence[Parent]) -> Iterator[Conflict]:
    for first, second in _pairs(parents):
        for free, bound in ((first, second), (second, first)):
            if _licence(free).no_more and _licence(bound).limits and _licence(bound).commercial:
                yield Conflict(
                    "further restrictions",
                    f"{_licence(free).id} ({free.name}) allows no further restrictions "
                    f"({_licence(free).clause}), {_licence(bound).id} ({bound.name}) has some "
                    f"({_licence(bound).clause})",
                    (free.name, bound.name),
                )


def _commercial(parents: Sequence[Parent]) -> Iterator[Conflict]:
    for first, second in _pairs(parents):
        for free, bound in ((first, second), (second, first)):
            must = _licence(free).no_more and _licence(free).commercial
            if must and not _licence(bound).commercial:
                yield Conflict(
                    "commercial use",
                    f"{_licence(free).id} ({free.name}) must allow commercial use of the whole, "
                    f"{_licence(bound).id} ({bound.name}) forbids it ({_licence(bound).clause})",
                    (free.name, bound.name),
                )


def _shared_alike(parents: Sequence[Parent]) -> Iterator[Conflict]:
    """Two licences that both want the whole for themselves."""
    for first, second in _pairs(parents):
        ids = {_licence(first).id, _licence(second).id}
        for own, other in ((first, second), (second, first)):
            alike = _licence(own).no_more and (_licence(other).same or _licence(other).no_more)
            told = _licence(other).limits and _licence(other).commercial
            if alike and not told and ids != {"gpl-3.0", "agpl-3.0"}:
                if _licence(other).no_more and own is second:
                    continue  # said already, the other way round
                yield Conflict(
                    "the same licence",
                    f"{_licence(own).id} ({own.name}) wants the whole under itself "
                    f"({_licence(own).clause}), {_licence(other).id} ({other.name}) too",
                    (own.name, other.name),
                )


def _released(
    parents: Sequence[Parent], released_as: str, allowed: tuple[str, ...]
) -> Iterator[Conflict]:
    chosen = {licence.id for licence in find_licences(released_as)} or {released_as}
    if allowed and all(chosen != set(one.split(" AND ")) for one in allowed):
        binding = [p for p in parents if _licence(p).same or not _licence(p).commercial]
        clauses = "; ".join(dict.fromkeys(
            f"{_licence(p).id} ({p.name}): {_licence(p).clause}" for p in binding
        ))  # fmt: skip
        yield Conflict(
            "released as",
            f"it cannot be released as {released_as}, only as {' or '.join(allowed)} ({clauses})",
            tuple(parent.name for parent in binding),
        )


def _named(parents: Sequence[Parent], name: str) -> Iterator[Conflict]:
    plain = _letters(name)
    for licence in _each(parents):
        if licence.prefix and not plain.startswith(_letters(licence.prefix)):
            yield Conflict(
                "name",
                f"the name '{name}' must begin with “{licence.prefix}” ({licence.id}: "
                f"{licence.clause})",
                tuple(p.name for p in parents if p.licence is licence),
            )
        if licence.not_first and plain.startswith(_letters(licence.not_first)):
            yield Conflict(
                "name",
                f"the name '{name}' must not begin with “{licence.not_first}” ({licence.id})",
                tuple(p.name for p in parents if p.licence is licence),
            )


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
