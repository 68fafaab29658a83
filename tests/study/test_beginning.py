"""Weights that a training begins with are those of the earlier run, or nothing is trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from locallearn.nets import mlp
from locallearn.nets.blocks import Blocks
from locallearn.study._beginning import begin_with
from locallearn.study.train import attached_task, read_tensors, run
from tests.study.conftest import MakePlan


@pytest.fixture
def earlier(make_plan: MakePlan) -> Path:
    """A finished run of Mono-Forward, which adds weights of its own."""
    return run(make_plan("mono_forward", seed=3))


def test_a_run_of_another_rule_begins_with_the_weights_of_the_earlier_one(earlier: Path, make_plan: MakePlan) -> None:
    kept = read_tensors(earlier / "model.pt")["state_dict"]
    for place in (earlier, earlier / "model.pt"):
        task = attached_task(make_plan("backprop", init_from=place))
        for name, value in task.net.state_dict().items():
            assert torch.equal(value, kept[f"net.{name}"])
    drawn = attached_task(make_plan("backprop")).net.state_dict()
    assert not all(torch.equal(value, kept[f"net.{name}"]) for name, value in drawn.items())


def test_what_the_rule_adds_is_drawn_as_without(earlier: Path, make_plan: MakePlan) -> None:
    with_it, without = (attached_task(make_plan("mono_forward", init_from=place)) for place in (earlier, None))
    added = dict(without.algorithm.named_parameters()).keys() - {
        f"blocks.{n}" for n, _ in without.net.named_parameters()
    }
    assert added
    own = [{n: p for n, p in task.algorithm.named_parameters() if n in added} for task in (with_it, without)]
    assert all(torch.equal(value, own[1][name]) for name, value in own[0].items())


def test_a_readout_for_other_classes_stays_as_drawn(earlier: Path) -> None:
    torch.manual_seed(0)
    net = mlp((1, 8, 8), 7, hidden=[16, 16])
    readout = {name: value.clone() for name, value in net.readout.state_dict().items()}  # type: ignore[union-attr]
    begin_with(net, earlier)
    kept = read_tensors(earlier / "model.pt")["state_dict"]
    for name, value in net.state_dict().items():
        part, _, rest = name.partition(".")
        assert torch.equal(value, readout[rest] if part == "readout" else kept[f"net.{name}"])


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        ([16, 20], r"layer2\.\S+ is \(16, 16\) there and \(20, 16\) here"),
        ([16], "it has layer2"),
        ([16, 16, 16], "it has no layer3"),
    ],
)
def test_another_network_is_refused_by_name(hidden: list[int], said: str, earlier: Path, make_plan: MakePlan) -> None:
    plan = make_plan("backprop", init_from=earlier, make_net=partial(mlp, (1, 8, 8), 10, hidden=hidden))
    with pytest.raises(ValueError, match=said):
        run(plan)
    assert len(list(plan.runs_dir.iterdir())) == 1


def test_a_place_without_a_model_is_told(make_plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*model\.pt"):
        run(make_plan("backprop", init_from=tmp_path))
    (tmp_path / "model.pt").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot be read"):
        run(make_plan("backprop", init_from=tmp_path / "model.pt"))
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds no model that a run of locallearn has kept"):
        run(make_plan("backprop", init_from=tmp_path / "model.pt"))


def test_a_network_without_readout_begins_too(tmp_path: Path) -> None:
    first, second = (Blocks({"a": nn.Linear(3, 2)}) for _ in range(2))
    torch.save({"state_dict": {f"net.{name}": v for name, v in first.state_dict().items()}}, tmp_path / "model.pt")
    begin_with(second, tmp_path / "model.pt")
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
