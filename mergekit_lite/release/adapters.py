"""Adapters packaged beside their base, to be switched while it runs.

Each adapter is there as PEFT saves it and, where llama.cpp can apply it, as GGUF; scripts start
vLLM and llama.cpp with all of them. The base is named, not copied.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf.lora import why_not, write_gguf_lora
from mergekit_lite.adapters.base import check_base
from mergekit_lite.adapters.config import AdapterConfig, LoraSettings, read_adapter_config
from mergekit_lite.adapters.contents import sort_tensors
from mergekit_lite.adapters.locate import open_adapter, put_on
from mergekit_lite.adapters.types import MERGED, is_streamed
from mergekit_lite.adapters.write import WEIGHTS_NAME
from mergekit_lite.checkpoint.digest import sha256_of
from mergekit_lite.checkpoint.header import write_header
from mergekit_lite.checkpoint.locate import Source, open_checkpoint
from mergekit_lite.checkpoint.protocol import Checkpoint, InputFile
from mergekit_lite.errors import PackError
from mergekit_lite.merge.config import to_json
from mergekit_lite.merge.lock import LOCK_NAME, lock_file
from mergekit_lite.merge.writer import (
    OutputFile,
    explained,
    partial_of,
    refuse_existing,
    refuse_inputs,
    replace_folder,
    write_durably,
)
from mergekit_lite.recipe import Recipe
from mergekit_lite.recipe.reference import AdapterReference
from mergekit_lite.resources import resource_folder

__all__ = ["BundleResult", "NamedAdapter", "Packaged", "bundle_adapters"]

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM allows as ``--max-lora-rank``."""


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter that goes into a bundle.

    Attributes:
        name: What it is asked for by, while the base runs.
        reference: Folder or Hub id.
        any_base: Whether the base that its config names does not matter.
    """

    name: str
    reference: str
    any_base: bool = False


@dataclass(frozen=True)
class Packaged:
    """What became of one adapter.

    Attributes:
        name: Its name.
        kind: Its type.
        rank: Largest rank; None for types without.
        not_gguf: Why there is no GGUF of it; None if there is.
        not_vllm: Why vLLM cannot use it; None if it can.
    """

    name: str
    kind: str
    rank: int | None
    not_gguf: str | None
    not_vllm: str | None


@dataclass(frozen=True)
class BundleResult:
    """A finished bundle.

    Attributes:
        folder: Where it lies.
        outputs: Its files, the lock included.
        adapters: What became of each.
        notes: What the user should know.
    """

    folder: Path
    outputs: Sequence[OutputFile]
    adapters: Sequence[Packaged]
    notes: Sequence[str]


def adapters_of(recipe: Recipe) -> tuple[str, list[NamedAdapter]]:
    """Base and adapters of a recipe with ``output: adapters``.

    Raises:
        PackError: It is another recipe.
    """
    if recipe.output != "adapters" or recipe.base_model is None or recipe.models is None:
        raise PackError(
            f"{recipe.name}: not a recipe for a bundle of adapters",
            "It needs 'output: adapters', 'base_model', and the adapters under 'models'.",
        )
    return recipe.base_model, [NamedAdapter(adapter_name(e.model), e.model) for e in recipe.models]


def adapter_name(reference: str) -> str:
    """What an adapter is called that has no name of its own: its folder's."""
    return Path(reference.partition("@")[0]).resolve().name


