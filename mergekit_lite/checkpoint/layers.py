"""Which tensors belong to which layer, read off the names themselves.

A *stack* is a prefix whose next component counts 0, 1, … without a hole, as in
``model.layers.0.…`` or ``encoder.layer.11.…``. No architecture is named here: whatever a model
calls its layers, its names show the counting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mergekit_lite.errors import PackError

__all__ = ["Layer", "LayerMap", "is_input_side", "layer_count_keys", "map_layers"]

_INPUT = re.compile(r"(^|[._])(emb|embeds?|embedd?ings?|wte|wpe)([._]|$)")
_LAYER = re.compile(r"(.*?\.)([0-9]{1,6})(\..*)", re.DOTALL)
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")


@dataclass(frozen=True)
class Layer:
    """A tensor's place in a stack.

    Attributes:
        prefix: What stands before the number, for example ``model.layers.``.
        index: The number.
        rest: What stands after it, for example ``.self_attn.q_proj.weight``.
    """

    prefix: str
    index: int
    rest: str


@dataclass(frozen=True)
class LayerMap:
    """Stacks of a checkpoint and the layers of its tensors.

    Attributes:
        counts: Number of layers by prefix.
        layers: Place of each tensor that is in a stack, by its name.
        main: Prefix of the stack that the config counts; None where that is not plain.
    """

    counts: Mapping[str, int]
    layers: Mapping[str, Layer]
    main: str | None

    def position(self, name: str) -> float:
        """Where a tensor stands between the first layer (0.0) and the last one (1.0).

        Outside the stacks, what embeds the input stands at 0.0 and everything else (final norm,
        heads) at 1.0.
        """
        layer = self.layers.get(name)
        if layer is None:
            return 0.0 if is_input_side(name) else 1.0
        last = self.counts[layer.prefix] - 1
        return layer.index / last if last else 0.0


def is_input_side(name: str) -> bool:
    """Whether a tensor outside the layers embeds the input, judged by its name."""
    return bool(_INPUT.search(name)) and "embed_out" not in name


def layer_count_keys(config: Mapping[str, object]) -> list[str]:
    """The keys of a config that count its layers."""
    return [key for key in _COUNT_KEYS if isinstance(config.get(key), int)]


def map_layers(names: Iterable[str], config: Mapping[str, object]) -> LayerMap:
    """Find the stacks of a checkpoint from its tensors' names.

    Args:
        names: Names of all tensors.
        config: Contents of config.json; its layer count tells the main stack from others.
    """
    split = {name: layer for name in names if (layer := _split(name))}
    indices: dict[str, set[int]] = {}
    for layer in split.values():
        indices.setdefault(layer.prefix, set()).add(layer.index)
    counts = {p: len(seen) for p, seen in indices.items() if max(seen) == len(seen) - 1}
    layers = {name: layer for name, layer in split.items() if layer.prefix in counts}
    return LayerMap(counts, layers, _main(counts, layers, config))


def _split(name: str) -> Layer | None:
    """The first number between two dots, and what stands around it."""
    found = _LAYER.fullmatch(name)
    return Layer(found[1], int(found[2]), found[3]) if found else None


def _main(
    counts: Mapping[str, int], layers: Mapping[str, Layer], config: Mapping[str, object]
) -> str | None:
    stated = {config[key] for key in layer_count_keys(config)}
    text = config.get("text_config")
    if isinstance(text, dict):
        stated |= {text[key] for key in layer_count_keys(text)}
    fitting = [p for p, n in counts.items() if n in stated] if stated else list(counts)
    if len(fitting) > 1:
        sizes = {p: sum(1 for layer in layers.values() if layer.prefix == p) for p in fitting}
        top = max(sizes.values())
        fitting = [p for p in fitting if sizes[p] == top]
    return fitting[0] if len(fitting) == 1 else None


def main_stack(layer_map: LayerMap, label: str) -> str:
    """The prefix of the main stack.

    Raises:
        PackError: The model has none, or several that could be it.
    """
    if layer_map.main is None:
        found = ", ".join(f"{p}* ({n})" for p, n in sorted(layer_map.counts.items())) or "none"
        raise PackError(
            f"{label}: cannot tell which stack of layers a layer_range means (found: {found})",
            "Merge with 'models' instead of 'slices'.",
        )
    return layer_map.main
