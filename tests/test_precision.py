"""What products are really computed with is told by what survives in them."""

from __future__ import annotations

import pytest
import torch

from locallearn.precision import _named, effective_precision, multiplying

NUMBERS = 1 + 2.0 ** -torch.arange(1, 24, dtype=torch.float64)


def _rounded(bits: int) -> torch.Tensor:
    """Rounded to so many bits after the point, ties to even."""
    return torch.round(NUMBERS * 2.0**bits) / 2.0**bits


@pytest.mark.parametrize(("bits", "name"), [(23, "float32"), (10, "tf32"), (7, "bfloat16"), (15, "15 bits")])
def test_a_precision_is_named_by_the_bits_that_survive(bits: int, name: str) -> None:
    assert _named(_rounded(bits).float()[None], NUMBERS) == name


def test_bfloat16_is_seen_in_real_products() -> None:
    matrix = NUMBERS.repeat(64, 1).bfloat16()
    assert _named((matrix @ torch.eye(23, dtype=torch.bfloat16)).float(), NUMBERS) == "bfloat16"


def test_highest_is_float32_on_a_cpu() -> None:
    with multiplying("highest"):
        assert effective_precision("cpu") == {"matmul_in_effect": "float32", "convolution_in_effect": "float32"}