def bundle_adapters(
    base: str,
    adapters: Sequence[NamedAdapter],
    home: Path,
    folder: Path,
    *,
    gguf: bool = True,
    force: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> BundleResult:
    """Package adapters.

    Args:
        base: The base that they are for: folder or Hub id; only its headers are read.
        adapters: What is packaged.
        home: Folder that relative paths start from.
        folder: Where the bundle goes.
        gguf: Whether GGUF files are made.
        force: Whether an existing result of pack is replaced.
        recipe: That asks for it, as data; None where none does.

    Raises:
        PackError: An adapter is not for this base or does not fit it, or a name is not usable.
    """
    refuse_existing(folder, force)
    _check_names(adapters)
    with ExitStack() as opened:
        source = open_checkpoint(base, home)
        opened.callback(source.checkpoint.close)
        found: list[Source] = []
        for adapter in adapters:
            found.append(open_adapter(adapter.reference, home))
            opened.callback(found[-1].checkpoint.close)
        refuse_inputs(folder, [source.path, *(adapter.path for adapter in found)])
        bundle = _Bundle(source, adapters, found, home, recipe, gguf=gguf)
        return bundle.write(folder)


def _check_names(adapters: Sequence[NamedAdapter]) -> None:
    seen: set[str] = set()
    for adapter in adapters:
        plain = adapter.name.replace("-", "").replace("_", "").replace(".", "")
        if not (plain.isascii() and plain.isalnum()) or adapter.name.startswith("."):
            raise PackError(
                f"'{adapter.name}': no name for an adapter; letters, digits, '-', '_' and '.'",
                f"Give another: name={adapter.reference}",
            )
        if adapter.name in seen:
            raise PackError(
                f"two adapters are named '{adapter.name}'",
                f"Name one of them: other-name={adapter.reference}",
            )
        seen.add(adapter.name)


class _Bundle:
    def __init__(
        self,
        base: Source,
        named: Sequence[NamedAdapter],
        adapters: Sequence[Source],
        home: Path,
        recipe: Mapping[str, Any] | None,
        *,
        gguf: bool,
    ) -> None:
        self._recipe = recipe
        self._base = base
        self._named = named
        self._adapters = adapters
        self._configs = [read_adapter_config(a.path, a.reference) for a in adapters]
        self._notes: list[str] = []
        for name, config, adapter in zip(named, self._configs, adapters, strict=True):
            if not name.any_base:
                self._notes += check_base(config, adapter, base, home)
            self._check_fits(config, adapter)
        self._packaged = [
            _packaged(name.name, config, adapter.checkpoint, base.checkpoint.config, gguf=gguf)
            for name, config, adapter in zip(named, self._configs, adapters, strict=True)
        ]

    def _check_fits(self, config: AdapterConfig, adapter: Source) -> None:
        """Compare shapes with the base's, of types that can be planned from headers."""
        if config.kind in MERGED and is_streamed(config):
            forced = AdapterReference(adapter.reference, any_base=True)
            put_on(config.label, self._base, [adapter], [forced], Path())

    def write(self, folder: Path) -> BundleResult:
        """Write everything beside the final folder, then give it its name."""
        with explained(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=partial_of(folder).name + ".", dir=folder.parent))
            try:
                made.chmod(0o755)
                self._fill(made)
                outputs = self._lock(made)
                replace_folder(made, folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        return BundleResult(folder, outputs, self._packaged, self._notes)

    def _fill(self, made: Path) -> None:
        for packaged, config, adapter in zip(
            self._packaged, self._configs, self._adapters, strict=True
        ):
            place = made / "adapters" / packaged.name
            place.mkdir(parents=True)
            _copy_weights(adapter.checkpoint, place / WEIGHTS_NAME)
            write_durably(place / "adapter_config.json", to_json(self._own_config(config)))
            if packaged.not_gguf is None:
                (made / "gguf").mkdir(exist_ok=True)
                write_gguf_lora(
                    config, adapter.checkpoint, self._base.checkpoint.config,
                    made / "gguf" / f"{packaged.name}.gguf", packaged.name,
                )  # fmt: skip
        for name, text in self._rendered().items():
            write_durably(made / name, text.encode())
        for script in (made / "serving").glob("*.sh"):
            script.chmod(0o755)

    def _own_config(self, config: AdapterConfig) -> dict[str, Any]:
        """The adapter's config, naming the base that the bundle is for."""
        name = self._base.reference.partition("@")[0]
        local = self._base.revision is None
        return dict(config.data) | {
            "base_model_name_or_path": str(self._base.path.resolve().name) if local else name,
            "revision": self._base.revision,
        }

    def _rendered(self) -> Mapping[str, str]:
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(resource_folder("templates")),
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True,
            lstrip_blocks=True, autoescape=False,  # noqa: S701 (shell scripts and Markdown)
        )  # fmt: skip
        for_vllm = [p for p in self._packaged if p.not_vllm is None]
        for_gguf = [p for p in self._packaged if p.not_gguf is None]
        ranks = [p.rank or 0 for p in for_vllm]
        base = self._base.reference if self._base.revision else self._base.path.resolve().name
        values = {
            "base": base.partition("@")[0],
            "revision": self._base.revision,
            "adapters": self._packaged,
            "vllm": for_vllm,
            "gguf": for_gguf,
            "max_rank": next((r for r in _VLLM_RANKS if r >= max(ranks, default=0)), None),
        }
        files = {"README.md": "adapters-readme.md.jinja"}
        if for_vllm:
            files["serving/vllm.sh"] = "serve-vllm.sh.jinja"
        if for_gguf:
            files["serving/llama-server.sh"] = "serve-llama-server.sh.jinja"
        return {
            name: environment.get_template(template).render(values)
            for name, template in files.items()
        }

    def _lock(self, made: Path) -> list[OutputFile]:
        files = sorted(path for path in made.rglob("*") if path.is_file())
        outputs = [
            OutputFile(str(p.relative_to(made)), p.stat().st_size, sha256_of(p)) for p in files
        ]
        fields = {
            **({"recipe": dict(self._recipe)} if self._recipe else {}),
            "base": {"model": self._base.reference, "revision": self._base.revision},
            "notes": self._notes,
            "adapters": {
                p.name: {"type": p.kind, "rank": p.rank, "no_gguf": p.not_gguf,
                         "no_vllm": p.not_vllm}
                for p in self._packaged
            },
        }  # fmt: skip
        weights: dict[str, Sequence[InputFile]] = {
            self._base.reference: (),  # it stays outside: none of its weights is read
            **{a.reference: a.checkpoint.input_files() for a in self._adapters},
        }
        lock = lock_file("adapters", fields, [*self._adapters, self._base], weights, outputs)
        write_durably(made / LOCK_NAME, lock)
        return [*outputs, OutputFile(LOCK_NAME, len(lock), sha256_of(made / LOCK_NAME))]


