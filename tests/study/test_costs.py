"""What a run's record says its training cost, against what its training did."""

from __future__ import annotations

import dataclasses
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from locallearn.algorithms import ForwardGNN, MonoForward
from locallearn.algorithms.base import TaskInfo
from locallearn.batch import Batch
from locallearn.energy import EnergyMonitor
from locallearn.nets import gnn
from locallearn.strategies import LocalStrategy, Schedule
from locallearn.study import train
from locallearn.study._costs import _Allocated
from locallearn.study.plan import Plan
from locallearn.study.train import run
from locallearn.tasks.classification import NodeClassification
from locallearn.tasks.graphs import GraphData
from locallearn.tasks.images import ImageData
from tests.study.conftest import MakePlan


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return found


def _counted(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], int]:
    """The record, and the operations of its very training, by PyTorch's own counter."""
    total = 0
    step = LocalStrategy.training_step

    def counted(self: LocalStrategy, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal total
        with FlopCounterMode(display=False) as counter:
            loss = step(self, *args, **kwargs)
        total += counter.get_total_flops()
        return loss

    monkeypatch.setattr(LocalStrategy, "training_step", counted)
    monkeypatch.setattr(train, "rehearse", lambda plan, task: None)  # its step is none of the training
    return _record(run(plan)), total


@pytest.mark.parametrize("algorithm", ["backprop", "forward_forward_hard"])
def test_training_costs_what_its_steps_cost(
    algorithm: str, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, total = _counted(make_plan(algorithm, max_epochs=2, warmup_steps=2), monkeypatch)
    assert record["cost"]["train_flops"] == total
    assert record["cost"]["once_flops"] == 0
    assert record["cost"]["uncounted"] == []


def test_a_part_of_every_batch_is_billed_as_such(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units behind the one that chooses learn from half of every batch."""
    plan = dataclasses.replace(make_plan("mono_forward", max_epochs=1), algorithm=MonoForward(keep=0.5))
    record, total = _counted(plan, monkeypatch)
    (stage,) = record["cost"]["stages"]
    seen = stage["samples"]
    assert stage["samples_by_unit"] == {"layer1": seen, "layer2": seen // 64 * 32 + round(seen % 64 / 2)}
    assert record["cost"]["samples"] == sum(stage["samples_by_unit"].values()) / 2
    assert (seen % 64) % 2 == 1  # half of it is rounded
    assert record["cost"]["train_flops"] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("cache", [False, True])
def test_stages_cost_what_their_steps_cost(cache: bool, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(sequential=True, patience=None, cache=cache)
    record, total = _counted(make_plan("mono_forward", schedule=schedule, max_epochs=2), monkeypatch)
    cost = record["cost"]
    assert cost["train_flops"] == total == sum(stage["train_flops"] for stage in cost["stages"])
    assert cost["once_flops"] == (1293 * 2 * 64 * 16 if cache else 0)  # one border, once for every sample
    assert [stage["units"] for stage in cost["stages"]] == [["layer1"], ["layer2"]]
    assert [stage["samples"] for stage in cost["stages"]] == [2 * 1293] * 2
    assert [stage["steps"] for stage in cost["stages"]] == [2 * 21] * 2
    assert cost["samples"] == 2 * 1293
    if cache:
        assert cost["cache_bytes"] == cost["stages"][1]["cache_bytes"] >= 1293 * (16 * 4 + 1)
    else:
        assert cost["cache_bytes"] == 0


def _graph_plan(tmp_path: Path, **other: Any) -> Plan:
    data = GraphData("karate_club", seed=0)
    return Plan(
        names={"algorithm": "forward_gnn", "dataset": "karate_club", "net": "gcn", "task": "node_classification"},
        seed=0,
        data=data,
        make_net=partial(gnn, data.shape, data.classes, hidden=(8, 8)),
        make_task=lambda net: NodeClassification(net, data.example(), data.classes),
        algorithm=ForwardGNN(),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        scheduler=None,
        schedule=Schedule(sequential=True, patience=None),
        meters=[],
        idle_s=0.0,
        runs_dir=tmp_path / "runs",
        max_epochs=10,
        trainer={"accelerator": "cpu", "devices": 1},
        probe_samples=0,
        **other,
    )


def test_a_graph_is_billed_for_its_aggregate_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _graph_plan(tmp_path, warmup_steps=1)
    record, total = _counted(plan, monkeypatch)
    cost = record["cost"]
    nodes, labelled = len(plan.data.example().inputs), len(plan.data.example().rows)  # type: ignore[attr-defined]
    assert cost["train_flops"] == pytest.approx(total, rel=1e-9)
    assert cost["once_flops"] > 0
    assert total - cost["once_flops"] == pytest.approx(10 * nodes * cost["update_flops"], rel=1e-9)
    assert cost["samples"] == 10 * labelled < 10 * nodes
    assert [(stage["samples"], stage["rows"]) for stage in cost["stages"]] == [(10 * labelled, 10 * nodes)] * 2
    assert cost["cache_bytes"] > 0


# -- a warm start ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["backprop", "forward_forward_hard"])
def test_a_warm_start_changes_nothing(algorithm: str, make_plan: MakePlan) -> None:
    plans = [make_plan(algorithm, max_epochs=1, warmup_steps=steps) for steps in (0, 3)]
    records = [_record(run(plan)) for plan in plans]
    states = [plan.algorithm.state_dict() for plan in plans]
    assert all(torch.equal(a, states[1][n]) for n, a in states[0].items() if isinstance(a, Tensor))
    extra = [plan.algorithm.get_extra_state() for plan in plans]
    assert all(torch.equal(value, extra[1][key]) for key, value in extra[0].items())
    assert records[0]["validation"] == records[1]["validation"]
    assert "notes" not in records[1] or records[1]["notes"] == []


class _OwnDraws(ImageData):
    """Ordinary loaders, whose order and noise come from generators that the data module holds."""

    def __init__(self) -> None:
        super().__init__("digits", batch_size=64, seed=0)
        self.order = torch.Generator().manual_seed(1)
        self.noise = np.random.default_rng(2)

    def train_dataloader(self) -> Any:
        inputs, targets = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(200) % 10

        def noisy(samples: list[Any]) -> tuple[Tensor, Tensor]:
            x, y = (torch.stack(part) for part in zip(*samples, strict=True))
            return x + float(self.noise.normal()), y

        return DataLoader(TensorDataset(inputs, targets), 64, shuffle=True, generator=self.order, collate_fn=noisy)


def test_neither_a_warm_start_nor_a_rehearsal_draws_from_the_data(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(warmup_steps: int) -> Tensor:
        plan = make_plan("backprop", max_epochs=1, warmup_steps=warmup_steps, data=_OwnDraws())
        run(plan)
        return torch.cat([p.detach().flatten() for p in plan.algorithm.parameters()])

    rehearsed, warm = weights(0), weights(3)
    monkeypatch.setattr(train, "rehearse", lambda plan, task: None)
    assert torch.equal(weights(0), rehearsed)
    assert torch.equal(rehearsed, warm)


def test_a_warm_start_steps_whatever_optimizer_there_is(make_plan: MakePlan) -> None:
    optimizer = partial(torch.optim.LBFGS, max_iter=2)
    record = _record(run(make_plan("backprop", max_epochs=1, warmup_steps=1, optimizer=optimizer)))
    assert record["notes"] == []


class _ReachesBack(MonoForward):
    """What it made when it was built holds on to the weights from then, whatever is copied."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        weight = next(self.blocks.parameters())
        self._push = lambda: weight.data.mul_(1.01)

    def prepare(self, batch: Batch) -> Batch:
        self._push()
        return batch


def test_a_copy_that_reaches_back_to_its_rule_does_not_change_it(make_plan: MakePlan) -> None:
    weights, accuracies = [], []
    for steps in (0, 2):
        plan = make_plan("mono_forward", max_epochs=1, warmup_steps=steps)
        plan.algorithm = _ReachesBack()
        record = _record(run(plan))
        weights.append([p.clone() for p in plan.algorithm.parameters()])
        accuracies.append(record["validation"]["accuracy"])
    assert all(map(torch.equal, *weights))
    assert accuracies[0] == accuracies[1]


class _Locked(MonoForward):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_what_cannot_be_measured_costs_its_own_figures_only(make_plan: MakePlan) -> None:
    plan = make_plan("mono_forward", max_epochs=1, warmup_steps=2)
    plan.algorithm = _Locked()
    record = _record(run(plan))
    assert record["status"] == "done"
    assert record["cost"]["train_flops"] is record["cost"]["update_flops"] is None
    assert record["cost"]["samples"] == 1293
    assert record["cost"]["optimizer_bytes"] > 0
    assert [note.partition(":")[0] for note in record["notes"]] == ["the cost of an update is unknown", "no warm-up"]


# -- what is not training ---------------------------------------------------------------------------------------------
def test_writing_checkpoints_is_not_training(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    save = pl.Trainer.save_checkpoint

    def slow(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        nonlocal now_s
        now_s += 50.0
        save(self, *args, **kwargs)
        now_s += 50.0

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", slow)
    monkeypatch.setattr(train, "EnergyMonitor", partial(EnergyMonitor, clock=lambda: now_s))
    record = _record(run(make_plan("backprop", max_epochs=1, checkpoint_s=1e-9)))
    assert now_s >= 20 * 100.0
    assert record["cost"]["train_s"] == 0.0


def test_peak_of_the_allocator_is_that_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    used, peak = 0, 0

    def allocate(size: int) -> None:
        nonlocal used, peak
        used += size
        peak = max(peak, used)

    def reset(device: Any) -> None:
        nonlocal peak
        peak = used

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    memory = _Allocated(torch.device("cuda"))
    allocate(1000)  # before training
    allocate(-900)
    memory.resume()
    allocate(50)
    allocate(-50)
    memory.resume()  # every batch says so
    memory.pause()
    allocate(800)  # validation
    allocate(-800)
    memory.resume()
    allocate(20)
    memory.pause()
    memory.pause()
    assert memory.peak == 150
    assert _Allocated(torch.device("cuda"), memory.peak).peak == 150
    cpu = _Allocated(torch.device("cpu"))
    cpu.resume()
    cpu.pause()
    assert cpu.peak is None
