"""What this machine does in a second, measured with the kernels and readers of a merge.

Random models of the types and parameters of a recipe lie in memory as files do in the page cache.
They are merged by the scheduler of a real run on as many threads, into a file that is written and
hashed as files of a result are. Digests of inputs and the disk are measured by
themselves. The rates are kept in the user's cache folder under pack's version, the processor, the
threads and what was measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import mergekit_lite
from mergekit_lite.checkpoint.header import write_header
from mergekit_lite.checkpoint.known import KNOWN
from mergekit_lite.checkpoint.locate import Source
from mergekit_lite.dtypes import DTYPES
from mergekit_lite.errors import PackError
from mergekit_lite.estimate.kinds import Kind, Kinds
from mergekit_lite.estimate.load import Rates, Stored
from mergekit_lite.estimate.sample import Clock, Sample, Spent, median
from mergekit_lite.merge.inputs import Inputs
from mergekit_lite.merge.plan import Plan

__all__ = ["calibrate", "known_rates", "stored_of"]

_MOST_KINDS = 6
_REPETITIONS = 3
_DISK_BYTES = 256 << 20
_PIECE = 1 << 22
_MACHINE = frozenset({"tensor", "hashing", "start", "waiting", "share", "reading", "writing"})


def known_rates(kinds: Kinds, threads: int) -> Rates | None:
    """Rates of a plan as they were measured before; None where its main kind was not.

    Args:
        kinds: Of the plan.
        threads: How many are busy at once.
    """
    machine = _load(_machine_key(kinds.plan, threads), _MACHINE)
    found = {
        kind.signature: held["elements"]
        for kind in _measured(kinds)
        if (held := _load(_kind_key(kind, threads), frozenset({"elements"}))) is not None
    }
    if machine is None or any(main not in found for main in list(kinds.kinds)[:1]):
        return None
    return Rates(elements=found, cores=threads, machine=_processor(), **machine)


def calibrate(
    kinds: Kinds,
    memory: int,
    threads: int,
    folder: Path,
    note: Callable[[str], None] = lambda _: None,
) -> Rates:
    """Measure what a plan needs of this machine, in some seconds, and remember it.

    Args:
        kinds: Of the plan; no weight of its models is read.
        memory: Bytes that may be held between the passes of a tensor.
        threads: How many are busy at once; more than there are cores make no sense.
        folder: Whose disk is measured, on which samples are merged; it must exist.
        note: Told what is measured.
    """
    elements = {}
    tensor = 0.0
    for kind in _measured(kinds):
        note(f"measuring {kind.signature}")
        sample = Sample(kinds, kind, folder)
        try:
            elements[kind.signature] = sample.element_seconds(threads, memory)
            tensor = tensor or sample.tensor_seconds(threads, memory)
        finally:
            sample.close()
        _keep(_kind_key(kind, threads), {"elements": elements[kind.signature]})
    note("measuring digests, disk and start")
    writing, reading = _disk(folder)
    start = _start(kinds.plan)
    hashing, share = _hashing(threads)
    machine = {
        "tensor": tensor,
        "hashing": hashing,
        "start": start.busy,
        "waiting": start.clock,
        "share": share,
        "reading": reading,
        "writing": writing,
    }
    _keep(_machine_key(kinds.plan, threads), machine)
    return Rates(elements=elements, cores=threads, machine=_processor(), **machine)


def _measured(kinds: Kinds) -> list[Kind]:
    return list(kinds.kinds.values())[:_MOST_KINDS]


# Where rates are kept.


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pack" / "rates"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _key(*what: object) -> str:
    words = [mergekit_lite.__version__, _processor(), platform.node(), *map(str, what)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _kind_key(kind: Kind, threads: int) -> str:
    return _key("kind", kind.signature, threads)


def _machine_key(plan: Plan, threads: int) -> str:
    return _key("machine", plan.method.name, threads)


def _load(key: str, names: frozenset[str]) -> dict[str, float] | None:
    """Rates of these names; None where they were not kept, or what was kept is something else."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        held = json.loads((_folder() / f"{key}.json").read_text("ascii"))
        if (
            isinstance(held, dict)
            and held.keys() == names
            and all(isinstance(v, float) and 0 <= v < float("inf") for v in held.values())
        ):
            return held
    return None


