"""The gallery: every cheat is caught, every oddity is confirmed, and nobody's rule is changed by being looked at."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from locallearn.algorithms import Algorithm, FeedbackAlignment, Locality, MonoForward
from locallearn.audit import audit
from locallearn.audit._border import Border
from locallearn.audit._examine import Findings
from locallearn.audit._judge import STRICTNESS
from locallearn.audit._replay import Batches, parties
from locallearn.batch import Batch
from tests.audit.cheats import _GLOBAL, _REGISTRY, CHEATS, HiddenAfterTheFirstPass, attached
from tests.audit.oddities import ODDITIES

pytestmark = pytest.mark.once

_DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(torch.randn(16, 12, generator=_DRAW), torch.randint(3, (16,), generator=_DRAW))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    _GLOBAL.clear()
    _REGISTRY.clear()


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_caught(name: str) -> None:
    make, claim = CHEATS[name]
    warmup = 56 if "Sixty" in name else 6
    slow = any(word in name for word in ("ForwardMode", "Differences"))  # a pass for every weight
    batches, warmup = (2, 1) if slow else (8, warmup)
    result = audit(attached(make(), BATCH), BATCH, batches=batches, warmup=warmup)
    assert not result.confirmed
    assert result.claim is claim
    assert str(claim) in result.reason


def test_layers_that_leave_the_carrier_are_refused_by_the_rule_itself() -> None:
    with pytest.raises(ValueError, match=r"'layer1\.0'"):
        audit(attached(HiddenAfterTheFirstPass(), BATCH), BATCH, batches=1, warmup=0)


@pytest.mark.parametrize("name", ODDITIES)
def test_an_oddity_is_confirmed(name: str) -> None:
    make, claim = ODDITIES[name]
    result = audit(attached(make(), BATCH), BATCH, batches=8, warmup=6)
    assert result.confirmed, result.reason
    assert result.verdict is claim


def test_the_gallery_is_large() -> None:
    assert len(CHEATS) >= 20
    assert len(ODDITIES) >= 10


@pytest.mark.parametrize("name", ["NumpyNoise", "ByAClosureOfItsOwnBlock", "WithBatchNorm", "ChangesItsInputs"])
def test_the_rule_its_data_and_all_generators_are_left_as_they_were(name: str) -> None:
    algorithm = attached(ODDITIES[name][0](), BATCH)
    before = {key: value.clone() for key, value in algorithm.state_dict().items() if isinstance(value, Tensor)}
    inputs = BATCH.inputs.clone()
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    audit(algorithm, BATCH, batches=3, warmup=2)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert torch.equal(inputs, BATCH.inputs)
    after = algorithm.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None for p in algorithm.parameters())


class _NotFinite(MonoForward):
    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        return super().local_loss(index, output, batch) + (0.0 * output.sum()).sqrt()


def test_a_gradient_that_is_not_finite_is_told_and_no_difference_is_made_of_it() -> None:
    result = audit(attached(_NotFinite(), BATCH), BATCH, batches=3, warmup=2)
    assert not result.confirmed
    assert "not finite" in result.reason
    assert "changes with" not in result.reason


class _NotFiniteLater(_NotFinite):
    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        self.batches_seen += index == 0
        wrong = self.batches_seen > 3
        return super().local_loss(index, output, batch) if wrong else MonoForward.local_loss(self, index, output, batch)


def test_the_step_is_told_from_which_on_gradients_are_not_finite() -> None:
    result = audit(attached(_NotFiniteLater(), BATCH), BATCH, batches=3, warmup=2)
    assert "'layer1' are not finite from step 3 on" in result.reason


def test_what_acts_through_another_unit_is_left_out() -> None:
    algorithm = attached(MonoForward(), BATCH)
    known = parties(algorithm)
    border = Border(algorithm, Batches([BATCH], 1))
    late = {("layer2", "layer1"): 1, ("layer3", "layer2"): 1, ("layer3", "layer1"): 2}
    assert Findings(algorithm, known, border, since=late).directly(known["layer1"]) == ["layer2"]
    at_once = late | {("layer3", "layer1"): 1}
    assert Findings(algorithm, known, border, since=at_once).directly(known["layer1"]) == ["layer2", "layer3"]


def test_a_rate_too_large_is_made_smaller() -> None:
    def wild(algorithm: Algorithm) -> dict[str, torch.optim.Optimizer]:
        return {unit: torch.optim.SGD(groups, lr=1e30) for unit, groups in algorithm.units().items()}

    assert audit(attached(MonoForward(), BATCH), BATCH, batches=3, warmup=3, optimizers=wild).confirmed


_ORDER = [Locality.GLOBAL, Locality.FEEDBACK, Locality.COUPLED, Locality.GROUP_LOCAL, Locality.LAYER_LOCAL]


def test_the_order_of_claims_is_total() -> None:
    assert sorted(STRICTNESS, key=STRICTNESS.__getitem__) == _ORDER


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("FrozenInTheMiddle", Locality.LAYER_LOCAL), ("ScaledByTheBlockAbove", Locality.COUPLED)],
)
def test_a_verdict_confirms_what_is_not_stricter_and_nothing_else(name: str, verdict: Locality) -> None:
    for claim in _ORDER:
        rule = type("Rule", (ODDITIES[name][0],), {"locality": property(lambda self, claim=claim: claim)})
        result = audit(attached(rule(), BATCH), BATCH, batches=2, warmup=1)
        assert result.verdict is verdict
        assert result.confirmed is (_ORDER.index(claim) <= _ORDER.index(verdict)), claim


def test_what_cannot_be_seen_is_said() -> None:
    result = audit(attached(MonoForward(), BATCH), BATCH, batches=1, warmup=0)
    assert result.confirmed
    assert any("recognises the audit" in limit for limit in result.limits)


class _UsedMemory(TorchDispatchMode):
    """New memory holds something else every now and then, as it does in a process that has run for a while."""

    def __init__(self, draw: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draw = draw

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "empty" in func._opname:
            out.fill_(float(torch.randint(2, (), generator=self._draw)))
        return out


@pytest.mark.parametrize("seed", range(3))
def test_what_lies_in_new_memory_is_no_part_of_a_forward_pass(seed: int) -> None:
    """The mirror's noise is drawn into such memory, before anything is computed."""
    draw = torch.Generator().manual_seed(seed)
    rule = attached(FeedbackAlignment("weight_mirror"), BATCH)
    result = audit(rule, BATCH, batches=1, warmup=1, context=lambda: _UsedMemory(draw))
    assert result.confirmed, result.reason


