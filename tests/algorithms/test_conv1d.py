"""Networks of one-dimensional convolutions: the same as two-dimensional ones whose maps have one column."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import locallearn as ll
from locallearn.algorithms import (
    MAN,
    CaFo,
    DeepSupervision,
    ForwardForward,
    ForwardGradient,
    LocalHeads,
    ScalableForwardForward,
    ZerothOrder,
)
from locallearn.algorithms.base import Algorithm
from locallearn.losses import SimilarityLoss
from locallearn.nets.heads import LinearHead
from locallearn.nets.layout import Signal

LENGTH = 21  # odd, so that windows need padding


def _flat(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU()),
        *(nn.Conv1d(8, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 4)),
    )


def _column(norm: bool = True) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, (3, 1), padding=(1, 0)), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()),
        *(nn.Conv2d(8, 12, (3, 1), padding=(1, 0)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )


def _poured(flat: Tensor, like: Tensor) -> Tensor:
    """A weight of the one network as it is in the other: kernels stand in the middle column, the rest of which reads zeros."""
    if flat.ndim == like.ndim:
        assert flat.shape == like.shape
        return flat.clone()
    made = torch.zeros_like(like)
    made[..., like.shape[-1] // 2] = flat
    return made


def _data(samples: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(samples, 2, LENGTH, generator=generator), torch.arange(samples) % 4


def _local(net: nn.Module, rule: Algorithm, x: Tensor) -> Any:
    return ll.localize(net, rule, cuts=["1"], example=x, optimizer=partial(torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (LocalHeads, {}),
        (LocalHeads, {"head_limit": 30}),
        (LocalHeads, {"head": "conv1"}),
        (LocalHeads, {"loss": "sim"}),
        (LocalHeads, {"loss": "predsim", "beta": 0.5, "head_limit": 60, "similarity_side": 7}),
        (DeepSupervision, {"head_limit": 30}),
        (DeepSupervision, {"head": "conv1"}),
        (CaFo, {"normalise": True}),
        (CaFo, {"blocks": "dfa"}),
        (ForwardForward, {}),
        (ForwardForward, {"loss": "channelwise"}),
        (ForwardGradient, {"losses": "local", "perturb": "weights"}),
        (ForwardGradient, {"losses": "local", "perturb": "activities", "groups": 2, "tangents": 2}),
        (ForwardGradient, {"guess": "local", "simulated": True}),
        (ForwardGradient, {"guess": "local", "simulated": True, "head": "mlp", "head_width": 6}),
        (ZerothOrder, {"losses": "local", "head_limit": 30}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_as_a_map_of_one_column(rule: Any, settings: dict[str, Any]) -> None:
    x, y = _data()
    norm = settings.get("perturb") != "activities"  # which needs samples that do not see one another
    flat = _local(_flat(norm), rule(**settings), x)
    column = _local(_column(norm), rule(**settings), x[..., None])
    pairs = list(zip(flat.algorithm.parameters(), column.algorithm.parameters(), strict=True))
    for given, other in pairs:
        other.data = _poured(given.data, other)
    before = [p.detach().clone() for p in flat.algorithm.parameters()]
    for _ in range(3):
        losses, others = flat.step(x, y), column.step(x[..., None], y)
        assert losses.keys() == others.keys()
        for name, loss in losses.items():
            assert float(loss) == pytest.approx(float(others[name]), rel=1e-4), name
    for given, other in pairs:
        torch.testing.assert_close(_poured(given.data, other), other.data, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(flat.predict(x), column.predict(x[..., None]), rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, flat.algorithm.parameters(), strict=True))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        *((LocalHeads(head=head), f"head={head} reads maps") for head in ("1c2f", "dgl", "man", "mirror", "auglocal")),
        (LocalHeads(head="token"), "head=token reads tokens"),
        (MAN(), "head=man reads maps"),
        (DeepSupervision(head="dgl"), "head=dgl reads maps"),
        (ScalableForwardForward(), "class maps of maps"),
        (ForwardGradient(guess="local", head="cnn"), "a cnn head reads maps"),
    ],
)
def test_heads_of_two_dimensions_are_refused(rule: Algorithm, words: str) -> None:
    x, _ = _data()
    with pytest.raises(ValueError, match=rf"{words}[^\n]*\((8|12), {LENGTH}\)") as refusal:
        _local(_flat(), rule, x)
    assert "block '" in str(refusal.value)
    assert "tokens of shape (8" not in str(refusal.value)


class Patches(nn.Module):
    """Tokens that a one-dimensional convolution makes, as many as they are wide."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv1d(2, 8, 3, stride=3)
        self.first = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.second = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.second(self.first(self.patch(x).transpose(1, 2)))
        scores: Tensor = self.last(tokens.mean(1))
        return scores


def test_tokens_stay_tokens() -> None:
    x, y = torch.randn(12, 2, 24), torch.arange(12) % 4
    local = ll.localize(Patches(), LocalHeads(head_limit=8), cuts=["patch", "first"], example=x)
    convolved, mixed = local.algorithm.heads.projections
    assert isinstance(convolved.pool, nn.AvgPool1d)  # behind the convolution, turned round by the next block
    seen: list[tuple[Tensor, Tensor]] = []
    mixed.pool.register_forward_hook(lambda module, given, made: seen.append((given[0].mean(1), made)))
    local.step(x, y)
    assert seen[0][1].shape == (12, 8)
    assert torch.equal(*seen[0])
    ll.localize(Patches(), LocalHeads(head="token"), cuts=["first"], example=x).step(x, y)


def test_modules_by_hand() -> None:
    values = torch.randn(5, 8, 12)
    head = LinearHead(Signal(8, 12), 3, limit=32)  # a window of four positions
    wanted = values.unflatten(2, (3, 4)).mean(3).flatten(1) @ head.projection.T
    torch.testing.assert_close(head(values), wanted)
    loss = SimilarityLoss(Signal(8, 12), classes=3)
    kernel = loss.layer.weight
    padded = nn.functional.pad(values, (1, 1))
    made = torch.stack([torch.einsum("nck,dck->nd", padded[:, :, i : i + 3], kernel) for i in range(12)], 2).std(2)
    wanted = (torch.corrcoef(made) - torch.corrcoef(torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])])).square().mean()
    torch.testing.assert_close(loss(values, torch.tensor([0, 1, 2, 0, 1])), wanted)
