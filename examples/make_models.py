"""Train the example models: a small Llama, three fine-tunes of it and three LoRA adapters on it.

    python examples/make_models.py [--out DIR] [--force]

The base reads all three domains of `corpus` briefly, each fine-tune and each adapter goes on with
one. Seeds, order and thread count are fixed: two runs with the same versions on the same kind of
processor write the same tensors. A stamp in the folder records what made it; while that agrees the
script ends at once, without importing torch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corpus
import perplexity

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
STAMP = ".made.json"
SOURCES = ("make_models.py", "corpus.py", "perplexity.py")
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")
THREADS = 2
BATCH = 8  # windows of perplexity.CONTEXT tokens
WARMUP = 10  # steps


@dataclass(frozen=True)
class Run:
    """How long and how fast one model is trained."""

    steps: int
    rate: float
    final_rate: float  # as a share of `rate`: the learning rate falls linearly to it
    seed: int


# The base stops early and at its full rate, as an intermediate checkpoint does: besides its own
# domain each fine-tune then learns what all of them learn, which is what a merge can keep.
BASE = Run(steps=220, rate=3e-3, final_rate=1.0, seed=1)
FINE_TUNE = Run(steps=60, rate=5e-4, final_rate=0.05, seed=2)
ADAPTER = Run(steps=45, rate=2e-3, final_rate=0.05, seed=3)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: dict[str, dict[str, bool]] = {
    "code": {},
    "docstrings": {"use_rslora": True},
    "reference": {"use_dora": True},
}


def say(text: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(text, flush=True)


def fingerprint() -> str:
    """Return a SHA-256 of all that decides the models: sources and versions."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    for package in PACKAGES:
        digest.update(f"{package}=={version(package)}\n".encode())
    digest.update(platform.python_version().encode())
    return digest.hexdigest()


