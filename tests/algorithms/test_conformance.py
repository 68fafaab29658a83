"""Every rule that comes along passes the suite that users run on theirs: one line per rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from locallearn.algorithms import Algorithm, Backprop, DeepSupervision, ForwardForward, MonoForward
from locallearn.testing import AlgorithmConformance

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "backprop": Backprop,
    "deep_supervision": DeepSupervision,
    "mono_forward": MonoForward,
    "mono_forward-ff": partial(MonoForward, prediction="ff"),
    "forward_forward": ForwardForward,
    "forward_forward-hard": partial(ForwardForward, negatives="hard"),
    "forward_forward-softmax": partial(ForwardForward, inference="softmax"),
    "forward_forward-peer": partial(ForwardForward, peer=0.03),
    "forward_forward-minimise": partial(ForwardForward, minimise=True),
}


class TestConformance(AlgorithmConformance):
    @pytest.fixture(params=ALGORITHMS)
    def make_algorithm(self, request: pytest.FixtureRequest) -> Callable[[], Algorithm]:
        return ALGORITHMS[request.param]
