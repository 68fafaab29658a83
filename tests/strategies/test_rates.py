"""Learning rate schedules against their formulas."""

from __future__ import annotations

import pytest
import torch

from locallearn.strategies import constant_then_linear
from locallearn.strategies.rates import multistep_with_first_decay


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


def _decaying(rate: float = 0.5, decay: float = 0.03) -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate, weight_decay=decay)


@pytest.mark.parametrize("epochs", [1, 3])
def test_weight_decay_falls_once_after_the_first_epochs_and_rates_at_the_milestones(epochs: int) -> None:
    optimizer = _decaying()
    scheduler = multistep_with_first_decay(optimizer, [2, 5], 0.1, factor=0.003, epochs=epochs)
    for epoch in range(8):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.1 ** ((epoch >= 2) + (epoch >= 5)))
        wanted = 0.03 if epoch < epochs else 0.03 * 0.003
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(wanted)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_resumed_decay_is_exact(stop: int) -> None:
    """New objects with the old states, as the Trainer makes them, at any epoch."""
    seen: dict[str, list[tuple[float, float]]] = {"whole": [], "resumed": []}
    for kind, values in seen.items():
        optimizer = _decaying()
        scheduler = multistep_with_first_decay(optimizer, [2], 0.5, factor=0.1)
        for epoch in range(5):
            if kind == "resumed" and epoch == stop:
                states = optimizer.state_dict(), scheduler.state_dict()
                optimizer = _decaying()
                scheduler = multistep_with_first_decay(optimizer, [2], 0.5, factor=0.1)
                optimizer.load_state_dict(states[0])
                scheduler.load_state_dict(states[1])
            values.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))
            optimizer.step()
            scheduler.step()
    assert seen["whole"] == seen["resumed"]
    assert seen["whole"][0][1] == 0.03
    assert seen["whole"][-1] == (0.25, pytest.approx(0.003))


def test_first_decay_refuses_no_epochs_and_a_negative_factor() -> None:
    with pytest.raises(ValueError, match="epochs is 0"):
        multistep_with_first_decay(_decaying(), [2], 0.5, factor=0.1, epochs=0)
    with pytest.raises(ValueError, match=r"factor is -0\.1"):
        multistep_with_first_decay(_decaying(), [2], 0.5, factor=-0.1)
