"""Weights that Forward-Forward learned before it was taken apart into kinds: the same options must still give them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.algorithms import ForwardForward, TaskInfo
from locallearn.batch import Batch
from locallearn.functional import forward_forward as ff
from locallearn.nets import mlp
from locallearn.testing import plain_loop

OPTIONS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "settings": {"threshold": 3.0, "temperature": 2.0, "label_strength": 2.5, "skip_first": False},
    "minimise": {"minimise": True},
    "peer": {"peer": 0.03},
    "hard": {"negatives": "hard", "readout_lr": 0.2, "readout_weight_decay": 0.003},
    "all": {
        "negatives": "hard",
        "inference": "softmax",
        "peer": 0.03,
        "minimise": True,
        "skip_first": False,
        "threshold": 4.0,
        "temperature": 1.5,
    },
}
# Of every option: a sum over all weights and buffers, each with a weight of its own, and one over the scores.
EXPECTED: dict[str, tuple[float, float]] = {
    "uniform": (81.03619315446228, -42.795777644508625),
    "settings": (74.6302636647602, -11.549885908516348),
    "minimise": (80.19249544133326, -15.411329738484387),
    "peer": (81.40661992608744, -42.90472834181208),
    "hard": (79.81117135385111, -18.912749626883954),
    "all": (76.0204593605913, 0.7980559513665242),
}


def _wave(*shape: int, phase: float = 0.0) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + phase).reshape(shape)


def _sum(tensors: list[Tensor]) -> float:
    return sum(float((_wave(*t.shape, phase=0.3 + i) * t.double()).sum()) for i, t in enumerate(tensors))


def trained(name: str) -> tuple[float, float]:
    """Six steps in double precision from weights that no generator has drawn."""
    algorithm = ForwardForward(**OPTIONS[name])
    batches = [Batch(_wave(16, 12, phase=float(i)).abs(), (torch.arange(16) * (i + 3) // 2) % 4) for i in range(6)]
    two = Batch(batches[0].inputs[:2].float(), batches[0].targets[:2])
    algorithm.attach(mlp((12,), 4, (10, 9, 8)), TaskInfo(two, 4, F.cross_entropy))
    algorithm.double()
    with torch.no_grad():
        for i, p in enumerate(algorithm.blocks.parameters()):
            p.copy_(0.6 * _wave(*p.shape, phase=float(i)) if p.ndim > 1 else torch.zeros_like(p))
    plain_loop(algorithm, batches, partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3))
    with torch.no_grad():
        scores = algorithm.eval().predict(batches[0].inputs)
    state = [value for value in algorithm.state_dict().values() if isinstance(value, Tensor)]
    return _sum(state), _sum([scores])


@pytest.fixture
def _no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of PyTorch may draw other numbers from the same seed."""

    def next_label(labels: Tensor, classes: int, generator: object) -> Tensor:
        return (labels + 1) % classes

    def likeliest(logits: Tensor, labels: Tensor, generator: object) -> Tensor:
        return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)

    monkeypatch.setattr(ff, "wrong_labels_uniform", next_label)
    monkeypatch.setattr(ff, "wrong_labels_hard", likeliest)


@pytest.mark.usefixtures("_no_draws")
@pytest.mark.parametrize("name", OPTIONS)
def test_weights_and_scores_are_those_of_before(name: str) -> None:
    assert trained(name) == pytest.approx(EXPECTED[name], rel=1e-9)
