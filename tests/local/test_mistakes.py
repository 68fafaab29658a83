"""``ll.localize``: what is given wrongly is told in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locallearn as ll
from tests.local.nets import X, Y, mlp, mobile, resnet


def test_what_is_refused() -> None:
    net = mobile()
    with pytest.raises(ValueError, match="pass example="):
        ll.localize(net, ll.MonoForward(), cuts=2)
    with pytest.raises(ValueError, match="give either cuts="):
        ll.localize(net, ll.MonoForward(), example=X)
    with pytest.raises(ValueError, match=r"write \['features'\]"):
        ll.localize(net, ll.MonoForward(), cuts="features", example=X)
    with pytest.raises(ValueError, match="algorithm is the class MonoForward, expected a rule"):
        ll.localize(net, ll.MonoForward, cuts=1, example=X)  # type: ignore[arg-type]
    local = ll.localize(net, ll.MonoForward(), cuts=["features.3"], example=X)
    with pytest.raises(ValueError, match="labels go from 0 to 10, expected class ids 0 to 9"):
        local.step(X, torch.arange(12) % 11)
    with pytest.raises(
        ValueError, match=r"block 'features_4' has a normalisation|block 'features_3' has a normalisation"
    ):
        local.step(X[:1], Y[:1])


_FIRST = nn.Linear(5, 8)


def _compiled(net: nn.Module) -> nn.Module:
    """What torch.compile makes of a network, without its import, which takes seconds."""
    wrapped = nn.Module()
    wrapped._orig_mod = net
    return wrapped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"example": torch.randn(4, 6)}, r"^Sequential cannot run the example in training mode: .*mat1 and mat2"),
        ({"example": torch.randn(0, 5)}, r"the example is empty, of shape \(0, 5\)"),
        ({"cuts": 2.0}, r"cuts is 2.0, expected names of modules, or a whole number of blocks"),
        ({"net": len}, r"net is a builtin_function_or_method, expected a torch.nn.Module"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, r"optimizer is a SGD, and every unit needs one of its own"),
        ({"cuts": ["7"]}, r"has no module '7'"),
        ({"cuts": [_FIRST]}, r"^a cut is a Linear itself, expected its name in Sequential: write '0'$"),
        ({"cuts": [nn.ReLU()]}, r"^a cut is a ReLU itself, .* Sequential, which does not contain it$"),
        ({"net": nn.Linear}, r"^net is the class Linear, expected a torch.nn.Module"),
        ({"net": _compiled(nn.Linear(5, 3))}, r"^net is compiled as a whole, .* compile='blocks'"),
        (
            {"net": nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), "cuts": 2},
            r"cuts is 2, and Sequential can be cut into no more than one block \(its last layer is the readout",
        ),
    ],
)
def test_what_is_given_wrongly_is_told(change: dict[str, Any], message: str) -> None:
    net = mlp()
    net[0] = _FIRST  # type: ignore[operator]
    given: dict[str, Any] = {"net": net, "cuts": ["0"], "example": torch.randn(4, 5), **change}
    with pytest.raises(ValueError, match=message):
        ll.localize(given.pop("net"), ll.MonoForward(), **given)


def test_one_sample_is_no_example_for_a_normalisation_and_a_key_may_be_missing() -> None:
    with pytest.raises(
        ValueError,
        match=r"training mode: Expected more than 1 value .*; give an example .*, because 'layer4.0.bn1' normalises",
    ):
        ll.localize(resnet(), ll.MonoForward(), cuts=["layer1"], example=X[:1])

    class Told(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return {"scores": super().forward(x)}

    with pytest.raises(ValueError, match=r"^output is 'scors', and Told gives scores$"):
        ll.localize(Told(*mlp()), ll.MonoForward(), cuts=1, example=torch.randn(4, 5), output="scors")


def test_batches_unlike_the_example_are_told_where_they_fail() -> None:
    local = ll.localize(mobile(), ll.MonoForward(), cuts=["features.3"], example=X)
    for wrong, message in (
        (
            X[:, :1],
            r"^inputs are torch.float32 of shape \(12, 1, 32, 32\), and the example .* \(12, 3, 32, 32\): .*channels",
        ),
        (X.double(), r"^inputs are torch.float64 of shape .* and the example .* torch.float32 of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            local.step(wrong, Y)
        with pytest.raises(ValueError, match=message):
            local.predict(wrong)
    with pytest.raises(ValueError, match=r"^inputs are torch.float32 of shape \(3, 32, 32\)"):
        local.predict(X[0])  # in which BatchNorm sees the mistake, with a ValueError of its own
    with pytest.raises(ValueError, match=r"^there are 12 inputs and 11 targets: every sample needs its own$"):
        local.step(X, Y[:11])
    with torch.no_grad(), pytest.raises(ValueError, match=r"^gradients are switched off here"):
        local.step(X, Y)
    assert local.predict(X[:3]).shape == (3, 10)  # another number of samples is nothing to refuse
    local.step(X[:5], Y[:5])


def test_what_a_forward_does_between_its_modules_is_called_so() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x).relu()).relu())

    rows, labels = torch.randn(6, 5), torch.arange(6) % 3
    for rule in (ll.Pepita(), ll.CounterCurrent()):
        with pytest.raises(
            ValueError, match=r"step that is no module of its own \(F.relu or \+, say: nn.ReLU\(\) is one\)"
        ):
            ll.localize(Plain(), rule, cuts=2, example=rows, targets=labels, optimizer=torch.optim.SGD)


def test_a_network_that_was_moved_alone_is_told_apart_from_its_rule() -> None:
    net = mlp()
    local = ll.localize(net, ll.MonoForward(), cuts=2, example=torch.randn(6, 5))
    net.double()
    with pytest.raises(ValueError, match=r"local.algorithm.to\(...\) moves all"):
        local.step(torch.randn(6, 5).double(), torch.arange(6) % 3)
    local.algorithm.to(torch.float64)
    assert local.step(torch.randn(6, 5).double(), torch.arange(6) % 3)
