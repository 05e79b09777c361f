"""Wall time and peak memory of a command, and the floor that no merge can go below."""

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.paths import WORK

_LAUNCHER = Path(__file__).with_name("launch.py")


@dataclass(frozen=True)
class Run:
    """One measured run of a command.

    Attributes:
        wall_s: Seconds from start to exit.
        flush_s: Seconds that the disk needed after the exit to hold the whole output.
        user_s: Processor seconds in the program, over all threads.
        system_s: Processor seconds in the kernel.
        disk_read_bytes: What came from the disk and not from the page cache.
        peak_rss_bytes: Largest resident memory of the largest process; pages of mapped files
            count.
        peak_anonymous_bytes: Largest memory that no file backs, sampled every 50 ms.
        sha256: Digest of the output's weights, empty where it was not asked for.
    """

    wall_s: float
    flush_s: float
    user_s: float
    system_s: float
    disk_read_bytes: int
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    sha256: str = ""

    @property
    def durable_s(self) -> float:
        """Seconds until the output is on disk."""
        return self.wall_s + self.flush_s


@dataclass(frozen=True)
class Floor:
    """Seconds to read the inputs from the page cache and to write the output with fsync."""

    read_s: float
    write_s: float

    @property
    def total_s(self) -> float:
        """Seconds for both, one after the other."""
        return self.read_s + self.write_s


def median_run(runs: Sequence[Run]) -> Run:
    """Return the run whose time to disk is the median (the lower of two in the middle)."""
    return sorted(runs, key=lambda run: run.durable_s)[(len(runs) - 1) // 2]


def median_floor(floors: Sequence[Floor]) -> Floor:
    """Return the medians of the two parts."""
    return Floor(
        statistics.median(floor.read_s for floor in floors),
        statistics.median(floor.write_s for floor in floors),
    )


def weights(folder: Path) -> list[Path]:
    """Return the `.safetensors`, `.gguf` and `.onnx` files of a folder, sorted by name."""
    patterns = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx_data", "*.onnx.data",
                "onnx/*.onnx", "onnx/*.onnx_data*")  # fmt: skip
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def digest(folder: Path) -> str:
    """Return the sha256 over the names and bytes of a checkpoint's weights."""
    total = hashlib.sha256()
    for file in weights(folder):
        with file.open("rb") as source:
            total.update(file.name.encode() + hashlib.file_digest(source, "sha256").digest())
    return total.hexdigest()


def run(
    command: Sequence[str | Path],
    output: Path,
    log: str,
    environment: Mapping[str, str] | None = None,
    hashed: bool = False,
) -> Run:
    """Run a command that writes a checkpoint and measure it; the output is left in place.

    Args:
        command: Program and arguments.
        output: Folder that the command writes. The folder around it is emptied before the run,
            because a program may keep there what it needs to continue a stopped run.
        log: Name of the log file under `work/logs/`.
        environment: Variables to add to this process's own.
        hashed: Whether to compute the digest of the output.

    Raises:
        SystemExit: The command failed or wrote no weights; the message ends with its output.
    """
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir(parents=True)
    logs = WORK / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    file, result = logs / f"{log}.log", logs / f"{log}.json"
    result.unlink(missing_ok=True)
    os.sync()  # what an earlier run left to be written must not be charged to this one
    _launch([str(part) for part in command], result, file, environment)
    values = json.loads(result.read_text())
    if values.pop("exit") or not weights(output):
        tail = "\n".join(file.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"{' '.join(map(str, command))}\nfailed or wrote no weights:\n{tail}")
    start = time.perf_counter()
    _flush(output)
    flush = time.perf_counter() - start
    return Run(flush_s=flush, sha256=digest(output) if hashed else "", **values)


def _launch(
    command: list[str], result: Path, log: Path, environment: Mapping[str, str] | None
) -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-S", _LAUNCHER, result, log, *command],
        env=os.environ | dict(environment or {}),
        start_new_session=True,
    ) as launcher:
        try:
            if launcher.wait():
                raise SystemExit(f"could not start {command[0]}")
        except BaseException:
            if launcher.returncode is None:
                os.killpg(launcher.pid, signal.SIGTERM)  # the launcher and what it started
            raise


def _flush(folder: Path) -> None:
    for file in weights(folder):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def kept_warm(folders: Sequence[Path]) -> Iterator[None]:
    """Hold the weights of checkpoints in the page cache.

    Reading them once is not enough: some virtual machines give page cache back to the host when
    it was not used for a few seconds, with plenty of memory free. So the files are mapped and
    locked. Where that is not allowed (`ulimit -l`), they are only read, and `report.cold_runs`
    tells which runs suffered.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    files = [file for folder in folders for file in weights(folder)]
    _seconds(["cat", *files])
    with contextlib.ExitStack() as stack:
        for file in files:
            with file.open("rb") as source:
                mapped = mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ)
            stack.callback(mapped.close)
            address = np.frombuffer(mapped, np.uint8).ctypes.data
            if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped))):
                reason = os.strerror(ctypes.get_errno())
                print(f"warning: cannot lock {file.parent.name} in memory: {reason}", flush=True)
                break
        yield


def floor(inputs: Sequence[Path], size: int) -> Floor:
    """Measure what reading the inputs and writing an output cost without any arithmetic.

    The inputs are read with `cat`, then `dd` writes zeros of the output's size with fsync.

    Args:
        inputs: Checkpoint folders, which `kept_warm` holds in memory.
        size: Bytes of the output.
    """
    files = [file for folder in inputs for file in weights(folder)]
    os.sync()
    read = _seconds(["cat", *files])
    target = WORK / "floor.bin"
    target.unlink(missing_ok=True)
    amount = ["bs=4M", f"count={size}", "iflag=count_bytes"]
    write = _seconds(["dd", "if=/dev/zero", f"of={target}", *amount, "conv=fsync", "status=none"])
    target.unlink()
    return Floor(read, write)


def _seconds(command: Sequence[str | Path]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Machine:
    """What the numbers were measured on.

    Attributes:
        processor: Name of the processor.
        cores: Cores that this process may use.
        memory_bytes: Installed memory.
        system: Operating system and kernel.
    """

    processor: str
    cores: int
    memory_bytes: int
    system: str

    def __str__(self) -> str:
        """Return one line for a table's head."""
        memory = f"{self.memory_bytes / 2**30:.0f} GiB"
        return f"{self.processor}, {self.cores} cores, {memory}, {self.system}"

    def as_dict(self) -> dict[str, object]:
        """Return the fields by name."""
        return asdict(self)


def machine() -> Machine:
    """Describe this machine (Linux)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return Machine(
        processor=names[0] if names else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release().partition('-')[0]}",
    )
