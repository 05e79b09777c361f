"""A Llama of 11 million parameters, trained on the text of the example models: once, 20 minutes.

Random weights stand in for a model where time and memory are measured. What quantizing costs in
quality shows only on weights that have learned something, and the example models are very small.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.paths import REPOSITORY, WORK

FOLDER = WORK / "trained-11m"
_READY = "trained.txt"
STEPS = 600


def trained_model(steps: int = STEPS) -> Path:
    """Train it unless it is there; return its folder."""
    ready = FOLDER / _READY
    if ready.is_file() and ready.read_text() == f"{steps} steps\n":
        return FOLDER
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import corpus
    import make_models
    import perplexity

    perplexity.quiet()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    began = time.perf_counter()
    texts = corpus.training()
    tokenizer = corpus.train_tokenizer([text for domain in texts.values() for text in domain])
    tokens = torch.cat([perplexity.windows(texts[d], tokenizer) for d in corpus.DOMAINS])
    torch.manual_seed(11)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024,
            num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
            max_position_embeddings=corpus.MAX_LENGTH, tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    run = make_models.Run(steps=steps, rate=1.5e-3, final_rate=0.05, seed=12)
    print(f"training a Llama of {model.num_parameters():,} parameters", flush=True)
    make_models.train("trained-11m", model, tokens, run)
    make_models.save(model, tokenizer, FOLDER)
    ready.write_text(f"{steps} steps\n")
    print(f"trained in {time.perf_counter() - began:.0f} s", flush=True)
    return FOLDER


def text_of(part: str) -> Path:
    """Write text of the example models' domains into a file, once.

    Args:
        part: ``training`` for calibration, ``held-out`` for measuring.
    """
    path = WORK / f"{part}.txt"
    if not path.is_file():
        sys.path.insert(0, str(REPOSITORY / "examples"))
        import corpus

        texts = corpus.held_out() if part == "held-out" else corpus.training()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(text for domain in texts.values() for text in domain))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trained", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    trained_model(parser.parse_args().steps)
