"""Where llama.cpp lies: the shared object in the xllamacpp wheel, which exports its C interface."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mergekit_lite.errors import PackError

__all__ = ["shared_object"]


def shared_object() -> Path:
    """The wheel's shared object.

    Raises:
        PackError: It is not installed.
    """
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise PackError("xllamacpp is not installed", "pip install 'pack-models[llama-cpp]'")
    [file] = Path(spec.origin).parent.glob("xllamacpp*.so")
    return file
