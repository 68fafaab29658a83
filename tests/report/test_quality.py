"""What the page calls the joules of a source: how good they are, and by what they came about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from locallearn.report._columns import quality


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
