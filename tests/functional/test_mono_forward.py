"""Mono-Forward's equations against autograd, against backprop, and its costs against the published network sizes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from locallearn.functional import mono_forward


def _problem(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {
        "inputs": normal(13, 7),
        "weight": normal(11, 7),
        "bias": normal(11),
        "projection": normal(5, 11),
        "targets": torch.randint(5, (13,), generator=draw),
    }


def test_closed_form_equals_autograd() -> None:
    problem = _problem()
    closed = mono_forward.gradients(**problem)
    weight, bias, projection = (problem[name].requires_grad_() for name in ("weight", "bias", "projection"))
    hidden = torch.relu(problem["inputs"] @ weight.T + bias)
    scores = hidden @ projection.T
    rows = torch.arange(len(scores))
    loss = (scores.logsumexp(1) - scores[rows, problem["targets"]]).mean()
    expected = torch.autograd.grad(loss, [weight, bias, projection])
    for got, want in zip(closed[:3], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(closed.loss, loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(mono_forward.loss(hidden, projection, problem["targets"]), loss, rtol=0, atol=1e-12)
    assert not any(part.requires_grad for part in closed)


def test_one_layer_step_is_the_backprop_step_with_a_bias_free_head() -> None:
    problem = _problem(1)
    net = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5, bias=False)).double()
    parameters = [problem[name].clone() for name in ("weight", "bias", "projection")]
    for parameter, start in zip(net.parameters(), parameters, strict=True):
        parameter.data.copy_(start)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(problem["inputs"]), problem["targets"]).backward()
        optimizer.step()
        weight, bias, projection = parameters
        step = mono_forward.gradients(problem["inputs"], weight, bias, projection, problem["targets"])
        parameters = [start - 0.3 * gradient for start, gradient in zip(parameters, step[:3], strict=True)]
    for parameter, got in zip(net.parameters(), parameters, strict=True):
        torch.testing.assert_close(got, parameter.detach(), rtol=0, atol=1e-10)


def test_zero_projection_stops_the_weights_but_not_itself() -> None:
    problem = _problem(2)
    problem["projection"] = torch.zeros_like(problem["projection"])
    step = mono_forward.gradients(**problem)
    assert torch.count_nonzero(step.weight) == 0
    assert torch.count_nonzero(step.bias) == 0
    assert step.projection.abs().max() > 1e-3


def test_goodness_flattens_maps_in_memory_order() -> None:
    maps = torch.randn(4, 3, 2, 2)
    projection = torch.randn(6, 12)
    expected = torch.einsum("bchw,kchw->bk", maps, projection.view(6, 3, 2, 2))
    torch.testing.assert_close(mono_forward.goodness(maps, projection), expected)


def test_misfits_are_named() -> None:
    activations, projection = torch.zeros(4, 3, 2), torch.zeros(5, 7)
    with pytest.raises(ValueError, match=r"6 entries per sample but the projection reads 7"):
        mono_forward.goodness(activations, projection)
    for targets in (torch.zeros(3, dtype=torch.int64), torch.zeros(4, 5)):
        with pytest.raises(ValueError, match=r"one class id per sample, shape \(4,\)"):
            mono_forward.loss(activations, torch.zeros(5, 6), targets)


@pytest.mark.parametrize(
    ("widths", "classes", "mono_forward_m", "backprop_m"),
    [
        ((784, 1000, 1000), 10, 3.628, 4.598),
        ((3072, 2000, 2000, 2000), 10, 28.468, 36.348),
        ((3072, 2000, 2000, 2000), 100, 30.088, 36.888),
    ],
)
def test_costs_are_the_published_ones(
    widths: tuple[int, ...], classes: int, mono_forward_m: float, backprop_m: float
) -> None:
    assert mono_forward.update_macs(widths, classes) == round(mono_forward_m * 1e6)
    assert mono_forward.backprop_macs(widths, classes) == round(backprop_m * 1e6)


@pytest.mark.parametrize(
    ("widths", "classes", "ratio"),
    [
        ((784, 1000, 1000), 10, 0.789),
        ((3072, 2000, 2000, 2000), 10, 0.783),
        ((3072, 2000, 2000, 2000), 100, 0.816),
        ((784, 2000, 2000, 2000, 2000), 10, 0.698),
        ((10**6,) * 3, 1, 0.800),
        ((10**6,) * 4, 1, 0.750),
    ],
)
def test_cost_ratio_to_backprop(widths: tuple[int, ...], classes: int, ratio: float) -> None:
    measured = mono_forward.update_macs(widths, classes) / mono_forward.backprop_macs(widths, classes)
    assert round(measured, 3) == ratio


def test_costs_are_what_a_flop_counter_sees() -> None:
    widths, classes, batch = (9, 8, 7, 6), 5, 4
    layers = [nn.Linear(before, after) for before, after in pairwise(widths)]
    projections = [nn.Parameter(torch.randn(classes, width)) for width in widths[1:]]
    images, targets = torch.randn(batch, widths[0]), torch.randint(classes, (batch,))

    with FlopCounterMode(display=False) as local:
        x = images
        for layer, projection in zip(layers, projections, strict=True):
            x = layer(x.detach()).relu()
            mono_forward.loss(x, projection, targets).backward()
    assert local.get_total_flops() == 2 * batch * mono_forward.update_macs(widths, classes)

    with FlopCounterMode(display=False) as whole:
        x = images
        for layer in layers:
            x = layer(x).relu()
        scores = mono_forward.goodness(x, projections[-1])
        forward_flops = whole.get_total_flops()
        F.cross_entropy(scores, targets).backward()
    assert forward_flops == 2 * batch * mono_forward.forward_macs(widths, classes)
    assert whole.get_total_flops() == 2 * batch * mono_forward.backprop_macs(widths, classes)


@pytest.mark.parametrize("widths", [(), (784,), (784, 0)])
def test_costs_refuse_a_network_without_layers(widths: tuple[int, ...]) -> None:
    for cost in (mono_forward.update_macs, mono_forward.backprop_macs, mono_forward.forward_macs):
        with pytest.raises(ValueError, match="describes no network"):
            cost(widths, 10)
