"""A checkpoint as GGUF: its family's names and numbers, its vocabulary, its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from exporters.gguf.arrange import ArrangedCheckpoint
from exporters.gguf.families import Model, place_of
from exporters.gguf.metadata import Metadata, Value, text, u32
from exporters.gguf.mixtures import Facts, Mixture, Overrides, choose_types
from exporters.gguf.vocabulary import no_vocabulary, read_vocabulary
from exporters.gguf.write import Kinds, lay_out
from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.merge.plan import Shard

__all__ = ["GgufModel", "Scheme"]

_QUANTIZATION_VERSION = 2
_OWN_KEYS = frozenset({
    "general.file_type", "general.quantization_version", "general.alignment", "split.no",
    "split.count", "split.tensors.count",
})  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """What is wanted of a file.

    Attributes:
        mixture: Name for the types of all tensors.
        overrides: What goes before it.
        importance: Importance of columns, by tensor.
        split_bytes: Most bytes of tensors in a file that holds more than one.
    """

    mixture: Mixture
    overrides: Overrides = field(default_factory=Overrides)
    importance: Mapping[str, Array] = field(default_factory=dict)
    split_bytes: int | None = None


class GgufModel:
    """A model under GGUF's names, from which files of any types are planned.

    Args:
        tensors: What is written, in its order.
        facts: What rules about types ask of it.
        described: Keys and values, but for those that depend on the types.
        notes: What the user should know.

    Attributes:
        tensors: What is written.
        names: Names of the tensors, in the order in which they are written.
        facts: What rules about types ask of it.
        generates: Whether it gives distributions of next tokens.
        notes: What the user should know.
    """

    def __init__(
        self,
        tensors: Checkpoint,
        names: Sequence[str],
        facts: Facts,
        described: Metadata,
        notes: Sequence[str] = (),
    ) -> None:
        self.tensors = tensors
        self.names = names
        self.facts = facts
        self.generates = facts.architecture not in ("bert", "nomic-bert")
        self.notes = notes
        self._described = described

    @classmethod
    def convert(
        cls,
        checkpoint: Checkpoint,
        files: Mapping[str, bytes] | None,
        about: Metadata | None = None,
    ) -> GgufModel:
        """See a model of Hugging Face's as GGUF.

        Args:
            checkpoint: Any checkpoint with a config.
            files: Contents of the small files beside its weights, by name; None for a file without
                a vocabulary.
            about: Metadata that says what it is and where it comes from.

        Raises:
            PackError: The family is not known, llama.cpp does not compute this model or has no
                equal of its tokenizer, a tensor is missing or is too many.
        """
        model = Model(checkpoint.config, checkpoint.label)
        tensors = ArrangedCheckpoint(checkpoint, model.tensors(checkpoint))
        rows = tensors.spec("token_embd.weight").shape[0]
        vocabulary = (
            no_vocabulary()
            if files is None
            else read_vocabulary(files, rows, checkpoint.config, checkpoint.label)
        )
        described: dict[str, Value | bytes] = {
            "general.architecture": text(model.family.architecture),
            "general.type": text("model"),
            **(about or {}),
            **model.hyperparameters(),
            **vocabulary.metadata,
        }
        notes = [*model.settings.notes, *vocabulary.notes]
        return cls(tensors, list(tensors.tensors), model.facts(), described, notes)

    @classmethod
    def again(cls, checkpoint: GgufCheckpoint) -> GgufModel:
        """See a GGUF file as what another one is made of; its metadata is kept.

        Raises:
            PackError: It is no model, or does not say what the rules about types ask.
        """
        values, label = checkpoint.values, checkpoint.label
        architecture = str(values.get("general.architecture"))
        if values.get("general.type", "model") != "model":
            raise PackError(
                f"{label}: is of the type '{values.get('general.type')}', not a model",
                "Give the GGUF file of a model.",
            )

        def first(key: str, default: int | None = None) -> int:
            value = values.get(f"{architecture}.{key}", default)
            found = int(np.ravel(value)[0]) if np.size(value) and value is not None else 0
            if found <= 0 and default is None:
                raise PackError(f"{label}: lacks '{architecture}.{key}'", "Convert it again.")
            return found

        heads = first("attention.head_count")
        facts = Facts(
            architecture, first("block_count"), heads, first("attention.head_count_kv", heads),
            first("expert_count", 0),
        )  # fmt: skip
        kept = {k: raw for k, raw in checkpoint.raw.items() if k not in _OWN_KEYS}
        coarse = sorted(
            {checkpoint.stored(name)[0] for name in checkpoint.names()} - {"F32", "F16", "BF16"}
        )
        notes = []
        if coarse:
            notes.append(
                f"{label} is quantized already ({', '.join(coarse)}); errors add up, so quantize "
                "the model itself where you have it"
            )
        names = sorted(checkpoint.names(), key=place_of)
        return cls(checkpoint, names, facts, kept, notes)

    def metadata(self, mixture: Mixture) -> Metadata:
        """Keys and values of a file."""
        return {
            **self._described,
            "general.file_type": u32(mixture.number),
            "general.quantization_version": u32(_QUANTIZATION_VERSION),
        }

    def kinds(self, scheme: Scheme) -> Kinds:
        """The type of every tensor.

        Raises:
            PackError: An override fits no tensor, or an importance matrix is needed.
        """
        shapes = {name: self.tensors.spec(name).shape for name in self.names}
        return choose_types(
            shapes, self.facts, scheme.mixture, scheme.overrides, bool(scheme.importance)
        )

    def lay_out(self, scheme: Scheme, stem: str) -> tuple[Kinds, list[Shard]]:
        """Plan a file, or the parts of one that is split.

        Args:
            scheme: What is wanted.
            stem: Name without ``.gguf``.

        Raises:
            PackError: A tensor cannot be stored in its type.
        """
        kinds = self.kinds(scheme)
        metadata = self.metadata(scheme.mixture)
        return kinds, lay_out(metadata, self.tensors, kinds, stem, scheme.split_bytes)

    def fitted(self, importance: Mapping[str, Array], label: str) -> dict[str, Array]:
        """An importance matrix for the tensors that there are.

        Args:
            importance: From `exporters.gguf.imatrix.read_imatrix`.
            label: Where it was read from.

        Raises:
            PackError: It is of another model.
        """
        found: dict[str, Array] = {}
        for name in self.names:
            if name not in importance:
                continue
            values, spec = importance[name], self.tensors.spec(name)
            experts = spec.shape[0] if len(spec.shape) == 3 else 1
            if values.size not in (spec.columns, experts * spec.columns):
                raise PackError(
                    f"{label}: '{name}' has {values.size} values, the model's tensor has "
                    f"{spec.columns} columns",
                    "Give the importance matrix of this model.",
                )
            shape = (spec.columns,) if values.size == spec.columns else (experts, spec.columns)
            found[name] = np.ascontiguousarray(values, np.float32).reshape(shape)
        if not found:
            raise PackError(
                f"{label}: names no tensor of the model", "Give its own importance matrix."
            )
        missing = [n for n in importance if n not in found]
        if missing:
            self.notes = [
                *self.notes,
                f"{label}: {len(missing)} of its tensors are not in the model",
            ]
        return found
