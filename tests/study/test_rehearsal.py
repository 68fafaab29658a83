"""The first batch is tried before a folder is made, and leaves no trace in the run that follows."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from locallearn.algorithms import Pepita
from locallearn.nets import Blocks
from locallearn.strategies import Schedule
from locallearn.study import train as study
from locallearn.study.train import check, run
from locallearn.tasks.classification import Classification
from locallearn.tasks.images import ImageData
from tests.study.conftest import MakePlan


def _weights(plan: Any) -> dict[str, Tensor]:
    return {n: v for n, v in plan.algorithm.state_dict().items() if isinstance(v, Tensor)}


def _dropping() -> Blocks:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
    return Blocks({"layer1": layers}, nn.Linear(16, 10))


@pytest.mark.parametrize("algorithm", ["forward_forward_hard", "backprop"])
def test_a_rehearsal_changes_nothing(algorithm: str, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout, normalisation and the rule's own draws would tell."""
    ends, draws = [], []
    for rehearsed in (True, False):
        if not rehearsed:
            monkeypatch.setattr(study, "rehearse", lambda *_: None)
        plan = make_plan(algorithm, max_epochs=1, make_net=_dropping)
        random.seed(3)
        np.random.seed(3)
        run(plan)
        ends.append(_weights(plan))
        draws.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    assert draws[0] == draws[1]


class _Wrong(Classification):
    def judge(self, batch: Any) -> Tensor:
        raise TypeError("the metric wants whole numbers")


def _narrow() -> Blocks:
    return Blocks({"layer1": nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())}, nn.Linear(16, 5))


def _of_doubles() -> Blocks:
    return Blocks({"layer1": nn.Sequential(nn.Flatten(), nn.Linear(64, 16))}, nn.Linear(16, 10).double())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"make_net": _narrow}, "the readout has 5 outputs for 10 classes: make it as wide"),
        ({"make_net": _of_doubles}, "dtype|same"),
        (
            {"optimizer": partial(torch.optim.LBFGS, lr=0.1, max_iter=2), "rule": Pepita},
            "asks for the loss again",
        ),
        ({"trainer": {"accelerator": "cpu", "limit_val_batches": 0}, "schedule": Schedule(patience=1)}, "leaves none"),
        ({"trainer": {"accelerator": "cpu", "limit_train_batches": 0.01}}, "leaves none of 21 batches"),
        ({"trainer": {"accelerator": "cpu", "val_check_interval": 22}}, "val_check_interval is 22.* 21 batches"),
        ({"trainer": {"accelerator": "cpu", "accumulate_grad_batches": 2}}, "accumulate_grad_batches is 2"),
        (
            {"scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=41)}
            | {"scheduler_interval": "step"},
            "ends after 41 steps.* may have 42",
        ),
    ],
)
@pytest.mark.parametrize("how", [run, check])
def test_what_cannot_be_trained_is_told_before_a_folder_is_made(
    how: Any, wrong: dict[str, Any], sentence: str, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan("backprop", **{key: value for key, value in wrong.items() if key != "rule"})
    if "rule" in wrong:
        plan.algorithm = wrong["rule"](seed=0)
    with pytest.raises(ValueError, match=sentence):
        how(plan)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        ({"limit_train_batches": 19}, False),
        ({"limit_train_batches": 20}, True),
        ({"limit_train_batches": 0.96}, False),
        ({"max_steps": 19}, False),
        ({"max_steps": 30, "limit_train_batches": 1.0}, True),
    ],
)
def test_a_last_batch_of_one_is_refused_where_training_reaches_it(
    limits: dict[str, Any], refused: bool, make_plan: MakePlan, tmp_path: Path
) -> None:
    """Digits have 19 batches of 68 samples and one more sample."""
    data = ImageData("digits", batch_size=68)
    normed = Blocks({"a": nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))}, nn.Linear(4, 10))
    trainer = {"accelerator": "cpu", "devices": 1, **limits}
    plan = make_plan("mono_forward", data=data, make_net=lambda: normed, trainer=trainer, max_epochs=1, warmup_steps=30)
    if refused:
        with pytest.raises(ValueError, match="last training batch of an epoch has one sample"):
            run(plan)
        assert not (tmp_path / "runs").exists()
    else:
        record = json.loads((run(plan) / "record.json").read_text())
        assert record["status"] == "done"
        assert "max_steps" in limits or "warm-up" not in str(record.get("notes"))


def test_a_metric_that_cannot_judge_is_told(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan("backprop")
    plan.make_task = lambda net: _Wrong(net, torch.zeros(2, 64), 10)
    with pytest.raises(ValueError, match="the first batch cannot be trained: the metric wants whole numbers"):
        run(plan)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_other_precisions_are_probed_and_counted(precision: str, make_plan: MakePlan) -> None:
    plan = make_plan(
        "mono_forward",
        max_epochs=1,
        probe_samples=40,
        trainer={"accelerator": "cpu", "devices": 1, "precision": precision},
    )
    folder = run(plan)
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert record["precision"]["trainer"] == precision
    assert record["precision"]["matmul"] == "highest"
    assert record["precision"]["matmul_in_effect"] == "float32"
    assert record["cost"]["update_flops"] > 0
    assert "probe_accuracy" in (folder / "metrics.csv").read_text(encoding="utf-8")


def test_units_that_never_trained_are_named(make_plan: MakePlan) -> None:
    plan = make_plan(
        "mono_forward",
        schedule=Schedule(sequential=True, patience=None),
        trainer={"accelerator": "cpu", "devices": 1, "max_steps": 30},
    )
    record = json.loads((run(plan) / "record.json").read_text(encoding="utf-8"))
    assert record["epochs"] == [2, 0]
    assert record["untrained"] == ["layer2"]
    assert plan.algorithm.active is None
