"""pack eval."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_lite.cli.options import CACHE, TEXT
from mergekit_lite.cli.table import echo_table
from mergekit_lite.text import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergekit_lite.evaluate.measure import Measured, Subject
    from mergekit_lite.evaluate.tasks import TaskScore

__all__ = ["command"]


@click.command("eval", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@CACHE
@click.option("--reference", metavar="MODEL", help="What the models are compared with.")
@click.option(
    "--text", "path", type=TEXT, metavar="FILE",
    help="Text, or JSON lines with text or messages.  [default: a small one that comes along]",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(2, 1 << 20), default=256, show_default=True,
    help="Tokens of a window.",
)  # fmt: skip
@click.option(
    "--windows", type=click.IntRange(2, 1 << 20), default=64, show_default=True,
    help="Windows at most; of more, some are taken by the seed.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of windows.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
    help="What it is computed in.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …")
@click.option(
    "--tasks", "tasks", metavar="NAMES",
    help="Tasks of lm-evaluation-harness, with commas between, in the place of text: "
    "hellaswag,arc_easy",
)  # fmt: skip
@click.option(
    "--task-path", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="DIR",
    help="Folder with tasks of your own.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Examples of each task.")
@click.option(
    "--shots", type=click.IntRange(min=0), metavar="N", help="Examples before each question."
)
@click.option("--json", "as_json", is_flag=True, help="Print all numbers for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    models: tuple[str, ...],
    reference: str | None,
    path: Path | None,
    context: int,
    windows: int,
    seed: int,
    dtype: str,
    device: str,
    tasks: str | None,
    task_path: Path | None,
    limit: int | None,
    shots: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure MODELS on text: perplexity, and how far they are from a reference.

    A model may be a folder, a Hub id, base+adapter, a recipe that has not run, a GGUF file, which
    llama.cpp runs, or a folder or file of ONNX, which onnxruntime runs. All others are run one
    decoder layer at a time, so that memory is that of a layer. The text is cut into the tokens of
    the reference, or of the first model. GPTQ, AWQ and compressed-tensors folders are run as the
    floats that they stand for.
    """
    from exporters.subjects import open_subject, tokenizing
    from mergekit_lite.adapters.factor import check_device
    from mergekit_lite.cli.progress import make_progress
    from mergekit_lite.evaluate.forward import require_torch
    from mergekit_lite.evaluate.measure import measure
    from mergekit_lite.evaluate.tasks import require_harness, run_tasks
    from mergekit_lite.evaluate.text import cut, read_text, tokenizer_of

    require_torch("pack eval")
    check_device(device)
    if tasks is None and (task_path or limit or shots is not None):
        raise click.UsageError("--task-path, --limit and --shots go with --tasks")
    if tasks is not None:
        require_harness()
        if reference or path:
            raise click.UsageError("--tasks compares nothing: leave --reference and --text out")
    text = read_text(path)
    names = list(dict.fromkeys([*([reference] if reference else []), *models]))
    with ExitStack() as stack, make_progress(quiet or as_json) as progress:
        opened: dict[str, tuple[Subject, Mapping[str, bytes]]] = {}
        for name in names:
            opened[name] = stack.enter_context(open_subject(name, Path(), dtype, device, progress))
        files, label = tokenizing([beside for _, beside in opened.values()], names)
        if tasks is not None:
            with tokenizer_of(files, label) as tokenizer:
                scores = run_tasks(
                    [opened[name][0] for name in models], tasks.split(","), tokenizer,
                    _longest(opened[names[0]][1]), limit, shots, task_path, progress,
                )  # fmt: skip
            _show_scores(scores, as_json, quiet)
            return
        with tokenizer_of(files, label) as tokenizer:
            pieces = cut(text, tokenizer, label, context, windows, seed)
        measured = measure(
            [opened[name][0] for name in models], opened[reference][0] if reference else None,
            pieces, progress,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps({
            "text": pieces.describe(),
            "models": [
                {**one.describe(), **({"tokens_per_second": round(one.tokens_per_second, 1)}
                                      if one.tokens_per_second else {})} for one in measured
            ],
        }))  # fmt: skip
    elif not quiet:
        _show(measured)
        click.echo(
            f"{pieces.text.name}: {len(pieces.ids)} windows of {context} tokens; intervals hold "
            "95 %"
        )


def _longest(files: Mapping[str, bytes]) -> int:
    """Tokens that a model knows positions for, 2048 at most."""
    stated = json.loads(files.get("config.json", b"{}")).get("max_position_embeddings")
    return min(2048, stated) if isinstance(stated, int) and stated > 1 else 2048


def _show_scores(scores: Sequence[TaskScore], as_json: bool, quiet: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(score) for score in scores]))
    elif not quiet:
        echo_table(
            ["model", "task", "metric", "value", "± error"],
            [[plain(s.model), plain(s.task), plain(s.metric), f"{s.value:.4f}",
              "-" if s.error is None else f"{s.error:.4f}"] for s in scores],
        )  # fmt: skip


def _show(measured: list[Measured]) -> None:
    against = any(one.reference for one in measured)
    rated = any(one.tokens_per_second for one in measured)
    head = ["model", "perplexity", "interval"]
    head += ["change", "KL mean", "median", "99 %", "same token"] if against else []
    head += ["tokens/s"] if rated else []
    rows = []
    for one in measured:
        row = [plain(one.name), f"{one.perplexity:.3f}", f"{one.low:.3f} … {one.high:.3f}"]
        if against and one.reference is None:
            row += ["-"] * 5
        elif against:
            row += [f"{one.perplexity_change:+.2%}", f"{one.kl_mean:.2e}", f"{one.kl_median:.2e}",
                    f"{one.kl_p99:.2e}", f"{one.agreement:.1%}"]  # fmt: skip
        if rated:
            row.append(f"{one.tokens_per_second:.0f}" if one.tokens_per_second else "-")
        rows.append(row)
    echo_table(head, rows)
