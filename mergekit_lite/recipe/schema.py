"""The schema of a recipe: a superset of mergekit's YAML in which every key is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from mergekit_lite.recipe.parameters import Parameter, Setting
from mergekit_lite.recipe.reference import AdapterReference, format_reference

__all__ = [
    "AdaptedModel",
    "AdapterEntry",
    "EvaluateSection",
    "MethodSchema",
    "ModelEntry",
    "Recipe",
    "Slice",
    "SliceSource",
    "TokenizerSection",
    "changed",
]

Parameters = Annotated[
    dict[str, Any],
    Field(
        description="Parameters of the merge method: a number, a gradient, or a list of filters."
    ),
]


class MethodSchema(Protocol):
    """What a recipe's checks need to know of a merge method."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Its parameters by name."""

    @property
    def base(self) -> bool:
        """Whether it needs a base model."""

    @property
    def models(self) -> tuple[int, int | None]:
        """Smallest and largest number of models beside the base."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    def settings(self) -> Mapping[str, Setting]:
        """The section's parameters, parsed; empty where it has none."""
        settings: Mapping[str, Setting] = self.__dict__.get("_settings", {})
        return settings


_MODEL = "A folder, a .safetensors file, or a Hub id org/name[@revision]"


class AdapterEntry(_Section):
    """One adapter on a base."""

    path: Annotated[str, Field(min_length=1, description="A folder that PEFT saved, or a Hub id.")]
    weight: Annotated[float, Field(allow_inf_nan=False, description="Negative to subtract it.")] = (
        1.0
    )
    any_base: Annotated[
        bool, Field(description="Put it on this base, whatever base its config names.")
    ] = False


Adapters = Annotated[
    list[AdapterEntry],
    Field(min_length=1, description="What is put on the base, each with its weight."),
    WithJsonSchema(
        {
            "description": "What is put on the base, each with its weight.",
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [{"type": "string", "minLength": 1}, AdapterEntry.model_json_schema()]
            },
        }
    ),
]


class AdaptedModel(_Section):
    """A base with adapters on it; the same as writing base+weight*adapter."""

    model: Annotated[str, Field(min_length=1, description=_MODEL)]
    adapters: Adapters

    @property
    def reference(self) -> str:
        """The same in one line."""
        return format_reference(
            self.model,
            [AdapterReference(a.path, float(a.weight), a.any_base) for a in self.adapters],
        )


ModelName = Annotated[
    str,
    Field(min_length=1, description=f"{_MODEL}; base+adapter for a base with adapters on it."),
    WithJsonSchema(
        {
            "description": f"{_MODEL}; base+adapter, or a mapping, for a base with adapters on it.",
            "anyOf": [
                {"type": "string", "minLength": 1},
                AdaptedModel.model_json_schema(),
            ],
        }
    ),
]


class ModelEntry(_Section):
    """One model of a merge."""

    model: ModelName
    adapters: Adapters | None = None
    parameters: Parameters | None = None


class SliceSource(_Section):
    """Some layers of one model."""

    model: ModelName
    adapters: Adapters | None = None
    layer_range: Annotated[
        list[Annotated[int, Field(ge=0, le=100_000)]],
        Field(min_length=2, max_length=2, description="First layer, and one past the last."),
    ]
    parameters: Parameters | None = None


class Slice(_Section):
    """Layers of the result, and what they are made of."""

    sources: Annotated[list[SliceSource], Field(min_length=1)]
    parameters: Parameters | None = None


class TokenizerSection(_Section):
    """Where the tokenizer comes from."""

    source: Annotated[str, Field(min_length=1, description="base, union, or one of the models.")]


_Reason = Annotated[str, Field(min_length=3, max_length=2000)]
_Text = Annotated[str, Field(min_length=1, max_length=20_000)]


class CardSection(_Section):
    """What only the author of a release knows."""

    summary: _Text | None = None
    intended_use: _Text | None = None
    out_of_scope: _Text | None = None
    training_data: _Text | None = None
    evaluation: _Text | None = None
    limitations: _Text | None = None
    ethics: _Text | None = None
    citation: _Text | None = None
    authors: Annotated[list[_Text], Field(max_length=100)] | None = None
    contact: _Text | None = None
    languages: Annotated[list[_Text], Field(max_length=100)] | None = None
    tags: Annotated[list[_Text], Field(max_length=100)] | None = None
    template: Annotated[
        str | None,
        Field(min_length=1, max_length=1000, description="File of a template of one's own."),
    ] = None


Repository = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", max_length=200)
]


class HubSection(_Section):
    """Where a release goes on the Hub."""

    repo: Repository
    private: Annotated[bool, Field(description="Whether new repositories are private.")] = False
    per_format: Annotated[
        bool, Field(description="Whether each format has its own repository, org/name-GGUF.")
    ] = False
    collection: Annotated[
        str | None,
        Field(min_length=1, max_length=60, description="Collection that all of them are put into."),
    ] = None


class EvaluateSection(_Section):
    """What `pack build` measures of its results."""

    text: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=1000,
            description="A file; without it, a small one.",
        ),
    ] = None
    reference: Annotated[
        str | None, Field(min_length=1, description="Model that the result is compared with.")
    ] = None
    context: Annotated[int, Field(ge=2, le=1 << 20, description="Tokens of a window.")] = 256
    windows: Annotated[int, Field(ge=2, le=1 << 20, description="Windows at most.")] = 64
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Of the choice of windows.")] = 0
    max_kl: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False, description="Largest divergence, in nats."),
    ] = None
    max_perplexity_increase: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False, description="Largest increase; 0.01 is one percent."),
    ] = None


