"""The model that a checkpoint belongs to, built by transformers without any weight."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import PackError

__all__ = ["build_empty", "require_peft"]

_INSTALL = "Install what it needs: pip install 'pack-models[peft]'"


def require_peft(label: str) -> None:
    """Refuse where PEFT, transformers and torch are not installed.

    Raises:
        PackError: One of them is missing.
    """
    try:
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise PackError(
            f"{label}: PEFT's own layers have to compute it, and '{error.name}' is not installed",
            _INSTALL,
        ) from None


def build_empty(checkpoint: Checkpoint) -> Any:
    """Build the model on torch's meta device: modules, names and shapes, no data.

    Returns:
        A `transformers.PreTrainedModel` in evaluation mode.

    Raises:
        PackError: transformers is not installed, or has no model for the config. Code that comes
            with a model is never run.
    """
    try:
        import torch
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise PackError(
            f"{checkpoint.label}: which module each tensor belongs to is known to transformers, "
            "which is not installed",
            _INSTALL,
        ) from None
    config = dict(checkpoint.config)
    kind = config.get("model_type")
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or model_class is None:
        raise PackError(
            f"{checkpoint.label}: transformers {transformers.__version__} has no "
            f"{name or kind or 'model for a config without architectures'}",
            "Install a newer transformers. Code that comes with a model is never run.",
        )
    try:
        with torch.device("meta"), quiet():
            built = model_class(CONFIG_MAPPING[kind].from_dict(config))
    except Exception as error:
        raise PackError(
            f"{checkpoint.label}: transformers cannot build the model from its config.json "
            f"({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''})",
            "Check that config.json belongs to these weights.",
        ) from None
    built.eval()
    return built


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings of torch, transformers and PEFT from the user's terminal."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
