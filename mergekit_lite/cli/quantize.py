"""pack quantize."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from exporters.onnx.schemes import BLOCKS, ROUTES, find_scheme
from exporters.onnx.schemes import SCHEMES as ONNX_SCHEMES
from exporters.schemes import FORMATS, ORDERS, TARGETS
from mergekit_lite.cli.options import (
    CACHE,
    OUTPUT_ANYWHERE,
    SIZE,
    TEXT,
    engine_options,
    make_engine,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from exporters.gguf.mixtures import Overrides
    from exporters.onnx.schemes import Route
    from exporters.schemes import Order
    from mergekit_lite.cli.quantizing import Quantizing
    from mergekit_lite.merge.address import Address

__all__ = ["command"]

_FORMATS = ("gguf", *TARGETS, "onnx")
_COMMON = ("q4_k_m", "q5_k_m", "q6_k", "q8_0", "q3_k_m", "iq4_xs", "q4_0", "bf16", "f16",
           "w4g128", "w3g128", "w8a16", "w8a8", "nf4", *ONNX_SCHEMES)  # fmt: skip


class _Target(click.Tuple):
    """FORMAT and SCHEME."""

    def __init__(self) -> None:
        super().__init__([str, str])

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete formats and the usual schemes."""
        return [CompletionItem(w) for w in (*_FORMATS, *_COMMON) if w.startswith(incomplete)]


