"""Channel-wise competition against NumPy that spells the formulas out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from locallearn.functional import channelwise

DRAW = torch.Generator().manual_seed(0)
MAPS = torch.randn(6, 12, 3, 2, generator=DRAW, dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1, 2, 2, 0])
CLASSES = 4


def _goodness() -> np.ndarray:
    x = MAPS.numpy()
    return np.stack([(x[:, 3 * c : 3 * c + 3] ** 2).mean(axis=(1, 2, 3)) for c in range(CLASSES)], axis=1)


def _expected(competition: str) -> float:
    good, labels = _goodness(), LABELS.numpy()
    own = good[np.arange(6), labels]
    cwc = -np.mean(np.log(np.exp(own) / np.exp(good).sum(1)))
    others = (good.sum(1) - own) / (CLASSES - 1)
    pvn = np.mean(np.log1p(np.exp(np.concatenate([2.0 - own, others - 2.0]))))
    return float({"cwc": cwc, "pvn": pvn, "cwg": 0.28 * cwc + 0.72 * pvn}[competition])


def test_goodness_is_the_mean_of_squares_of_neighbouring_channels() -> None:
    np.testing.assert_allclose(channelwise.group_goodness(MAPS, CLASSES).numpy(), _goodness(), rtol=1e-14)
    units = MAPS.flatten(2)[:, :, 0]
    got = channelwise.group_goodness(units, CLASSES)
    torch.testing.assert_close(got, units.square().reshape(6, 4, 3).mean(2))
    assert channelwise.group_goodness(MAPS.bfloat16(), CLASSES).dtype is torch.float32


@pytest.mark.parametrize("competition", ["cwc", "pvn", "cwg"])
def test_losses_are_those_of_the_formulas(competition: str) -> None:
    loss = getattr(channelwise, competition)
    good = torch.tensor(_goodness(), requires_grad=True)
    value = loss(good, LABELS)
    assert value.item() == pytest.approx(_expected(competition), rel=1e-13)
    (slope,) = torch.autograd.grad(value, good)
    assert bool((slope.gather(1, LABELS[:, None]) < 0).all())  # the true group grows, every other one shrinks
    assert int((slope > 0).sum()) == 6 * 3


def test_a_loud_wrong_group_is_still_pulled_down() -> None:
    """The code's clamp at 50 would leave it alone."""
    good = torch.tensor([[3.0, 80.0, 1.0, 1.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(channelwise.cwc(good, torch.tensor([0])), good)
    assert slope[0].tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0])
    for loss in (channelwise.cwc, channelwise.pvn, channelwise.cwg):
        assert bool(loss(torch.tensor([[1e4, 0.0], [0.0, 1e4]]), torch.tensor([1, 1])).isfinite())


def test_channels_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match="12 channels cannot be shared out among 5 classes"):
        channelwise.group_goodness(MAPS, 5)
