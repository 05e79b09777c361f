"""Templates and recipes: beside the code in a wheel, at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

__all__ = ["resource_folder"]


def resource_folder(kind: str) -> Path:
    """The folder of ``templates`` or ``recipes``."""
    here = Path(__file__).parent
    installed = here / "data" / kind
    return installed if installed.is_dir() else here.parent / kind
