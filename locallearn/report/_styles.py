"""What a rule and its settings look like, the same in every chart: a hue per rule, a marker and a dash per setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from locallearn.statistics import Row

# Okabe and Ito's palette, which colour-blind people can tell apart, then six further hues of like weight, all of them legible
# on white and on black. The baseline is grey. Rules differ by their marker, too, so that colour is never the only sign.
_GREY = "#808080"
_HUES = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#8F5BD6", "#A0522D", "#7F9F1F", "#C2185B", "#00A5A5", "#5C6BC0"),
)
_SYMBOLS = ("circle", "diamond", "triangle-up", "star", "hexagon", "cross", "triangle-down", "x", "pentagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


class Style(NamedTuple):
    """Colour of a rule; marker and dash of one of its settings."""

    colour: str
    symbol: str
    dash: str = "solid"


def styles(rows: Sequence[Row], baseline: str) -> dict[str, Style]:
    """The style of every label on the page."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        labels.setdefault(row.algorithm, []).append(row.label)
    chosen = {}
    others = sorted(labels.keys() - {baseline})
    for rule, own in labels.items():
        # Of more than twelve rules some share a hue; their markers and dashes are others.
        place = others.index(rule) if rule != baseline else 0
        round_ = place // len(_HUES)
        colour = _GREY if rule == baseline else _HUES[place % len(_HUES)]
        for k, label in enumerate(sorted(set(own))):
            symbol = "square" if rule == baseline and k == 0 else _SYMBOLS[(place + k + round_) % len(_SYMBOLS)]
            chosen[label] = Style(colour, symbol, _DASHES[(k + round_) % len(_DASHES)])
    return chosen


Styles = Mapping[str, Style]
