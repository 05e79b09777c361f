"""Versions and stages in MLflow's model registry.

A version of a release is a version of a registered model, with the release's version, digest and
metrics as tags and its card as description. What is in a stage is an alias of that name, which
MLflow and whatever reads from it understand; every change is also a tag of the model, which pack
never removes, so that the history is not lost and a rollback knows where to go.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from mergekit_lite.errors import PackError
from mergekit_lite.release.registry import STAGES, Event, Version, check_promotion, event_before

__all__ = ["MlflowRegistry"]

_EVENT = "pack.event."
_VERSION, _DIGEST, _METRICS = "pack.version", "pack.digest", "pack.metrics"
_LONGEST = 90_000
"""Characters of a description; a longer card is cut."""


class MlflowRegistry:
    """MLflow's registry.

    Args:
        word: ``mlflow://HOST[:PORT][/PATH]``, over https, on this machine over http; or
            ``mlflow://`` for what MLFLOW_REGISTRY_URI or MLFLOW_TRACKING_URI say.

    Raises:
        PackError: The library is not installed, or the server does not answer.
    """

    def __init__(self, word: str) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise PackError(
                "MLflow's registry needs its client", "pip install 'pack-models[mlflow]'"
            ) from None
        self._uri = _address(word)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        with self._explained():
            self._client: Any = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
            self._client.search_registered_models(max_results=1)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except PackError:
            raise
        except Exception as error:  # whatever the client raises
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise PackError(
                f"MLflow at {self._uri}: {said:.200}",
                "Check the address and the credentials (MLFLOW_TRACKING_TOKEN or _USERNAME).",
            ) from None

    def add(
        self, name: str, version: str, digest: str, metrics: Mapping[str, Any], card: str
    ) -> bool:
        """Add a version; returns whether it is new.

        Raises:
            PackError: The version is there with another digest, or MLflow refuses.
        """
        with self._explained():
            if self._model(name) is None:
                self._create(name)
            for found in self._versions(name):
                if found.tags[_VERSION] != version:
                    continue
                if found.tags.get(_DIGEST) != digest:
                    raise PackError(
                        f"{name} {version} is in the registry with another digest "
                        f"({found.tags.get(_DIGEST)})",
                        "A version never changes; release it under the next one.",
                    )
                return False
            self._client.create_model_version(
                name, source=f"pack://{name}/{version}@sha256:{digest}",
                tags={_VERSION: version, _DIGEST: digest,
                      _METRICS: json.dumps(metrics, sort_keys=True)},
                description=card[:_LONGEST],
            )  # fmt: skip
        return True

    def _create(self, name: str) -> None:
        from mlflow.exceptions import RestException

        try:
            self._client.create_registered_model(name)
        except RestException as error:  # somebody else may have been faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _model(self, name: str) -> Any:
        from mlflow.exceptions import RestException

        try:
            return self._client.get_registered_model(name)
        except RestException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _versions(self, name: str) -> list[Any]:
        """Versions that pack added, oldest first."""
        quoted = name.replace("'", "")
        found = self._client.search_model_versions(f"name='{quoted}'", max_results=10_000)
        own = [version for version in found if _VERSION in version.tags]
        return sorted(own, key=lambda version: int(version.version))

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, or those of a name, in the order in which they were added."""
        with self._explained():
            names = [name] if name else [m.name for m in self._client.search_registered_models()]
            return [
                Version(v.name, v.tags[_VERSION], v.tags.get(_DIGEST, ""),
                        json.loads(v.tags.get(_METRICS, "{}")), _at(v.creation_timestamp))
                for one in names for v in self._versions(one)
            ]  # fmt: skip

    def promote(self, name: str, version: str, stage: str, share: float = 1.0) -> Event:
        """Put a version into a stage.

        Raises:
            PackError: There is no such version or stage.
        """
        known = self.versions(name)
        check_promotion(name, version, stage, share, [v.version for v in known])
        now = self.current(name).get(stage)
        if now is not None and (now.version, now.share) == (version, share):
            return now
        return self._set(name, stage, version, share, "promote")

    def rollback(self, name: str, stage: str) -> Event:
        """Put back what was in a stage before.

        Raises:
            PackError: Nothing was there before.
        """
        kept = event_before(name, stage, [e for e in self.history(name) if e.stage == stage])
        return self._set(name, stage, str(kept.version), kept.share, "rollback")

    def _set(self, name: str, stage: str, version: str, share: float, reason: str) -> Event:
        with self._explained():
            number = next(v.version for v in self._versions(name) if v.tags[_VERSION] == version)
            now = time.time_ns()
            data = {"stage": stage, "version": version, "share": share, "reason": reason,
                    "at": _at(now // 10**6)}  # fmt: skip
            key = f"{_EVENT}{now:020d}.{uuid.uuid4().hex[:8]}"
            self._client.set_registered_model_tag(name, key, json.dumps(data, sort_keys=True))
            self._client.set_registered_model_alias(name, stage, number)
        return self.history(name)[-1]

    def current(self, name: str) -> dict[str, Event]:
        """What is in each stage: by the alias, which others may have moved."""
        with self._explained():
            model = self._model(name)
            aliases = dict(model.aliases) if model is not None else {}
            by_number = {str(v.version): v.tags[_VERSION] for v in self._versions(name)}
        found = {}
        for stage in STAGES:
            version = by_number.get(str(aliases.get(stage)))
            if version is None:
                continue
            last = [e for e in self.history(name) if e.stage == stage]
            if last and last[-1].version == version:
                found[stage] = last[-1]
            else:
                found[stage] = Event(0, stage, version, 1.0, "changed in MLflow", "-")
        return found

    def history(self, name: str) -> list[Event]:
        """All that was, in order."""
        with self._explained():
            model = self._model(name)
            tags = dict(model.tags) if model is not None else {}
        events = [json.loads(tags[key]) for key in sorted(tags) if key.startswith(_EVENT)]
        return [
            Event(number, e["stage"], e["version"], float(e["share"]), e["reason"], e["at"])
            for number, e in enumerate(events, 1)
        ]

    def close(self) -> None:
        """Nothing is held open."""


def _address(word: str) -> str:
    rest = word.removeprefix("mlflow://").rstrip("/")
    if not rest:
        stated = os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI")
        if not stated:
            raise PackError(
                "mlflow:// names no server", "Write mlflow://HOST:PORT, or set MLFLOW_TRACKING_URI."
            )
        return stated
    host = urlsplit(f"//{rest}").hostname or ""
    near = host == "localhost" or host.startswith("127.")
    return f"{'http' if near else 'https'}://{rest}"


def _at(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
