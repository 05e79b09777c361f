"""Tables in plain text, and the results file that keeps what a run measured."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Floor, Run, median_floor, median_run


@dataclass(frozen=True)
class Result:
    """What was measured of one merge.

    Attributes:
        method: Name of the merge method.
        models: Number of models read.
        input_bytes: Bytes of their weights.
        output_bytes: Bytes of the merged weights.
        pack: One entry for each repetition, in order.
        floors: The floor before each repetition, and once after the last.
        mergekit: The peer's run, or None where it was skipped and never ran.
        mergekit_is_old: Whether the peer's run comes from an earlier run of the benchmark.
    """

    method: str
    models: int
    input_bytes: int
    output_bytes: int
    pack: Sequence[Run]
    floors: Sequence[Floor]
    mergekit: Run | None
    mergekit_is_old: bool = False

    @property
    def same_bits(self) -> bool | None:
        """Whether all repetitions wrote the same bytes, None for a single one."""
        return len({run.sha256 for run in self.pack}) == 1 if len(self.pack) > 1 else None

    def ratio_to_floor(self) -> float:
        """Return pack's seconds until its output is on disk over the floor's, median.

        Each run is set against the mean of the floors before and after it: the speed of a disk
        changes from minute to minute, by more than the programs differ.
        """
        floors = [floor.total_s for floor in self.floors]
        return statistics.median(
            run.durable_s / ((before + after) / 2)
            for run, before, after in zip(self.pack, floors[:-1], floors[1:], strict=True)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what was measured and what follows from it, for JSON."""
        ours = median_run(self.pack)
        return asdict(self) | {
            "same_bits": self.same_bits,
            "pack_to_floor": self.ratio_to_floor(),
            "mergekit_to_pack": self.mergekit.wall_s / ours.wall_s if self.mergekit else None,
        }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def gigabytes(size: float) -> str:
    """Return a number of bytes in units of 10⁹."""
    return f"{size / 1e9:.2f} GB"


def time_table(results: Sequence[Result]) -> str:
    """Return the table of times; README.md explains its columns."""
    head = ["merge", "reads", "floor", "pack", "min-max", "pack/floor", "mergekit", "faster by"]
    head += ["same bits"]
    rows = []
    for result in results:
        ours, peer = median_run(result.pack), result.mergekit
        walls = [run.wall_s for run in result.pack]
        same = {True: "yes", False: "NO", None: "-"}[result.same_bits]
        old = " (old)" if result.mergekit_is_old else ""
        rows.append(
            [
                f"{result.method}, {result.models} models",
                gigabytes(result.input_bytes),
                f"{median_floor(result.floors).total_s:.1f} s",
                f"{ours.wall_s:.1f} s",
                f"{min(walls):.1f}-{max(walls):.1f}",
                f"{result.ratio_to_floor():.2f}x",
                f"{peer.wall_s:.1f} s{old}" if peer else "-",
                f"{peer.wall_s / ours.wall_s:.1f}x" if peer else "-",
                same,
            ]
        )
    return table(head, rows)


def cold_runs(results: Sequence[Result]) -> list[str]:
    """Return a line for each run that read more than a twentieth of its inputs from the disk."""
    return [
        f"{program} {result.method} read {gigabytes(run.disk_read_bytes)} from the disk: "
        "its page cache was not warm"
        for result in results
        for program, runs in (("pack", result.pack), ("mergekit", [result.mergekit]))
        for run in runs
        if run and run.disk_read_bytes > result.input_bytes / 20
    ]


def memory_table(results: Sequence[Result]) -> str:
    """Return the table of peak memory, the largest of pack's repetitions."""
    head = ["peak memory", "pack", "of which anonymous", "mergekit", "of which anonymous"]
    rows = [
        [
            result.method,
            gigabytes(max(run.peak_rss_bytes for run in result.pack)),
            gigabytes(max(run.peak_anonymous_bytes for run in result.pack)),
            gigabytes(result.mergekit.peak_rss_bytes) if result.mergekit else "-",
            gigabytes(result.mergekit.peak_anonymous_bytes) if result.mergekit else "-",
        ]
        for result in results
    ]
    return table(head, rows)


def read_results(file: Path) -> dict[str, Any]:
    """Return what an earlier run kept, or nothing."""
    return json.loads(file.read_text()) if file.exists() else {}


def write_results(file: Path, content: Mapping[str, Any]) -> None:
    """Keep the content of a run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
