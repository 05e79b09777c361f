"""Whether an adapter's files agree with each other, with the installed PEFT and with the base.

PEFT says what it would save from the layers that it put on the base. An adapter that lacks any of
it, or holds anything else, is not the adapter that its config describes or not of this base.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mergekit_lite.adapters.architecture import quiet
from mergekit_lite.adapters.config import AdapterConfig
from mergekit_lite.adapters.contents import PREFIX
from mergekit_lite.adapters.lending import Originals
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import PackError

__all__ = ["Contents", "account_for", "base_path", "check_keys"]

_WRONG = "Check that this is the base that the adapter was trained on."


@dataclass(frozen=True)
class Contents:
    """What an adapter holds beside the tensors of PEFT's layers.

    Attributes:
        carried: Parameters of the base: the adapter's names by their paths.
        added: Parameters that the base has not, such as a classifier's: likewise.
    """

    carried: dict[str, str]
    added: dict[str, str]

    @property
    def whole(self) -> frozenset[str]:
        """The names of all these tensors."""
        return frozenset({*self.carried.values(), *self.added.values()})


def check_keys(config: AdapterConfig, settings: Any) -> None:
    """Refuse settings of a newer PEFT, which this one would leave out without a word.

    Args:
        config: The file.
        settings: What PEFT made of it.

    Raises:
        PackError: A key that is set is not known to the installed PEFT.
    """
    known = {"runtime_config", *(field.name for field in dataclasses.fields(settings))}
    unknown = sorted(key for key, value in config.data.items() if value and key not in known)
    if unknown:
        import peft

        written = config.data.get("peft_version")
        raise PackError(
            f"{config.label}: PEFT {peft.__version__} does not know {unknown} of its "
            "adapter_config.json" + (f", written by PEFT {written}" if written else ""),
            "Upgrade it: pip install -U peft. Or remove the keys, if they change no weights.",
        )


def account_for(
    config: AdapterConfig,
    tensors: Checkpoint,
    base: Checkpoint,
    model: Any,
    originals: Originals,
    *,
    exact: bool,
) -> Contents:
    """Compare an adapter's tensors, by their headers, with those that PEFT would save.

    Args:
        config: Of the adapter.
        tensors: Of the adapter.
        base: What it is put on.
        model: With PEFT's layers on it.
        originals: The parameters that it had before.
        exact: Whether shapes, and the number of tensors in a list, are known by now.

    Raises:
        PackError: A tensor is missing, left over, or of another shape.
    """
    import peft

    with quiet():
        expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    live = dict(model.named_parameters(remove_duplicate=False))
    found = set(tensors.names())
    carried = {name for name in found if live.get(name) in originals}
    added = {name for name in found - expected.keys() if _is_added(name, config, model)}
    wanted = {_unnumbered(name, exact=exact) for name in expected}
    own = {_unnumbered(name, exact=exact) for name in found - carried - added}
    _refuse(config, "lacks", wanted - own - carried)
    _refuse(config, "holds, and nothing there needs,", own - wanted)
    for name in sorted(carried | (expected.keys() if exact else set())):
        shape = tuple((live if name in carried else expected)[name].shape)
        _check_shape(config, name, tensors.spec(name).shape, shape, base.config.get("vocab_size"))
    return Contents(
        {base_path(name.removeprefix(PREFIX)): name for name in carried},
        {name.removeprefix(PREFIX): name for name in added},
    )


def base_path(path: str) -> str:
    """The path that a module or parameter has without PEFT's layers."""
    return path.replace(".base_layer", "").replace(".original_module", "")


def _is_added(name: str, config: AdapterConfig, model: Any) -> bool:
    """Whether a tensor is of a whole module that the config names and the base has not."""
    saved = config.data.get("modules_to_save") or ()
    path = name.removeprefix(PREFIX).split(".")[:-1]
    module = model.base_model.model
    return any(part in saved for part in path) and not hasattr(module, path[0])


def _refuse(config: AdapterConfig, what: str, names: Iterable[str]) -> None:
    listed = sorted(names)
    if listed:
        more = f"\n  … and {len(listed) - 10} more" if len(listed) > 10 else ""
        raise PackError(
            f"{config.label}: {what} {len(listed)} tensor(s):"
            + "".join(f"\n  {name}" for name in listed[:10])
            + more,
            _WRONG,
        )


def _check_shape(
    config: AdapterConfig,
    name: str,
    shape: tuple[int, ...],
    wanted: tuple[int, ...],
    vocabulary: object,
) -> None:
    if shape == wanted or (config.kind == "ADALORA" and _is_cut(shape, wanted)):
        return
    resized = len(shape) == len(wanted) == 2 and shape[1] == wanted[1] and wanted[0] == vocabulary
    raise PackError(
        f"{config.label}: '{name}' is {list(shape)}, while its config and the base call for "
        f"{list(wanted)}",
        "The adapter was trained on another vocabulary; give the base with that vocabulary."
        if resized
        else _WRONG,
    )


def _unnumbered(name: str, *, exact: bool) -> str:
    """A name without its number in a list, if that is not known yet."""
    return name if exact else re.sub(r"\.\d+$", "", name)


def _is_cut(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape is another with ranks taken away, which PEFT does while it loads them."""
    pairs = list(zip(shape, wanted, strict=False))
    return (
        len(shape) == len(wanted)
        and sum(a != b for a, b in pairs) <= 1
        and all(a <= b for a, b in pairs)
    )
