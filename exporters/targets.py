"""From what a user asks for (``gptq w4g128``, ``int8 w8a8``) to how linear layers are rounded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporters.bnb.layout import Nf4Layout, Nf4Rounder
from exporters.gptq.rounder import GptqRounder
from exporters.gptq.solve import Settings
from exporters.linears.folding import FoldingRounder
from exporters.linears.layouts import AwqLayout, CompressedLayout, GptqLayout, Layout
from exporters.linears.quantized import Grid
from exporters.linears.rounder import FEWEST_TOKENS, PlainRounder, Rounder, WeightRounder
from exporters.linears.scheme import Scheme, parse_scheme
from exporters.linears.work import Request
from exporters.schemes import BUILT_IN, SCHEMES, TARGETS, WEIGHTS_ALONE
from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.errors import PackError, nearest
from mergekit_lite.evaluate.text import Windows, cut, read_text, tokenizer_of
from mergekit_lite.merge.model import WholeModel

__all__ = [
    "Calibration", "Wanted", "check_wanted", "cut_for", "describe_asked", "plan_target",
]  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Text that a model is run on while it is quantized.

    Attributes:
        path: A text file or JSON lines; None for the small one that comes along.
        context: Tokens of a window.
        windows: Windows at most.
        seed: Of the choice of windows.
    """

    path: Path | None = None
    context: int = 512
    windows: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Wanted:
    """How a target is made.

    Attributes:
        target: ``gptq``, ``awq``, ``int8`` or ``bnb``.
        scheme: See `SCHEMES`.
        format: How it lies in files; None for the target's own.
        calibrated: Whether it looks at activations.
        nearest: Whether codes are the nearest ones even so (AWQ as in its paper).
        settings: Of GPTQ's rounding.
        threads: Worker threads.
        device: torch's.
        dtype: That layers are computed in.
    """

    target: str
    scheme: str
    format: str | None = None
    calibrated: bool = True
    nearest: bool = False
    settings: Settings = field(default_factory=Settings)
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def looks(self) -> bool:
        """Whether the model is run on text."""
        return self.calibrated and (self.target, self.scheme.lower()) not in WEIGHTS_ALONE


def check_wanted(wanted: Wanted) -> None:
    """Check what can be checked without a model.

    Raises:
        PackError: There is no such target or scheme, or its format has none of that kind.
    """
    if wanted.target not in TARGETS:
        raise PackError(
            f"no such format '{wanted.target}'{nearest(wanted.target, TARGETS)}",
            f"Known: {', '.join(TARGETS)}",
        )
    if wanted.settings.order == "columns" and wanted.target != "gptq":
        raise PackError(
            f"--act-order columns gives groups in an order of their own, which {wanted.target} "
            "has not",
            "Use --act-order static.",
        )
    if wanted.target == "awq" and not wanted.calibrated:
        raise PackError(
            "AWQ is made by looking at activations", "Leave --no-calibration out, or use --to gptq."
        )
    if wanted.nearest and wanted.target != "awq" and wanted.scheme.lower() != "w8a8":
        raise PackError(
            f"--nearest is for AWQ and w8a8, not for {wanted.target} {wanted.scheme}",
            "Round plainly with --no-calibration.",
        )
    _layout(wanted, _scheme(wanted), "F16")


def plan_target(
    wanted: Wanted, model: WholeModel, windows: Windows | None, folder: Path, force: bool
) -> Request:
    """Say how a target is made.

    Args:
        wanted: What is asked for.
        model: Of which.
        windows: Calibration text; None where it is not calibrated.
        folder: Where it goes.
        force: Whether an existing result is replaced.

    Raises:
        PackError: See `check_wanted`.
    """
    check_wanted(wanted)
    refuse_gguf(model)
    stated = model.checkpoint.config.get("dtype") or model.checkpoint.config.get("torch_dtype")
    dtype = {"float16": "F16", "bfloat16": "BF16"}.get(str(stated), "F32")
    layout = _layout(wanted, _scheme(wanted), dtype)
    return Request(
        wanted.target, wanted.scheme.lower(), layout, _rounder(wanted, layout.grid),
        windows if wanted.looks else None, folder, asked_of(wanted, windows), _besides(wanted),
        wanted.threads, wanted.device, wanted.dtype, force,
    )  # fmt: skip


def asked_of(wanted: Wanted, windows: Windows | None) -> dict[str, Any]:
    """What was asked for, as an entry of a recipe, with the digest of the text."""
    if windows is None or not wanted.looks:
        return describe_asked(wanted, None, None, None)
    setting = Calibration(None, windows.context, windows.asked or len(windows.ids), windows.seed)
    return describe_asked(wanted, setting, windows.text.name, windows.text.sha256)


