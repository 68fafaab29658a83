"""Linear probes against scikit-learn's ridge, and against what they must leave alone."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from locallearn.algorithms import Backprop, TaskInfo
from locallearn.batch import Batch
from locallearn.nets import Blocks, mlp
from locallearn.probe import probe_blocks, ridge_probe
from locallearn.tasks.images import ImageData

Split = tuple[Tensor, Tensor, Tensor, Tensor]


def _noisy(samples: int, width: int, noise: float, seed: int, judged: int = 400, classes: int = 4) -> Split:
    """Classes whose centres differ in a few hidden directions, seen through ``width`` noisy features."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples + judged,), generator=draw)
    hidden = torch.randn(classes, 5, generator=draw)[labels]
    hidden = hidden + 0.5 * torch.randn(hidden.shape, generator=draw)
    features = hidden @ torch.randn(5, width, generator=draw)
    features = features + noise * torch.randn(features.shape, generator=draw) + 3
    return features[:samples], labels[:samples], features[samples:], labels[samples:]


def _accuracy(model: Any, split: Split, classes: int = 4) -> float:
    """A scikit-learn regression onto one-hot labels as a classifier, on standardised features."""
    train, train_labels, test, test_labels = (part.double().numpy() for part in split)
    scaler = StandardScaler().fit(train)
    model.fit(scaler.transform(train), np.eye(classes)[train_labels.astype(int)])
    return float((model.predict(scaler.transform(test)).argmax(1) == test_labels).mean())


def _reference(split: Split) -> float:
    """RidgeCV: the penalty by exact leave-one-out errors, from the same 15 candidates."""
    samples, width = split[0].shape
    mean_eigenvalue = samples * width / min(samples, width)  # every standardised feature has sum of squares N
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _accuracy(RidgeCV(mean_eigenvalue * np.logspace(-4, 3, 15)), split)


@pytest.mark.parametrize(("samples", "width"), [(60, 20), (200, 60), (60, 60), (40, 150), (100, 300)])
@pytest.mark.parametrize("noise", [0.1, 3.0, 10.0])
def test_equals_scikit_learns_ridge_with_cross_validation(samples: int, width: int, noise: float) -> None:
    accuracies = []
    for seed in range(3):
        split = _noisy(samples, width, noise, seed)
        accuracies.append(ridge_probe(*split, classes=4))
        assert accuracies[-1] == pytest.approx(_reference(split), abs=1 / 400 + 1e-9)  # one tie may fall either way
    assert min(accuracies) > 0.25


def test_the_penalty_fits_wide_noisy_features() -> None:
    """As in a block of 2000 units on CIFAR-10: a penalty of a hundredth per sample nearly interpolates."""
    gains = []
    for seed in range(4):
        split = _noisy(300, 600, 12.0, seed)
        gains.append(ridge_probe(*split, classes=4) - _accuracy(Ridge(alpha=0.01 * 300), split))
    assert min(gains) > 0
    assert sum(gains) / 4 > 0.04


def test_judged_features_have_no_say() -> None:
    """The answer for one sample is the same, whatever else is judged with it."""
    train, labels, test, test_labels = _noisy(50, 120, 5.0, 0, judged=40)
    alone = [ridge_probe(train, labels, test[i : i + 1], test_labels[i : i + 1], 4) for i in range(40)]
    assert ridge_probe(train, labels, test, test_labels, 4) == pytest.approx(sum(alone) / 40)


@pytest.mark.parametrize("width", [10, 100])
def test_constant_features_say_nothing(width: int) -> None:
    train, labels, test, test_labels = _noisy(50, width, 1.0, 1)
    expected = ridge_probe(train, labels, test, test_labels, 4)
    # Constant while fitting, wild when judged: units that are dead on the training samples only.
    train, test = F.pad(train, (0, 3), value=7.0), torch.cat([test, 100 * torch.randn(len(test), 3)], 1)
    assert ridge_probe(train, labels, test, test_labels, 4) == expected


def test_features_without_any_information_give_the_commonest_class() -> None:
    labels, judged = torch.tensor([0, 2, 2, 1]), torch.tensor([2, 2, 0, 1, 2])
    assert ridge_probe(torch.zeros(4, 6), labels, torch.zeros(5, 6), judged, 3) == pytest.approx(3 / 5)


