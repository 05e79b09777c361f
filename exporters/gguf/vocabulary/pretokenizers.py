"""How a byte-level BPE tokenizer cuts text before it merges, by the name that llama.cpp gives it.

A tokenizer.json says itself how it cuts: a list of steps with regular expressions. Those steps are
what is looked up here, so that a vocabulary which was extended or trained anew still converts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from exporters.gguf.vocabulary.cuts import CUTS, Cut, Step, spelled
from exporters.gguf.vocabulary.merging import Merging
from mergekit_lite.errors import PackError

__all__ = ["find_pretokenizer"]

_TELLING = 1000
"""Where one token in so many or fewer is merged otherwise, the user is told; else it is refused."""


def find_pretokenizer(pre_tokenizer: Any, merging: Merging, label: str) -> tuple[str, list[str]]:
    """The name of a pre-tokenizer, and what the user should know of it.

    Args:
        pre_tokenizer: That part of tokenizer.json.
        merging: The vocabulary.
        label: How the user named the model.

    Raises:
        PackError: llama.cpp has no equal of it; the message says of which part.
    """
    steps = tuple(_steps(pre_tokenizer, label))
    cuts = CUTS.get(steps)
    if cuts is None:
        shown = "; ".join(" ".join(str(part) for part in step) for step in steps) or "nothing"
        raise PackError(
            f"{label}: tokenizer.json cuts text by steps that llama.cpp has no equal of: {shown}",
            "Train the tokenizer with the cutting of a known model, for example Llama 3 or Qwen2.",
        )
    cut = next((cut for cut in cuts if cut.whole == merging.whole), cuts[0])
    if cut.breaks is not None and cut.breaks(merging):
        raise PackError(
            f"{label}: tokenizer.json cuts text at digits, where llama.cpp ({cut.name}) does not, "
            "and its merges go over such places",
            "Train the vocabulary with the cutting that tokenizer.json has.",
        )
    notes = []
    if cut.differs:
        notes.append(f"llama.cpp ({cut.name}) cuts {cut.differs} otherwise than the tokenizer")
    if cut.whole != merging.whole:
        notes += _whole_words(cut, merging, label)
    return cut.name, notes


def _whole_words(cut: Cut, merging: Merging, label: str) -> list[str]:
    """What it means that llama.cpp treats words that are tokens otherwise than the tokenizer.

    Raises:
        PackError: Too many of them become other tokens.
    """
    if not merging.unmade:
        return []
    count, of, example = len(merging.unmade), len(merging.vocabulary), merging.unmade[0]
    if count * _TELLING > of:
        raise PackError(
            f"{label}: tokenizer.json sets 'ignore_merges' to {str(merging.whole).lower()}, of "
            f"which llama.cpp ({cut.name}) has the opposite; {count} of {of} tokens, such as "
            f"{example!r}, are not what their merges give",
            "Set it otherwise in tokenizer.json, if the vocabulary was made so.",
        )
    mine, theirs = ("whole", "by merging") if merging.whole else ("by merging", "whole")
    note = f"{count} of {of} tokens, such as {example!r}, are not what their merges give; "
    return [f"{note}the tokenizer makes them {mine}, llama.cpp {theirs}"]


def _steps(part: Any, label: str) -> list[Step]:
    """The steps, in a form in which equal ones are equal."""
    if part is None:
        return []
    kind = part.get("type")
    if kind == "Sequence":
        return [step for each in part["pretokenizers"] for step in _steps(each, label)]
    if kind == "ByteLevel":
        if part.get("add_prefix_space"):
            raise PackError(
                f"{label}: tokenizer.json puts a space before every text ('add_prefix_space' of "
                "ByteLevel), which llama.cpp does not do for such a vocabulary",
                "Set it to false in tokenizer.json; the first word of a text gets other tokens.",
            )
        return [("ByteLevel", bool(part.get("use_regex", True)))]
    if kind == "Split":
        return [_split_step(part)]
    if kind == "Punctuation":
        return [("Punctuation", part.get("behavior", "Isolated"))]
    if kind == "Digits":
        return [("Digits", bool(part.get("individual_digits")))]
    return [(kind, *(value for key, value in sorted(part.items()) if key != "type"))]


def _split_step(part: Mapping[str, Any]) -> Step:
    pattern = part.get("pattern", {})
    expression = pattern.get("Regex")
    if expression is None:
        expression = re.escape(str(pattern.get("String")))
    # To keep what does not match is to cut where it matches.
    behavior, invert = part.get("behavior"), bool(part.get("invert"))
    if behavior == "Removed" and invert:
        behavior, invert = "Isolated", False
    step: Step = ("Split", spelled(str(expression)), behavior, invert)
    return ("Digits", True) if step == ("Split", r"\p{N}", "Isolated", False) else step