def describe_asked(
    wanted: Wanted, calibration: Calibration | None, text: str | None, sha256: str | None
) -> dict[str, Any]:
    """The same from its parts.

    Args:
        wanted: What is made.
        calibration: Its settings; None where the model is not run.
        text: Name of the file, or of what comes along.
        sha256: Of the text.
    """
    found: dict[str, Any] = {"to": wanted.target, "scheme": wanted.scheme.lower()}
    if wanted.format is not None:
        found["format"] = wanted.format
    if not wanted.calibrated:
        found["calibrate"] = False
    if calibration is not None and wanted.looks:
        found["calibration"] = {
            "context": calibration.context, "windows": calibration.windows,
            "seed": calibration.seed, "text": text, "sha256": sha256,
        }  # fmt: skip
    return found


def _besides(wanted: Wanted) -> dict[str, Any]:
    """What differs from the usual and is not in `describe_asked`."""
    usual = Wanted(wanted.target, wanted.scheme)
    pairs = {
        "nearest": (wanted.nearest, usual.nearest),
        "act_order": (wanted.settings.order, usual.settings.order),
        "damping": (wanted.settings.damping, usual.settings.damping),
        "device": (wanted.device, usual.device),
        "dtype": (wanted.dtype, usual.dtype),
    }
    return {name: value for name, (value, common) in pairs.items() if value != common}


def _scheme(wanted: Wanted) -> Scheme:
    if wanted.target not in ("int8", "bnb"):
        return parse_scheme(wanted.scheme, symmetric=wanted.target == "gptq")
    if wanted.scheme.lower() not in SCHEMES[wanted.target]:
        raise PackError(
            f"'{wanted.scheme}' is no scheme of {wanted.target}",
            f"Known: {', '.join(SCHEMES[wanted.target])}",
        )
    return Scheme(8, None, True)


def _layout(wanted: Wanted, scheme: Scheme, dtype: str) -> Layout:
    by_activation = wanted.settings.order == "columns" and wanted.calibrated
    if wanted.target == "bnb" and wanted.format is None:
        return Nf4Layout({"F16": "float16", "BF16": "bfloat16"}.get(dtype, "float32"))
    form = wanted.format or {"int8": "compressed-tensors"}.get(wanted.target, wanted.target)
    own = {"int8": ("compressed-tensors",), "bnb": (), "gptq": ("gptq", "compressed-tensors")}
    if form not in own.get(wanted.target, ("awq", "compressed-tensors")):
        raise PackError(
            f"--to {wanted.target} cannot be written as '{form}'",
            "Leave --format out."
            if wanted.target == "bnb"
            else "Use --format compressed-tensors, or leave --format out.",
        )
    if form == "gptq":
        return GptqLayout(scheme, by_activation)
    if form == "awq":
        if scheme.symmetric:
            raise PackError("AWQ's own format has zero points", "Choose w4g128-asym, or w4g128.")
        return AwqLayout(scheme)
    return CompressedLayout(scheme, dtype, by_activation, wanted.scheme.lower() == "w8a8")


def _rounder(wanted: Wanted, grid: Grid) -> Rounder | WeightRounder:
    from exporters.awq.scaling import AwqScaling
    from exporters.int8.scaling import SmoothScaling

    if wanted.target == "bnb":
        return Nf4Rounder()
    if not wanted.looks:
        return PlainRounder(grid)
    gptq = GptqRounder(grid, wanted.settings, wanted.threads, wanted.device)
    rounding = None if wanted.nearest else gptq
    if wanted.target == "awq":
        scaling = AwqScaling(grid, wanted.threads)
        return FoldingRounder(scaling, grid, wanted.threads, wanted.device, rounding)
    if wanted.scheme.lower() == "w8a8":
        return FoldingRounder(SmoothScaling(), grid, wanted.threads, wanted.device, rounding)
    return gptq


def refuse_gguf(model: WholeModel) -> None:
    """Refuse a GGUF file: its names are not transformers', and mostly it is quantized already.

    Raises:
        PackError: It is one.
    """
    if isinstance(model.checkpoint, GgufCheckpoint):
        raise PackError(
            f"{model.reference}: is a GGUF file, which is only made into other GGUF files",
            "Give the model that it was made of.",
        )


def cut_for(model: WholeModel, calibration: Calibration) -> Windows:
    """Cut calibration text into a model's tokens.

    Raises:
        PackError: The text is too short or cannot be read, the model has no tokenizer, or no chat
            template for conversations.
    """
    refuse_gguf(model)
    text = read_text(calibration.path)
    with tokenizer_of(model.files, model.reference) as tokenizer:
        found = cut(
            text, tokenizer, model.reference, calibration.context, calibration.windows,
            calibration.seed,
        )  # fmt: skip
    count = len(found.ids) * found.context
    if count < FEWEST_TOKENS:
        raise PackError(
            f"{found.text.name}: {count} tokens are too few to calibrate on",
            f"Give at least {FEWEST_TOKENS}, better ten thousand: --windows, --context, longer "
            "text.",
        )
    if calibration.path is None:
        return replace(found, text=replace(found.text, name=BUILT_IN))
    return found
