"""Forward Projection and ridge from the command line: passes as stages, what a record says of them, refusals."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from locallearn.functional.ridge import gather_macs, solve_flops
from tests.cli.conftest import Cli


def _weights(folder: Path) -> dict[str, Any]:
    state = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
    return {key: value for key, value in state.items() if key.startswith("net.")}


def test_passes_are_stages_whatever_the_schedule_and_kept_outputs_change_nothing(cli: Cli) -> None:
    outcome = cli("train", "algorithm=forward_projection", "trainer.max_epochs=9", "net.readout_bias=true")
    assert outcome.code == 0, outcome.err
    record = outcome.record
    assert record["epochs"] == [1, 1, 1]
    assert record["locality"] == "forward-only"
    assert record["test"]["accuracy"] > 0.6
    stages = record["cost"]["stages"]
    labels = 2 * 10 * 16
    assert [stage["update_flops"] for stage in stages] == [
        2 * gather_macs(64, 16) + 2 * 64 * 16 + labels,
        2 * 64 * 16 + 2 * gather_macs(16, 16) + 2 * 16 * 16 + labels,
        2 * 64 * 16 + 2 * 16 * 16 + 2 * gather_macs(16, 10),
    ]
    assert [stage["once_flops"] for stage in stages] == [solve_flops(65, 16), solve_flops(17, 16), solve_flops(17, 10)]
    samples = stages[0]["rows"]
    each = sum(samples * stage["update_flops"] + stage["once_flops"] for stage in stages)
    assert record["cost"]["train_flops"] == each
    assert record["cost"]["samples"] == samples
    assert stages[0]["cache_bytes"] == 8 * (64 * 64 + 64 * 16 + 64 + 16 + 2) + 4 * (65 + 10) * 16
    assert record["cost"]["uncounted"] == []
    rows = list(csv.DictReader((outcome.folder / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    figures = {row["name"]: float(row["value"]) for row in rows}
    assert figures["layer/layer2/residual"] < 1e-9
    assert (figures["layer/layer1/lambda"], figures["layer/readout/lambda"]) == (10, 1)
    words = ("schedule=sequential", "schedule.cache=true", "net.readout_bias=true")
    cached = cli("train", "algorithm=forward_projection", *words)
    assert cached.code == 0, cached.err
    one, other = _weights(outcome.folder), _weights(cached.folder)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_ridge_chooses_its_penalty_in_a_second_pass(cli: Cli) -> None:
    outcome = cli("train", "algorithm=ridge", "algorithm.grid=[1e-3,1,1e3]", "net.readout_bias=true")
    assert outcome.code == 0, outcome.err
    record = outcome.record
    assert record["epochs"] == [1, 1]
    assert record["cost"]["uncounted"] == []
    rows = list(csv.DictReader((outcome.folder / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    figures = {row["name"]: float(row["value"]) for row in rows}
    assert figures["layer/readout/lambda"] in (1e-3, 1, 1e3)
    assert 0 < figures["layer/readout/loo_error"] < 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["algorithm=ridge", "algorithm.lambda_=-1"], "lambda_ is -1, expected a number of at least 0, or loo"),
        (["algorithm=forward_projection", "algorithm.lambda_=-0.5"], "lambda_ is -0.5, expected"),
        (
            [
                "algorithm=forward_projection",
                "+scheduler={_target_: torch.optim.lr_scheduler.ExponentialLR,_partial_: true,gamma: 0.9}",
            ],
            "ForwardProjection solves for its weights and has no learning rate to schedule: drop scheduler",
        ),
        (["algorithm=forward_projection", "algorithm.memory_gib=1e-7"], "layer 'layer1', which reads 64 numbers"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(cli: Cli, words: list[str], says: str) -> None:
    outcome = cli("train", *words)
    assert outcome.code == 2
    assert says in outcome.err
    assert "Traceback" not in outcome.err
    assert not Path("runs").exists()
