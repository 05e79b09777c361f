"""A model exported to ONNX from start to end: graph, weights as a stream, check, lock."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from exporters.linears.matrices import is_router
from exporters.onnx.build import build_graph
from exporters.onnx.card import onnx_card
from exporters.onnx.check import (
    TOLERANCE,
    Checked,
    Comparison,
    as_floats,
    check_form,
    check_places,
    refuse_other,
)
from exporters.onnx.codes import codes_of
from exporters.onnx.deferred import Read
from exporters.onnx.folder import genai_config, small_files
from exporters.onnx.layout import LaidOut, lay_out_graph
from exporters.onnx.link import Links, link_weights
from exporters.onnx.rewrite import Asked, Rewritten, rewrite
from exporters.onnx.schemes import OnnxScheme, Route
from exporters.onnx.session import GraphRun, Refused
from exporters.onnx.weights import WeightWriter
from mergekit_lite.checkpoint.protocol import Checkpoint
from mergekit_lite.errors import Interrupted
from mergekit_lite.evaluate.parts import Parts
from mergekit_lite.kernels.jit import is_first_use
from mergekit_lite.merge.destination import Upload
from mergekit_lite.merge.lock import LOCK_NAME, lock_file
from mergekit_lite.merge.model import WholeModel
from mergekit_lite.merge.run import Progress
from mergekit_lite.merge.writer import (
    ArtifactWriter,
    OutputFile,
    check_place,
    explained,
    write_durably,
)

__all__ = ["FORMAT", "MadeOnnx", "OnnxRequest", "run_onnx"]

FORMAT = 2
"""Raised whenever the same model begins to give other bytes; part of a fingerprint."""
FOLDER = "onnx"
"""Where transformers.js and optimum look for graphs."""
_BUDGET = 128 << 20
_FLOATS = {"float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True)
class OnnxRequest:
    """What is wanted.

    Attributes:
        scheme: Kind of file.
        folder: Where the result goes.
        asked: The same as an entry of a recipe.
        block: Weights that share a scale, of 4 bits.
        symmetric: Whether the zero point is the middle of the codes.
        route: Who makes the graph.
        threads: Worker threads.
        force: Whether an existing result is replaced.
        linked: Whether weights stay where they are in the model's files, which are linked.
        verify: Whether the graph is run beside the model.
        rounded: The model on grids already, by looking at activations; its codes are taken where
            they fit. None for rounding here, or for a model that is quantized itself.
        details: How that was done.
        upload: Takes the result elsewhere; the folder is then only where it passes through.
    """

    scheme: OnnxScheme
    folder: Path
    asked: Mapping[str, Any]
    block: int = 32
    symmetric: bool = True
    route: Route = "auto"
    threads: int = 1
    force: bool = False
    linked: bool = False
    verify: bool = True
    rounded: Checkpoint | None = None
    details: Mapping[str, Any] | None = None
    upload: Upload | None = None


@dataclass(frozen=True)
class MadeOnnx:
    """One result.

    Attributes:
        folder: Where it lies, or passed through on its way elsewhere.
        outputs: Its files, the lock included.
        bits: Per weight, all tensors together.
        route: What made the graph.
        checked: How far it is from the model; None where it was not run.
        notes: What the user should know.
        seconds: That it took.
    """

    folder: Path
    outputs: Sequence[OutputFile]
    bits: float
    route: str
    checked: Checked | None
    notes: Sequence[str]
    seconds: float


def run_onnx(model: WholeModel, request: OnnxRequest, progress: Progress | None = None) -> MadeOnnx:
    """Export a model; the result appears when it is whole and was compared with the model.

    Args:
        model: Left open.
        request: What is wanted.
        progress: Told how far it is.

    Raises:
        Interrupted: The user stopped it; files of weights that were finished are kept.
        PackError: The architecture is not known, the graph is not the model, the disk is full.
    """
    began = time.monotonic()
    progress = progress or Progress()
    check_place(request.folder, request.upload, model.sources, request.force)
    notes: list[str] = []
    try:
        model.observe_alone(progress)
        try:
            with ExitStack() as stack:
                return _run(model, request, progress, stack, began, notes)
        except _BuilderRefused as error:
            notes.append(f"{error.message}; torch.onnx makes it")
        upload = None if request.upload is None else request.upload.again()
        other = replace(request, route="torch", upload=upload)
        with ExitStack() as stack:
            return _run(model, other, progress, stack, began, notes)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted("stopped", "Run the same command again.") from None


class _BuilderRefused(Exception):
    """A graph of the builder's is not right, and another way is open."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def _run(
    model: WholeModel,
    request: OnnxRequest,
    progress: Progress,
    stack: ExitStack,
    began: float,
    why: Sequence[str],
) -> MadeOnnx:
    scheme = request.scheme
    progress.begin("Graph", 0)
    weights = request.rounded or model.checkpoint
    # The builder joins and turns matrices, which then lie nowhere in the files.
    route = "torch" if request.linked and request.route == "auto" else request.route
    graph, parts = build_graph(weights, route, scheme.half)
    comparison = Comparison(model.checkpoint, graph.kind)
    stack.callback(comparison.close)
    built = graph.route.startswith("onnxruntime-genai")
    unrounded = None
    if request.verify:
        comparison.begin([output.name or "" for output in graph.model.graph.outputs])
        if built and scheme.bits is not None:
            # What codes cost would hide a graph that is another model: it is run with floats too.
            unrounded = as_floats(graph)
    made = rewrite(graph, Asked(
        scheme, request.block, request.symmetric, _routers(parts),
        _head(parts.model), codes_of(weights, parts),
    ))  # fmt: skip
    links = link_weights(graph, made, parts, weights) if request.linked else Links({}, {})
    laid = lay_out_graph(made, FOLDER, scheme.file, links.places)
    notes = list(dict.fromkeys([*model.notes, *why, *graph.notes, *made.notes]))
    for line in notes:
        progress.note(line)
    beside = small_files(model.files, model.checkpoint.config, scheme.file, laid.chunks)
    writer = ArtifactWriter(
        request.folder, laid.shards, _fingerprint(model, request, laid), request.force,
        request.upload, hold=True,
    )  # fmt: skip
    stack.callback(writer.close)
    if writer.discarded and not why:
        progress.note("the model or the settings changed since the run that was stopped; "
                      "starting afresh")  # fmt: skip
    if is_first_use():
        progress.note("compiling kernels, once after installation: some seconds")
    path = f"{FOLDER}/{scheme.file}.onnx"
    maker = WeightWriter(made, laid, parts.parameter, writer, request.threads, progress)
    checked = None
    try:
        with _builder_may_fail(built and request.route == "auto"):
            if unrounded is not None:
                itself = None if request.rounded is None else _reader(model.checkpoint)
                lent = maker.unrounded(graph, scheme.half, itself)
                run = GraphRun(
                    writer.partial / path, _BUDGET, request.threads, False, lent, unrounded
                )
                refuse_other(comparison.measure(run), TOLERANCE[_FLOATS[scheme.dtype]], graph.route)
            elif request.verify and scheme.bits is None and not request.linked:
                message = onnx.load_from_string(laid.graph)
                run = GraphRun(
                    writer.partial / path, _BUDGET, request.threads, False, maker.written, message
                )
                checked = comparison.measure(run)
                refuse_other(checked, TOLERANCE[scheme.name], graph.route)
        maker.finish()
    except BaseException:
        maker.abort()
        raise
    inputs = model.input_files()
    digests = {file.path: file.sha256 for files in inputs.values() for file in files}
    for name, source in links.files.items():
        writer.link(f"{FOLDER}/{name}", source, digests[name])
    with explained(request.folder):
        write_durably(writer.partial / path, laid.graph)
        check_form(writer.partial / path, links.files)
        check_places(writer.partial / path, maker.ends)
    run = GraphRun(writer.partial / path, _BUDGET, request.threads, scheme.bits is not None)
    if request.verify and checked is None:
        with _builder_may_fail(built and request.route == "auto"):
            checked = comparison.measure(run)
            refuse_other(checked, TOLERANCE.get(scheme.name), graph.route)
    files = {
        **beside,
        path: laid.graph,
    }
    if graph.kind == "decoder":
        files["genai_config.json"] = genai_config(
            parts.model.config, model.files, run.cache,
            (list(run.inputs), run.outputs), path,
        )  # fmt: skip
    elements = sum(p.numel() for p in parts.model.parameters())
    size = sum(shard.size for shard in laid.shards) + len(laid.graph)
    bits = 8 * size / max(1, elements)
    files["README.md"] = onnx_card(model, scheme, graph.kind, graph.route, bits, checked, notes)
    fields: dict[str, Any] = {
        "name": model.name,
        "format": "onnx",
        "scheme": scheme.name,
        "asked": request.asked,
        "options": {},
        **model.describe(),
        "details": dict(request.details or {}),
        "matrices": {"rounded": made.rounded, "with_codes_of_their_own": made.kept},
        "graph": {"by": graph.route, "kind": graph.kind, "opset": _opset(made)},
        "computed_with": _versions(),
        "bits_per_weight": round(bits, 3),
        "verification": None if checked is None else checked.describe(),
        "notes": notes,
    }
    if writer.uploads:
        progress.begin("Upload", 0)
    outputs = writer.outputs(files)
    lock = lock_file("quantize", fields, list(model.sources), inputs, outputs)
    published = writer.publish({**files, LOCK_NAME: lock})
    return MadeOnnx(
        request.folder, published, bits, graph.route, checked, notes, time.monotonic() - began
    )