def is_current(out: Path) -> bool:
    """Say whether `out` was made by these sources and versions and no file has gone since."""
    try:
        stamp = json.loads((out / STAMP).read_text())
        sizes: dict[str, int] = stamp["bytes"]
        return stamp["fingerprint"] == fingerprint() and all(
            (out / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def write_json(path: Path, content: object) -> None:
    """Write indented JSON that ends in a newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def new_base(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a Llama of 2.2 million parameters with random weights."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(BASE.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=corpus.MAX_LENGTH,
            tie_word_embeddings=False,
            **tokens,
        )
    )
    model.generation_config = GenerationConfig(max_new_tokens=64, **tokens)
    return model


def mixture(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return as many windows of each domain as make one epoch of the base, short ones repeated."""
    import torch

    share = -(-BASE.steps * BATCH // len(tokens))
    return torch.cat([part.repeat(-(-share // len(part)), 1)[:share] for part in tokens.values()])


def train(name: str, model: PreTrainedModel, tokens: torch.Tensor, run: Run) -> None:
    """Train the model's trainable parameters in place with AdamW on windows drawn by the seed.

    Args:
        name: what the progress lines call it.
        model: in float32.
        tokens: (windows, perplexity.CONTEXT), int64.
        run: how long and how fast.
    """
    import torch

    generator = torch.Generator().manual_seed(run.seed)
    epochs = -(-run.steps * BATCH // len(tokens))
    order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(epochs)])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    started = time.perf_counter()
    model.train()
    for step in range(run.steps):
        share = step / run.steps
        rate = run.rate * min(1.0, (step + 1) / WARMUP) * (1 - share * (1 - run.final_rate))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = tokens[order[step * BATCH : (step + 1) * BATCH]]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == run.steps:
            seconds = time.perf_counter() - started
            done = f"step {step + 1:>3} of {run.steps}"
            say(f"  {name:<16}  {done}  loss {loss.item():.3f}  {seconds:5.1f} s")
    model.eval()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model in bfloat16, as most are published, with its tokenizer."""
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(domain: str, tokens: torch.Tensor, out: Path) -> None:
    """Train a LoRA adapter on `out/base` for one domain and save it in PEFT's layout."""
    import torch
    from peft import LoraConfig, get_peft_model

    model, _ = perplexity.load(out / "base")
    # Where the base lies relative to the adapter, in place of this machine's temporary folder.
    model.name_or_path = model.config.name_or_path = "../base"
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
        **ADAPTERS[domain],
    )
    torch.manual_seed(ADAPTER.seed)
    model = get_peft_model(model, config)
    train(f"lora-{domain}", model, tokens, ADAPTER)
    folder = out / f"lora-{domain}"
    model.save_pretrained(folder, save_embedding_layers=False)
    # PEFT lists the modules in the order of a set, another one in each process.
    saved: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    write_json(
        folder / "adapter_config.json", saved | {"target_modules": sorted(saved["target_modules"])}
    )


def make(out: Path) -> None:
    """Train and save every model, their perplexities and the stamp into the empty folder `out`."""
    say("reading the standard library and training the tokenizer")
    made_by = fingerprint()
    perplexity.quiet()
    import torch

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    texts = corpus.training()
    tokenizer = corpus.train_tokenizer([text for domain in texts.values() for text in domain])
    tokens = {domain: perplexity.windows(texts[domain], tokenizer) for domain in corpus.DOMAINS}
    sizes = ", ".join(f"{domain} {part.numel():,}" for domain, part in tokens.items())
    say(f"training tokens: {sizes}")

    base = new_base(tokenizer)
    say(f"training a Llama of {base.num_parameters():,} parameters and what derives from it")
    train("base", base, mixture(tokens), BASE)
    save(base, tokenizer, out / "base")
    for domain in corpus.DOMAINS:
        model, _ = perplexity.load(out / "base")
        train(domain, model, tokens[domain], FINE_TUNE)
        save(model, tokenizer, out / domain)
    for domain in corpus.DOMAINS:
        save_adapter(domain, tokens[domain], out)

    say("measuring held-out perplexity")
    names = ["base", *corpus.DOMAINS, *(f"lora-{domain}" for domain in ADAPTERS)]
    content = {
        "context_tokens": perplexity.CONTEXT,
        "tokens": {
            domain: part.numel() for domain, part in perplexity.held_out_tokens(tokenizer).items()
        },
        "perplexity": {name: perplexity.held_out_perplexity(out / name) for name in names},
    }
    write_json(out / "perplexity.json", content)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    sizes_in_bytes = {path.relative_to(out).as_posix(): path.stat().st_size for path in files}
    write_json(out / STAMP, {"fingerprint": made_by, "bytes": sizes_in_bytes})


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place whole, or not at all."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        # Git ignores the folder should the process be killed before it is cleaned up.
        (Path(scratch) / ".gitignore").write_text("*\n")
        fresh, retired = Path(scratch) / "fresh", Path(scratch) / "retired"
        fresh.mkdir()
        yield fresh
        try:
            if out.exists():
                out.rename(retired)
            fresh.rename(out)
        finally:
            if retired.exists() and not out.exists():
                retired.rename(out)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one run at a time work in `folder`, without leaving a lock file in it."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is at work, waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def main() -> int:
    """Make the models unless they are there."""
    parser = argparse.ArgumentParser(description="Train the example models (about two minutes).")
    parser.add_argument("--out", type=Path, default=HERE / "models", help="folder to make")
    parser.add_argument("--force", action="store_true", help="train even if they are up to date")
    options = parser.parse_args()
    out: Path = options.out.absolute()
    shown = f"{out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}/"
    if out.exists() and not (out / STAMP).exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"error: {shown} is not empty and was not made by this script", file=sys.stderr)
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    # Asked before the lock too: runs that find everything made do not wait for each other.
    current = not options.force and is_current(out)
    if not current:
        with locked(out.parent):
            current = not options.force and is_current(out)
            if not current:
                with replacing(out) as fresh:
                    make(fresh)
    if current:
        say(f"example models are up to date in {shown}")
        return 0
    rows = json.loads((out / "perplexity.json").read_text())["perplexity"]
    say(f"\nheld-out perplexity, * is the lowest of its column\n\n{perplexity.table(rows)}\n")
    say(f"example models are in {shown} after {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit("interrupted: nothing was changed")