@click.command("quantize", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option(
    "--to", "targets", type=_Target(), multiple=True, metavar="FORMAT SCHEME",
    help="What to make, for example: --to gguf q4_k_m. May be given several times; GGUF "
    "files are made in one pass over the weights.",
)  # fmt: skip
@click.option("--list", "list_schemes", is_flag=True, help="List formats and schemes.")
@click.option(
    "-o", "--output", type=OUTPUT_ANYWHERE, metavar="WHERE",
    help="Where the result goes: a folder, s3://BUCKET/PREFIX or hf://ORG/NAME; several results "
    "into folders below it.  [default: dist/NAME/FORMAT-SCHEME]",
)  # fmt: skip
@click.option("--name", help="Name of the files.  [default: the model's]")
@click.option(
    "--imatrix", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Importance of columns, from pack imatrix or llama-imatrix.",
)  # fmt: skip
@click.option(
    "--calibration", type=TEXT, metavar="FILE",
    help="Text, or JSON lines or Parquet with text or messages, that the model is run on; of the "
    "Hub: hf://datasets/ORG/NAME/FILE. GGUF weighs columns "
    "by it; GPTQ and AWQ need one; with one, int4 of ONNX is rounded as GPTQ rounds.  [default for "
    "GPTQ and AWQ: a small one that comes along]",
)  # fmt: skip
@click.option(
    "--no-calibration", is_flag=True,
    help="Round to the nearest code, without running the model (GPTQ, int8).",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(2, 1 << 20), metavar="N",
    help="Tokens of a window of that text.  [default: 512; for GGUF 256]",
)  # fmt: skip
@click.option(
    "--windows", type=click.IntRange(2, 1 << 20), metavar="N",
    help="Windows at most.  [default: 128]",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of windows.")
@click.option(
    "--format", "form", type=click.Choice(FORMATS),
    help="How GPTQ and AWQ are written.  [default: each in its own]",
)  # fmt: skip
@click.option(
    "--act-order", type=click.Choice(ORDERS), default="static", show_default=True,
    help="GPTQ: which columns are rounded first. static: those with most activation, scales found "
    "before; groups: group by group; columns: groups are formed in that order (desc_act).",
)  # fmt: skip
@click.option(
    "--damping", type=click.FloatRange(0, 1, min_open=True), default=0.01, show_default=True,
    help="GPTQ: share of the mean that is added to the Gram matrix's diagonal.",
)  # fmt: skip
@click.option(
    "--nearest", is_flag=True, help="AWQ, w8a8: round to the nearest code, as in their papers."
)
@click.option(
    "--graph", "route", type=click.Choice(ROUTES), default="auto", show_default=True,
    help="ONNX: who makes the graph: onnxruntime-genai's builder, torch.onnx, or the first for the "
    "decoders that it makes right and the second for the rest.",
)  # fmt: skip
@click.option(
    "--block", type=click.Choice([str(b) for b in BLOCKS]), default=str(BLOCKS[0]),
    show_default=True, help="ONNX: weights that share a scale, of int4.",
)  # fmt: skip
@click.option("--asymmetric", is_flag=True, help="ONNX: int4 with zero points.")
@click.option(
    "--link-weights", "linked", is_flag=True,
    help="ONNX: leave weights in the model's safetensors, linked beside the graph (same disk, and "
    "stored as the graph wants them: bf16 for most models).",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
    help="What the model is run in.",
)  # fmt: skip
@click.option(
    "--tensor-type", "patterns", multiple=True, metavar="PATTERN=TYPE",
    help="Type of the tensors whose GGUF names hold a pattern (a regular expression), for "
    "example attn_v=q6_k; the first that fits holds.",
)  # fmt: skip
@click.option("--output-type", metavar="TYPE", help="Type of the output matrix.")
@click.option("--embedding-type", metavar="TYPE", help="Type of the token embedding.")
@click.option("--pure", is_flag=True, help="Give all matrices the scheme's main type.")
@click.option("--split-max-size", type=SIZE, help="Most bytes of weights in a file.")
@click.option(
    "--verify/--no-verify", default=None,
    help="Compare what was written with the model.  [default: ONNX, and small models in GGUF]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing result.")
@CACHE
@click.option("--memory", type=SIZE, default="448MB", show_default=True, help="Memory for weights.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all cores]"
)
@engine_options
@click.option("--rehash", is_flag=True, help="Hash inputs again that were hashed before.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for programs.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    model: str | None,
    targets: tuple[tuple[str, str], ...],
    list_schemes: bool,
    output: Path | Address | None,
    name: str | None,
    imatrix: Path | None,
    calibration: Path | None,
    no_calibration: bool,
    context: int | None,
    windows: int | None,
    seed: int,
    form: str | None,
    act_order: Order,
    damping: float,
    nearest: bool,
    route: Route,
    block: str,
    asymmetric: bool,
    linked: bool,
    device: str,
    dtype: str,
    patterns: tuple[str, ...],
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
    split_max_size: int | None,
    verify: bool | None,
    force: bool,
    memory: int,
    threads: int | None,
    engine_name: str,
    address: str | None,
    rehash: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Quantize MODEL: a folder, a Hub id, BASE+ADAPTER, a .gguf file, or a recipe that has not run.

    \b
    pack quantize --to gguf q4_k_m                 (the model last made below dist)
    pack quantize --to gguf q4_k_m --to gguf q8_0 my-model
    pack quantize --to gguf q4_k_m recipe.yaml     (merged while it is quantized)
    pack quantize --to gptq w4g128 --calibration text.txt my-model
    pack quantize --to awq w4g128 my-model
    pack quantize --to onnx int4 my-model

    Nothing is written between the model and the result, and nothing has to be compiled. GPTQ, AWQ
    and int8 run the model one decoder layer at a time; a run that was stopped continues at the
    layer it was in.
    """  # noqa: D301 (click reads the character)
    if list_schemes:
        _list()
        return
    if not targets:
        raise click.UsageError("say what to make, for example: --to gguf q4_k_m")
    from mergekit_lite.adapters.factor import check_device
    from mergekit_lite.checkpoint.known import KNOWN
    from mergekit_lite.cli.quantizing import Quantizing
    from mergekit_lite.merge.run import check_memory, default_threads

    KNOWN.enabled = not rehash
    check_memory(memory)
    _check_targets(targets)
    check_device(device)
    if no_calibration and calibration is not None:
        raise click.UsageError("give --calibration or --no-calibration, not both")
    if imatrix is not None and calibration is not None:
        raise click.UsageError("give --imatrix or --calibration, not both")
    once = tuple(
        dict.fromkeys((target, _usual(target, scheme.lower())) for target, scheme in targets)
    )
    job = Quantizing(
        model, once, output, name, force, threads or default_threads(), device, calibration,
        context, windows, seed, quiet or as_json,
    )  # fmt: skip
    if engine_name != "local":
        _check_spread(job)
    of_gguf = {
        "--imatrix": imatrix, "--tensor-type": patterns, "--output-type": output_type,
        "--embedding-type": embedding_type, "--pure": pure, "--split-max-size": split_max_size,
    }  # fmt: skip
    of_others = {"--no-calibration": no_calibration, "--format": form, "--nearest": nearest}
    if not job.ggufs:
        _refuse_unused("GGUF", of_gguf)
    if not job.ggufs and not job.onnxes:
        _refuse_unused("GGUF and ONNX", {"--verify": verify is not None})
    if not job.others:
        _refuse_unused("GPTQ, AWQ, int8 and bnb", of_others)
    source = click.get_current_context().get_parameter_source
    given = {
        f"--{name.replace('_', '-')}": source(name) is not ParameterSource.DEFAULT
        for name in (
            "act_order",
            "damping",
            "dtype",
            "context",
            "windows",
            "seed",
            "calibration",
            "block",
            "asymmetric",
        )
    } | {"--graph": source("route") is not ParameterSource.DEFAULT}
    if not job.others:
        _refuse_unused("GPTQ and AWQ", {k: given[k] for k in ("--act-order", "--damping")})
    if not job.looks and not job.ggufs:
        usual = ("--act-order", "--damping", "--dtype", "--context", "--windows", "--seed",
                 "--calibration")  # fmt: skip
        _refuse_unused("what runs the model", {k: given[k] for k in usual})
    overrides = _overrides(patterns, output_type, embedding_type, pure)
    if not job.onnxes:
        _refuse_unused("ONNX", {
            **{k: given[k] for k in ("--graph", "--block", "--asymmetric")},
            "--link-weights": linked,
        })  # fmt: skip
    job.open_uploads(linked)
    with make_engine(engine_name, address, threads) as engine:
        job.make_linears(
            form, not no_calibration, nearest, act_order, damping, dtype, memory, engine
        )
        job.make_onnxes(int(block), not asymmetric, route, dtype, linked, verify is not False)
        job.make_ggufs(imatrix, overrides, split_max_size, memory, verify, engine)
    if as_json:
        click.echo(json.dumps(job.described))
    elif not quiet:
        for line in job.lines:
            line.show()


def _check_spread(job: Quantizing) -> None:
    """Refuse what only one process can make, where a cluster was asked for."""
    if job.onnxes:
        raise click.UsageError(
            "--engine ray spreads GGUF, GPTQ, AWQ, int8 and bnb over a cluster; ONNX is made by "
            "one process, so leave it out there"
        )
    if job.others and job.device != "cpu":
        raise click.UsageError("--device is of this machine: with --engine ray leave it out")


def _check_targets(targets: tuple[tuple[str, str], ...]) -> None:
    from mergekit_lite.errors import nearest

    for target, _ in targets:
        if target not in _FORMATS:
            raise click.UsageError(
                f"no such format '{target}'{nearest(target, _FORMATS)}; known: "
                f"{', '.join(_FORMATS)}"
            )


def _usual(target: str, scheme: str) -> str:
    """The name of a scheme that has several, as q4_k is q4_k_m: what is made is made once."""
    if target == "gguf":
        from exporters.gguf.mixtures import find_mixture

        return find_mixture(scheme).name
    return find_scheme(scheme).name if target == "onnx" else scheme


def _overrides(
    patterns: tuple[str, ...], output_type: str | None, embedding_type: str | None, pure: bool
) -> Overrides:
    from exporters.gguf.mixtures import Overrides, find_type

    found = []
    for entry in patterns:
        pattern, equals, kind = entry.rpartition("=")
        if not equals or not pattern:
            raise click.UsageError(
                f"--tensor-type {entry}: write PATTERN=TYPE, for example attn_v=q6_k"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise click.UsageError(
                f"--tensor-type {entry}: no regular expression ({error})"
            ) from None
        found.append((pattern, find_type(kind)))
    return Overrides(
        found,
        None if output_type is None else find_type(output_type),
        None if embedding_type is None else find_type(embedding_type),
        pure,
    )


def _list() -> None:
    from exporters.gguf.mixtures import MIXTURES
    from exporters.schemes import SCHEMES

    click.echo("--to gguf …")
    for mixture in MIXTURES.values():
        click.echo(f"  {mixture.name:<12} {mixture.summary}")
    for target, schemes in SCHEMES.items():
        click.echo(f"--to {target} …")
        for name, summary in schemes.items():
            click.echo(f"  {name:<12} {summary}")
    click.echo("--to onnx …")
    for scheme in ONNX_SCHEMES.values():
        click.echo(f"  {scheme.name:<12} {scheme.summary}")


def _refuse_unused(what: str, given: Mapping[str, object]) -> None:
    """Refuse options that belong to formats that are not made."""
    unused = [name for name, value in given.items() if value not in (None, (), False)]
    if unused:
        raise click.UsageError(f"{', '.join(unused)}: of {what}, which is not made here")
