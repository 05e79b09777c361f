"""provenance.intoto.json: what was made of what and by what, as SLSA provenance.

Source of the format: in-toto Statement v1 and SLSA Provenance v1 (slsa.dev/spec/v1.0/provenance).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mergekit_lite
from mergekit_lite.merge.config import to_json
from mergekit_lite.release.gather import Made
from mergekit_lite.release.manifest import Entry

__all__ = ["make_provenance"]

_BUILD = "urn:pack-models:build:v1"


def make_provenance(made: Made, recipe: Mapping[str, Any], entries: Sequence[Entry]) -> bytes:
    """Write the statement.

    Args:
        made: The results of the release.
        recipe: As the release states it; empty without.
        entries: Files that it speaks for.
    """
    dependencies: dict[str, dict[str, Any]] = {}
    for artifact in made.artifacts:
        for source in made.released_lock(artifact).get("inputs", []):
            for file in source["files"]:
                name = f"{source['model']}/{file['path']}"
                dependencies[name] = _dependency(name, source, file)
    steps = [
        {"folder": a.folder.name, "kind": a.kind, "seed": a.lock.get("seed"),
         "scheme": a.lock.get("scheme")}
        for a in made.artifacts
    ]  # fmt: skip
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": entry.path, "digest": {"sha256": entry.sha256}}
            for entry in sorted(entries, key=lambda e: e.path)
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD,
                "externalParameters": {"recipe": dict(recipe), "steps": steps},
                "internalParameters": dict(made.main.lock.get("environment", {})),
                "resolvedDependencies": [dependencies[name] for name in sorted(dependencies)],
            },
            "runDetails": {
                "builder": {
                    "id": f"{_BUILD}#local",
                    "version": {"pack-models": mergekit_lite.__version__},
                }
            },
        },
    }
    return to_json(statement)


def _dependency(name: str, source: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "digest": {"sha256": file["sha256"]}}
    if source.get("revision"):
        found["uri"] = f"https://huggingface.co/{source['model']}@{source['revision']}"
    return found
