"""The Forward-Forward loss in somebody else's training loop."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor, nn

import locallearn.losses.forward_forward
from locallearn.functional.forward_forward import (
    embed_label,
    goodness,
    rms_normalise,
    wrong_labels_uniform,
)
from locallearn.functional.forward_forward import loss as pure_loss
from locallearn.losses import ForwardForwardLoss

CLASSES = 4


def _blobs(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four classes of Gaussian clusters behind the slots of the label."""
    centres = torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=draw)
    features = centres[labels] + 0.6 * torch.randn(samples, 20, generator=draw)
    return torch.cat([torch.zeros(samples, CLASSES), features], dim=1), labels


def _accuracy_of_single_layers(layers: list[nn.Linear], minimise: bool) -> list[float]:
    inputs, labels = _blobs(1000, seed=2)
    scores = torch.zeros(len(layers), len(inputs), CLASSES)
    with torch.no_grad():
        for label in range(CLASSES):
            x = embed_label(inputs, torch.full_like(labels, label), CLASSES, strength=3.0)
            for i, layer in enumerate(layers):
                x = layer(rms_normalise(x)).relu()
                scores[i, :, label] = -goodness(x) if minimise else goodness(x)
    return [(score.argmax(1) == labels).float().mean().item() for score in scores]


@pytest.mark.parametrize(("minimise", "peer"), [(False, 0.0), (False, 0.03), (True, 0.0)])
def test_every_layer_learns_to_classify_in_a_plain_loop(minimise: bool, peer: float) -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    layers = [nn.Linear(20 + CLASSES, 64), nn.Linear(64, 64)]
    losses = [ForwardForwardLoss(minimise=minimise, peer=peer, features=64) for _ in layers]
    optimizers = [torch.optim.Adam(layer.parameters(), lr=3e-3) for layer in layers]
    inputs, labels = _blobs(2000, seed=1)
    for _ in range(20):
        for rows in torch.randperm(len(inputs)).split(100):
            wrong = wrong_labels_uniform(labels[rows], CLASSES, draw)
            good = embed_label(inputs[rows], labels[rows], CLASSES, strength=3.0)
            bad = embed_label(inputs[rows], wrong, CLASSES, strength=3.0)
            for layer, local, optimizer in zip(layers, losses, optimizers, strict=True):
                optimizer.zero_grad()
                pre_activation = layer(rms_normalise(good.detach()))
                good, bad = pre_activation.relu(), layer(rms_normalise(bad.detach())).relu()
                local(good, bad, pre_activation).backward()
                optimizer.step()
    accuracies = _accuracy_of_single_layers(layers, minimise)
    assert min(accuracies) > 0.97, accuracies


def test_the_threshold_is_the_number_of_entries_unless_given() -> None:
    good, bad = torch.rand(3, 2, 4) * 2, torch.rand(3, 2, 4) * 2
    torch.testing.assert_close(ForwardForwardLoss()(good, bad), pure_loss(goodness(good), goodness(bad), 8.0))
    given = ForwardForwardLoss(threshold=2.0, temperature=3.0, minimise=True)(good, bad)
    torch.testing.assert_close(given, pure_loss(goodness(good), goodness(bad), 2.0, 3.0, minimise=True))


def test_peer_normalisation_revives_a_unit_that_is_dead_on_the_whole_batch() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(10, 6), torch.rand(20, 10)
    layer.bias.data[3] = -100.0
    for peer, revived in ((0.0, False), (0.03, True)):
        layer.zero_grad()
        pre_activation = layer(x)
        local = ForwardForwardLoss(peer=peer, features=6)
        local(pre_activation.relu(), layer(torch.rand(20, 10)).relu(), pre_activation).backward()
        assert layer.bias.grad is not None
        assert (layer.bias.grad[3] < 0) == revived  # a step against the gradient raises the bias
    layer.zero_grad()
    output = layer(x).relu()
    ForwardForwardLoss(peer=0.03, features=6)(output, output, pre_activation=output).backward()
    assert layer.bias.grad[3] == 0  # as documented: gated by the ReLU where only the output is given


def test_the_peer_mean_is_updated_before_use_and_only_in_training() -> None:
    z = torch.tensor([[1.0, 0.0], [3.0, 0.0]], requires_grad=True)
    local = ForwardForwardLoss(peer=0.1, features=2)
    gradient = torch.autograd.grad(local(z, z, pre_activation=z), z)[0]
    without = torch.autograd.grad(ForwardForwardLoss()(z, z), z)[0]
    torch.testing.assert_close(local.peer_mean, torch.tensor([0.65, 0.45]))
    torch.testing.assert_close(gradient - without, torch.tensor([[0.005, -0.005]] * 2))  # -0.1/2 (0.55 - m)
    local.eval()(z, z, pre_activation=z)
    torch.testing.assert_close(local.peer_mean, torch.tensor([0.65, 0.45]))


def test_only_peer_normalisation_keeps_a_state() -> None:
    assert ForwardForwardLoss(features=4).state_dict() == {}
    state = ForwardForwardLoss(peer=0.03, features=4).state_dict()
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"peer_mean": [0.5] * 4}
    assert list(ForwardForwardLoss(peer=0.03, features=4).parameters()) == []


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"temperature=0\.0 must be above 0"):
        ForwardForwardLoss(temperature=0.0)
    with pytest.raises(ValueError, match=r"peer=-1\.0"):
        ForwardForwardLoss(peer=-1.0)
    with pytest.raises(ValueError, match="needs features"):
        ForwardForwardLoss(peer=0.03)
    z = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="as many negatives as positives"):
        ForwardForwardLoss()(z, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="needs pre_activation"):
        ForwardForwardLoss(peer=0.03, features=4)(z, z)
    with pytest.raises(ValueError, match="4 rows for 2 positives"):
        ForwardForwardLoss(peer=0.03, features=4)(z, z, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="running mean of 1 units"):
        ForwardForwardLoss(peer=0.03, features=1)(z, z, z)


def test_the_example_runs() -> None:
    outcome = doctest.testmod(locallearn.losses.forward_forward)
    assert outcome.attempted > 5
    assert outcome.failed == 0
