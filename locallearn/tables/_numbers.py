"""Numbers as people write them: no more digits than are known."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Decimal

_DIGITS = 2  # of an uncertainty: one digit alone may be half as large again, three say what nobody knows
_ALONE = 4  # of a number whose uncertainty is not known
_LONG = 15


def plus_minus(value: float, spread: float | None, *, join: str = " ± ") -> str:
    """``value`` and its uncertainty, both to the second digit of the latter: ``97.2 ± 1.1``, ``1230 ± 210``.

    Args:
        value: a finite number.
        spread: its standard deviation, or half of its interval; ``None`` or 0 where there is none: then the value has four
            significant digits, or all that it has if it is whole.
        join: what stands between the two.
    """
    if not spread or not math.isfinite(spread):
        return _alone(value)
    place = _place(spread)
    return f"{_at(value, place)}{join}{_at(spread, place)}"


def range_text(value: float, lo: float, hi: float, *, ratio: bool = False) -> str:
    """``value`` with the ends of its interval, to the second digit of half the interval: ``-1.2 [-2.6, 0.2]``.

    An interval of no width, but for rounding, is left out.

    Args:
        value: a finite number.
        lo: lower end.
        hi: upper end.
        ratio: whether these are ratios, all above 0: half of a wide interval is no measure of what its lower end is known
            to, and each of the three has two significant digits at least: ``4.1 [0.48, 34]``.
    """
    half = (hi - lo) / 2
    if not half > 1e-12 * abs(value) or not math.isfinite(half):
        return _alone(value)
    place = _place(half)
    number, *ends = (_at(one, min(place, _place(one)) if ratio and one else place) for one in (value, lo, hi))
    return f"{number} [{', '.join(ends)}]"


def _place(spread: float) -> int:
    """The power of ten of the last digit that is shown."""
    place = math.floor(math.log10(abs(spread))) - (_DIGITS - 1)
    shown = Decimal(repr(abs(spread))).quantize(Decimal(1).scaleb(place), ROUND_HALF_EVEN)
    return place + (shown >= Decimal(10) ** (place + _DIGITS))  # 0.0996 has become 0.100


def _at(value: float, place: int) -> str:
    if abs(place) > _LONG or abs(value) >= 10.0**_LONG:
        return f"{value:.{_ALONE}g}"
    rounded = Decimal(repr(value)).quantize(Decimal(1).scaleb(place), ROUND_HALF_EVEN)
    text = f"{rounded:f}" if place <= 0 else f"{int(rounded)}"
    return text.removeprefix("-") if not rounded else text  # nothing is below zero and yet zero


def _alone(value: float) -> str:
    if value == int(value) and abs(value) < 10.0**_LONG:
        return f"{int(value)}"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{_ALONE}g}"
    return f"{value:.0f}" if abs(value) >= 10**_ALONE else f"{value:.{_ALONE}g}"
