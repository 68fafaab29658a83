"""Every YAML file that ships composes into a plan, alone and on top of the defaults."""

from __future__ import annotations

import pytest

from locallearn.cli import _GROUPS, _compose, _options, _plan

_EXTRAS = {("logger", "wandb"), ("logger", "mlflow")}  # these need their extra
CHOICES = [(group, name) for group in _GROUPS for name in _options(group) if (group, name) not in _EXTRAS]


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{group}={name}" for group, name in CHOICES])
def test_every_choice_makes_a_plan(group: str, name: str) -> None:
    plan = _plan(*_compose([f"{group}={name}"]), "test")
    assert plan.names["algorithm"]
    assert plan.max_epochs >= 1


@pytest.mark.parametrize("name", _options("experiment"))
def test_every_experiment_trains_what_it_is_named_after(name: str) -> None:
    plan = _plan(*_compose([f"experiment={name}"]), "test")
    assert name == f"{plan.names['algorithm']}_{plan.names['dataset']}"
    assert plan.scheduler is not None
    assert plan.schedule.patience is None  # a rate that falls to zero at the last epoch must be let get there
