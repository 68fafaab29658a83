"""``locallearn audit``: the precision it runs in, and what it prints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from locallearn.study.train import attached_task
from tests.cli.conftest import Cli


@pytest.mark.parametrize(
    ("precision", "weights", "autocast"),
    [("bf16-true", torch.bfloat16, False), ("bf16-mixed", torch.float32, True), ("64-true", torch.float64, False)],
)
def test_the_precision_of_the_trainer_reaches_the_layers(
    precision: str, weights: torch.dtype, autocast: bool, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    forward = torch.nn.Linear.forward

    def spy(self: torch.nn.Linear, x: torch.Tensor) -> Any:
        if self.training:  # not the dry runs of attaching
            seen.add((self.weight.dtype, torch.is_autocast_enabled("cpu")))
        return forward(self, x)

    def attached(plan: Any) -> Any:
        task = attached_task(plan)
        seen.clear()  # a network is tried out when a rule is attached, before the precision is there
        return task

    monkeypatch.setattr(torch.nn.Linear, "forward", spy)
    monkeypatch.setattr("locallearn.study.train.attached_task", attached)
    outcome = cli("audit", "algorithm=mono_forward", "net.hidden=[6,6]", f"trainer.precision={precision}")
    assert outcome.code == 0
    assert seen == {(weights, autocast)}
    assert precision in outcome.out
    assert "not seen: " in outcome.out
