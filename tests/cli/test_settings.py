"""Every YAML file that ships composes into a plan, alone and on top of the defaults."""

from __future__ import annotations

import pytest

from locallearn.cli.plans import make_plan
from locallearn.cli.settings import GROUPS, compose_settings, options

_EXTRAS = {("logger", "wandb"), ("logger", "mlflow")}  # these need their extra
# What a choice cannot do without.
_GRAPH = "dataset.graph={_target_:locallearn.tasks.graphs.GeneratedGraph,nodes:50}"
_WITH = {
    ("task", "link_prediction"): ["dataset=karate_club"],
    ("task", "reconstruction"): ["net=autoencoder"],
    ("dataset", "own_graph"): [_GRAPH],
    ("dataset", "generated_graph"): [_GRAPH],
}
CHOICES = [(group, name) for group in GROUPS for name in options(group) if (group, name) not in _EXTRAS]


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{group}={name}" for group, name in CHOICES])
def test_every_choice_makes_a_plan(group: str, name: str) -> None:
    plan = make_plan(*compose_settings([f"{group}={name}", *_WITH.get((group, name), ())]), "test")
    assert plan.names["algorithm"]
    assert plan.max_epochs >= 1


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_trains_what_it_is_named_after(name: str) -> None:
    plan = make_plan(*compose_settings([f"experiment={name}"]), "test")
    named = f"{plan.names['algorithm']}_{plan.names['dataset']}"
    assert name in (named, f"{named}_{plan.names['net']}")
    # A rate that falls to zero at the last epoch must be let get there.
    assert plan.scheduler is None or plan.schedule.patience is None
