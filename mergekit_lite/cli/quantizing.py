"""What pack quantize makes, and what it says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporters.schemes import TARGETS, WEIGHTS_ALONE
from mergekit_lite.cli.imatrix import CONTEXT, WINDOWS
from mergekit_lite.cli.progress import make_progress
from mergekit_lite.text import human_bytes

if TYPE_CHECKING:
    from exporters.gguf.mixtures import Overrides
    from exporters.gguf.run import Made
    from exporters.linears.run import MadeLinears
    from exporters.onnx.run import MadeOnnx
    from exporters.onnx.schemes import Route
    from exporters.schemes import Order
    from mergekit_lite.dtypes import Array
    from mergekit_lite.engines.protocol import Engine
    from mergekit_lite.merge.address import Address
    from mergekit_lite.merge.destination import Upload

__all__ = ["Quantizing"]


@dataclass(frozen=True)
class _Line:
    """Something that is said at the end."""

    text: str
    warning: bool = False

    def show(self) -> None:
        """Say it."""
        if self.warning:
            click.secho(f"warning: {self.text}", fg="yellow", err=True)
        else:
            click.echo(self.text)


@dataclass
class Quantizing:
    """One call of the command.

    Attributes:
        model: As the user named it.
        targets: Formats and schemes, by the usual names of these.
        output: Where results go, a folder or an address; None for below ``dist``.
        name: Of the files; None for the model's.
        force: Whether results are replaced.
        threads: Worker threads.
        device: torch's.
        text: Calibration text; None for what comes along.
        context: Tokens of a window; None for the usual.
        windows: Windows at most; None for the usual.
        seed: Of their choice.
        quiet: Whether nothing is shown.
        lines: What is to be said.
        described: The same for programs.
        uploads: What takes results elsewhere, by the folder that they pass through.
    """

    model: str | None
    targets: tuple[tuple[str, str], ...]
    output: Path | Address | None
    name: str | None
    force: bool
    threads: int
    device: str
    text: Path | None
    context: int | None
    windows: int | None
    seed: int
    quiet: bool
    lines: list[_Line] = field(default_factory=list)
    described: list[dict[str, Any]] = field(default_factory=list)
    uploads: dict[Path, Upload] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check names.

        Raises:
            click.UsageError: One is none.
        """
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise click.UsageError(
                f"'{self.name}' is no name of a file: letters, digits, '.', '_' and '-'"
            )
        where = str(self.output or "")  # a repository may be called so
        if where.endswith(".gguf") and not where.startswith("hf://"):
            stem = Path(where).stem
            raise click.UsageError(f"-o names a folder; the file gets its name by --name {stem}")

    @property
    def ggufs(self) -> list[str]:
        """Schemes of GGUF."""
        return [scheme for target, scheme in self.targets if target == "gguf"]

    @property
    def others(self) -> list[tuple[str, str]]:
        """Formats whose linear layers alone are quantized, with their schemes."""
        return [pair for pair in self.targets if pair[0] in TARGETS]

    @property
    def onnxes(self) -> list[str]:
        """Schemes of ONNX."""
        return [scheme for target, scheme in self.targets if target == "onnx"]

    @property
    def looks(self) -> bool:
        """Whether something is made by running the model."""
        calibrated = self.text is not None and any(s.startswith("int4") for s in self.onnxes)
        return calibrated or any(pair not in WEIGHTS_ALONE for pair in self.others)

    def _folder(self, stem: str, last: str) -> Path:
        if self.output is None:
            return Path("dist") / stem / last
        several = len(self.targets) > 1
        if isinstance(self.output, Path):
            return self.output / last if several else self.output
        return (self.output.below(last) if several else self.output).scratch

    def _where(self, folder: Path) -> str:
        """Where a result lies that was written into a folder, or passed through it."""
        return self.uploads[folder].location if folder in self.uploads else str(folder)

    def open_uploads(self, linked: bool) -> None:
        """Open the ways to places that are no folders, and see that results may go there.

        Args:
            linked: Whether weights of ONNX are left in the model's files.

        Raises:
            click.UsageError: Such a place cannot take these results.
            PackError: One is taken, or cannot be reached.
        """
        if self.output is None or isinstance(self.output, Path):
            return
        from mergekit_lite.merge.destination import open_upload
        from mergekit_lite.merge.writer import refuse_uploaded

        if linked:
            raise click.UsageError(
                f"--link-weights links files of this disk, which {self.output} cannot; leave it "
                "out, or write to a folder: -o DIR"
            )
        lasts = [f"{target}-{scheme}" for target, scheme in self.targets]
        if len(lasts) > 1 and self.output.scheme == "hf":
            raise click.UsageError(
                f"{self.output}: a repository takes one result, not {len(lasts)}; run pack "
                f"quantize once for each, with its own repository: -o {self.output}-{lasts[0]}"
            )
        for (target, _), last in zip(self.targets, lasts, strict=True):
            address = self.output.below(last) if len(lasts) > 1 else self.output
            upload = open_upload(address, card=target != "gguf")
            refuse_uploaded(upload, self.force)
            self.uploads[upload.folder] = upload

    def make_linears(
        self,
        form: str | None,
        calibrated: bool,
        nearest: bool,
        order: Order,
        damping: float,
        dtype: str,
        memory: int,
        engine: Engine,
    ) -> None:
        """Make what is no GGUF, one after the other."""
        if not self.others:
            return
        from exporters.gguf.mixtures import find_mixture
        from mergekit_lite.evaluate.forward import require_torch, set_threads

        require_torch(f"--to {self.others[0][0]}")
        set_threads(self.threads)
        from exporters.gptq.solve import Settings
        from exporters.linears.run import run_linears
        from exporters.targets import Calibration, Wanted, check_wanted, cut_for, plan_target
        from mergekit_lite.merge.model import open_whole
        from mergekit_lite.merge.writer import refuse_existing

        asked = [
            Wanted(target, scheme, form, calibrated, nearest, Settings(order, damping),
                   self.threads, self.device, dtype)
            for target, scheme in self.others
        ]  # fmt: skip
        for wanted in asked:
            check_wanted(wanted)
        mixtures = [find_mixture(scheme) for scheme in self.ggufs]
        text = Calibration(self.text, self.context or 512, self.windows or WINDOWS, self.seed)
        whole = open_whole(self.model)
        try:
            stem = self.name or whole.name
            lasts = [f"gguf-{mixture.name}" for mixture in mixtures]
            for last in (*lasts, *(f"{w.target}-{w.scheme}" for w in asked)):
                refuse_existing(self._folder(stem, last), self.force)
            windows = cut_for(whole, text) if any(w.looks for w in asked) else None
            for wanted in asked:
                folder = self._folder(stem, f"{wanted.target}-{wanted.scheme}")
                with make_progress(self.quiet) as progress:
                    request = plan_target(wanted, whole, windows, folder, self.force)
                    upload = self.uploads.get(folder)
                    self._add_linears(run_linears(whole, request, progress, engine, memory, upload))
        finally:
            whole.close()

    def make_onnxes(
        self,
        block: int,
        symmetric: bool,
        route: Route,
        dtype: str,
        linked: bool,
        verify: bool,
    ) -> None:
        """Make ONNX files, one after the other."""
        if not self.onnxes:
            return
        from exporters.onnx.schemes import find_scheme
        from exporters.onnx.session import require_onnxruntime
        from mergekit_lite.merge.model import open_whole
        from mergekit_lite.merge.writer import refuse_existing

        schemes = [find_scheme(word) for word in self.onnxes]
        require_onnxruntime("--to onnx")
        from exporters.onnx.job import OnnxJob, run_job
        from exporters.targets import Calibration
        from mergekit_lite.evaluate.forward import set_threads

        set_threads(self.threads)
        text = None
        if self.text is not None:
            text = Calibration(self.text, self.context or 512, self.windows or WINDOWS, self.seed)
        whole = open_whole(self.model)
        try:
            stem = self.name or whole.name
            folders = [self._folder(stem, f"onnx-{scheme.name}") for scheme in schemes]
            for folder in folders:
                refuse_existing(folder, self.force)
            for scheme, folder in zip(schemes, folders, strict=True):
                with make_progress(self.quiet) as progress:
                    job = OnnxJob(
                        scheme, folder, text, block, symmetric, route, self.threads,
                        self.force, self.device, dtype, linked, verify,
                        self.uploads.get(folder),
                    )  # fmt: skip
                    self._add_onnx(run_job(whole, job, progress))
        finally:
            whole.close()

    def make_ggufs(
        self,
        imatrix: Path | None,
        overrides: Overrides,
        split_bytes: int | None,
        memory: int,
        verify: bool | None,
        engine: Engine,
    ) -> None:
        """Make GGUF files; the weights are read once for all of them."""
        if not self.ggufs:
            return
        from exporters.gguf.export import Scheme
        from exporters.gguf.mixtures import find_mixture
        from exporters.gguf.run import Options, Request, prepare_gguf, run_gguf
        from mergekit_lite.merge.model import open_whole

        mixtures = [find_mixture(word) for word in self.ggufs]
        importance = self._importance(imatrix)
        whole = open_whole(self.model)
        try:
            stem = self.name or whole.name
            requests = [
                Request(
                    Scheme(mixture, overrides, importance, split_bytes),
                    self._folder(stem, f"gguf-{mixture.name}"),
                    f"{stem}-{mixture.name.upper()}",
                )
                for mixture in mixtures
            ]
            options = Options(self.threads, memory, self.force, verify, engine, self.uploads)
            with make_progress(self.quiet) as progress:
                for made in run_gguf(prepare_gguf(whole, requests), options, progress):
                    self._add_gguf(made)
        finally:
            whole.close()

    def _importance(self, imatrix: Path | None) -> Mapping[str, Array]:
        """Importance of columns: from a file, or measured; empty where none is asked for."""
        if imatrix is not None:
            from exporters.gguf.imatrix import read_imatrix

            return read_imatrix(imatrix)
        if self.text is None:
            return {}
        from exporters.gguf.importance import importance_of

        with make_progress(self.quiet) as progress:
            return importance_of(
                self.model, self.text, self.context or CONTEXT, self.windows or WINDOWS,
                progress, self.device, self.seed,
            ).means()  # fmt: skip

    def _add_linears(self, made: MadeLinears) -> None:
        size = sum(output.size for output in made.outputs)
        self.lines.append(_Line(
            f"{human_bytes(size)}, {made.bits:.2f} bits per weight ({made.matrices} matrices) in "
            f"{made.seconds:.1f} s"
        ))  # fmt: skip
        self.lines.append(_Line(f"→ {self._where(made.folder)}"))
        self.described.append({
            "folder": self._where(made.folder),
            "seconds": round(made.seconds, 3),
            "bits_per_weight": round(made.bits, 3),
            "matrices": made.matrices,
            "recomputed": made.recomputed,
            "notes": list(made.notes),
            "outputs": _outputs(made),
        })  # fmt: skip

    def _add_onnx(self, made: MadeOnnx) -> None:
        size = sum(output.size for output in made.outputs)
        self.lines.append(_Line(
            f"{human_bytes(size)}, {made.bits:.2f} bits per weight, graph by {made.route}, in "
            f"{made.seconds:.1f} s"
        ))  # fmt: skip
        checked = made.checked
        if checked is not None:
            self.lines.append(_Line(checked.line()))
        self.lines.append(_Line(f"→ {self._where(made.folder)}"))
        self.described.append({
            "folder": self._where(made.folder),
            "seconds": round(made.seconds, 3),
            "bits_per_weight": round(made.bits, 3),
            "graph": made.route,
            "verification": None if checked is None else {
                **checked.describe(), "tokens_per_second": round(checked.tokens_per_second, 1),
            },
            "notes": list(made.notes),
            "outputs": _outputs(made),
        })  # fmt: skip

    def _add_gguf(self, made: Made) -> None:
        size = sum(output.size for output in made.outputs)
        types = ", ".join(f"{count} {name}" for name, count in made.types.items())
        self.lines.append(_Line(
            f"{human_bytes(size)}, {made.bits:.2f} bits per weight ({types}) in "
            f"{made.seconds:.1f} s"
        ))  # fmt: skip
        if made.verification is not None:
            self.lines.append(_Line(made.verification.line()))
            if made.verification.differing:
                first = f"{made.verification.differing[0]!r:.70}"
                self.lines.append(_Line(f"tokenized otherwise, first: {first}", warning=True))
        files = [o.path for o in made.outputs if o.path.endswith(".gguf")]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        self.lines.append(_Line(f"→ {self._where(made.folder)}/{files[0]}{more}"))
        self.described.append({
            "folder": self._where(made.folder),
            "seconds": round(made.seconds, 3),
            "bits_per_weight": round(made.bits, 3),
            "types": dict(made.types),
            "recomputed": made.recomputed,
            "verification": None if made.verification is None else made.verification.describe(),
            "outputs": _outputs(made),
        })  # fmt: skip


def _outputs(made: Made | MadeLinears | MadeOnnx) -> list[dict[str, Any]]:
    return [{"path": o.path, "bytes": o.size, "sha256": o.sha256} for o in made.outputs]
