"""Profiles: what a release for research, for the community or for production must hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_lite.errors import PackError, nearest
from mergekit_lite.release.gather import Made
from mergekit_lite.release.licences.combine import Verdict
from mergekit_lite.release.licences.expression import find_licences
from mergekit_lite.release.licences.table import licences

__all__ = ["PROFILES", "Profile", "lacking"]

_ASKED = (
    "summary", "intended_use", "out_of_scope", "evaluation", "limitations", "authors", "citation",
)  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """What a release must hold.

    Attributes:
        name: ``research``, ``community`` or ``production``.
        asked: Keys of ``card:``, which only the author knows.
        repeatable: Whether it must come from a recipe, to be made again.
        measured: Whether every quantized file must have been measured.
        signed: Whether it is pushed only when it is signed.
        strict: Whether what lacks is an error rather than a warning.
    """

    name: str
    asked: tuple[str, ...]
    repeatable: bool = False
    measured: bool = False
    signed: bool = False
    strict: bool = False


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("research", ("summary", "limitations", "authors", "citation"), repeatable=True),
        Profile("community", _ASKED),
        Profile(
            "production", (*_ASKED, "training_data", "contact"), repeatable=True, measured=True,
            signed=True, strict=True,
        ),
    )
}  # fmt: skip


def lacking(
    profile: Profile,
    made: Made,
    recipe: Mapping[str, Any],
    licence: str | None,
    verdict: Verdict,
    without_text: Sequence[str],
) -> list[str]:
    """What a release would have under a profile, and has not.

    Args:
        profile: What it must hold.
        made: What was made.
        recipe: It was made by; empty without.
        licence: Of the release; None if none is stated.
        verdict: On the licences of its parents.
        without_text: Parents whose licence wants its text to go along, which is nowhere found.

    Raises:
        PackError: The profile is strict, and something is lacking.
    """
    found = list(_lacking(profile, made, recipe, licence, verdict, without_text))
    if profile.strict and found:
        listed = "".join(f"\n  {line}" for line in found)
        raise PackError(
            f"not ready for {profile.name}:{listed}", "Add what is missing to the recipe."
        )
    return found


def _lacking(
    profile: Profile,
    made: Made,
    recipe: Mapping[str, Any],
    licence: str | None,
    verdict: Verdict,
    without_text: Sequence[str],
) -> Iterator[str]:
    for parent in verdict.unknown:
        yield f"the licence of {parent.name} is not known"
    for name in without_text:
        yield f"the text of the licence of {name} must go along (put it there as LICENSE)"
    if not licence:
        yield "the release states no licence (license: in the recipe)"
    elif not find_licences(licence):
        near = nearest(licence, [*licences()])
        yield f"the licence '{licence}' of the release is none that pack knows{near}"
    card = recipe.get("card") or {}
    evaluations = [a for a in (made.whole or made).artifacts if a.kind == "evaluate"]
    evaluated = bool(evaluations)
    seen = {str(d) for a in evaluations for d in (a.lock.get("results") or {}).values()}
    if profile.measured and not evaluated:
        yield "it was not evaluated (evaluate: in the recipe)"
    for key in profile.asked:
        if not card.get(key) and not (key == "evaluation" and evaluated):
            yield f"the card lacks '{key}' (card: in the recipe)"
    if profile.repeatable and not recipe:
        yield "it was made without a recipe, so nobody can make it again"
    for artifact in made.artifacts:
        checked = artifact.lock.get("verification") or {}
        measured = {"divergence", "largest_relative_error"} & checked.keys()
        whole = {e.sha256 for e in artifact.files} <= seen
        if profile.measured and artifact.kind == "quantize" and not (measured or whole):
            yield f"{artifact.folder.name} was not measured (pack quantize without --no-verify)"