def _packaged(
    name: str,
    config: AdapterConfig,
    tensors: Checkpoint,
    base_config: Mapping[str, object],
    *,
    gguf: bool,
) -> Packaged:
    if config.kind != "LORA":
        other = f"it knows LoRA only, this is {config.kind}"
        return Packaged(name, config.kind, None, f"llama.cpp: {other}", f"vLLM: {other}")
    contents = sort_tensors(tensors)
    settings = LoraSettings.of(config)
    paths = [module.path for module in contents.modules]
    ranks = [settings.rank_of(path) for path in paths]
    scales = {settings.scale_of(path) for path in paths}
    whole = settings.alpha / (settings.rank**0.5 if settings.rank_stabilized else settings.rank)
    reasons = {
        "applies no DoRA": settings.dora,
        "loads no tensors saved whole": bool(contents.whole or contents.rows),
        "loads no biases": config.data.get("bias") not in (None, "none"),
        "applies one scale to all modules (pack merge linear with output: adapter makes them one)":
        scales != {whole},
        f"allows no rank above {_VLLM_RANKS[-1]}": max(ranks, default=0) > _VLLM_RANKS[-1],
        "knows no adapted parameters or replicated layers":
        bool(settings.parameters or settings.replication),
    }  # fmt: skip
    found = [what for what, there in reasons.items() if there]
    not_gguf = why_not(config, contents, base_config) if gguf else "not asked for"
    return Packaged(
        name, config.kind, max(ranks, default=None), not_gguf,
        f"vLLM {' and '.join(found)}" if found else None,
    )  # fmt: skip


def _copy_weights(tensors: Checkpoint, path: Path) -> None:
    """Write an adapter's tensors as they are, with a canonical header."""
    names = tensors.names()
    prefix, _ = write_header(
        ((name, tensors.spec(name).dtype, tensors.spec(name).shape) for name in names),
        {"format": "pt"},
    )
    with path.open("wb") as file:
        file.write(prefix)
        for name in names:
            file.write(np.ascontiguousarray(tensors.read(name)).tobytes())


def describe(result: BundleResult) -> str:
    """The result as JSON for programs."""
    return json.dumps(
        {
            "folder": str(result.folder),
            "notes": list(result.notes),
            "adapters": {
                p.name: {
                    "type": p.kind,
                    "rank": p.rank,
                    "no_gguf": p.not_gguf,
                    "no_vllm": p.not_vllm,
                }
                for p in result.adapters
            },
            "outputs": [
                {"path": o.path, "bytes": o.size, "sha256": o.sha256} for o in result.outputs
            ],
        }
    )
