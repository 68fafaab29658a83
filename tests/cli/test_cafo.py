"""Cascaded Forward from the command line: one epoch of a closed form, stages, what a record says of them, refusals."""

from __future__ import annotations

import csv

import pytest

from locallearn.functional import cafo
from tests.cli.conftest import Cli


def test_a_closed_form_is_solved_in_training_and_ends_after_an_epoch(cli: Cli) -> None:
    outcome = cli(
        "train", "algorithm=cafo", "algorithm.predictor=mse", "trainer.max_epochs=9", "dataset.batch_size=100"
    )
    assert outcome.code == 0, outcome.err
    record = outcome.record
    assert record["epochs"] == [1]
    assert (record["variant"], record["locality"]) == ("random-mse", "layer-local")
    assert record["test"]["accuracy"] > 0.5
    rows = list(csv.DictReader((outcome.folder / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    figures = {row["name"]: float(row["value"]) for row in rows}
    assert figures["layer/layer1/cholesky"] == figures["layer/layer2/cholesky"] == 1
    assert figures["layer/layer2/residual"] < 1e-6
    samples = record["cost"]["samples"]
    forward = 64 * 16 + 16 * 16
    assert record["cost"]["update_flops"] == 2 * (forward + 2 * cafo.gather_macs(16, 10))
    assert record["cost"]["once_flops"] == 2 * cafo.solve_flops(16, 10)
    assert record["cost"]["train_flops"] == samples * record["cost"]["update_flops"] + record["cost"]["once_flops"]
    assert record["cost"]["uncounted"] == []
    assert record["cost"]["extra_params"] == 2 * 16 * 10
    assert (outcome.folder / "model.pt").stat().st_size < 60_000  # no sums in it
    again = cli("predict", str(outcome.folder))
    assert again.code == 0, again.err


def test_blocks_are_taught_then_frozen_then_read(cli: Cli) -> None:
    words = (
        "algorithm=cafo",
        "algorithm.blocks=dfa",
        "schedule=sequential",
        "trainer.max_epochs=3",
        "algorithm.cache=true",
    )
    outcome = cli("train", *words)
    assert outcome.code == 0, outcome.err
    record = outcome.record
    assert record["epochs"] == [3, 3]
    assert record["locality"] == "feedback"
    stages = record["cost"]["stages"]
    assert [stage["units"] for stage in stages] == [["layer1", "layer2"], ["layer1_predictor", "layer2_predictor"]]
    rows = stages[1]["rows"]
    assert stages[1]["update_flops"] == 2 * cafo.predictor_macs([16, 16], 10)  # blocks ran once
    assert stages[1]["once_flops"] == rows / 3 * 2 * (64 * 16 + 16 * 16)
    assert stages[0]["cache_bytes"] == 0 < stages[1]["cache_bytes"]
    assert stages[1]["cache_bytes"] <= 1.1 * rows / 3 * (2 * 16 * 4 + 2)


def test_a_closed_form_over_taught_blocks_takes_one_epoch_after_theirs(cli: Cli) -> None:
    outcome = cli(
        "train",
        "algorithm=cafo",
        "algorithm.blocks=dfa",
        "algorithm.predictor=mse",
        "schedule=sequential",
        "trainer.max_epochs=3",
    )
    assert outcome.code == 0, outcome.err
    assert outcome.record["epochs"] == [3, 1]
    assert outcome.record["test"]["accuracy"] > 0.5


def test_one_predictor_after_the_other_each_to_its_own_end(cli: Cli) -> None:
    outcome = cli("train", "algorithm=cafo", "schedule=sequential", "schedule.cache=true", "trainer.max_epochs=2")
    assert outcome.code == 0, outcome.err
    stages = outcome.record["cost"]["stages"]
    assert [stage["units"] for stage in stages] == [["layer1"], ["layer2"]]
    assert [stage["update_flops"] for stage in stages] == [2 * cafo.predictor_macs([16], 10)] * 2
    assert outcome.record["epochs"] == [2, 2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["algorithm.predictor=mae"], "expected 'mse' or 'ce' or 'sparsemax'"),
        (["algorithm.predictor=mse", "net.hidden=[50000]"], "GiB in float64"),
        (["algorithm.blocks=dfa", "algorithm.cache=true"], "schedule=sequential"),
    ],
)
def test_what_cannot_be_trained_is_told_in_one_sentence(words: list[str], says: str, cli: Cli) -> None:
    outcome = cli("train", "algorithm=cafo", *words)
    assert outcome.code == 2
    assert says in outcome.err
    assert "Traceback" not in outcome.err
