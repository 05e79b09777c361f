"""Measure GGUF against llama.cpp's two steps and mergekit before them: `python -m benchmarks.gguf`.

The models are those of `benchmarks.merge`, with a tokenizer of SentencePiece beside their weights.
The peers are convert_hf_to_gguf.py and llama-quantize out of the source package of
llama-cpp-python, built here (some minutes, once). README.md beside this file explains the columns.
"""

import argparse
import io
import pydoc_data.topics
import shutil
import statistics
import sys
import time
from pathlib import Path

import yaml

from benchmarks import measure, peers, report
from benchmarks.paths import WORK
from benchmarks.shapes import TINY, TINYLLAMA, make_family

SHAPES = {"tinyllama": TINYLLAMA, "tiny": TINY}
_OUT = WORK / "out-gguf"


def with_tokenizer(family: dict[str, Path], root: Path) -> dict[str, Path]:
    """The same models with links to their weights and a SentencePiece tokenizer, once."""
    found = {}
    for name, folder in family.items():
        found[name] = beside = root / name
        if (beside / "tokenizer.model").exists():
            continue
        beside.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            (beside / file).unlink(missing_ok=True)
            (beside / file).symlink_to((folder / file).resolve())
        (beside / "tokenizer.model").write_bytes(_sentencepiece())
    return found


def _sentencepiece() -> bytes:
    import sentencepiece

    made = io.BytesIO()
    lines = [line for text in pydoc_data.topics.topics.values() for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line), model_writer=made,
        model_type="bpe", vocab_size=1500, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return made.getvalue()


def _ties(models: dict[str, Path], file: Path) -> Path:
    weights = (0.5, 0.3, 0.4)
    tunes = [folder for name, folder in sorted(models.items()) if name != "base"]
    content = {
        "merge_method": "ties",
        "base_model": str(models["base"].absolute()),
        "models": [
            {"model": str(folder.absolute()), "parameters": {"weight": weight, "density": 0.5}}
            for folder, weight in zip(tunes, weights, strict=True)
        ],
        "dtype": "bfloat16",
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def _step(name: str, command: list[str | Path], output: Path) -> measure.Run:
    print(f"{time.strftime('%H:%M:%S')}  {name}", flush=True)
    log = "gguf-" + "".join(c if c.isalnum() else "-" for c in name)
    return measure.run(command, output, log, peers.OFFLINE)


class _Chain:
    """The peers' steps, each of which writes a model that the next one reads."""

    def __init__(self, tools: peers.LlamaCpp) -> None:
        self._tools = tools

    def quantized(self, model: Path, kind: str) -> list[measure.Run]:
        """Convert a folder and quantize it."""
        wide = _OUT / "wide" / "model" / "bf16.gguf"
        last = _OUT / "last" / "model" / "last.gguf"
        convert: list[str | Path] = [
            sys.executable, self._tools.convert, model, "--outtype", "bf16", "--outfile", wide,
        ]  # fmt: skip
        runs = [_in_folder(f"{kind}: convert_hf_to_gguf.py", convert, wide.parent)]
        command: list[str | Path] = [self._tools.quantize, wide, last, kind]
        runs.append(_in_folder(f"{kind}: llama-quantize", command, last.parent))
        shutil.rmtree(_OUT)
        return runs

    def merged(self, recipe: Path, models: dict[str, Path], kind: str) -> list[measure.Run]:
        """Merge, convert, quantize."""
        merged = WORK / "out-mergekit-gguf" / "merged"
        environment = peers.mergekit_environment()
        command = peers.mergekit_command(environment, recipe, merged)
        runs = [_step(f"{kind}: mergekit", command, merged)]
        for path in merged.glob("*token*"):
            path.unlink()
        shutil.copy(models["base"] / "tokenizer.model", merged)
        runs += self.quantized(merged, kind)
        shutil.rmtree(merged.parent)
        return runs


def _in_folder(name: str, command: list[str | Path], folder: Path) -> measure.Run:
    """Run a step that wants its folder to be there."""
    shell = 'mkdir -p "$0" && exec "$@"'
    return _step(name, ["/bin/sh", "-c", shell, folder, *command], folder)


def main() -> None:
    """Measure all jobs, print a table, keep `results-gguf.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf", description=__doc__)
    parser.add_argument("--skip-peers", action="store_true", help="leave the peers out")
    parser.add_argument("--repeat", type=int, default=3, help="runs of pack, default 3")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    arguments = parser.parse_args()
    family = make_family(WORK / arguments.shape, SHAPES[arguments.shape], "BF16")
    models = with_tokenizer(family, WORK / f"{arguments.shape}-gguf")
    recipe = _ties(models, WORK / "recipes" / f"{arguments.shape}-gguf.yaml")
    theirs = _ties(family, WORK / "recipes" / f"{arguments.shape}-gguf-mergekit.yaml")
    tools = None if arguments.skip_peers else peers.llama_cpp()
    chain = None if tools is None else _Chain(tools)
    jobs: dict[str, tuple[Path, str]] = {
        "folder to q4_k_m": (models["base"], "q4_k_m"),
        "folder to q8_0": (models["base"], "q8_0"),
        "TIES of three to q4_k_m": (recipe, "q4_k_m"),
    }
    rows, kept = [], {}
    with measure.kept_warm(list(family.values())):
        for name, (model, kind) in jobs.items():
            output = _OUT / "pack" / "gguf"
            command: list[str | Path] = [
                peers.installed_pack(), "quantize", "--to", "gguf", kind, model, "-o", output,
                "--force", "-q",
            ]  # fmt: skip
            runs = []
            for number in range(arguments.repeat):
                runs.append(_step(f"{name}: pack {number + 1}", command, output))
                shutil.rmtree(_OUT)
            wall = statistics.median(run.wall_s for run in runs)
            rss = max(run.peak_rss_bytes for run in runs)
            peer = []
            if chain is not None:
                merges = model == recipe
                peer = (
                    chain.merged(theirs, models, kind) if merges else chain.quantized(model, kind)
                )
            total = sum(run.wall_s for run in peer)
            kept[name] = {
                "pack_s": [run.wall_s for run in runs], "pack_rss": rss,
                "peer_s": [run.wall_s for run in peer],
                "peer_rss": [run.peak_rss_bytes for run in peer],
            }  # fmt: skip
            rows.append(
                [
                    name,
                    f"{wall:.1f} s",
                    report.gigabytes(rss),
                    " + ".join(f"{run.wall_s:.1f}" for run in peer) + " s" if peer else "-",
                    report.gigabytes(max(run.peak_rss_bytes for run in peer)) if peer else "-",
                    f"{total / wall:.1f}x" if peer else "-",
                ]
            )
    report.write_results(WORK / "results-gguf.json", kept)
    head = ["job", "pack", "memory", "peers, step by step", "memory", "faster by"]
    print(f"\n{measure.machine()}\n")
    print(report.table(head, rows))


if __name__ == "__main__":
    main()
