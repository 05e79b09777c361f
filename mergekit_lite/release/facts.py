"""What pack knows of a release, for its card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from exporters.gguf.about import size_label
from mergekit_lite.checkpoint.locate import open_checkpoint
from mergekit_lite.release.card import front_matter
from mergekit_lite.release.compared import PLOT
from mergekit_lite.release.draft import Draft
from mergekit_lite.release.evaluated import EVALUATION
from mergekit_lite.release.gather import Made
from mergekit_lite.release.licences.find import data_sets
from mergekit_lite.release.licences.table import find_licence
from mergekit_lite.release.manifest import Entry
from mergekit_lite.release.papers import made_by

__all__ = ["cache_bytes", "card_values", "file_size"]


def card_values(draft: Draft, weights: Sequence[Entry]) -> dict[str, Any]:
    """All that a template of a card may name.

    Args:
        draft: The release.
        weights: Its files that are no papers.
    """
    made, recipe, licence, sources = draft.made, draft.recipe, draft.licence, draft.sources
    verdict, version = draft.verdict, draft.version
    card = dict.fromkeys(
        ("summary", "intended_use", "out_of_scope", "training_data", "evaluation", "limitations",
         "ethics", "citation", "authors", "contact"), None
    ) | dict(draft.card)  # fmt: skip
    bases = [s.parent.name for s in sources if s.entry.get("revision")]
    if made.variant and draft.hub is not None:
        bases = [draft.hub.repo]
    kinds = {artifact.kind for artifact in made.artifacts}
    relation = "merge" if "merge" in kinds else "quantized" if kinds == {"quantize"} else "adapter"
    ggufs = [entry.path for entry in weights if entry.path.endswith(".gguf")]
    found = find_licence(licence) if licence else None
    head = front_matter(
        licence, bases, relation, card.get("languages") or [], card.get("tags") or [],
        "peft" if relation == "adapter" else "gguf" if kinds == {"quantize"} and ggufs
        else "transformers",
        _model_index(made),
    )  # fmt: skip
    return {
        "front_matter": head,
        "name": made.title,
        "version": version,
        "card": card,
        "display": [o.what for o in verdict.obligations if o.kind == "display"],
        "made_by": made_by(made),
        "architecture": draft.architecture,
        "parameters": _parameters(made),
        "base": recipe.get("base_model") or "",
        "base_to_load": _base_to_load(draft),
        "licence": found.title if found else licence or "",
        "licence_url": found.url if found else "",
        "parents": [
            {"name": s.parent.name, "revision": s.entry.get("revision"), "digest": s.digest,
             "licence": " AND ".join(one.id for one in s.parent.terms) or s.parent.stated}
            for s in sources
        ],
        "data_sets": [
            {"parent": s.parent.name, "names": ", ".join(names)}
            for s in sources if (names := data_sets(s.folder))
        ],
        "recipe": yaml.safe_dump(_without_card(recipe), sort_keys=True) if recipe else "",
        "quantized": list(_quantized(made)),
        "plot": _plot(made),
        "evaluation": _evaluation(made),
        "cache": file_size(cached) if (cached := cache_bytes(draft.config)) else "",
        "adapters": _adapters(made),
        "files": [{"path": e.path, "size": file_size(e.size)} for e in weights if e.size > 1 << 16],
        "in_transformers": made.main.kind == "merge"
        or bool(made.variant and not ggufs and not list(_graphs(made))),
        "linears": [] if made.variant else sorted({
            made.place(a, "").rstrip("/") for a in made.artifacts
            if a.kind == "quantize" and a.lock.get("format") not in ("gguf", "onnx")
        }),
        "graphs": list(_graphs(made)),
        "kind": made.main.kind,
        "ggufs": ggufs,
        "siblings": list(_siblings(draft)),
        "accepted": list(verdict.accepted),
        "obligations": [
            o.what for o in verdict.obligations if o.kind not in ("display", "prefix", "not_first")
        ],
    }  # fmt: skip


def _base_to_load(draft: Draft) -> str:
    """What to load a base by: its name on the Hub, or a folder that somebody must have."""
    base = str(draft.recipe.get("base_model") or "BASE")
    on_hub = any(s.parent.name == base and s.entry.get("revision") for s in draft.sources)
    return base if on_hub else f"path/to/{Path(base).name}"


def _siblings(draft: Draft) -> Iterator[dict[str, str]]:
    """The other repositories of this release."""
    plan, whole = draft.hub, draft.made.whole
    if plan is None or whole is None:
        return
    for part in whole.parts():
        if part.variant != draft.made.variant:
            what = f"in {part.variant.upper()}" if part.variant else "the model itself"
            yield {"what": what, "repo": plan.repo_of(part.variant)}


def _parameters(made: Made) -> str:
    """How many weights the model has, from headers; nothing where it is no whole model."""
    if made.model.kind != "merge":
        return ""
    checkpoint = open_checkpoint(str(made.model.folder), Path()).checkpoint
    try:
        return size_label(sum(checkpoint.spec(name).elements for name in checkpoint.names()))
    finally:
        checkpoint.close()


def _without_card(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "card"}


def _quantized(made: Made) -> Iterator[dict[str, str]]:
    for artifact in made.artifacts:
        if artifact.kind != "quantize":
            continue
        types = artifact.lock.get("types") or {}
        counts: dict[str, int] = {}
        for kind in types.values():
            counts[kind] = counts.get(kind, 0) + 1
        checked = artifact.lock.get("verification") or {}
        evaluated = any(a.kind == "evaluate" for a in (made.whole or made).artifacts)
        measured = "see the evaluation" if evaluated else "not measured"
        if checked.get("divergence") is not None:
            measured = (
                f"KL divergence {checked['divergence']:.2e}, the same top token at "
                f"{checked['top_token_agreement']:.1%} of {checked['positions']} positions"
            )
        elif checked.get("largest_difference") is not None:
            measured = (
                f"largest difference of an output {checked['largest_difference']:g} of "
                f"{checked['largest_output']:g}, the same first choice at "
                f"{checked['agreement']:.1%} of {checked['tokens']} tokens"
            )
        elif checked.get("largest_relative_error") is not None:
            measured = f"largest error of a tensor {checked['largest_relative_error']:.2%}"
        form = artifact.lock.get("format")
        path = artifact.files[0].path if form == "gguf" else "model*.safetensors"
        if form == "onnx":
            path = next(e.path for e in artifact.files if e.path.endswith(".onnx"))
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        yield {
            "path": made.place(artifact, path),
            "types": listed or f"{form} {artifact.lock.get('scheme')}",
            "bits": str(artifact.lock.get("bits_per_weight", "-")),
            "measured": measured,
        }


def _graphs(made: Made) -> Iterator[dict[str, str]]:
    """Results in ONNX: the folder, and transformers.js's name of the kind, if it has one."""
    names = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4", "int4-fp16": "q4f16"}
    for artifact in made.artifacts:
        if artifact.kind == "quantize" and artifact.lock.get("format") == "onnx":
            folder = made.place(artifact, "").rstrip("/") or "."
            yield {"folder": folder, "dtype": names.get(str(artifact.lock.get("scheme")), "")}


