"""The equations of local heads, against numbers of the authors' codes and against autograd and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from locallearn.functional import local_heads as heads
from locallearn.functional import scalable_ff as sff
from tests.references import reference

DRAW = torch.Generator().manual_seed(0)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


# -- similarity -------------------------------------------------------------------------------------------------------
def test_similarity_is_that_of_the_authors() -> None:
    known = reference("predsim")
    t, y = _tensor(known["sim.t"]).requires_grad_(), _tensor(known["y"])
    loss = heads.similarity_loss(t, y, 4)
    loss.backward()
    assert t.grad is not None
    for got, name in (
        (heads.similarity_matrix(t), "R_std"),
        (heads.similarity_matrix(t.flatten(1)), "R_flat"),
        (heads.similarity_matrix(_tensor(known["sim.t3"])), "R_3channels"),
        (loss, "loss"),
        (t.grad, "grad_t"),
    ):
        assert torch.allclose(got, _tensor(known[f"sim.{name}"]), rtol=0, atol=1e-14), name
    dead = _tensor(known["sim.t"]).clone()
    dead[:, 1] = 0
    dead.requires_grad_()
    loss = heads.similarity_loss(dead, y, 4)
    loss.backward()
    assert dead.grad is not None
    assert torch.allclose(loss, _tensor(known["sim.dead_loss"]), rtol=0, atol=1e-14)
    assert torch.allclose(dead.grad, _tensor(known["sim.dead_grad"]), rtol=0, atol=1e-14)


def test_similarity_by_hand() -> None:
    x = torch.randn(5, 6, 3, 3, generator=DRAW, dtype=torch.float64)
    spread = ((x - x.mean((2, 3), keepdim=True)).square().sum((2, 3)) / 8).sqrt()  # unbiased, over positions
    assert np.allclose(heads.similarity_matrix(x), np.corrcoef(spread), atol=1e-7)
    for flat in (x[:, :3], x[:, :, :1], x[:, :, 0, 0]):  # three channels, one row, no map
        assert np.allclose(heads.similarity_matrix(flat), np.corrcoef(flat.flatten(1)), atol=1e-7)
    labels = heads.similarity_matrix(F.one_hot(torch.tensor([0, 2, 2]), 4).double())
    third = -1 / 3
    assert torch.allclose(labels, torch.tensor([[1, third, third], [third, 1, 1], [third, 1, 1]]).double(), atol=1e-7)


def test_what_is_dead_gets_no_gradient_that_is_none() -> None:
    x = torch.zeros(4, 5, 3, 3, requires_grad=True)
    heads.similarity_loss(x, torch.tensor([0, 1, 1, 2]), 3).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    with pytest.raises(ValueError, match="one class id per sample"):
        heads.similarity_loss(x, torch.tensor([0, 1]), 3)


# -- contrast ---------------------------------------------------------------------------------------------------------
def test_contrast_by_hand() -> None:
    z = torch.randn(6, 5, generator=DRAW, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 1, 0, 3])
    unit = z / z.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        partners = [j for j in others if y[j] == y[i]]
        below = sum(math.exp(unit[i] @ unit[j] / 0.2) for j in others)
        total -= sum(float(unit[i] @ unit[j]) / 0.2 - math.log(below) for j in partners) / max(len(partners), 1)
    assert heads.supervised_contrast(z, y, 0.2).item() == pytest.approx(total / 6, abs=1e-12)


def test_contrast_without_partners_is_nothing() -> None:
    for count in (1, 3):
        z = torch.randn(count, 4, generator=DRAW, requires_grad=True)
        loss = heads.supervised_contrast(z, torch.arange(count))
        loss.backward()
        assert loss == 0
        assert z.grad is not None
        assert not z.grad.any()


# -- which units a head mirrors ---------------------------------------------------------------------------------------
def test_lists_of_auglocal() -> None:
    """Property 5 of the sheet; l = 6 at d = 3 halves to even: unit 10.5 is 10."""
    depths = [heads.auglocal_depth(i, 13, 3) for i in range(12)]
    assert depths == [3] * 6 + [2] * 6
    assert [heads.auglocal_depth(i, 11, 5) for i in range(10)] == [5, 5, 5, 4, 4, 4, 4, 3, 3, 3]
    assert [heads.auglocal_depth(i, 52, 3) for i in range(51)] == [3] * 25 + [2] * 26
    assert heads.auglocal_units(0, 16, 3) == [5, 10, 15]
    assert heads.auglocal_units(6, 16, 2) == [10, 15]
    assert heads.auglocal_units(0, 55, 3) == [18, 36, 54]
    assert heads.auglocal_units(13, 16, 5) == [14, 15]
    assert heads.auglocal_depth(0, 2, 3) == 3
    assert heads.halvings(32, [16, 8, 8]) == [2, 2, 1]
    assert heads.halvings(32, [8, 8]) == [2, 2]  # what is owed is paid by the next unit
    assert heads.halvings(32, [8]) == [2]  # or lost


def test_lists_are_those_of_the_authors() -> None:
    known = reference("auglocal")
    for units, ends in ((16, (6, 11)), (55, (19, 37))):
        side = [32 if unit < ends[0] else 16 if unit < ends[1] else 8 for unit in range(units)]
        for depth in range(1, 7):
            blocks = units - depth
            rows = zip(
                *(known[f"n{units}.d{depth}.{name}"].tolist() for name in ("depth_list", "units", "strides")),
                strict=True,
            )
            for i, (deep, chosen, strides) in enumerate(rows):
                mine = heads.auglocal_units(i, units, heads.auglocal_depth(i, blocks, depth))
                assert len(mine) == deep
                assert mine == [unit for unit in chosen if unit >= 0]
                assert heads.halvings(side[i], [side[unit] for unit in mine]) == [s for s in strides if s >= 0]


def test_weights_run_from_the_first_local_block_to_the_last() -> None:
    assert [heads.ramp((1.0, 0.0), i, 3) for i in range(3)] == [1.0, 0.5, 0.0]
    assert heads.ramp((0.7, 0.1), 0, 1) == 0.7


def test_movement() -> None:
    branch = torch.randn(4, 3, 2, generator=DRAW)
    assert heads.movement(branch) == pytest.approx(sum(float(row.norm()) ** 2 for row in branch) / 8)


# -- scalable Forward-Forward -----------------------------------------------------------------------------------------
def test_goodness_is_the_mean_square_of_a_class_map() -> None:
    """Property 2: also after a change of sign and after a permutation of positions."""
    maps = torch.randn(3, 4, 2, 5, generator=DRAW, dtype=torch.float64)
    want = torch.stack([maps[:, c].flatten(1).square().mean(1) for c in range(4)], 1)
    order = torch.randperm(10, generator=DRAW)
    shuffled = maps.flatten(2)[:, :, order].view_as(maps)
    for same in (maps, -maps, shuffled):
        assert torch.allclose(sff.goodness(same), want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_gradient_of_a_class_map(margin: float) -> None:
    """Property 3: 2u(s - Y)/(B·HW), s the softmax of goodness with the margin on the wrong classes."""
    maps = torch.randn(3, 4, 2, 5, generator=DRAW, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 1])
    y = F.one_hot(targets, 4).double()
    loss = sff.loss(sff.goodness(maps), targets, margin)
    loss.backward()
    g = sff.goodness(maps).detach()
    s = (g + margin * (1 - y)).softmax(1)
    assert maps.grad is not None
    assert torch.allclose(maps.grad, 2 * maps.detach() * ((s - y) / 30)[:, :, None, None], rtol=0, atol=1e-15)
    right = (g * y).sum(1)
    wrong = ((g + margin).exp() * (1 - y)).sum(1)
    assert torch.allclose(loss, ((right.exp() + wrong).log() - right).mean())


def test_temperature_divides_goodness_and_margin() -> None:
    g, targets = torch.rand(3, 4, generator=DRAW), torch.tensor([0, 3, 1])
    assert torch.allclose(sff.loss(g, targets, 0.5, 2.0), sff.loss(g / 2, targets, 0.25))
    with pytest.raises(ValueError, match="one class id per sample"):
        sff.loss(g, targets[:2])


def test_hand_over_does_not_see_the_scale() -> None:
    """Property 4."""
    x = torch.randn(3, 4, 2, 5, generator=DRAW, dtype=torch.float64) + 1
    plain = sff.normalise(x, eps=0.0)
    assert torch.allclose(sff.normalise(7 * x, eps=0.0), plain)
    assert torch.allclose(plain.flatten(1).mean(1), torch.zeros(3).double(), atol=1e-12)
    assert torch.allclose(plain.flatten(1).square().mean(1), torch.ones(3).double())


def test_autocast_rounds_no_pair_and_no_square() -> None:
    """What these equations are given may be halves; what they make of it is as exact as outside of autocast."""
    y, maps = torch.arange(32) % 4, torch.randn(32, 16, 4, 4, generator=DRAW)
    rows = torch.randn(32, 12, generator=DRAW)

    def found() -> list[torch.Tensor]:
        halves = maps.bfloat16()
        return [
            heads.similarity_matrix(halves),
            heads.similarity_loss(halves, y, 4),
            heads.supervised_contrast(rows.bfloat16(), y),
            heads.movement(halves),
            sff.goodness(halves),
        ]

    plain = found()
    with torch.autocast("cpu", torch.bfloat16):
        under = found()
    for one, other in zip(plain, under, strict=True):
        assert one.dtype is other.dtype is torch.float32
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plain[4], sff.goodness(maps.bfloat16().double()).float(), rtol=1e-6, atol=0)
