"""Licence expressions: `mit OR apache-2.0`, `mit AND cc-by-4.0`, as SPDX writes them."""

from __future__ import annotations

from typing import Any

from mergekit_lite.release.licences.table import Licence, find_licence

__all__ = ["find_licences", "read_licences"]

_LONGEST = 500


def find_licences(stated: str) -> tuple[Licence, ...]:
    """The licences that a statement names.

    Of alternatives (OR) the one that binds least is taken, which whoever uses the model may choose;
    of several that hold together (AND) all. An exception (WITH) only ever loosens its licence, so
    that the licence itself is on the safe side.

    Args:
        stated: An id, or an expression (SPDX specification 3.0, annex B).

    Returns:
        None of them if one that matters is not known, or if it cannot be read.
    """
    known, whole = read_licences(stated)
    return known if whole else ()


def read_licences(stated: str) -> tuple[tuple[Licence, ...], bool]:
    """The licences of a statement that are known, and whether these are all that matter."""
    one = find_licence(stated)
    if one is not None:
        return (one,), True
    if len(stated) > _LONGEST:
        return (), False
    from license_expression import ExpressionError, Licensing

    try:
        parsed = Licensing().parse(stated)
    except (ExpressionError, ValueError, RecursionError):
        return (), False
    if parsed is None:
        return (), False
    found = _licences(parsed)
    if not found and type(parsed).__name__ == "AND":  # what is known of it binds all the same
        parts = [licence for inner in parsed.args for licence in _licences(inner)]
        return tuple(dict.fromkeys(parts)), False
    return found, bool(found)


def _licences(part: Any) -> tuple[Licence, ...]:
    name = type(part).__name__
    if name == "AND":
        every = [_licences(inner) for inner in part.args]
        return tuple(dict.fromkeys(licence for one in every for licence in one)) if all(every) \
            else ()  # fmt: skip
    if name == "OR":
        known = [found for inner in part.args if (found := _licences(inner))]
        return min(known, key=_bounds, default=())
    symbol = getattr(part, "license_symbol", part)
    one = find_licence(str(symbol))
    return () if one is None else (one,)


def _bounds(licences: tuple[Licence, ...]) -> tuple[int, ...]:
    """How much licences bind; the least first."""
    return (
        sum(not licence.commercial for licence in licences),
        sum(licence.no_more for licence in licences),
        sum(licence.same for licence in licences),
        sum(licence.limits for licence in licences),
        len(licences),
    )
