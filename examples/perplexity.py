"""Measure the perplexity of models on held-out text of the three domains.

    python examples/perplexity.py examples/models/base merged/

A model folder is one in transformers' layout, or an adapter in PEFT's whose base is a folder.
Weights are read in the type they were saved in and computed with in float32, so that two models
differ by their weights alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import corpus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXT = 256  # tokens
WINDOWS = 48  # of CONTEXT tokens per domain, at most
BATCH = 16  # windows


def quiet() -> None:
    """Keep transformers from the network and from writing progress bars and warnings."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(model_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model folder, or an adapter folder with its base, in float32 and in eval mode."""
    quiet()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = model_dir / "adapter_config.json"
    base_dir = model_dir
    if adapter.exists():
        base_dir = model_dir / json.loads(adapter.read_text())["base_model_name_or_path"]
    if not (base_dir / "config.json").exists():
        raise FileNotFoundError(f"{base_dir} holds no config.json: not a model's folder")
    model = AutoModelForCausalLM.from_pretrained(base_dir.resolve(), dtype=torch.float32)
    if adapter.exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(model_dir))
    return model.eval(), AutoTokenizer.from_pretrained(base_dir.resolve())


def windows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Join the documents, each between its special tokens, and cut them into whole windows.

    Returns:
        Token ids, (windows, CONTEXT), int64.
    """
    import torch

    stream: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    whole = len(stream) // CONTEXT
    return torch.tensor(stream[: whole * CONTEXT]).view(whole, CONTEXT)


def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return exp of the mean negative log-likelihood of each window's tokens after its first."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for batch in tokens.split(BATCH):
            logits = model(input_ids=batch).logits[:, :-1].double()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            )
            total += loss.item()
    return math.exp(total / tokens[:, 1:].numel())


def held_out_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Return the windows of each domain on which every model is measured."""
    return {
        domain: windows(texts, tokenizer)[:WINDOWS] for domain, texts in corpus.held_out().items()
    }


def held_out_perplexity(model_dir: Path) -> dict[str, float]:
    """Return the perplexity of the model in `model_dir` on each domain's held-out text.

    Raises:
        FileNotFoundError: if the folder holds no model.
    """
    model, tokenizer = load(model_dir)
    return {
        domain: perplexity(model, tokens) for domain, tokens in held_out_tokens(tokenizer).items()
    }


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out one line per model and one column per domain; `*` marks each column's lowest."""
    columns = list(dict.fromkeys(domain for row in rows.values() for domain in row))
    best = {
        column: min(row[column] for row in rows.values() if column in row) for column in columns
    }
    first = max(map(len, ["model", *rows]))
    lines = ["model".ljust(first) + "".join(f"  {column:>10} " for column in columns)]
    for name, row in rows.items():
        cells = [
            f"  {row[column]:>10.2f}{'*' if row[column] == best[column] else ' '}"
            if column in row
            else f"  {'-':>10} "
            for column in columns
        ]
        lines.append(name.ljust(first) + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Print the table of the folders named on the command line."""
    parser = argparse.ArgumentParser(description="Held-out perplexity of models, per domain.")
    parser.add_argument("model_dir", type=Path, nargs="+", help="a model's or an adapter's folder")
    folders: list[Path] = parser.parse_args().model_dir
    try:
        rows = {str(folder): held_out_perplexity(folder) for folder in folders}
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    print("Lower is better, * is the lowest of its column.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
