"""From a LoRA's config and tensor names to what it changes, every tensor accounted for.

The layout of names is that of PEFT's `save_pretrained`: ``base_model.model.<module>.<part>``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from mergekit_lite.adapters.config import AdapterConfig, LoraSettings
from mergekit_lite.adapters.contents import PREFIX, TIED, LoraModule, sort_tensors
from mergekit_lite.adapters.edits import Factors
from mergekit_lite.adapters.plan import (
    AdapterPlan,
    BiasAdded,
    ConvAdded,
    LowRankAdded,
    PlannedEdit,
    Residual,
    RowsSet,
    WholeSet,
)
from mergekit_lite.checkpoint.layers import is_input_side
from mergekit_lite.checkpoint.protocol import Checkpoint, TensorSpec
from mergekit_lite.errors import PackError

__all__ = ["Part", "plan_lora"]


@dataclass(frozen=True)
class Part:
    """Where a parameter of the model, or a part of it, lies in the base's files.

    Attributes:
        tensor: Name in the files.
        expert: Index in the first dimension of the parameter, where files keep experts apart.
        rows: First and one past the last row of that expert's matrix; None for all.
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


Find = Callable[[str], tuple[Part, ...]]
"""From a parameter's path in the model to its places in the files; empty if there is none."""


def plan_lora(
    config: AdapterConfig,
    tensors: Checkpoint,
    base: Checkpoint,
    find: Find,
    output_embedding: Callable[[], str | None],
) -> AdapterPlan:
    """Plan a LoRA.

    Args:
        config: Of the adapter.
        tensors: Of the adapter.
        base: What it is put on; with its layers replicated, if the adapter wants that.
        find: Where the parameters of the model lie in the base.
        output_embedding: Tells the path of the model's output embedding, for a base that ties it.

    Raises:
        PackError: A tensor of the adapter fits nothing, a factor is missing, a shape does not fit.
    """
    return _Planner(config, tensors, base, find, output_embedding).plan()


