"""What charts have in common: the colour and line of each curve, the numbers on an axis and its range."""

import math
from collections.abc import Sequence

from .html import COLOURS

Style = tuple[str, str]  # a colour, `#rrggbb`, and a line as matplotlib names it
_CURVES = "abcdefgh"  # the colours of curves
_LINES = ("-", "--", ":")
# methods of one family share a colour where there are not enough
_METHODS = {
    "nca": "a-", "infonca": "b-", "dpo": "c-", "sft": "d-", "gvpo": "e-", "kto": "f-", "ipo": "g-", "all_pairs": "h-",
    "best_vs_rest": "h--", "plackett_luce": "h:", "nca_pair": "a:", "hinge": "c:", "apo_zero": "e:",
    "outcome": "f--",
}  # fmt: skip
_STEPS = 24  # of the colours between the first and the last curve of an order
_ENDS = COLOURS["a"], COLOURS["b"]


def _mixed(share: float) -> str:
    """The colour so far on the way from the first end to the second, linearly in sRGB."""
    pairs = (tuple(int(end[i : i + 2], 16) for end in _ENDS) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


# a colour of a chart → how a page says it, so that it follows light and dark
PAGE_COLOURS = {
    _mixed(i / _STEPS): f"color-mix(in srgb, var(--b) {100 * i / _STEPS:.3g}%, var(--a))" for i in range(1, _STEPS)
} | {light: f"var(--{name})" for name, light in COLOURS.items()}


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Name of a curve → its colour and line.

    What stands before a name's first comma has a colour of its own: a method the same one in all charts. Curves that
    differ behind the comma differ in their lines, unless all begin alike.
    """
    starts = {name: name.partition(",")[0] for name in names}
    if len({*starts.values()}) == 1:
        starts = {name: name for name in names}
    own = {start: _METHODS[start] for start in starts.values() if start in _METHODS}
    owners = {style[0]: start for start, style in reversed(own.items())}
    found: dict[str, Style] = {}
    left: list[str] = []
    for name, start in starts.items():
        left = left or [colour + line for line in _LINES for colour in _CURVES]
        others = {style for other, style in own.items() if other != start}
        taken = min(
            left,
            key=lambda one: (one != own.get(start), one in others, owners.get(one[0]) != start, one[0] in owners),
        )
        left.remove(taken)
        found[name] = (COLOURS[taken[0]], taken[1:])
        owners.setdefault(taken[0], start)
    return found


def ordered_styles(names: Sequence[str]) -> dict[str, Style]:
    """The same for curves in an order, such as ranks: colours on the way from the first to the last."""
    each = list(dict.fromkeys(names))
    steps = [round(i * _STEPS / max(1, len(each) - 1)) for i in range(len(each))]
    return {name: (_mixed(step / _STEPS), "-") for name, step in zip(each, steps, strict=True)}


def plain_styles(names: Sequence[str]) -> dict[str, Style]:
    """The text's colour for each: curves that their width tells apart."""
    return dict.fromkeys(names, (COLOURS["text"], "-"))


def number(value: float, _: object = None) -> str:
    """`1,234`, `0.25`, `12k`: short enough for an axis."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k" if abs(value) < 1e6 else f"{value / 1e6:,.4g}M"
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


def axis_range(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """What an axis shows of `values` and of the ends of their bars. Bars of few seeds can be far wider than all that is
    to be seen: they widen it, but at most threefold."""
    low, high = min(values), max(values)
    span = high - low or abs(low) * 0.1 or 1.0
    known = [end for end in ends if math.isfinite(end)]
    most = max(min([low, *known]), low - span), min(max([high, *known]), high + span)
    edge = max(0.06 * (most[1] - most[0]), 0.02 * abs(low), 1e-9)  # of equal values too
    return most[0] - edge, most[1] + edge


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart and between `low` and `high`, in the same order, as near to `wanted` as can be.

    Without the room for all, they lie closer.
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    blocks: list[list[float]] = []  # of places less their own gaps, which are to rise: neighbours that don't share one
    for i, which in enumerate(order):
        blocks.append([wanted[which] - i * gap])
        while len(blocks) > 1 and sum(blocks[-2]) / len(blocks[-2]) > sum(blocks[-1]) / len(blocks[-1]):
            blocks[-2:] = [[*blocks[-2], *blocks[-1]]]
    level = [sum(block) / len(block) for block in blocks for _ in block]
    most = high - gap * (len(wanted) - 1)
    placed = [min(max(value, low), most) + i * gap for i, value in enumerate(level)]
    return [placed[order.index(i)] for i in range(len(wanted))]
