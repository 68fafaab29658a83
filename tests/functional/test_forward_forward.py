"""Forward-Forward's equations against autograd, against Hinton's hand-made gradient, and by distribution."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from locallearn.functional import forward_forward as ff

DRAWS = 100_000


def _seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def _layer(seed: int = 0) -> dict[str, Tensor]:
    draw = _seeded(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {
        "inputs_positive": normal(6, 9),
        "inputs_negative": normal(6, 9),
        "weight": normal(8, 9) / 3,
        "bias": normal(8) / 3,
    }


def _chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


# Normalisation and goodness.


@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 4, 2)])
def test_normalised_samples_have_rms_one_whatever_their_scale(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=_seeded())
    normalised = ff.rms_normalise(x)
    assert normalised.shape == x.shape
    torch.testing.assert_close(normalised.flatten(1).square().mean(1), torch.ones(5))
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(normalised.flatten(1), x.flatten(1)), torch.ones(5)
    )
    for scale in (1e-3, 1e3):
        torch.testing.assert_close(ff.rms_normalise(scale * x), normalised)


def test_normalised_zero_rows_stay_zero_with_a_finite_gradient() -> None:
    x = torch.randn(3, 4)
    x[1] = 0
    x.requires_grad_()
    normalised = ff.rms_normalise(x)
    normalised.sum().backward()
    assert torch.count_nonzero(normalised[1]) == 0
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_half_precision_keeps_its_dtype_and_does_not_round_the_goodness() -> None:
    x = torch.full((2, 1000), 1.0, dtype=torch.bfloat16)
    x[1, :3] = 0
    assert ff.rms_normalise(x).dtype == torch.bfloat16
    assert ff.goodness(x).tolist() == [1000.0, 997.0]  # bfloat16 would say 1000 and 996


def test_goodness_sums_squares_over_the_sample() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    assert ff.goodness(x).tolist() == [sum(i * i for i in range(6)), sum(i * i for i in range(6, 12))]


# Loss and gradients.


@pytest.mark.parametrize("minimise", [False, True])
def test_loss_is_log_two_per_term_at_the_threshold(minimise: bool) -> None:
    at_threshold = torch.full((4,), 20.0)
    assert ff.loss(at_threshold, at_threshold, 20.0, minimise=minimise).item() == pytest.approx(math.log(2))


def test_loss_is_the_cross_entropy_of_the_probability_of_being_positive() -> None:
    good, bad = torch.tensor([12.0, 9.0]).double(), torch.tensor([11.0, 4.0]).double()
    p_good, p_bad = (1 / (1 + torch.exp(-(g - 10.0) / 2.0)) for g in (good, bad))
    expected = -(torch.log(p_good).sum() + torch.log(1 - p_bad).sum()) / 4
    assert ff.loss(good, bad, 10.0, temperature=2.0).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("minimise", [False, True])
def test_loss_and_gradient_are_finite_far_from_the_threshold(minimise: bool) -> None:
    good = torch.tensor([1e4, -1e4], requires_grad=True)
    bad = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = ff.loss(good, bad, 0.0, minimise=minimise)
    loss.backward()
    assert loss.item() == pytest.approx(5e3)
    assert good.grad is not None
    assert bad.grad is not None
    wrong = 0 if minimise else 1  # the row on the wrong side pulls with full force 1/2B, the other not at all
    torch.testing.assert_close(good.grad[wrong].abs(), torch.tensor(0.25))
    torch.testing.assert_close(bad.grad[1 - wrong].abs(), torch.tensor(0.25))
    assert good.grad[1 - wrong] == bad.grad[wrong] == 0


def test_minimising_is_the_loss_of_negated_goodness_and_threshold() -> None:
    good, bad = torch.rand(5, generator=_seeded(1)) * 30, torch.rand(5, generator=_seeded(2)) * 30
    quiet = ff.loss(good, bad, 11.0, 1.7, minimise=True)
    torch.testing.assert_close(quiet, ff.loss(-good, -bad, -11.0, 1.7))
    assert not torch.isclose(quiet, ff.loss(good, bad, 11.0, 1.7))


@pytest.mark.parametrize(("temperature", "minimise"), [(1.0, False), (2.5, False), (1.0, True), (0.5, True)])
def test_hand_gradient_equals_autograd(temperature: float, minimise: bool) -> None:
    layer = _layer()
    closed = ff.gradients(**layer, threshold=8.0, temperature=temperature, minimise=minimise)
    weight, bias = layer["weight"].requires_grad_(), layer["bias"].requires_grad_()
    good, bad = (
        ff.goodness(torch.relu(layer[name] @ weight.T + bias)) for name in ("inputs_positive", "inputs_negative")
    )
    loss = ff.loss(good, bad, 8.0, temperature, minimise)
    expected = torch.autograd.grad(loss, [weight, bias])
    torch.testing.assert_close(closed.weight, expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(closed.bias, expected[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(closed.loss, loss.detach(), rtol=0, atol=1e-12)
    assert not any(part.requires_grad for part in closed)


def test_hand_gradient_is_hintons_with_the_two_dropped_and_divided_by_the_batch() -> None:
    layer = _layer(3)
    x_good, x_bad, weight, bias = layer.values()
    z_good, z_bad = (torch.clamp(x @ weight.T + bias, min=0) for x in (x_good, x_bad))
    p_good, p_bad = (1 / (1 + torch.exp(8.0 - (z * z).sum(1, keepdim=True))) for z in (z_good, z_bad))
    ascent = x_good.T @ ((1 - p_good) * z_good) - x_bad.T @ (p_bad * z_bad)
    closed = ff.gradients(**layer, threshold=8.0)
    torch.testing.assert_close(closed.weight, -ascent.T / len(x_good), rtol=0, atol=1e-12)


# Labels.


@pytest.mark.parametrize("shape", [(3, 20), (3, 2, 3, 4)])
def test_label_slots_are_overwritten_and_the_rest_is_kept(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    before = x.clone()
    embedded = ff.embed_label(x, torch.tensor([2, 0, 9]), classes=10, strength=3.0)
    assert embedded.shape == x.shape
    expected = torch.zeros(3, 10)
    expected[0, 2] = expected[1, 0] = expected[2, 9] = 3.0
    assert torch.equal(embedded.flatten(1)[:, :10], expected)
    assert torch.equal(embedded.flatten(1)[:, 10:], before.flatten(1)[:, 10:])
    assert torch.equal(x, before)


def test_neutral_label_sums_to_one_and_prefers_none() -> None:
    x = torch.randn(4, 1, 5, 5)
    before = x.clone()
    slots = ff.embed_neutral(x, classes=10).flatten(1)[:, :10]
    assert torch.equal(slots, torch.full((4, 10), 0.1))
    torch.testing.assert_close(slots.sum(1), torch.ones(4))
    assert torch.equal(ff.embed_neutral(x, 10).flatten(1)[:, 10:], before.flatten(1)[:, 10:])
    assert torch.equal(x, before)


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="8 entries per sample, too few for the label of 10 classes"):
        ff.embed_label(torch.zeros(3, 2, 4), torch.zeros(3, dtype=torch.int64), classes=10)
    with pytest.raises(ValueError, match="too few"):
        ff.embed_neutral(torch.zeros(3, 9), classes=10)
    with pytest.raises(ValueError, match=r"one class id per sample, shape \(3,\)"):
        ff.embed_label(torch.zeros(3, 20), torch.zeros(2, dtype=torch.int64), classes=10)
    with pytest.raises(ValueError, match="at least 2 classes"):
        ff.wrong_labels_uniform(torch.zeros(3, dtype=torch.int64), 1, _seeded())
    with pytest.raises(ValueError, match="at least 2 classes"):
        ff.wrong_labels_hard(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), _seeded())


@pytest.mark.parametrize("true", [0, 3, 9])
def test_uniform_negatives_are_never_true_and_uniform_over_the_rest(true: int) -> None:
    drawn = ff.wrong_labels_uniform(torch.full((DRAWS,), true), 10, _seeded(true))
    counts = drawn.bincount(minlength=10)
    assert counts[true] == 0
    wrong = torch.arange(10) != true
    assert _chi_square_p(counts[wrong], torch.full((9,), 1 / 9)) > 1e-4


@pytest.mark.parametrize("true", [0, 2])
def test_hard_negatives_are_never_true_and_follow_the_softmax_of_the_rest(true: int) -> None:
    logits = torch.tensor([50.0, -1.0, 50.0, 0.5, 2.0, 1.0])  # the true class is the favourite by far
    logits[2 - true] = 1.5
    drawn = ff.wrong_labels_hard(logits.expand(DRAWS, 6), torch.full((DRAWS,), true), _seeded(true))
    counts = drawn.bincount(minlength=6)
    assert counts[true] == 0
    wrong = torch.arange(6) != true
    assert _chi_square_p(counts[wrong], logits[wrong].exp() / logits[wrong].exp().sum()) > 1e-4


def test_no_negative_of_mixed_labels_carries_its_true_label() -> None:
    labels = torch.randint(10, (DRAWS,), generator=_seeded(5))
    logits = torch.randn(DRAWS, 10, generator=_seeded(6)) * 30
    assert not (ff.wrong_labels_uniform(labels, 10, _seeded(7)) == labels).any()
    assert not (ff.wrong_labels_hard(logits, labels, _seeded(8)) == labels).any()


def test_draws_come_from_the_given_generator_alone() -> None:
    labels, logits = torch.randint(10, (64,)), torch.randn(64, 10)
    state = torch.get_rng_state()
    first = [ff.wrong_labels_uniform(labels, 10, _seeded(1)), ff.wrong_labels_hard(logits, labels, _seeded(1))]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again = [ff.wrong_labels_uniform(labels, 10, _seeded(1)), ff.wrong_labels_hard(logits, labels, _seeded(1))]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], ff.wrong_labels_uniform(labels, 10, _seeded(2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cpu_generator_draws_the_same_labels_for_a_gpu() -> None:
    labels, logits = torch.randint(10, (64,)), torch.randn(64, 10)
    uniform = ff.wrong_labels_uniform(labels.cuda(), 10, _seeded(1))
    hard = ff.wrong_labels_hard(logits.cuda(), labels.cuda(), _seeded(1))
    assert uniform.is_cuda
    assert hard.is_cuda
    assert torch.equal(uniform.cpu(), ff.wrong_labels_uniform(labels, 10, _seeded(1)))
    assert torch.equal(hard.cpu(), ff.wrong_labels_hard(logits, labels, _seeded(1)))


# Peer normalisation.


def test_peer_mean_follows_the_activity_of_every_unit() -> None:
    z = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    torch.testing.assert_close(ff.update_peer_mean(torch.full((2,), 0.5), z), torch.tensor([0.65, 0.45]))
    maps = torch.stack([torch.full((2, 3, 3), 4.0), torch.zeros(2, 3, 3)], dim=1)
    torch.testing.assert_close(ff.update_peer_mean(torch.zeros(2), maps), torch.tensor([0.4, 0.0]))


def test_gradient_with_the_peer_term_is_hintons_even_for_dead_units() -> None:
    layer = _layer(4)
    x_good, x_bad, weight, bias = layer.values()
    bias[2] = -1e3  # unit 2 is dead on the whole batch
    mean = torch.rand(8, generator=_seeded(), dtype=torch.float64)
    z_good, z_bad = (torch.clamp(x @ weight.T + bias, min=0) for x in (x_good, x_bad))
    p_good, p_bad = (1 / (1 + torch.exp(8.0 - (z * z).sum(1, keepdim=True))) for z in (z_good, z_bad))
    signal = (1 - p_good) * z_good + 0.03 * (mean.mean() - mean)
    ascent = x_good.T @ signal - x_bad.T @ (p_bad * z_bad)

    weight.requires_grad_()
    u_good, u_bad = (x @ weight.T + bias for x in (x_good, x_bad))
    loss = ff.loss(ff.goodness(u_good.relu()), ff.goodness(u_bad.relu()), 8.0) + ff.peer_term(u_good, mean, 0.03)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, -ascent.T / len(x_good), rtol=0, atol=1e-12)
    assert gradient[2].abs().max() > 1e-6


def test_peer_term_on_maps_pulls_every_position_of_a_channel() -> None:
    u = torch.randn(3, 2, 4, 4, requires_grad=True)
    mean = torch.tensor([0.1, 0.7])
    (gradient,) = torch.autograd.grad(ff.peer_term(u, mean, 0.5), u)
    expected = -0.5 / 3 * torch.tensor([0.3, -0.3]).view(1, 2, 1, 1).expand_as(u)
    torch.testing.assert_close(gradient, expected)


def test_peer_functions_refuse_another_number_of_units() -> None:
    with pytest.raises(ValueError, match="running mean of 1 units"):
        ff.peer_term(torch.zeros(3, 4), torch.zeros(1), 0.03)
    with pytest.raises(ValueError, match="running mean of 5 units"):
        ff.update_peer_mean(torch.zeros(5), torch.zeros(3, 4))


# Costs.


def test_costs_are_the_published_ones() -> None:
    widths = (784, 1000, 1000, 1000)
    assert round(ff.update_flops(widths) / 1e6, 1) == 22.3
    assert round(ff.update_flops(widths, neutral=True) / 1e6, 1) == 27.8
    with pytest.raises(ValueError, match="describes no network"):
        ff.update_flops((784,))


def test_costs_are_what_a_flop_counter_sees() -> None:
    widths, classes, batch = (9, 8, 7, 6), 5, 4
    layers = [nn.Linear(before, after) for before, after in pairwise(widths)]
    readout = nn.Linear(sum(widths[2:]), classes)
    with FlopCounterMode(display=False) as counter:
        good, bad = torch.randn(batch, 9), torch.randn(batch, 9)
        for layer in layers:
            good, bad = (layer(ff.rms_normalise(x.detach())).relu() for x in (good, bad))
            ff.loss(ff.goodness(good), ff.goodness(bad), 1.0).backward()
    assert counter.get_total_flops() == batch * ff.update_flops(widths)

    with counter:
        hidden = [torch.randn(batch, 9)]
        with torch.no_grad():
            for layer in layers:
                hidden.append(layer(ff.rms_normalise(hidden[-1])).relu())
        scores = readout(torch.cat([ff.rms_normalise(z) for z in hidden[2:]], dim=1))
        torch.nn.functional.cross_entropy(scores, torch.zeros(batch, dtype=torch.int64)).backward()
    with_readout = ff.update_flops(widths, neutral=True, readout_classes=classes)
    assert counter.get_total_flops() == batch * (with_readout - ff.update_flops(widths))
