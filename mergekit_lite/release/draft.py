"""What a release will hold and say, before it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.schemes import BUILT_IN, WEIGHTS_ALONE
from mergekit_lite.errors import PackError
from mergekit_lite.recipe.schema import CalibrationSection
from mergekit_lite.release.gather import Made
from mergekit_lite.release.hub import HubPlan, hub_plan
from mergekit_lite.release.licences.combine import Verdict, combine
from mergekit_lite.release.licences.find import find_data
from mergekit_lite.release.manifest import TEMPLATE, is_plain_path
from mergekit_lite.release.profiles import PROFILES, Profile, lacking
from mergekit_lite.release.sources import ParentSource, find_sources, only_licence

__all__ = ["Asked", "Draft", "draft_release"]


@dataclass(frozen=True)
class Asked:
    """What whoever releases asks for; None and empty stand for what the recipe says.

    Attributes:
        version: Semantic version.
        template: Text of the card's template.
        profile: Of `PROFILES`.
        accepted: Reasons to accept licences, by their ids or their models' names.
    """

    version: str | None = None
    template: str | None = None
    profile: str | None = None
    accepted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Draft:
    """A release before it is written.

    Attributes:
        made: What was made.
        version: Of the release.
        recipe: As it is written into the release; empty where there was none.
        licence: That it is released under; None if none is stated.
        sources: Its parents.
        verdict: On their licences.
        profile: What it must hold.
        template: Text of the card's template; None for pack's own.
        notes: What the user should know.
        warnings: What a good release would have.
    """

    made: Made
    version: str
    recipe: Mapping[str, Any]
    licence: str | None
    sources: Sequence[ParentSource]
    verdict: Verdict
    profile: Profile
    template: str | None
    notes: Sequence[str]
    warnings: Sequence[str]

    @property
    def hub(self) -> HubPlan | None:
        """Where the recipe wants it on the Hub; None if it says nothing."""
        return hub_plan(self.recipe.get("hub"))

    @property
    def card(self) -> Mapping[str, Any]:
        """What the author says."""
        found: Mapping[str, Any] = self.recipe.get("card") or {}
        return found

    @property
    def architecture(self) -> str:
        """Name of the model's class; empty where its config does not say."""
        found = self.config.get("architectures")
        return str(found[0]) if isinstance(found, list) and found else ""

    @property
    def config(self) -> Mapping[str, Any]:
        """Contents of the model's config.json; empty where it has none."""
        path = self.made.model.folder / "config.json"
        found: Any = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return found if isinstance(found, dict) else {}


def draft_release(made: Made, home: Path, version: str, asked: Asked) -> Draft:
    """Judge what was made, and settle what the release says.

    Args:
        made: What was made.
        home: Folder that relative paths of locks and recipe start from.
        version: Of the release.
        asked: What the recipe does not say.

    Raises:
        PackError: Licences conflict, or the profile wants more.
    """
    recipe = dict(made.recipe)
    accepted = {**(recipe.get("accept_licenses") or {}), **asked.accepted}
    profile = PROFILES[asked.profile or recipe.get("profile") or "community"]
    sources, notes = find_sources(made.whole or made, home, recipe.get("licenses") or {})
    licence = recipe.get("license") or only_licence(sources)
    if licence and not recipe.get("license"):
        notes = [*notes, f"no license: in the recipe; {licence}, which all parents have, is taken"]
    data, more = find_data({s.parent.name: s.folder for s in sources}, recipe.get("licenses") or {})
    notes = [*notes, *more]
    parents = [*(s.parent for s in sources), *data]
    verdict = combine(parents, licence, made.title, accepted)
    template = asked.template or _template(recipe, home)
    if recipe:
        recipe |= {"version": version, **_made(made, recipe)}
        recipe |= {"profile": profile.name} if asked.profile else {}
        recipe |= {"accept_licenses": accepted} if accepted else {}
        recipe = {key: value for key, value in recipe.items() if value is not None}
        if template is not None:
            recipe["card"] = {**(recipe.get("card") or {}), "template": TEMPLATE}
    if verdict.conflicts:
        listed = "".join(f"\n  {conflict.sentence}" for conflict in verdict.conflicts)
        raise PackError(
            f"licences conflict:{listed}",
            "See: pack licenses RECIPE. Choose other models, another licence or another name; if "
            "you have leave from the author: --accept-license ID --reason TEXT.",
        )
    missing = [s.parent.name for s in sources if s.lacks_text]
    warnings = lacking(profile, made, recipe, licence, verdict, missing)
    return Draft(
        made, version, recipe, licence, sources, verdict, profile, template, notes, warnings
    )


def _made(made: Made, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe must ask for to give these results, however they were made."""
    every = (made.whole or made).artifacts
    made_so = sorted((_entry(a) for a in every if a.kind == "quantize"), key=_order)
    stated = sorted(recipe.get("quantize") or [], key=_order)
    asked: dict[str, Any] = {}
    if list(map(_order, made_so)) != list(map(_order, stated)):
        asked["quantize"] = made_so or None
    if not any(artifact.kind == "compare" for artifact in every):
        asked["compare"] = False
    if recipe.get("evaluate") and not any(artifact.kind == "evaluate" for artifact in every):
        asked["evaluate"] = None
    return asked


def _entry(artifact: Any) -> dict[str, Any]:
    """What a recipe must ask for to give a quantized result."""
    found = dict(artifact.lock.get("asked") or {"to": "gguf", "scheme": artifact.lock["scheme"]})
    if "calibration" in found:
        text = found["calibration"]["text"]
        kept = {k: v for k, v in found["calibration"].items() if k not in ("text", "sha256")}
        found["calibration"] = kept if text == BUILT_IN else {**kept, "text": text}
    return found


def _order(entry: Mapping[str, Any]) -> str:
    """An entry with what it leaves out, so that equal ones are equal texts."""
    target, scheme = str(entry.get("to", "gguf")), str(entry["scheme"]).lower()
    stated = entry.get("calibration")
    calibrated = target != "gguf" and entry.get("calibrate") is not False
    if target == "onnx":
        calibrated = stated is not None
    section = CalibrationSection(**(stated or {})).model_dump() if calibrated else {}
    section["text"] = Path(str(section.get("text") or "")).name
    plain = (target, scheme) in WEIGHTS_ALONE
    return json.dumps(
        [
            target,
            scheme,
            entry.get("format"),
            calibrated and not plain,
            {} if plain else section,
            *(entry.get(key) for key in ("block", "symmetric", "graph")),
        ],
        sort_keys=True,
    )


def _template(recipe: Mapping[str, Any], home: Path) -> str | None:
    name = (recipe.get("card") or {}).get("template")
    if name is None:
        return None
    if not is_plain_path(name):
        raise PackError(
            f"template: {name}: is not below the recipe's folder",
            "Put it beside the recipe, or give --template FILE.",
        )
    try:
        return (home / str(name)).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(
            f"{home / name}: the card's template cannot be read ({error})",
            "Correct template: in the recipe's card:, or give --template FILE.",
        ) from None
