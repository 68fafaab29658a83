"""The Mono-Forward loss in somebody else's training loop."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor, nn

import locallearn.losses.mono_forward
from locallearn.losses import MonoForwardLoss


def _blobs(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Eight classes, each of two opposite clusters, so that no linear map of the inputs can tell them apart."""
    centres = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(8, (samples,), generator=draw)
    side = torch.randint(2, (samples, 1), generator=draw) * 2 - 1
    return side * centres[labels] + 0.6 * torch.randn(samples, 20, generator=draw), labels


def test_every_layer_learns_to_classify_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(20, 64), nn.Linear(64, 64)]
    losses = [MonoForwardLoss(64, 8) for _ in layers]
    optimizers = [
        torch.optim.Adam([*layer.parameters(), *loss.parameters()], lr=5e-3)
        for layer, loss in zip(layers, losses, strict=True)
    ]
    inputs, labels = _blobs(2000, seed=1)
    history: list[list[float]] = [[], []]
    for _ in range(10):
        for rows in torch.randperm(len(inputs)).split(100):
            x = inputs[rows]
            for i, (layer, local, optimizer) in enumerate(zip(layers, losses, optimizers, strict=True)):
                optimizer.zero_grad()
                x = layer(x.detach()).relu()
                loss = local(x, labels[rows])
                loss.backward()
                optimizer.step()
                history[i].append(loss.item())

    x, wanted = _blobs(2000, seed=2)
    with torch.no_grad():
        for i, (layer, local) in enumerate(zip(layers, losses, strict=True)):
            x = layer(x).relu()
            accuracy = (local.goodness(x).argmax(1) == wanted).float().mean().item()
            assert accuracy > 0.97, f"layer {i} alone: {accuracy}"
            assert sum(history[i][-20:]) < 0.5 * sum(history[i][:20])


def test_it_owns_one_projection_of_kaiming_scale_and_nothing_else() -> None:
    local = MonoForwardLoss(400, 10)
    assert {name: tuple(tensor.shape) for name, tensor in local.state_dict().items()} == {"projection": (10, 400)}
    assert [name for name, _ in local.named_parameters()] == ["projection"]
    bound = 400**-0.5  # Kaiming-uniform with a = √5: sqrt(6 / ((1 + 5) fan_in))
    assert local.projection.abs().max() <= bound
    assert local.projection.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_no_gradient_reaches_what_came_detached() -> None:
    below, layer, local = nn.Linear(4, 5), nn.Linear(5, 6), MonoForwardLoss(6, 3)
    hidden = below(torch.randn(7, 4)).relu()
    local(layer(hidden.detach()).relu(), torch.randint(3, (7,))).backward()
    assert below.weight.grad is None
    assert layer.weight.grad is not None
    assert local.projection.grad is not None


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="features=0, classes=10"):
        MonoForwardLoss(0, 10)
    with pytest.raises(ValueError, match="8 entries per sample"):
        MonoForwardLoss(9, 3)(torch.zeros(2, 4, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one class id per sample"):
        MonoForwardLoss(8, 3)(torch.zeros(2, 8), torch.zeros(2, 3))


def test_the_example_runs() -> None:
    outcome = doctest.testmod(locallearn.losses.mono_forward)
    assert outcome.attempted > 5
    assert outcome.failed == 0