class _Planner:
    def __init__(
        self,
        config: AdapterConfig,
        tensors: Checkpoint,
        base: Checkpoint,
        find: Find,
        output_embedding: Callable[[], str | None],
    ) -> None:
        self._label = config.label
        self._settings = LoraSettings.of(config)
        self._conv1d = config.data.get("fan_in_fan_out") is True
        self._tensors = tensors
        self._base = base
        self._find = find
        self._output_embedding = output_embedding
        self._names = frozenset(base.names())
        self._edits: dict[str, list[PlannedEdit]] = {}
        self._copied: dict[str, str] = {}
        self._added: dict[str, TensorSpec] = {}
        self._notes: list[str] = []
        self._leftovers: list[str] = []
        self._tied: frozenset[str] = frozenset()

    def plan(self) -> AdapterPlan:
        contents = sort_tensors(self._tensors)
        modules, rows = contents.modules, contents.rows
        whole = {**contents.whole, **contents.copies}
        self._leftovers += contents.leftovers
        self._separate_tied([*(m.path for m in modules), *whole, *rows])
        for parameter, name in whole.items():
            if parameter.removesuffix(".weight") not in self._tied:
                self._set_whole(parameter, name)
        stored = self._orientation(modules)
        for module in modules:
            if module.path not in self._tied:
                self._add_module(module, stored)
        for path, name in rows.items():
            self._set_rows(path, name)
        if self._leftovers:
            self._fail_leftovers()
        return AdapterPlan(
            {name: tuple(edits) for name, edits in self._edits.items()},
            self._copied,
            self._added,
            tuple(self._notes),
        )

    def _separate_tied(self, touched: list[str]) -> None:
        """Give the output embedding a tensor of its own where the adapter parts it from the input.

        As when the adapter runs beside its base: what changes the one embedding leaves the other
        alone, unless the adapter says that it holds for both.
        """
        if self._base.config.get("tie_word_embeddings") is not True:
            return
        paths = {path.removesuffix(".weight") for path in touched}
        inputs = [name for name in self._names if is_input_side(name) and self._is_table(name)]
        touched_inputs = [n for n in inputs if n.removesuffix(".weight") in paths]
        outputs = [
            path
            for path in sorted(paths)
            if not self._find(f"{path}.weight") and self._could_be_output(path)
        ]
        only_rows = all(self._settings.tokens_of(path) is not None for path in paths & {
            n.removesuffix(".weight") for n in touched_inputs
        })  # fmt: skip
        if self._settings.ties or self._tensors.metadata().get(TIED) in outputs:
            self._tied = frozenset(outputs)
            return
        if touched_inputs and not outputs and not only_rows:
            output = self._output_embedding()
            outputs = [output] if output else []
        if len(inputs) == 1 and len(outputs) == 1:
            self._copied[f"{outputs[0]}.weight"] = inputs[0]
            self._notes.append(
                f"{self._label} changes only one of the tied input and output embeddings, or each "
                f"in its own way; '{outputs[0]}.weight' becomes a tensor of its own"
            )

    def _is_table(self, name: str) -> bool:
        spec = self._base.spec(name)
        vocabulary = self._base.config.get("vocab_size")
        return len(spec.shape) == 2 and (vocabulary is None or spec.shape[0] == vocabulary)

    def _could_be_output(self, path: str) -> bool:
        """Whether a module that the base has no tensor for is its tied output embedding."""
        prefix = f"{PREFIX}{path}."
        return any(
            name.startswith(prefix)
            and (
                name.removeprefix(prefix) in ("weight", "lora_B.weight")
                and self._tensors.spec(name).shape[0] == self._base.config.get("vocab_size")
            )
            for name in self._tensors.names()
        )

    def _places(self, parameter: str) -> tuple[Part, ...]:
        if parameter in self._copied:
            return (Part(parameter),)
        return self._find(parameter)

    def _spec(self, tensor: str) -> TensorSpec:
        return self._base.spec(self._copied.get(tensor, tensor))

    def _edit(self, tensor: str, edit: PlannedEdit) -> None:
        self._edits.setdefault(tensor, []).append(edit)

    def _set_whole(self, parameter: str, name: str) -> None:
        places = self._places(parameter)
        spec = self._tensors.spec(name)
        if not places:
            self._added[parameter] = spec
            self._edit(parameter, WholeSet(name))
            return
        place = places[0]
        stored = self._spec(place.tensor)
        if len(places) > 1 or place.expert is not None or stored.shape != spec.shape:
            self._fail_shape(name, spec.shape, place.tensor, stored.shape)
        self._edit(place.tensor, WholeSet(name))

    def _set_rows(self, path: str, name: str) -> None:
        places = self._places(f"{path}.weight")
        indices = self._settings.tokens_of(path)
        if len(places) != 1 or indices is None:
            self._leftovers.append(name)
            return
        spec = self._tensors.spec(name)
        stored = self._spec(places[0].tensor)
        if spec.shape != (len(indices), stored.columns):
            raise PackError(
                f"{self._label}: '{name}' is {list(spec.shape)}, while the config names "
                f"{len(indices)} tokens and the base has rows of {stored.columns}",
                _WRONG_BASE,
            )
        if indices and max(indices) >= stored.rows:
            raise PackError(
                f"{self._label}: trained the token {max(indices)}, while the base has "
                f"{stored.rows} tokens",
                "The adapter was trained on a larger vocabulary; give that base.",
            )
        self._edit(places[0].tensor, RowsSet(name, indices))

    def _orientation(self, modules: Sequence[LoraModule]) -> bool:
        """Whether square weights are stored as (in, out): told by those that are not square."""
        votes = []
        for module in modules:
            places = self._places(f"{module.path}.weight")
            if len(places) != 1 or not {"lora_A", "lora_B"} <= module.parts.keys():
                continue
            stored = self._spec(places[0].tensor).shape
            change = (self._shape(module, "lora_B")[0], self._shape(module, "lora_A")[1])
            if len(stored) == 2 and stored[0] != stored[1]:
                if stored == change[::-1]:
                    votes.append(True)
                elif stored == change:
                    votes.append(False)
        return any(votes) if votes else self._conv1d

    def _shape(self, module: LoraModule, part: str) -> tuple[int, ...]:
        shape = self._tensors.spec(module.parts[part]).shape
        if len(shape) < 2 or 0 in shape:
            raise PackError(
                f"{self._label}: '{module.parts[part]}' is {list(shape)}, no matrix",
                "The weights were saved without gathering them (DeepSpeed, FSDP); save them again.",
            )
        return shape

    def _add_module(self, module: LoraModule, conv1d: bool) -> None:
        embedding = module.embedding
        a, b = module.factors
        for part, other in ((a, b), (b, a)):
            if part not in module.parts:
                raise PackError(
                    f"{self._label}: '{module.path}' has "
                    f"{' and '.join(sorted(module.parts)) or other} but no {part}",
                    "The file is not whole; download or save the adapter again.",
                )
        places = self._places(f"{module.path}.weight")
        if not places:
            self._add_parameter(module)
            return
        if len(places) != 1 or places[0].expert is not None or module.depth:
            self._leftovers += module.parts.values()
            return
        tensor = places[0].tensor
        stored = self._spec(tensor).shape
        shapes = self._shape(module, a), self._shape(module, b)
        if len(stored) > 2 and not embedding:
            self._add_convolution(module, tensor, stored, *shapes)
            return
        self._add_matrix(module, tensor, stored, *shapes, embedding=embedding, conv1d=conv1d)

    def _add_matrix(
        self,
        module: LoraModule,
        tensor: str,
        stored: tuple[int, ...],
        a: tuple[int, ...],
        b: tuple[int, ...],
        *,
        embedding: bool,
        conv1d: bool,
    ) -> None:
        rank = self._rank(module.path, a[0], b[1] if len(b) == 2 else -1)
        change = (b[0], a[1]) if len(a) == 2 else ()
        transposed = embedding or (
            stored == change[::-1] and (stored != change or conv1d)
        )  # fmt: skip
        if stored != (change[::-1] if transposed else change):
            name = module.parts["lora_embedding_A" if embedding else "lora_A"]
            self._fail_shape(name, change[::-1] if embedding else change, tensor, stored)
        keys = module.factors
        scale = self._settings.scale_of(module.path)
        factors = Factors(module.parts[keys[0]], module.parts[keys[1]], scale, transposed)
        if not embedding:
            self._edit_residual(tensor, rank, scale, transposed)
        magnitude = self._magnitude(module, b[0])
        self._edit(tensor, LowRankAdded(factors, magnitude, "columns" if transposed else "rows"))
        if "lora_B.bias" in module.parts:
            self._add_bias(module, scale)

    def _edit_residual(self, tensor: str, rank: int, scale: float, transposed: bool) -> None:
        """What the initialisation took from the base, if it did so and was not converted back."""
        initial = self._settings.initial
        kinds: dict[str, Literal["pissa", "olora"]] = {"pissa": "pissa", "olora": "olora"}
        if initial == "olora" and transposed:
            self._fail_variant("OLoRA on a weight that is stored as (in, out)")
        if initial in kinds:
            self._edit(tensor, Residual(kinds[initial], rank, scale, transposed))

    def _add_convolution(
        self,
        module: LoraModule,
        tensor: str,
        stored: tuple[int, ...],
        a: tuple[int, ...],
        b: tuple[int, ...],
    ) -> None:
        if (b[0], *a[1:]) != stored or b[1] != a[0] or any(size != 1 for size in b[2:]):
            self._fail_shape(module.parts["lora_A"], (b[0], *a[1:]), tensor, stored)
        self._rank(module.path, a[0], b[1])
        if self._settings.initial in ("pissa", "olora"):
            self._fail_variant(f"{self._settings.initial} on convolutions")
        scale = self._settings.scale_of(module.path)
        magnitude = self._magnitude(module, b[0])
        self._edit(
            tensor, ConvAdded(module.parts["lora_A"], module.parts["lora_B"], scale, magnitude)
        )
        if "lora_B.bias" in module.parts:
            self._add_bias(module, scale)

    def _add_parameter(self, module: LoraModule) -> None:
        """Factors of a parameter that is no module's weight, such as fused experts."""
        targets = self._settings.parameters
        a, b = self._shape(module, "lora_A"), self._shape(module, "lora_B")
        fitting: list[tuple[str, tuple[Part, ...], int, bool]] = []
        for name in sorted({target.rpartition(".")[2] for target in targets}):
            parameter = f"{module.path}.{name}"
            if not any(f".{parameter}".endswith(f".{target}") for target in targets):
                continue
            places = self._places(parameter)
            rank = self._settings.rank_of(parameter)
            if places and a[0] % rank == 0 and a[0] == b[1]:
                experts = a[0] // rank
                transposed = self._lies(places, experts, b[0], a[1])
                if transposed is not None:
                    fitting.append((parameter, places, experts, transposed))
        taken = {parameter for parameter, *_ in fitting}
        if len(taken) > 1:
            # The wrappers nest in the order in which the module defines its parameters.
            self._fail_variant(f"'{module.path}', whose parameters {sorted(taken)} have one shape")
        if not fitting:
            self._leftovers += module.parts.values()
            return
        parameter, places, experts, transposed = fitting[0]
        for place in places:
            factors = Factors(
                module.parts["lora_A"], module.parts["lora_B"],
                self._settings.scale_of(parameter), transposed, experts, place.expert, place.rows,
            )  # fmt: skip
            self._edit(place.tensor, LowRankAdded(factors))

    def _lies(self, places: tuple[Part, ...], experts: int, out: int, inputs: int) -> bool | None:
        """Whether a parameter is stored as (in, out); None if the change does not fit it."""
        shapes = [self._spec(place.tensor).shape for place in places]
        if places[0].expert is None:
            if len(places) > 1:
                return None
            lead = (experts,) if len(shapes[0]) == 3 else ()
            if len(shapes[0]) == 2 and experts != 1:
                return None
            whole = shapes[0]
        else:
            if experts != 1 + max(place.expert or 0 for place in places):
                return None
            lead = ()
            of_first = [s for s, p in zip(shapes, places, strict=True) if p.expert == 0]
            whole = (sum(shape[0] for shape in of_first), of_first[0][1])
        if whole == (*lead, out, inputs):
            return False
        return True if whole == (*lead, inputs, out) else None

    def _add_bias(self, module: LoraModule, scale: float) -> None:
        places = self._places(f"{module.path}.bias")
        if len(places) != 1:
            raise PackError(
                f"{self._label}: trained a bias for '{module.path}', which has none in the base",
                "It cannot be merged (PEFT refuses it too); use the adapter beside its base: "
                "pack adapters",
            )
        name = module.parts["lora_B.bias"]
        stored = self._spec(places[0].tensor).shape
        if self._tensors.spec(name).shape != stored:
            self._fail_shape(name, self._tensors.spec(name).shape, places[0].tensor, stored)
        self._edit(places[0].tensor, BiasAdded(name, scale))

    def _magnitude(self, module: LoraModule, outputs: int) -> str | None:
        name = module.parts.get("lora_magnitude_vector")
        if (name is not None) != self._settings.dora:
            raise PackError(
                f"{self._label}: the config {'asks' if name is None else 'does not ask'} for DoRA, "
                f"while '{module.path}' has {'no' if name is None else 'a'} magnitude vector",
                "Config and weights are of two adapters; download or save it again.",
            )
        if name is not None and self._tensors.spec(name).elements != outputs:
            self._fail_shape(name, self._tensors.spec(name).shape, module.path, (outputs,))
        return name

    def _rank(self, path: str, rank: int, other: int) -> int:
        stated = self._settings.rank_of(path)
        if not rank == other == stated:
            raise PackError(
                f"{self._label}: the factors of '{path}' have ranks {rank} and {other}, while the "
                f"config gives {stated}",
                "Config and weights are of two adapters, or the file is not whole; download or "
                "save it again.",
            )
        return rank

    def _fail_variant(self, what: str) -> NoReturn:
        raise PackError(
            f"{self._label}: cannot merge {what}",
            "Merge it with PEFT, or use it beside its base: pack adapters",
        )

    def _fail_shape(
        self, name: str, found: tuple[int, ...], tensor: str, stored: tuple[int, ...]
    ) -> NoReturn:
        vocabulary = len(found) == len(stored) == 2 and found[1] == stored[1]
        raise PackError(
            f"{self._label}: '{name}' changes a tensor of {list(found)}, while the base's "
            f"'{tensor}' is {list(stored)}",
            "The adapter was trained on another vocabulary; give the base with that vocabulary."
            if vocabulary
            else _WRONG_BASE,
        )

    def _fail_leftovers(self) -> NoReturn:
        names = sorted(self._leftovers)
        more = f"\n  … and {len(names) - 10} more" if len(names) > 10 else ""
        listed = "".join(f"\n  {name}" for name in names[:10])
        raise PackError(
            f"{self._label}: {len(names)} tensor(s) of the adapter fit nothing in the base:"
            + listed + more,
            _WRONG_BASE,
        )  # fmt: skip


_WRONG_BASE = "Check that this is the base that the adapter was trained on."
