"""SymBa against numbers of a public implementation (tdooms/trifecta, run on a tiny problem)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from locallearn.functional import forward_forward as ff
from locallearn.functional import symba
from locallearn.losses import SymBaLoss
from tests.references import reference

# Goodness of six positives and of their negatives, and what the implementation makes of it.
GOODNESS = [
    *(1.019462656101526, 1.4254516578025302, 1.0121164171265173, 1.7017474234579435, 1.3447738155867368),
    *(1.5635633627190544, 1.4017555035743545, 1.0218448727475415, 1.1206239255611365, 1.330110520089517),
    *(1.1544166178391095, 1.084736672676109),
]
LOSS = {4.0: 0.5941422006317806, 1.0: 0.6286670890990257}
SLOPES = [-0.5479233642113763, -0.11064991353865718, -0.4045570610310671]  # of the first positives, α = 4
THRESHOLD_LOSS = 0.7248447691735299  # θ = 2


def _halves() -> tuple[torch.Tensor, torch.Tensor]:
    good = torch.tensor(GOODNESS, dtype=torch.float64, requires_grad=True)
    return good[:6], good[6:]


@pytest.mark.parametrize("alpha", LOSS)
def test_the_loss_is_theirs(alpha: float) -> None:
    assert symba.loss(*_halves(), alpha).item() == pytest.approx(LOSS[alpha], rel=1e-14)


def test_gradients_carry_alpha_and_are_equal_in_a_pair() -> None:
    positive, negative = _halves()
    pulls = torch.autograd.grad(symba.loss(positive, negative, 4.0), (positive, negative))
    assert pulls[0][:3].tolist() == pytest.approx(SLOPES, rel=1e-13)
    torch.testing.assert_close(pulls[0], -pulls[1], rtol=0, atol=0)


def test_the_threshold_loss_on_the_same_goodness_is_theirs() -> None:
    assert ff.loss(*_halves(), 2.0).item() == pytest.approx(THRESHOLD_LOSS, rel=1e-14)


def test_equal_pairs_cost_log_2_and_far_ones_are_finite() -> None:
    assert symba.loss(torch.ones(3), torch.ones(3)).item() == pytest.approx(math.log(2))
    assert symba.loss(torch.zeros(3), torch.full((3,), 1e4)).item() == pytest.approx(4e4)


def test_losses_and_gradients_along_their_chain() -> None:
    """Four blocks of BatchNorm, convolution and ReLU, trained one by one on what the one before gives."""
    given = {key: torch.tensor(value) for key, value in reference("symba_trifecta").items()}
    local = SymBaLoss(float(given["chain_alpha"]))
    x = given["chain_x"]
    for k in range(1, 5):
        weight = given[f"chain_W{k}"].requires_grad_()
        z = F.conv2d(F.batch_norm(x, None, None, training=True), weight, padding=1).relu()
        z = F.max_pool2d(z, 2) if k == 3 else z
        loss = local(*z.chunk(2))
        assert loss.item() == pytest.approx(float(given["chain_layerwise_it0_losses"][k - 1]), rel=1e-13)
        (slope,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(slope, given[f"chain_layerwise_it0_W{k}_grad"], rtol=0, atol=1e-14)
        x = z.detach()


def test_a_whole_map_gives_their_gradient() -> None:
    given = {key: torch.tensor(value) for key, value in reference("symba_trifecta").items()}
    act = given["symba_act"].requires_grad_()
    torch.testing.assert_close(ff.mean_goodness(act.detach()), given["symba_goodness"])
    (slope,) = torch.autograd.grad(SymBaLoss(4.0)(*act.chunk(2)), act)
    torch.testing.assert_close(slope, given["symba_grad_act"], rtol=0, atol=1e-16)


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="makes no pairs"):
        symba.loss(torch.zeros(3), torch.zeros(2))