@contextmanager
def _builder_may_fail(another: bool) -> Iterator[None]:
    """Let a refused graph be made another way, where there is another."""
    try:
        yield
    except Refused as error:
        if another:
            raise _BuilderRefused(error.message) from None
        raise


def _options(request: OnnxRequest) -> dict[str, Any]:
    """What was asked for and differs from the usual."""
    pairs = {
        "block": (request.block, 32),
        "symmetric": (request.symmetric, True),
        "graph": (request.route, "auto"),
    }
    return {name: value for name, (value, usual) in pairs.items() if value != usual}


def _opset(made: Rewritten) -> int:
    return int(made.model.opset_imports[""])


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import transformers

    return {
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
    }


def _fingerprint(model: WholeModel, request: OnnxRequest, laid: LaidOut) -> str:
    parts = [
        f"onnx {FORMAT}",
        model.fingerprint(),
        hashlib.sha256(laid.graph).hexdigest(),
        json.dumps([request.scheme.name, request.asked, _options(request)], sort_keys=True),
        json.dumps(dict(request.details or {}), sort_keys=True),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _reader(checkpoint: Checkpoint) -> Read:
    return Parts(checkpoint, torch.float32, "cpu").parameter


def _routers(parts: Parts) -> frozenset[str]:
    """Parameters that choose experts, which stay as they are."""
    found = (name for name, _ in parts.model.named_parameters(remove_duplicate=False))
    return frozenset(name for name in found if is_router(name.removesuffix(".weight")))


def _head(model: Any) -> frozenset[str]:
    """Parameters of the embedding and the head, by all their names."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [id(module.weight) for module in wanted if module is not None]
    return frozenset(
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()  # noqa: SLF001
        if parameter is not None and id(parameter) in weights
    )
