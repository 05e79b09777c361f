"""The one family of errors that a user sees: what is wrong, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = ["FileFormatError", "Interrupted", "Mistake", "PackError", "RecipeError", "nearest"]


class PackError(Exception):
    """Something that the user or the world must change; shown without a traceback.

    Args:
        message: Names the thing (file, tensor, key, line), what was found, what was expected.
        hint: The next step, as an imperative sentence; empty when the message says it all.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class FileFormatError(PackError):
    """A file that is not what its format promises: truncated, hostile, or of another kind."""


class Interrupted(PackError):
    """The user stopped the run; what is finished is kept for the next one."""


class Mistake:
    """One mistake in a recipe, at a place in its text."""

    def __init__(self, path: Sequence[str | int], message: str, line: int | None = None) -> None:
        self.path = tuple(path)
        self.message = message
        self.line = line

    @property
    def where(self) -> str:
        """The key as a user would write it: ``models[1].parameters.weight``."""
        text = ""
        for part in self.path:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        return text


class RecipeError(PackError):
    """Every mistake of a recipe in one report, in the order of its lines."""

    def __init__(self, source: str, mistakes: Iterable[Mistake], hint: str = "") -> None:
        self.source = source
        self.mistakes = sorted(mistakes, key=lambda m: (m.line is None, m.line or 0))
        many = len(self.mistakes) != 1
        lines = [f"{source}: {len(self.mistakes)} mistake{'s' if many else ''}"]
        for mistake in self.mistakes:
            place = f"line {mistake.line}: " if mistake.line else ""
            key = f"{mistake.where}: " if mistake.where else ""
            lines.append(f"  {place}{key}{mistake.message}")
        super().__init__("\n".join(lines), hint)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest known word, or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
