"""The family's equations against autograd, torch.nn.grad, closed forms and the statistics of random matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.flop_counter import FlopCounterMode

from locallearn.functional import feedback_alignment as fa
from locallearn.functional.feedback_alignment import Geometry

GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Geometry | None]] = {
    "linear": ((5, 7), (4, 7), None),
    "linear, more dimensions": ((5, 3, 7), (4, 7), None),
    "conv": ((5, 3, 7, 6), (4, 3, 3, 3), Geometry(padding=(1, 1))),
    "stride": ((5, 3, 7, 6), (4, 3, 3, 2), Geometry((2, 3), (1, 0))),
    "dilation": ((5, 3, 7, 6), (4, 3, 2, 2), Geometry(dilation=(3, 2), padding=(0, 1))),
    "groups": ((5, 4, 6, 6), (6, 2, 3, 3), Geometry((2, 2), (1, 1), (1, 1), 2)),
    "1x1": ((5, 3, 4, 4), (4, 3, 1, 1), Geometry((2, 2))),
}


def _problem(kind: str, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Geometry | None]:
    """Inputs, W, b, and δ, in double precision."""
    draw = torch.Generator().manual_seed(0)
    input_shape, weight_shape, geometry = GEOMETRIES[kind]
    inputs = torch.randn(input_shape, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(weight_shape, generator=draw, dtype=torch.float64).requires_grad_()
    offset = torch.randn(weight_shape[0], generator=draw, dtype=torch.float64).requires_grad_() if bias else None
    output = fa.forward(inputs, weight, offset, geometry)
    return inputs, weight, offset, torch.randn(output.shape, generator=draw, dtype=torch.float64), geometry


def _plain(inputs: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, geometry: Geometry | None) -> list[Any]:
    """What PyTorch's own layer gives: output and the gradients of inputs, W and b."""
    if geometry is None:
        output = F.linear(inputs, weight, bias)
    else:
        output = F.conv2d(inputs, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    wanted = [inputs, weight, *([] if bias is None else [bias])]
    return [output, *torch.autograd.grad(output, wanted, delta)]


def _close(got: Any, wanted: Any, atol: float = 1e-12) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


# -- one layer --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", GEOMETRIES)
def test_feedback_equal_to_the_weight_is_backpropagation(kind: str, bias: bool) -> None:
    inputs, weight, offset, delta, geometry = _problem(kind, bias)
    output = fa.carry(inputs, weight, offset, weight.detach().clone(), geometry)
    wanted = [inputs, weight, *([] if offset is None else [offset])]
    _close([output, *torch.autograd.grad(output, wanted, delta)], _plain(inputs, weight, offset, delta, geometry))


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_another_feedback_changes_what_goes_down_and_nothing_else(kind: str) -> None:
    inputs, weight, offset, delta, geometry = _problem(kind)
    feedback = torch.randn_like(weight)
    output = fa.carry(inputs, weight, offset, feedback, geometry)
    down, *own = torch.autograd.grad(output, [inputs, weight, offset], delta)
    _, _, *wanted = _plain(inputs, weight, offset, delta, geometry)
    _close(own, wanted)
    other = _plain(inputs, feedback.requires_grad_(), offset, delta, geometry)[1]
    _close([down], [other])


def test_a_learned_feedback_gets_a_copy_of_the_weights_gradient() -> None:
    inputs, weight, offset, delta, geometry = _problem("conv")
    feedback = torch.randn_like(weight).requires_grad_()
    fa.carry(inputs, weight, offset, feedback, geometry).backward(delta)
    assert torch.equal(weight.grad, feedback.grad)
    assert weight.grad.data_ptr() != feedback.grad.data_ptr()  # clipping in place would count it twice


def test_a_frozen_weight_leaves_its_learned_feedback_alone_and_the_bias_learns() -> None:
    for kind in ("linear, more dimensions", "conv"):
        inputs, weight, offset, delta, geometry = _problem(kind)
        *_, wanted = _plain(inputs, weight, offset, delta, geometry)
        feedback = torch.randn_like(weight).requires_grad_()
        fa.carry(inputs, weight.requires_grad_(False), offset, feedback, geometry).backward(delta)
        assert weight.grad is None
        assert feedback.grad is None
        _close([offset.grad], [wanted])


@pytest.mark.parametrize("expansion", [1, 3])
@pytest.mark.parametrize("macs", [(1, 2), (2, 1)], ids=["as published", "reordered"])
@pytest.mark.parametrize("kind", ["linear", "conv", "stride", "dilation", "groups"])
def test_a_product_follows_its_three_equations(
    kind: str, macs: tuple[int, int], expansion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """m = δ B, g = m R, ∇R = mᵀ h, by torch.nn.grad, in both orders."""
    monkeypatch.setattr(fa, "_product_macs", lambda *sizes: macs)
    inputs, weight, offset, delta, geometry = _problem(kind)
    groups = 1 if geometry is None else geometry.groups
    fixed = torch.randn(len(weight), expansion * len(weight) // groups, dtype=torch.float64)
    fixed = fixed.reshape(*fixed.shape, *[1] * (weight.ndim - 2))
    learned = torch.randn(expansion * len(weight), *weight.shape[1:], dtype=torch.float64).requires_grad_()
    output = fa.carry_product(inputs, weight, offset, fixed, learned, geometry)
    got = torch.autograd.grad(output, [inputs, learned, weight, offset], delta)
    if geometry is None:
        inner = delta @ fixed
        wanted = [inner @ learned, inner.T @ inputs]
    else:
        inner = conv2d_input((len(delta), len(learned), *delta.shape[2:]), fixed, delta, groups=groups)
        wanted = [
            conv2d_input(inputs.shape, learned, inner, *geometry),
            conv2d_weight(inputs, learned.shape, inner, *geometry),
        ]
    _close(got, [*wanted, *_plain(inputs, weight, offset, delta, geometry)[2:]], atol=1e-10)


def test_the_cheaper_order_is_taken() -> None:
    layers, costs = (64, 64), {}
    for rows in (2, 4000):
        inputs, weight = torch.randn(rows, 64, requires_grad=True), torch.randn(layers, requires_grad=True)
        fixed, learned = torch.randn(64, 640), torch.randn(640, 64, requires_grad=True)
        output = fa.carry_product(inputs, weight, None, fixed, learned)
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        costs[rows] = counter.get_total_flops()
    macs = 64 * 64
    assert costs[2] == 2 * 2 * (macs + 3 * 10 * macs)
    assert costs[4000] == 2 * (2 * 4000 * macs + 2 * 10 * 64 * macs)


@pytest.mark.parametrize("kind", ["linear", "conv", "groups"])
def test_an_orthogonal_product_that_has_arrived_is_backpropagation(kind: str) -> None:
    """Property 5: B Bᵀ = I and R = BᵀW."""
    inputs, weight, offset, delta, geometry = _problem(kind)
    groups = 1 if geometry is None else geometry.groups
    fixed = fa.fixed_product_weights(len(weight), 2, groups, orthogonal=True)
    learned = fa.product_gradient(fixed, weight.detach(), 2 * len(weight), groups)
    torch.testing.assert_close(fa.product(fixed, learned, groups), weight.detach(), rtol=0, atol=1e-12)
    fixed = fixed.reshape(*fixed.shape, *[1] * (weight.ndim - 2))
    output = fa.carry_product(inputs, weight, offset, fixed, learned, geometry)
    got = torch.autograd.grad(output, [inputs, weight, offset], delta)
    _close([output, *got], _plain(inputs, weight, offset, delta, geometry))


@pytest.mark.parametrize("kind", ["linear", "conv", "groups"])
def test_direct_feedback_sends_the_outputs_error(kind: str) -> None:
    inputs, weight, offset, delta, geometry = _problem(kind)
    error = fa.OutputError()
    feedback = torch.randn(3, inputs[0].numel(), dtype=torch.float64)
    hidden = fa.carry_direct(inputs, weight, offset, feedback, error, False, geometry)
    with pytest.raises(RuntimeError, match="does not lead through the output layer"):
        hidden.backward(delta)
    output_weight = torch.randn(3, hidden[0].numel(), dtype=torch.float64).requires_grad_()
    below = torch.randn_like(output_weight)
    hidden = fa.carry_direct(inputs, weight, offset, feedback, error, False, geometry)
    output = fa.carry_direct(hidden.flatten(1), output_weight, None, below, error, True)
    last = torch.randn(output.shape, dtype=torch.float64)
    down, own, top = torch.autograd.grad(output, [inputs, weight, output_weight], last)
    _close([down], [(last @ feedback).reshape(inputs.shape)])
    _close([top], [last.T @ hidden.flatten(1)])
    _close([own], [_plain(inputs, weight, offset, (last @ below).reshape(hidden.shape), geometry)[2]])


def test_the_backward_pass_does_not_read_the_weights() -> None:
    for kind in GEOMETRIES:
        gradients = []
        for spoil in (False, True):
            inputs, weight, offset, delta, geometry = _problem(kind)
            torch.manual_seed(0)
            output = fa.carry(inputs, weight, offset, torch.randn_like(weight), geometry)
            if spoil:
                weight.data.fill_(float("nan"))
            gradients.append(torch.autograd.grad(output, [inputs, weight, offset], delta))
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_half_precision_comes_back_as_the_weights_precision() -> None:
    """Under autocast the products run in bf16, and gradients have the dtype of what they belong to."""
    layer, feedback = nn.Conv2d(2, 3, 3), torch.randn(3, 2, 3, 3)
    fixed, learned = torch.randn(3, 6, 1, 1), torch.randn(6, 2, 3, 3, requires_grad=True)
    inputs = torch.randn(4, 2, 5, 5, requires_grad=True)
    for product in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            reads = inputs.to(torch.bfloat16)
            if product:
                output = fa.carry_product(reads, layer.weight, layer.bias, fixed, learned, Geometry())
            else:
                output = fa.carry(reads, layer.weight, layer.bias, feedback, Geometry())
        assert output.dtype is torch.bfloat16
        output.float().square().mean().backward()
        assert inputs.grad is not None
        assert {layer.weight.grad.dtype, layer.bias.grad.dtype, inputs.grad.dtype} == {torch.float32}
    assert learned.grad.dtype is torch.float32


# -- feedback weights -------------------------------------------------------------------------------------------------
def test_angles_at_the_start_are_those_of_random_matrices() -> None:
    """Property 3."""
    torch.manual_seed(0)
    uniform, normal = fa.xavier_uniform(torch.empty(500, 400)), torch.randn(500, 400)
    assert fa.angle(fa.xavier_uniform(uniform), uniform) == pytest.approx(90.0, abs=0.5)
    assert fa.angle(fa.sign_symmetric(uniform), uniform) == pytest.approx(30.0, abs=0.3)
    assert fa.angle(fa.sign_symmetric(normal), normal) == pytest.approx(37.1, abs=0.3)
    magnitudes = fa.xavier_uniform(uniform)
    assert fa.angle(fa.sign_magnitude(uniform, magnitudes), uniform) == pytest.approx(41.4, abs=0.3)
    assert fa.norm_ratio(fa.sign_symmetric(uniform), uniform) == pytest.approx(1.0, abs=0.01)
    assert fa.norm_ratio(2 * uniform, uniform) == pytest.approx(2.0)


def test_xavier_is_pytorchs_and_scales_follow_the_kernel() -> None:
    weight = torch.empty(40, 30, 3, 5)
    torch.manual_seed(0)
    drawn = fa.xavier_uniform(weight)
    torch.manual_seed(0)
    assert torch.equal(drawn, nn.init.xavier_uniform_(weight))
    assert fa.sign_symmetric(weight).abs().max().item() == pytest.approx(math.sqrt(2 / (15 * 70)))


@pytest.mark.parametrize(("expansion", "degrees", "ratio"), [(10, 17.55, 1.049), (3, 30.0, 1.155)])
def test_a_product_that_has_arrived_points_along_the_weight(expansion: int, degrees: float, ratio: float) -> None:
    """Property 6: arctan(1/√k) and √(1 + 1/k); an orthogonal B gives 0° and 1."""
    torch.manual_seed(0)
    weight = torch.randn(300, 200)
    fixed = fa.fixed_product_weights(300, expansion)
    path = fa.product(fixed, fa.product_gradient(fixed, weight, 300 * expansion))
    assert fa.angle(path, weight) == pytest.approx(degrees, abs=0.3)
    assert fa.norm_ratio(path, weight) == pytest.approx(ratio, abs=0.01)
    exact = fa.fixed_product_weights(300, expansion, orthogonal=True)
    path = fa.product(exact, fa.product_gradient(exact, weight.double(), 300 * expansion))
    assert fa.angle(path, weight) < 1e-4
    assert fa.norm_ratio(path, weight) == pytest.approx(1.0)


@pytest.mark.parametrize(("density", "groups"), [(1.0, 1), (0.3, 1), (0.3, 4)])
def test_a_fixed_matrix_times_its_transpose_is_one_on_average(density: float, groups: int) -> None:
    torch.manual_seed(0)
    fixed = fa.fixed_product_weights(200, 5, groups, density)
    assert fixed.shape == (200, 1000 // groups)
    square = fixed @ fixed.T
    assert square.diagonal().mean().item() == pytest.approx(1.0, abs=0.01)
    assert (square - square.diagonal().diag()).mean().abs().item() < 1e-3
    assert (fixed != 0).float().mean().item() == pytest.approx(density, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "shape"), [("linear", (7,)), ("conv", (3, 7, 6)), ("dilation", (3, 7, 6)), ("groups", (4, 6, 6))]
)
def test_noise_shows_the_weight(kind: str, shape: tuple[int, ...]) -> None:
    """Property 7: the mean of ζᵀ ξ is W, within five standard errors."""
    _, weight, _, _, geometry = _problem(kind)
    weight = weight.detach()
    geometry = None if geometry is None else geometry._replace(padding=(0, 0))
    torch.manual_seed(0)
    noise = (torch.rand(100, 200, *shape, dtype=torch.float64) - 0.5) * math.sqrt(12)
    estimates = torch.stack([fa.mirror(part, weight, geometry) for part in noise])
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - weight).abs() < 5 * error).all()
    assert error.max() < 0.1


# -- costs ------------------------------------------------------------------------------------------------------------
def test_costs_of_what_the_equations_say() -> None:
    widths = (20, 16, 8, 4)
    weights, above = 20 * 16 + 16 * 8 + 8 * 4, 16 * 8 + 8 * 4
    assert fa.update_flops(widths) == 4 * weights + 2 * above
    assert fa.update_flops(widths, direct=True) == 4 * weights + 2 * 4 * (16 + 8)
    assert fa.update_flops(widths, mirror_every=2) == fa.update_flops(widths) + 2 * above
    published = sum(2 * 10 * d**2 + 4 * 10 * d * b for b, d in ((16, 8), (8, 4)))
    assert fa.product_update_flops(widths, 1, 10) == 4 * weights + published
    many = 10**9
    assert fa.product_update_flops(widths, many, 10) == pytest.approx(fa.update_flops(widths), rel=1e-6)
    with pytest.raises(ValueError, match="describes no network"):
        fa.update_flops(())


@pytest.mark.parametrize("zero", [True, False])
def test_an_angle_exists_for_every_pair(zero: bool) -> None:
    one = torch.tensor([[3.0, 4.0]])
    other = torch.zeros(1, 2) if zero else 1e-20 * one
    assert fa.angle(one, other) == pytest.approx(90.0 if zero else 0.0, abs=1e-5)
    assert fa.norm_ratio(one, torch.zeros(1, 2)) == math.inf
