"""The counter-current equations against autograd, against sums written out, and against published costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from locallearn.functional import counter_current as ccl
from locallearn.functional.mono_forward import backprop_macs

DRAW = torch.Generator().manual_seed(0)
TARGETS = torch.tensor([2, 0, 1, 1, 3])
MATCHES = ccl.class_matches(TARGETS, 4)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


A, B = _normal(5, 3, 2), _normal(4, 6)
MAPS, PARTNERS = _normal(3, 2, 4, 5), _normal(3, 2, 4, 5)


def _dot(x: Tensor, y: Tensor) -> float:
    return sum(float(i * j) for i, j in zip(x.flatten(), y.flatten(), strict=True))


def _length(x: Tensor) -> float:
    return math.sqrt(_dot(x, x))


# Pairs.


def test_a_sample_belongs_to_its_class_alone() -> None:
    assert MATCHES.tolist() == [[float(y == k) for k in range(4)] for y in TARGETS.tolist()]


def test_pair_loss_is_the_sum_written_out() -> None:
    terms = [(_dot(a, b) - float(y == k)) ** 2 for a, y in zip(A, TARGETS, strict=True) for k, b in enumerate(B)]
    assert ccl.pair_loss(A, B, MATCHES, c=0.7).item() == pytest.approx(256 * 0.7 / 6 * sum(terms) / 20, rel=1e-12)


def test_normalised_pair_loss_is_the_sum_written_out() -> None:
    terms = [
        (_dot(a, b) / _length(a) / _length(b) - float(y == k)) ** 2
        for a, y in zip(A, TARGETS, strict=True)
        for k, b in enumerate(B)
    ]
    assert ccl.normalised_pair_loss(A, B, MATCHES, c=0.7).item() == pytest.approx(0.7 * sum(terms) / 20, rel=1e-12)


def test_gram_loss_is_the_sum_written_out() -> None:
    terms = [
        (_dot(a, b) / _length(a) / _length(b) - float(i == j)) ** 2 for i, a in enumerate(A) for j, b in enumerate(A)
    ]
    assert ccl.gram_loss(A).item() == pytest.approx(sum(terms) / 25, rel=1e-12)


@pytest.mark.parametrize("c", [0.5, 2.0])
def test_hand_gradients_equal_autograd(c: float) -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    loss = ccl.pair_loss(a, b, MATCHES, c)
    expected = torch.autograd.grad(loss, [a, b])
    closed = ccl.pair_gradients(a, b, MATCHES, c)
    torch.testing.assert_close(closed.activations, expected[0].flatten(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(closed.signals, expected[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(closed.loss, loss.detach(), rtol=0, atol=1e-12)
    assert not any(part.requires_grad for part in closed)


def test_a_row_of_zeros_stays_zero_with_a_finite_gradient() -> None:
    x = A.clone()
    x[1] = 0
    x.requires_grad_()
    unit = ccl.normalise(x)
    (gradient,) = torch.autograd.grad(unit.sum() + ccl.gram_loss(x), x)
    assert not unit[1].any()
    assert float(gradient.abs().max()) < 1e3
    torch.testing.assert_close(unit.square().sum(1), torch.tensor([1.0, 0, 1, 1, 1]).double())


def test_half_precision_is_compared_in_single() -> None:
    a, b = A.bfloat16(), B.bfloat16()
    for loss in (ccl.pair_loss, ccl.normalised_pair_loss):
        assert loss(a, b, MATCHES).dtype == torch.float32
    assert ccl.gram_loss(a).dtype == torch.float32
    assert ccl.map_loss(MAPS.bfloat16(), PARTNERS.bfloat16()).dtype == torch.float32


# Maps of an autoencoder.


def test_map_losses_are_the_sums_written_out() -> None:
    plain = sum(float(x - y) ** 2 for x, y in zip(MAPS.flatten(), PARTNERS.flatten(), strict=True)) / MAPS.numel()
    assert ccl.map_loss(MAPS, PARTNERS, 0.5).item() == pytest.approx(0.5 * 4 * plain, rel=1e-12)
    shape = 0.0
    for x, y in zip(MAPS.flatten(0, 1), PARTNERS.flatten(0, 1), strict=True):
        x, y = x - x.sum() / 20, y - y.sum() / 20
        difference = x / _length(x) - y / _length(y)
        shape += _dot(difference, difference) / MAPS.numel()
    assert ccl.centred_map_loss(MAPS, PARTNERS, 0.5).item() == pytest.approx(0.5 * 4 * (plain + shape), rel=1e-12)


def test_a_flat_channel_has_no_shape_and_a_finite_gradient() -> None:
    flat = MAPS.clone()
    flat[:, 1] = 3.0
    flat.requires_grad_()
    loss = ccl.centred_map_loss(flat, PARTNERS)
    (gradient,) = torch.autograd.grad(loss, flat)
    assert float(gradient.abs().max()) < 1e3


# Steps.


def test_learned_samples_are_dropped_by_the_probability_of_their_class() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [2.1, 0.0], [2.3, 0.0]])  # 0.953, 0.047, 0.891, 0.909 for class 0
    keep = ccl.unlearned(logits, torch.zeros(4, dtype=torch.int64), 0.9)
    assert keep.tolist() == [False, True, True, False]
    dropped = ccl.drop_rows(A[:4], keep)
    assert torch.equal(dropped[keep], A[:4][keep])
    assert not dropped[~keep].any()


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2)])
def test_a_centralised_gradient_has_no_mean_over_inputs(shape: tuple[int, ...]) -> None:
    gradient = _normal(*shape)
    central = ccl.centralise(gradient)
    torch.testing.assert_close(central.flatten(1).sum(1), torch.zeros(4).double())
    moved = (gradient - central).flatten(1)
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved))  # nothing but a constant per output is gone
    assert torch.equal(ccl.centralise(gradient.flatten()), gradient.flatten())
    lengths = gradient.flatten()[:4, None]  # of weight normalisation: one entry per output
    assert torch.equal(ccl.centralise(lengths), lengths)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_is_that_of_torch(limit: float) -> None:
    parameters = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]
    gradients = [_normal(3, 4).float(), _normal(5).float()]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    factor = ccl.clip_factor([ccl.gradient_norm(g) for g in gradients], limit)
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient * factor, parameter.grad)


# Costs and refusals.


@pytest.mark.parametrize(
    ("widths", "published", "backprop"),
    [((784, 256, 256, 256, 256, 256), 2.55e6, 2.39e6), ((3072, 1024, 1024, 1024), 27.89e6, 25.23e6)],
)
def test_costs_are_the_published_ones_but_for_the_second_run(
    widths: tuple[int, ...], published: float, backprop: float
) -> None:
    """Per sample in batches of 32, classes 10 (MNIST and CIFAR-10)."""
    weights = sum(a * b for a, b in zip(widths, (*widths[1:], 10), strict=True))
    second_run = 2 * (weights - widths[0] * widths[1]) * 10 / 32
    assert ccl.update_flops(widths, 10, 32) - second_run == pytest.approx(published, rel=0.02)
    assert 2 * backprop_macs(widths, 10) == pytest.approx(backprop, rel=0.01)
    assert ccl.update_flops(widths, 10, 32, frozen=True) < published


def test_what_does_not_fit_is_refused_with_its_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(5, 3, 2\), signals of shape \(4, 5\)"):
        ccl.pair_loss(A, B[:, :5], MATCHES)
    with pytest.raises(ValueError, match=r"matches of shape \(4, 4\) do not fit"):
        ccl.normalised_pair_loss(A, B, MATCHES[:4])
    with pytest.raises(ValueError, match="two maps of the same shape"):
        ccl.map_loss(MAPS, PARTNERS[:2])
    with pytest.raises(ValueError, match="describes no network"):
        ccl.update_flops((784,), 10, 32)
