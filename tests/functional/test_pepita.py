"""PEPITA's equations against loops, unfolded convolutions and distributions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from locallearn.functional import pepita


def _seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_seeded(seed), dtype=torch.float64)


# -- the second pass's input ------------------------------------------------------------------------------------------
def test_feedback_is_uniform_within_its_bound() -> None:
    feedback = pepita.feedback_matrix(600, 50, scale=0.2, generator=_seeded())
    bound = 0.2 * math.sqrt(6 / 600)
    assert feedback.shape == (600, 50)
    assert 0.999 * bound < feedback.abs().max() <= bound
    assert feedback.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("shape", [(12,), (3, 2, 2)])
def test_the_error_is_projected_onto_every_entry_of_its_own_input(sign: float, shape: tuple[int, ...]) -> None:
    inputs, error, feedback = _normal(5, *shape), _normal(5, 4, seed=1), _normal(12, 4, seed=2)
    before = inputs.clone()
    modulated = pepita.modulate(inputs, error, feedback, sign)
    assert modulated.shape == inputs.shape
    assert torch.equal(inputs, before)
    for n in range(5):
        for i in range(12):
            change = sign * sum(float(error[n, k] * feedback[i, k]) for k in range(4))
            assert modulated[n].flatten()[i].item() == pytest.approx(float(inputs[n].flatten()[i]) + change)


def test_feedback_of_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 classes to inputs of 12 entries: draw it with feedback_matrix\(12, 4\)"):
        pepita.modulate(_normal(5, 12), _normal(5, 4), _normal(4, 12))


# -- the steps --------------------------------------------------------------------------------------------------------
def test_a_linear_step_is_the_mean_over_samples() -> None:
    post, pre = _normal(5, 3), _normal(5, 4, seed=1)
    expected = sum(torch.outer(a, b) for a, b in zip(post, pre, strict=True)) / 5
    torch.testing.assert_close(pepita.correlation(post, pre), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "code"])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), ((2, 1), (1, 2), 1, 1), (1, 1, 2, 1), (2, 1, 1, 2)]
)
def test_a_convolution_steps_like_a_linear_layer_at_every_patch(
    stride: int | tuple[int, int], padding: int | tuple[int, int], dilation: int, groups: int, reduction: str
) -> None:
    """Property 9; the patches are laid out by unfold."""
    pre, kernel = _normal(3, 4, 9, 8), (3, 2)
    weight = _normal(6, 4 // groups, *kernel, seed=1)
    post = F.conv2d(pre, weight, None, stride, padding, dilation, groups).tanh()
    patches = F.unfold(pre, kernel, dilation=dilation, padding=padding, stride=stride)  # (N, C·i·j, positions)
    patches = patches.view(3, groups, -1, patches.shape[-1])
    expected = torch.einsum("ngkp,ngcp->gkc", post.view(3, groups, 6 // groups, -1), patches).reshape(weight.shape) / 3
    positions = patches.shape[-1]
    expected = expected / {"sum": 1, "mean": positions, "code": -3 * positions}[reduction]
    got = pepita.conv_correlation(post, pre, kernel, stride, padding, dilation, groups, reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "code"])
def test_biases_step_like_the_weights_of_an_input_that_is_one(reduction: pepita.Reduction) -> None:
    linear, maps = _normal(5, 3), _normal(5, 3, 4, 2)
    ones = torch.ones(5, 1, dtype=torch.float64)
    torch.testing.assert_close(pepita.bias_correlation(linear, reduction), pepita.correlation(linear, ones)[:, 0])
    kernel = pepita.conv_correlation(maps, torch.ones_like(maps[:, :1]), (1, 1), reduction=reduction)
    torch.testing.assert_close(pepita.bias_correlation(maps, reduction), kernel.flatten())


def test_activities_of_a_batch_have_one_norm_together() -> None:
    activity = _normal(5, 3, 2)
    normalised = pepita.normalise(7 * activity)
    torch.testing.assert_close(normalised, activity / math.sqrt(float((activity**2).sum())))
    assert not pepita.normalise(torch.zeros(5, 3)).any()
    assert pepita.normalise(activity.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("dropout", [0.1, 0.75])
def test_masks_drop_their_share_independently_and_keep_the_mean(dropout: float) -> None:
    drawn = pepita.dropout_mask((500, 7, 37), dropout, _seeded())  # no multiple of 4
    activity = torch.ones(500, 7, 37).double()
    mask = drawn.apply_(activity)
    assert mask is activity
    assert mask.shape == (500, 7, 37)
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / (1 - dropout), abs=1e-3)]
    spread = math.sqrt(dropout / (1 - dropout) / mask.numel())
    assert mask.mean().item() == pytest.approx(1.0, abs=4 * spread)
    flat = (mask.flatten() - 1) / math.sqrt(dropout / (1 - dropout))
    for apart in range(1, 9):  # entries that came from one random number, and from neighbours
        assert abs(float((flat[apart:] * flat[:-apart]).mean())) < 4 / math.sqrt(len(flat))
    again = pepita.dropout_mask((500, 7, 37), dropout, _seeded())
    assert torch.equal(drawn.dropped, again.dropped)
    assert drawn.dropped.element_size() == 1  # it is held from the first pass to the second


# -- weight mirroring -------------------------------------------------------------------------------------------------
def test_the_product_of_the_mirrors_is_as_large_as_plain_feedback() -> None:
    widths = (300, 200, 100, 50)
    mirrors = pepita.mirror_matrices(widths, 0.05, _seeded())
    assert [tuple(mirror.shape) for mirror in mirrors] == list(pairwise(widths))
    deviations = {round(float(mirror.std()), 2) for mirror in mirrors}
    assert len(deviations) == 1
    product = mirrors[0] @ mirrors[1] @ mirrors[2]
    assert product.std().item() == pytest.approx(0.05 * math.sqrt(2 / 300), rel=0.1)
    assert product.std().item() == pytest.approx(pepita.feedback_matrix(300, 50, 0.05, _seeded()).std().item(), rel=0.1)


def test_composing_scales_every_mirror_alike() -> None:
    mirrors = [_normal(6, 5), _normal(5, 4, seed=1), _normal(4, 3, seed=2)]
    feedback, factor = pepita.compose(mirrors, 0.25)
    assert feedback.std().item() == pytest.approx(0.25, rel=1e-6)
    torch.testing.assert_close(feedback, (factor * mirrors[0]) @ (factor * mirrors[1]) @ (factor * mirrors[2]))


def test_a_mirror_of_a_linear_layer_comes_to_lie_along_its_transposed_weights() -> None:
    """Property 10; what it forgets is the decay's share."""
    weight, mirror, draw = _normal(8, 12), 0.01 * _normal(12, 8, seed=1), _seeded(2)
    start = pepita.angle(mirror, weight.T)
    for _ in range(300):
        noise = 0.1 * torch.randn(256, 12, generator=draw, dtype=torch.float64)
        mirror = pepita.mirror_step(mirror, noise, noise @ weight.T, lr=0.1, decay=0.5)
    assert start > 60
    assert pepita.angle(mirror, weight.T) < 5
    torch.testing.assert_close(mirror.norm(), 0.1**2 / 0.5 * weight.norm(), rtol=0.05, atol=0)  # where the two balance


def test_angles_are_in_degrees() -> None:
    one = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert pepita.angle(one, one) == 0.0
    assert pepita.angle(one, other) == pytest.approx(45.0)
    assert pepita.angle(one, -one) == pytest.approx(180.0)
