"""Whether a base is the one that an adapter was trained on, as far as names can tell."""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_lite.adapters.config import AdapterConfig
from mergekit_lite.checkpoint.hub import parse_reference
from mergekit_lite.checkpoint.locate import Source, find_local
from mergekit_lite.errors import PackError

__all__ = ["check_base"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_base(config: AdapterConfig, adapter: Source, base: Source, home: Path) -> list[str]:
    """Compare the base that an adapter names with the one that it is put on.

    Two names on the Hub, or two folders on this disk, can be compared for certain. A name on the
    Hub and a folder, or a folder of another machine, can only be alike or not.

    Returns:
        Notes for the user, where the names cannot be compared for certain and are not alike.

    Raises:
        PackError: They are different models for certain.
    """
    wanted = config.base
    if wanted is None:
        return []
    local = find_local(wanted, adapter.path) or find_local(wanted, home)
    hub = parse_reference(wanted) if local is None else None
    if base.revision is None and local is not None:
        if local.resolve() == base.path.resolve():
            return []
        raise _other(config, wanted, base)
    if base.revision is not None and hub is not None and not wanted.startswith("."):
        given = parse_reference(base.reference)
        if given is not None and given.repo.lower() == hub.repo.lower():
            return _revisions(config, base)
        raise _other(config, wanted, base)
    if Path(wanted).name.lower() == base.path.resolve().name.lower():
        return []
    return [f"{config.label} was trained on '{wanted}'; it is put on '{base.reference}' as told"]


def _revisions(config: AdapterConfig, base: Source) -> list[str]:
    wanted = config.revision
    if wanted is None or base.revision is None or wanted == base.revision:
        return []
    if _COMMIT.fullmatch(wanted):
        raise PackError(
            f"{config.label}: was trained on revision {wanted[:12]} of '{config.base}', while the "
            f"base is revision {base.revision[:12]}",
            f"Give that revision: {config.base}@{wanted}",
        )
    if base.reference.endswith(f"@{wanted}"):
        return []
    found = base.revision[:12]
    return [
        f"{config.label} was trained on revision '{wanted}' of '{config.base}'; this is {found}"
    ]


def _other(config: AdapterConfig, wanted: str, base: Source) -> PackError:
    return PackError(
        f"{config.label}: was trained on '{wanted}', not on '{base.reference}'",
        f"Give that base; or, if this one is meant, write an exclamation mark: "
        f"{base.reference}+!{config.label}",
    )