class CalibrationSection(_Section):
    """Text that a model is run on while it is quantized."""

    text: Annotated[
        str | None,
        Field(min_length=1, max_length=1000, description="A file; without it, a small one."),
    ] = None
    context: Annotated[int, Field(ge=2, le=1 << 20, description="Tokens of a window.")] = 512
    windows: Annotated[int, Field(ge=2, le=1 << 20, description="Windows at most.")] = 128
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Of the choice of windows.")] = 0


class QuantizeEntry(_Section):
    """One quantized file or folder that `pack build` makes."""

    to: Literal["gguf", "gptq", "awq", "int8", "bnb", "onnx"] = "gguf"
    scheme: Annotated[str, Field(min_length=1, description="See `pack quantize --list`.")]
    format: Annotated[
        Literal["gptq", "awq", "compressed-tensors"] | None,
        Field(description="How GPTQ and AWQ are written; each in its own if not given."),
    ] = None
    calibrate: Annotated[
        bool | None,
        Field(
            description="Whether GPTQ and int8 run the model, as usual; else they round plainly."
        ),
    ] = None
    calibration: Annotated[
        CalibrationSection | None, Field(description="What the model is run on.")
    ] = None
    block: Annotated[
        Literal[32, 128] | None, Field(description="ONNX: weights that share a scale, of int4.")
    ] = None
    symmetric: Annotated[
        bool | None, Field(description="ONNX: whether int4 has no zero points, as usual.")
    ] = None
    graph: Annotated[
        Literal["genai", "torch"] | None,
        Field(description="ONNX: who makes the graph; the better one for the model if not given."),
    ] = None


class Recipe(_Section):
    """A merge: which models, by which method, into what."""

    name: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$",
            description="Name of the result; the recipe's file name if not given.",
        ),
    ] = None
    version: Annotated[
        str | None,
        Field(
            pattern=r"^(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})(-[0-9A-Za-z-]{1,32}(\.[0-9A-Za-z-]{1,32}){0,8})?(\+[0-9A-Za-z-]{1,32}(\.[0-9A-Za-z-]{1,32}){0,8})?$",
            description="Semantic version of the result.",
        ),
    ] = None
    merge_method: Annotated[str, Field(description="See `pack methods`.")]
    license: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=200,
            description="Licence that the result is released under: the Hub's id, or SPDX's.",
        ),
    ] = None
    licenses: Annotated[
        dict[str, str] | None,
        Field(description="Licences of models, by their names here, where they do not say it."),
    ] = None
    accept_licenses: Annotated[
        dict[str, _Reason] | None,
        Field(description="Licences, by id or model, that you answer for, each with the reason."),
    ] = None
    profile: Annotated[
        Literal["research", "community", "production"] | None,
        Field(description="What a release must hold; under production what lacks is an error."),
    ] = None
    quantize: Annotated[
        list[QuantizeEntry] | None,
        Field(min_length=1, description="What `pack build` quantizes the result to."),
    ] = None
    evaluate: Annotated[
        EvaluateSection | None,
        Field(description="What `pack build` measures of its results, and what stops a release."),
    ] = None
    compare: Annotated[
        bool,
        Field(description="Whether a release shows what the models changed, by layer."),
    ] = True
    hub: Annotated[
        Repository | HubSection | None,
        Field(description="Repository of the Hub that `pack release --push-hub` pushes to."),
    ] = None
    card: Annotated[
        CardSection | None, Field(description="What only you know, for the card of a release.")
    ] = None
    base_model: ModelName | None = None
    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[list[Slice], Field(min_length=1)] | None = None
    parameters: Parameters | None = None
    output: Annotated[
        Literal["model", "adapter", "adapters"],
        Field(
            description="What is made: a whole model; of adapters alone, one adapter; or a bundle "
            "of the adapters beside their base (pack adapters)."
        ),
    ] = "model"
    rank: Annotated[
        int | None, Field(ge=1, le=1 << 20, description="Largest rank of a resulting adapter.")
    ] = None
    energy: Annotated[
        float | None,
        Field(gt=0, le=1, description="Share of each change that a resulting adapter keeps."),
    ] = None
    dtype: Annotated[
        str | None,
        Field(
            description="Type of the result; float64 also computes in it, all others in float32."
        ),
    ] = None
    out_dtype: Annotated[str | None, Field(description="Type of the result, if not dtype.")] = None
    tokenizer_source: Annotated[
        str | None, Field(min_length=1, description="base, union, or one of the models.")
    ] = None
    tokenizer: TokenizerSection | None = None
    chat_template: Annotated[
        str | None,
        Field(min_length=1, description="auto, chatml, one of the models, or a Jinja template."),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of random masks.")] = 0


def changed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe with other values of some keys; its parsed parameters stay attached."""
    copy = recipe.model_copy(update=dict(values))
    if "_settings" in recipe.__dict__:
        copy.__dict__["_settings"] = recipe.__dict__["_settings"]
    return copy