def test_maps_are_flattened_and_precision_does_not_matter() -> None:
    train, labels, test, test_labels = _noisy(80, 24, 0.5, 2)
    expected = ridge_probe(train, labels, test, test_labels, 4)
    maps = ridge_probe(train.view(-1, 6, 2, 2), labels, test.view(-1, 6, 2, 2), test_labels, 4)
    assert maps == expected
    assert ridge_probe(train.bfloat16(), labels, test.bfloat16(), test_labels, 4) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 2])
def test_a_feature_that_is_not_finite_gives_nan(value: float, where: int) -> None:
    split = _noisy(20, 5, 1.0, 0, judged=20)
    split[where][3, 2] = value
    assert math.isnan(ridge_probe(*split, classes=4))


def test_random_features_of_cifar10(data_dir: Path) -> None:
    """2000 random features, 1000 training samples: over 30 % on validation samples, where a fixed penalty gave 21."""
    try:
        data = ImageData("cifar10", data_dir=data_dir, batch_size=1000, seed=0)
        data.setup("fit")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    train, validation = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    weight = torch.randn(3072, 2000, generator=torch.Generator().manual_seed(0)) / 3072**0.5
    features = [F.relu(batch.inputs.flatten(1) @ weight) for batch in (train, validation)]
    assert ridge_probe(features[0], train.targets, features[1], validation.targets, 10) > 0.31


# -- blocks -----------------------------------------------------------------------------------------------------------


class Neighbours(nn.Module):
    """A block that reads a second argument: a mean over neighbours, then a linear map."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, units)

    def forward(self, inputs: Tensor, adjacency: Tensor) -> Tensor:
        """Features ``(N, units)``."""
        mapped: Tensor = self.linear(adjacency @ inputs)
        return torch.relu(mapped)


def test_context_is_handed_on_and_only_rows_with_targets_count() -> None:
    inputs, labels, _, _ = _noisy(90, 8, 0.2, 3)
    adjacency = torch.softmax(torch.randn(90, 90, generator=torch.Generator().manual_seed(0)) + 8 * torch.eye(90), 1)
    rows = torch.arange(90)
    train = Batch(inputs, labels.where(rows < 60, torch.tensor(0)), (adjacency,), rows=rows < 60)
    test = Batch(inputs, labels, (adjacency,), rows=rows[60:])
    torch.manual_seed(0)
    algorithm = Backprop()
    net = Blocks({"first": Neighbours(8, 12), "second": Neighbours(12, 6)}, Neighbours(6, 4))
    algorithm.attach(net, TaskInfo(train._replace(rows=None), 4, F.cross_entropy))
    found = probe_blocks(algorithm, train, test, 4)
    with torch.no_grad():
        first = net[0](inputs, adjacency)
        second = net[1](first, adjacency)
    expected = [ridge_probe(h[:60], labels[:60], h[60:], labels[60:], 4) for h in (first, second)]
    assert list(found) == ["first", "second"]
    assert list(found.values()) == expected
    assert expected[0] > 0.5


def test_probing_changes_nothing() -> None:
    train, labels, test, test_labels = _noisy(40, 6, 1.0, 4)
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
    algorithm = Backprop()
    algorithm.attach(
        Blocks({"first": first, "second": nn.Linear(8, 8)}, nn.Linear(8, 4)),
        TaskInfo(Batch(train[:2], labels[:2]), 4, F.cross_entropy),
    )
    algorithm.train()
    first[1].eval()  # a part that somebody froze
    before = {name: value.clone() for name, value in algorithm.state_dict().items() if isinstance(value, Tensor)}
    modes = [module.training for module in algorithm.modules()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = [probe_blocks(algorithm, Batch(train, labels), Batch(test, test_labels), 4) for _ in range(2)]
    assert found[0] == found[1]  # no dropout, no moving statistics
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in algorithm.modules()] == modes
    after = algorithm.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in algorithm.parameters())


def test_modes_come_back_after_an_error() -> None:
    train, labels, _, _ = _noisy(10, 6, 1.0, 5)
    algorithm = Backprop()
    algorithm.attach(mlp((6,), 4, [5]), TaskInfo(Batch(train[:2], labels[:2]), 4, F.cross_entropy))
    algorithm.train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        probe_blocks(algorithm, Batch(train, labels), Batch(train[:, :3], labels), 4)
    assert all(module.training for module in algorithm.modules())
