"""sbom.cdx.json: the bill of materials, CycloneDX 1.6, with the model's card and its ancestors.

Source of the format: the JSON schema of CycloneDX 1.6 (cyclonedx.org/docs/1.6/json). Nothing in it
tells one run from another: the serial number follows from the content, and there is no time.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from typing import Any

import mergekit_lite
from mergekit_lite.merge.config import to_json
from mergekit_lite.release.draft import Draft
from mergekit_lite.release.licences.expression import find_licences
from mergekit_lite.release.licences.table import find_licence
from mergekit_lite.release.manifest import Entry, media_type
from mergekit_lite.release.sources import ParentSource

__all__ = ["make_sbom"]


def make_sbom(draft: Draft, entries: Sequence[Entry]) -> bytes:
    """Write the bill of materials.

    Args:
        draft: The release.
        entries: Its files that the bill lists.
    """
    name, version, licence = draft.made.title, draft.version, draft.licence
    architecture = draft.architecture
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": version,
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                **({"modelArchitecture": architecture} if architecture else {}),
            }
        },
        "pedigree": {"ancestors": [_ancestor(source) for source in draft.sources]},
    }
    if licence:
        names = [one.id for one in find_licences(licence)] or [licence]
        model["licenses"] = [_licence(name) for name in names]
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": "pack-models",
                     "version": mergekit_lite.__version__}
                ]
            },
            "component": model,
        },
        "components": [_file(entry) for entry in sorted(entries, key=lambda e: e.path)],
    }  # fmt: skip
    content = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}"
    return to_json(document)


def _licence(name: str) -> dict[str, Any]:
    found = find_licence(name)
    if found is None:
        return {"license": {"name": name}}
    if found.spdx is not None:
        return {"license": {"id": found.spdx, "url": found.url}}
    return {"license": {"name": found.title, "url": found.url}}


def _ancestor(source: ParentSource) -> dict[str, Any]:
    """A parent; its digest is that of the list of its files' digests."""
    entry, parent = source.entry, source.parent
    found: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": f"parent:{entry['model']}",
        "name": entry["model"],
        "hashes": [{"alg": "SHA-256", "content": source.digest}],
    }
    if entry.get("revision"):
        found["version"] = entry["revision"]
    if parent.licence or parent.stated:
        names = [licence.id for licence in parent.terms] or [parent.stated]
        found["licenses"] = [_licence(name) for name in names]
    return found


def _file(entry: Entry) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{entry.path}",
        "name": entry.path,
        "mime-type": media_type(entry.path),
        "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
    }
