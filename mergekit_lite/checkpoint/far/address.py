"""What an address of a model looks like; imports nothing, since every reference is asked."""

from __future__ import annotations

__all__ = ["is_far"]

_SCHEMES = ("hf", "s3", "gs", "gcs", "http", "https")


def is_far(reference: str) -> bool:
    """Whether a reference is an address, of a model that is read where it lies."""
    scheme, found, _ = reference.partition("://")
    return bool(found) and scheme in _SCHEMES
