"""Plans made without a command line: small networks on the embedded digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from locallearn.algorithms import Backprop, DeepSupervision, ForwardForward, ForwardGradient, MonoForward
from locallearn.algorithms.base import Algorithm
from locallearn.nets import mlp
from locallearn.strategies import Schedule
from locallearn.study import tune as tuning
from locallearn.study.train import Plan
from locallearn.tasks.classification import Classification
from locallearn.tasks.images import ImageData
from tests.study.tuning import FakeRecord, FakeRuns

MakePlan = Callable[..., Plan]

ALGORITHMS: dict[str, Callable[[int], Algorithm]] = {
    "backprop": lambda seed: Backprop(seed=seed),
    "deep_supervision": lambda seed: DeepSupervision(seed=seed),
    "mono_forward": lambda seed: MonoForward(seed=seed),
    "forward_gradient": lambda seed: ForwardGradient(seed=seed),
    "forward_forward": lambda seed: ForwardForward(seed=seed),
    "forward_forward_hard": lambda seed: ForwardForward(negatives="hard", seed=seed),
}


@pytest.fixture
def make_plan(tmp_path: Path) -> MakePlan:
    """Makes a plan for one algorithm; keywords replace entries of the plan."""

    def make(algorithm: str, seed: int = 0, schedule: Schedule | None = None, **other: Any) -> Plan:
        data = ImageData("digits", batch_size=64, seed=seed)
        settings: dict[str, Any] = {
            "names": {"algorithm": algorithm, "dataset": "digits", "net": "mlp", "task": "classification"},
            "seed": seed,
            "data": data,
            "make_net": partial(mlp, data.shape, data.classes, hidden=[16, 16]),
            "make_task": lambda net: Classification(net, data.example(), data.classes),
            "algorithm": ALGORITHMS[algorithm](seed),
            "optimizer": partial(torch.optim.Adam, lr=1e-3),
            "scheduler": None,
            "schedule": schedule or Schedule(patience=None),
            "meters": [],
            "idle_s": 0.0,
            "runs_dir": tmp_path / "runs",
            "max_epochs": 2,
            "trainer": {"accelerator": "cpu", "devices": 1},
            "probe_samples": 0,
        }
        return Plan(**{**settings, **other})

    return make


@pytest.fixture(params=list(ALGORITHMS))
def algorithm(request: pytest.FixtureRequest) -> str:
    """Every learning rule, one after another."""
    return str(request.param)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    """Trials of ``tune`` that are answered by ``runs.answer`` instead of being trained."""
    fake = FakeRuns()
    monkeypatch.setattr(tuning, "run", fake.run)
    monkeypatch.setattr(tuning, "load_record", FakeRecord)
    return fake
