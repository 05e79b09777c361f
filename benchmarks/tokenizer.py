"""A small but valid tokenizer of any size, written without a network.

Random models need no language, only files that `transformers.AutoTokenizer` loads: a BPE without
merges whose vocabulary is three special tokens, the 256 byte tokens, and numbered fillers.
"""

import json
from pathlib import Path

SPECIAL = ("<unk>", "<s>", "</s>")


def vocabulary(size: int) -> dict[str, int]:
    """Return `size` distinct tokens with their ids.

    Args:
        size: Number of entries, at least 259 (three special tokens and 256 bytes).

    Raises:
        ValueError: `size` is less than 259.
    """
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    if size < len(tokens):
        raise ValueError(f"a vocabulary has at least {len(tokens)} entries, not {size}")
    tokens += [f"▁filler{number}" for number in range(size - len(tokens))]
    return {token: number for number, token in enumerate(tokens)}


def write_tokenizer(folder: Path, size: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    Args:
        folder: An existing folder.
        size: Number of entries, equal to the rows of the model's embedding.
    """
    tokens = vocabulary(size)
    added = [
        {
            "id": tokens[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in SPECIAL
    ]
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": tokens,
            "merges": [],
        },
    }
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", names),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", encoding="utf-8")
