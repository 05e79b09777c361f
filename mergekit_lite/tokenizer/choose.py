"""Which tokenizer and chat template the result gets, and whether the models agree on tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite.errors import PackError, nearest
from mergekit_lite.resources import resource_folder
from mergekit_lite.tokenizer.vocabulary import (
    TOKENIZER_FILES,
    conflicts,
    read_vocabulary,
    same_files,
)

__all__ = ["Tokenizer", "choose_tokenizer"]


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a result.

    Attributes:
        source: The model it comes from; None where no model has one.
        files: Contents by name, the chat template included.
        notes: What the user should know.
    """

    source: str | None
    files: Mapping[str, bytes]
    notes: tuple[str, ...]


def choose_tokenizer(
    folders: Mapping[str, Path | None], template: str, wanted: str | None, chat: str | None
) -> Tokenizer:
    """Choose, and check that every model's embeddings mean the same tokens.

    Args:
        folders: Where each model's files lie.
        template: The model whose tokenizer is taken unless another is wanted.
        wanted: ``base``, ``union`` or a model, from the recipe.
        chat: ``auto``, ``chatml``, a model, or a Jinja template, from the recipe.

    Raises:
        PackError: The vocabularies differ, or a wanted model is not part of the merge.
    """
    source: str | None = template if wanted in (None, "base", "union") else wanted
    if source not in folders:
        raise PackError(
            f"tokenizer_source '{wanted}' is not a model of this recipe"
            + nearest(str(wanted), folders),
            "Use base, union, or one of the models.",
        )
    notes: list[str] = []
    holders = {name: f for name, f in folders.items() if f is not None and _holds(f)}
    if source not in holders:
        source = min(holders, default=None)
        if source is not None:
            notes.append(f"the tokenizer is taken from {source}; {wanted or template} has none")
    if source is None:
        return Tokenizer(None, {}, ("no model has a tokenizer, so the result has none",))
    source = _agree(source, holders, wanted, notes)
    files = {
        name: (holders[source] / name).read_bytes()
        for name in TOKENIZER_FILES
        if (holders[source] / name).is_file()
    }
    files.update(_chat_files(chat, source, holders, folders))
    return Tokenizer(source, files, tuple(notes))


def _holds(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _agree(source: str, holders: Mapping[str, Path], wanted: str | None, notes: list[str]) -> str:
    """Check every vocabulary against the source's; under ``union`` move to the largest one."""
    own = read_vocabulary(holders[source])
    for name, folder in holders.items():
        if name == source or same_files(folder, holders[source]):
            continue
        other = read_vocabulary(folder)
        if own is None or other is None:
            notes.append(f"the vocabularies of {source} and {name} could not be compared")
            continue
        wrong = conflicts(own, other)
        if wrong:
            shown = "; ".join(f"id {i} is {a!r:.30} and {b!r:.30}" for i, a, b in wrong[:3])
            raise PackError(
                f"the vocabularies of {source} and {name} differ at {len(wrong)} ids ({shown})",
                "Their embeddings mean different tokens; pack does not remap them yet. "
                "Resize one model's vocabulary to the other's first.",
            )
        more = len(other.keys() - own.keys())
        if more and wanted == "union":
            source, own = name, other
        elif more:
            notes.append(f"{name} knows {more} token(s) that the tokenizer of {source} lacks")
    return source


def _chat_files(
    chat: str | None, source: str, holders: Mapping[str, Path], folders: Mapping[str, Path | None]
) -> dict[str, bytes]:
    if chat is None:
        return _templates(holders[source])
    if chat == "auto":
        found = {name: _templates(folder) for name, folder in holders.items()}
        counted = Counter(_key(files) for files in found.values() if files)
        if not counted:
            return {}
        most = max(counted.values())
        common = sorted(
            name for name, files in found.items() if files and counted[_key(files)] == most
        )
        return found[source if source in common else common[0]]
    if chat == "chatml":
        return {"chat_template.jinja": (resource_folder("templates") / "chatml.jinja").read_bytes()}
    if chat == "base":
        return _templates(holders[source])
    if chat in folders:
        if chat not in holders or not _templates(holders[chat]):
            raise PackError(f"chat_template: {chat} has no chat template", "Choose another model.")
        return _templates(holders[chat])
    if "{" in chat:
        return {"chat_template.jinja": chat.encode()}
    raise PackError(
        f"chat_template '{chat}' is neither a model of this recipe nor a template"
        + nearest(chat, [*folders, "auto", "chatml"]),
        "Use auto, chatml, one of the models, or the text of a Jinja template.",
    )


def _templates(folder: Path) -> dict[str, bytes]:
    """The chat template files of a model."""
    paths = [*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    if (folder / "chat_template.json").is_file():
        paths.append(folder / "chat_template.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(paths) if p.is_file()}


def _key(files: Mapping[str, bytes]) -> tuple[tuple[str, bytes], ...]:
    return tuple(sorted(files.items()))
