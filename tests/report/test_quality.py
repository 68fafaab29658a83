"""What the page calls the joules of a source: how good they are, and by what they came about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from locallearn.report._columns import p_text, quality


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ([], "unlabelled"),
        ([{}], "unlabelled"),
        ([{"quality": "measured", "by": "a counter"}], "measured"),
        ([{"quality": "modelled"}], "modelled"),
        ([{"quality": "modelled", "by": "constant power"}] * 2, "modelled (constant power)"),
        (
            [{"quality": "modelled", "by": "load"}, {"quality": "modelled", "by": "counters"}],
            "modelled (counters; load)",
        ),
        ([{"quality": "modelled", "by": "load"}, {"quality": "modelled"}], "modelled (load)"),
        ([{"quality": "modelled", "by": "load"}, {"quality": "measured"}], "measured and modelled mixed"),
    ],
)
def test_quality(windows: list[dict[str, Any]], said: str) -> None:
    energy = [{"source": "m", **window} for window in windows] + [{"source": "other", "quality": "measured"}]
    rows: Any = [SimpleNamespace(records=[SimpleNamespace(energy=lambda: energy)])]
    assert quality("m", rows) == said


@pytest.mark.parametrize(
    ("p", "text"),
    [
        *((2 / 2**n, text) for n, text in ((1, "1"), (3, "0.25"), (4, "0.13"), (5, "0.063"), (16, "3.1e-05"))),
        (0.05, "0.05"),
        (3 * 0.1, "0.3"),  # but for the rounding of the product
        (0.0101, "0.011"),
        (1.0, "1"),
    ],
)
def test_a_p_value_is_never_printed_as_less_than_it_is(p: float, text: str) -> None:
    assert p_text(p) == text
    assert float(text) >= p - 1e-12
