"""Every YAML file that ships composes into a plan, alone and on top of the defaults."""

from __future__ import annotations

import pytest

from locallearn.cli.arms import Arm
from locallearn.cli.plans import make_plan
from locallearn.cli.settings import GROUPS, compose_settings, options

_EXTRAS = {("logger", "wandb"), ("logger", "mlflow"), ("logger", "aim")}  # these need their extra
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
    # What an analysis, a size or a kind adds to the name.
    of_its_own = ("emergent_", "_4x2000", "_ce", "_dfa", "_guesses", "_unsupervised")
    plain = next((name.removeprefix(part).removesuffix(part) for part in of_its_own if part in name), name)
    plain = plain.replace("lg_fg_a_", "forward_gradient_")  # what the paper calls these settings of it
    assert plain in (named, f"{named}_{plan.names['net']}")
    # A rate that falls to zero at the last epoch must be let get there.
    assert plan.scheduler is None or plan.schedule.patience is None


def test_what_an_experiment_sets_of_its_algorithm_is_not_for_another_one() -> None:
    alone, _ = compose_settings(["algorithm=backprop"])
    words = ["experiment=counter_current_mnist", "algorithm=backprop"]
    cfg, choices = compose_settings(words)
    assert cfg.algorithm == alone.algorithm
    assert choices["algorithm"] == "backprop"
    assert list(cfg.net.hidden) == [256] * 5  # everything else is the experiment's
    assert cfg.optimizer.lr == 2.0
    make_plan(cfg, choices, "test")


def test_an_experiment_keeps_its_own_algorithm_and_what_is_typed_goes_over_it() -> None:
    own = ["experiment=counter_current_mnist", "algorithm=counter_current"]
    assert compose_settings(own)[0].algorithm.clip == 0.5
    assert compose_settings([*own, "algorithm.clip=0.3"])[0].algorithm.clip == 0.3
    other = ["experiment=counter_current_mnist", "algorithm=pepita", "algorithm.variant=hebbian"]
    assert compose_settings(other)[0].algorithm.variant == "hebbian"


@pytest.mark.parametrize(
    ("arm", "variant"),
    [
        ("forward_forward", None),
        ("forward_forward(loss=symba)", "loss=symba"),
        ("forward_forward(recurrent={steps:4,damping:0.2})", "recurrent=4, recurrent={steps:4,damping:0.2}"),
        ("layer_collaboration(gamma=all)", "gamma=all"),
        ("layer_collaboration( gamma = all )", "gamma=all"),
        ("local_heads(head=conv1,loss=predsim,width=0.5)", "head=conv1, loss=predsim, width=0.5"),
        ("cafo(blocks=random,predictor=mse)", "random-mse"),
    ],
)
def test_kinds_of_a_rule_have_rows_of_their_own_with_every_choice_named_once(arm: str, variant: str | None) -> None:
    """The same by ``compare`` and by ``train``, or runs of both would be averaged or stand apart."""
    by_compare = Arm(arm)
    assert make_plan(*compose_settings(by_compare.overrides), "test", arm=by_compare).variant == variant
    alone = make_plan(*compose_settings(by_compare.overrides), "test").variant
    assert alone is variant or alone in variant


def test_a_run_is_of_the_data_set_that_its_settings_name() -> None:
    """``dataset.name`` leaves the group's choice what it was, and two data sets must never share a row."""
    for words, name in ((["dataset=mnist"], "mnist"), (["dataset=mnist", "dataset.name=digits"], "digits")):
        assert make_plan(*compose_settings(words), "").names["dataset"] == name
    assert make_plan(*compose_settings(["dataset=vowels"]), "").names["dataset"] == "vowels"  # it has no name