def file_size(count: int) -> str:
    """Bytes as a person reads them, in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _evaluation(made: Made) -> dict[str, Any] | None:
    """What was measured, where its plot lies, and the command that measures it; None without."""
    whole = made.whole or made
    artifact = next((a for a in whole.artifacts if a.kind == "evaluate"), None)
    if artifact is None:
        return None
    settings = artifact.lock.get("settings") or {}
    text = f" --text {settings['text']}" if settings.get("text") else ""
    against = settings.get("reference")
    rows = [
        {"name": one["name"], "perplexity": f"{one['perplexity']:g}",
         "interval": f"{one['low']:g} … {one['high']:g}", "reference": one.get("reference") or "-",
         "change": "-" if one.get("perplexity_change") is None else
         f"{one['perplexity_change']:+.2%}",
         "kl": "-" if one.get("kl_mean") is None else f"{one['kl_mean']:g}",
         "agreement": "-" if one.get("agreement") is None else f"{one['agreement']:.1%}"}
        for one in artifact.lock.get("measured", [])
    ]  # fmt: skip
    ggufs = [made.place(a, e.path) for a in made.artifacts if a.kind == "quantize"
             for e in a.files if e.path.endswith(".gguf")]  # fmt: skip
    ggufs += [made.place(a, "").rstrip("/") or "." for a in made.artifacts
              if a.kind == "quantize" and a.lock.get("format") != "gguf"]  # fmt: skip
    options = f"{text} --context {settings['context']} --windows {settings['windows']}"
    commands = [f"pack eval . --reference {against}{options}"] if against else []
    commands += [f"pack eval {' '.join(ggufs)} --reference .{options}"] if ggufs else []
    shown = any(a is artifact for a in made.artifacts)
    return {
        "rows": rows, "text": artifact.lock.get("text"), "context": settings["context"],
        "commands": commands or [f"pack eval .{options}"],
        "plot": made.place(artifact, EVALUATION) if shown else "",
    }  # fmt: skip


def _model_index(made: Made) -> list[dict[str, Any]]:
    """What was measured of the model itself, as the Hub reads it."""
    artifact = next((a for a in made.artifacts if a.kind == "evaluate"), None)
    if artifact is None:
        return []
    text = str(artifact.lock.get("text"))
    found = [one for one in artifact.lock.get("measured", []) if one["name"] == "the model"]
    return [
        {"name": made.title, "results": [
            {"task": {"type": "text-generation"},
             "dataset": {"name": text, "type": text.rpartition(".")[0] or text},
             "metrics": [{"type": "perplexity", "value": one["perplexity"]}]} for one in found
        ]}
    ]  # fmt: skip


def _plot(made: Made) -> str:
    """Where the plot of what the models changed lies; empty without."""
    for artifact in made.artifacts:
        if artifact.kind == "compare":
            return made.place(artifact, PLOT)
    return ""


def _adapters(made: Made) -> list[str]:
    """Folders of the adapters of a bundle, within the release."""
    return sorted(
        {
            str(Path(e.path).parent)
            for e in made.main.files
            if e.path.endswith("adapter_config.json")
        }
    )


def cache_bytes(config: Mapping[str, Any]) -> int:
    """Memory that 1,024 tokens of context take, in 16 bits; 0 where the config does not tell.

    Two vectors (key and value) for each layer and each head that has its own.
    """
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    layers, heads, hidden = (config.get(name) for name in names)
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return 0
    own = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or hidden // max(heads, 1)
    if not (isinstance(own, int) and isinstance(width, int)):
        return 0
    return 2 * layers * own * width * 2 * 1024
