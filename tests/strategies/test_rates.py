"""Learning rate schedules against their formulas."""

from __future__ import annotations

import pytest
import torch

from locallearn.strategies import constant_then_linear


@pytest.mark.parametrize("epochs", [1, 2, 7, 100])
def test_constant_then_linear_is_the_formula_of_the_matlab_code(epochs: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = constant_then_linear(optimizer, epochs)
    for epoch in range(1, epochs + 1):
        wanted = 0.5 if epoch <= epochs / 2 else 0.5 * (1 + 2 * (epochs - epoch)) / epochs
        assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] >= 0


def test_constant_then_linear_refuses_no_epochs() -> None:
    with pytest.raises(ValueError, match="epochs is 0"):
        constant_then_linear(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5), 0)
