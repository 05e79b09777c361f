"""How fast the network was last time, for plans."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable

from mergekit_lite.checkpoint.far.fetcher import FETCHER, cache_folder

__all__ = ["known_rate", "note_rate"]

_ENOUGH = 32 << 20
"""Bytes from which a rate means something."""


def known_rate(host: str) -> float | None:
    """Bytes a second that came from a host in the last run that fetched enough to tell."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return float(json.loads((cache_folder() / "network.json").read_text("utf-8"))[host])
    return None


def note_rate(hosts: Iterable[str]) -> None:
    """Remember the rate of this run; a cache that cannot be written is no error."""
    traffic = FETCHER.traffic
    if traffic.received < _ENOUGH or traffic.seconds <= 0:
        return
    path = cache_folder() / "network.json"
    held: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        held = dict(json.loads(path.read_text("utf-8")))
    held |= dict.fromkeys(hosts, round(traffic.received / traffic.seconds))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(held, indent=2), "utf-8")
        beside.rename(path)
