"""Replicated losses: one value, a derivative for every slice, and the closed form of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from locallearn.functional.local_losses import readout_gradients, replicated_losses, replicated_slopes


def _given(patches: int = 4, groups: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = torch.randn(5, patches, 2 * groups).double()
    weight, bias = torch.randn(3, 2 * groups).double(), torch.randn(3).double()
    return features, weight, bias, torch.arange(5) % 3


def _pooled(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(features.mean(1) @ weight.T + bias, targets, reduction="none")


def test_all_slices_have_the_value_of_the_pooled_loss_and_share_its_derivative() -> None:
    given = [x.requires_grad_() if x.is_floating_point() else x for x in _given()]
    losses = replicated_losses(*given, groups=3)
    assert losses.shape == (5, 4, 3)
    whole = _pooled(*given)
    assert torch.equal(losses, losses[:, :1, :1].expand_as(losses))
    assert torch.allclose(losses[:, 0, 0], whole, atol=1e-14)
    for made, wanted in zip(
        torch.autograd.grad(losses.sum(), given[:3]), torch.autograd.grad(whole.sum(), given[:3]), strict=True
    ):
        assert torch.allclose(made, wanted, atol=1e-13)


def test_a_slice_has_a_derivative_of_its_own_features_alone() -> None:
    """In reverse and in forward mode."""
    features, weight, bias, targets = _given()
    whole = torch.autograd.functional.jacobian(lambda h: _pooled(h, weight, bias, targets), features)
    made = torch.autograd.functional.jacobian(lambda h: replicated_losses(h, weight, bias, targets, 3), features)
    for p in range(4):
        for g in range(3):
            here = torch.zeros(4, 6).double()
            here[p, 2 * g : 2 * g + 2] = 1
            assert torch.allclose(made[:, p, g], whole * here, atol=1e-14)
            along = torch.randn_like(features) * (1 - here)  # of all other slices
            _, slopes = jvp(lambda h: replicated_losses(h, weight, bias, targets, 3), (features,), (along,))
            assert not slopes[:, p, g].any()
            assert slopes.any()


def test_the_closed_form_is_the_derivative() -> None:
    features, weight, bias, targets = _given()
    along = torch.randn_like(features)
    losses, wanted = jvp(lambda h: replicated_losses(h, weight, bias, targets, 3), (features,), (along,))
    found, slopes = replicated_slopes(features, along, weight, bias, targets, 3)
    assert torch.allclose(found, losses[:, 0, 0], atol=1e-14)
    assert torch.allclose(slopes, wanted, atol=1e-14)


def test_vectors_are_one_patch() -> None:
    features, weight, bias, targets = _given(patches=1)
    vectors = features[:, 0]
    assert torch.equal(
        replicated_losses(vectors, weight, bias, targets, 3), replicated_losses(features, weight, bias, targets, 3)
    )
    found = replicated_slopes(vectors, vectors, weight, bias, targets, 3)[1]
    assert torch.equal(found, replicated_slopes(features, features, weight, bias, targets, 3)[1])


def test_gradients_of_the_readout_are_those_of_autograd() -> None:
    features, weight, bias, targets = _given()
    weight.requires_grad_()
    bias.requires_grad_()
    scores = features.mean(1) @ weight.T + bias
    wanted = torch.autograd.grad(F.cross_entropy(scores, targets), (weight, bias))
    for made, by_autograd in zip(readout_gradients(features.mean(1), scores.detach(), targets), wanted, strict=True):
        assert torch.allclose(made, by_autograd, atol=1e-14)


def test_groups_have_to_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="groups is 4, which does not divide 6 channels"):
        replicated_losses(*_given(), groups=4)