def _keep(key: str, rates: Mapping[str, float]) -> None:
    """Remember rates; a cache that cannot be written is no error."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _folder() / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(rates), "ascii")
        beside.rename(path)


# Digest, disk, start.


def _hashing(threads: int) -> tuple[float, float]:
    """Seconds of one core for each byte of SHA-256 while all threads hash; part of a core got.

    Threads that hash wait for nothing but the processor, so what the clock says beyond their work
    is what other programs take.
    """
    data = np.random.default_rng(0).integers(0, 256, 4 * _PIECE, np.uint8)

    def work() -> None:
        digest = hashlib.sha256()
        for _ in range(4):
            for start in range(0, data.size, _PIECE):
                digest.update(data[start : start + _PIECE].data)

    def measure() -> Spent:
        workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
        clock = Clock()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return clock.read()

    spent = median([measure() for _ in range(_REPETITIONS)])
    share = min(1.0, spent.busy / spent.clock / threads)
    return spent.busy / (threads * 4 * data.size), share


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes a second that the disk of a folder takes and gives, past the page cache."""
    page = np.frombuffer(mmap.mmap(-1, _PIECE), np.uint8)
    page[:] = np.random.default_rng(0).integers(0, 256, _PIECE, np.uint8)
    handle, name = tempfile.mkstemp(prefix=".pack-rate-", dir=folder)
    os.close(handle)
    try:
        fd = _past_cache(name, os.O_WRONLY)
        try:
            began = time.perf_counter()
            for at in range(0, _DISK_BYTES, _PIECE):
                os.pwrite(fd, page.data, at)
            os.fsync(fd)
            writing = _DISK_BYTES / (time.perf_counter() - began)
        finally:
            os.close(fd)
        fd = _past_cache(name, os.O_RDONLY)
        try:
            began = time.perf_counter()
            for at in range(0, _DISK_BYTES, _PIECE):
                os.preadv(fd, [page.data], at)
            return writing, _DISK_BYTES / (time.perf_counter() - began)
        finally:
            os.close(fd)
    finally:
        Path(name).unlink()


def _past_cache(name: str, flags: int) -> int:
    with contextlib.suppress(OSError):
        return os.open(name, flags | getattr(os, "O_DIRECT", 0) | os.O_CLOEXEC)
    return os.open(name, flags | os.O_CLOEXEC)


def _start(plan: Plan) -> Spent:
    """Seconds of a merge of next to nothing by the same method, in a process of its own."""
    example = next((t for t in plan.tensors.values() if t.method == plan.method.name), None)
    models = len(example.models) if example is not None else 1
    with tempfile.TemporaryDirectory(prefix="pack-rate-") as name:
        folder = Path(name)
        recipe: dict[str, Any] = {
            "merge_method": plan.method.name,
            "models": [{"model": f"m{i}", "parameters": {"weight": 1.0}} for i in range(models)],
        }
        if example is not None:
            recipe["parameters"] = {
                key: value for key, value in example.parameters.items()
                if not plan.method.parameters[key].each
            }  # fmt: skip
            if not any(p.name == "weight" for p in plan.method.parameters.values()):
                recipe["models"] = [{"model": f"m{i}"} for i in range(models)]
        if plan.method.base:
            recipe["base_model"] = "base"
        for model in ["base", *(f"m{i}" for i in range(models))]:
            _tiny(folder / model)
        times = [_timed(folder, recipe) for _ in range(_REPETITIONS)]
    return median(times)


def _tiny(folder: Path) -> None:
    folder.mkdir()
    tensors = [(f"layers.0.{i}.weight", DTYPES["BF16"], (64, 64)) for i in range(2)]
    prefix, _ = write_header(tensors, {"format": "pt"})
    data = np.random.default_rng(0).integers(0x3C00, 0x3E00, 2 * 64 * 64, np.uint16)
    (folder / "model.safetensors").write_bytes(prefix + data.tobytes())
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')


def _timed(folder: Path, recipe: Mapping[str, Any]) -> Spent:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    command = [sys.executable, "-P", "-m", "mergekit_lite", "merge", str(file), "-q", "--force",
               "-o", str(folder / "out")]  # fmt: skip
    clock = Clock()
    ran = subprocess.run(command, capture_output=True, check=False)  # noqa: S603
    spent = clock.read()
    if ran.returncode and recipe["merge_method"] != "linear":
        models = [{"model": name, "parameters": {"weight": 1.0}} for name in ("m0", "base")]
        return _timed(folder, {"merge_method": "linear", "models": models})
    if ran.returncode:
        said = (ran.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[0]
        raise PackError(
            f"the start of pack could not be measured: a small merge failed ({said})",
            "Try such a merge: pack merge; the plan alone needs no --measure.",
        )
    return spent


# What is known of the inputs without reading them.


def stored_of(inputs: Inputs) -> dict[str, Stored]:
    """How each model lies on the disk: what has no known digest, what memory does not hold."""
    return {name: _stored(model.source) for name, model in inputs.items()}


def _stored(source: Source) -> Stored:
    total = unknown = cold = 0.0
    for part in source.sources[:1]:  # adapters are small
        for path in _weights(part.path):
            stat = path.stat()
            total += stat.st_size
            unknown += stat.st_size * (KNOWN.find(stat) is None)
            cold += stat.st_size * (1 - _cached(path, stat.st_size))
    return Stored(unknown / total, cold / total) if total else Stored()


def _weights(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [f for ending in ("safetensors", "bin", "gguf") for f in path.glob(f"*.{ending}")]
    return sorted(f for f in found if f.is_file())


def _cached(path: Path, size: int) -> float:
    """Share of a file that the page cache holds, of a few places; nothing is fetched for it."""
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is None or size == 0:
        return 0.0
    found, places = 0, 16
    with path.open("rb", buffering=0) as file:
        for i in range(places):
            try:
                found += os.preadv(file.fileno(), [bytearray(1)], size * i // places, nowait) > 0
            except BlockingIOError:
                continue
            except OSError:
                return 0.0
    return found / places
