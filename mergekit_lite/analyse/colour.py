"""A scale of colours whose steps look equally large."""

from __future__ import annotations

__all__ = ["VIRIDIS", "colour_at", "is_light"]

VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129),
    (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip
"""Nine steps of viridis (van der Walt and Smith, 2015), whose lightness rises evenly; sRGB."""


def colour_at(place: float) -> tuple[int, int, int]:
    """The colour at a place from 0 to 1, between the steps in a straight line."""
    at = min(1.0, max(0.0, place)) * (len(VIRIDIS) - 1)
    step = min(int(at), len(VIRIDIS) - 2)
    pairs = zip(VIRIDIS[step], VIRIDIS[step + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (at - step)) for a, b in pairs)
    return red, green, blue


def is_light(colour: tuple[int, int, int]) -> bool:
    """Whether black is easier to read on it than white: contrast as in WCAG 2.2."""
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (luminance + 0.05) ** 2 > 1.05 * 0.05