def test_several_batches_are_taken() -> None:
    some = [Batch(BATCH.inputs[i : i + 8], BATCH.targets[i : i + 8]) for i in (0, 8)]
    assert audit(attached(MonoForward(), BATCH), iter(some), batches=3, warmup=2).confirmed
    with pytest.raises(ValueError, match="needs a Batch"):
        audit(attached(MonoForward(), BATCH), [])
    with pytest.raises(ValueError, match="at least 1"):
        audit(attached(MonoForward(), BATCH), BATCH, batches=0)


def test_batches_are_the_same_the_old_ones_and_new_ones() -> None:
    run = list(Batches([BATCH], 10))
    assert run[1] is run[0]
    assert run[4] is run[3]
    assert run[5] is not run[0]
    assert torch.equal(run[5].inputs, BATCH.inputs)
    new = [run[2], run[3], run[7], run[8]]
    assert all(not torch.equal(a.inputs, b.inputs) for a, b in itertools.combinations(new, 2))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(run, Batches([BATCH], 10), strict=True))


@pytest.mark.parametrize("rows", [torch.tensor([0, 1, 3]), torch.tensor([True, True, False, True])])
def test_nodes_without_a_label_never_lend_it_to_others(rows: Tensor) -> None:
    from locallearn.audit._effects import _other

    graph = Batch(torch.zeros(4, 2), torch.tensor([0, 1, -1, 2]), (torch.zeros(2, 0, dtype=torch.long),), rows)
    assert _other(graph).tolist() == [2, 0, -1, 1]
