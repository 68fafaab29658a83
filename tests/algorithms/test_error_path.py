"""What autograd's graph shows of the way an error takes, in every training pass of the feedback alignment family."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from locallearn.algorithms import Algorithm, Backprop, FeedbackAlignment, ProductFeedbackAlignment
from locallearn.nets import Blocks
from tests.algorithms.chains import CLASSES, ROWS, attached, gradients_of

TOLD = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
RULES: list[Callable[[], Algorithm]] = [
    FeedbackAlignment,
    lambda: FeedbackAlignment("dfa"),
    lambda: ProductFeedbackAlignment(2),
]


class Odd(nn.Module):
    """A block that does what a function says, with a linear layer, a weight and a fixed matrix at hand."""

    def __init__(
        self, run: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...] = (12, 12), late: bool = False
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.run = run
        self.late = late
        self.layer = nn.Linear(12, 12)
        self.other = nn.Linear(12, 12)
        self.weight = nn.Parameter(torch.randn(shape, generator=draw))
        self.register_buffer("fixed", torch.randn(12, 12, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x) if self.training or not self.late else self.layer(x)


def _around(layer: nn.Module) -> Blocks:
    above = nn.Sequential(nn.Tanh(), nn.Linear(12, 12))
    return Blocks({"one": nn.Linear(12, 12), "odd": layer, "two": above}, nn.Linear(12, CLASSES))


class Hand(torch.autograd.Function):
    """A linear layer of somebody's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return delta @ weight, delta.T @ x


class Keeps(torch.autograd.Function):
    """A product with something that its context keeps, wherever it is in there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, place: Callable[[Tensor], Any], back: Callable[[Any], Tensor]
    ) -> Tensor:
        ctx.kept, ctx.back = place(matrix), back
        return x @ matrix

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None]:
        return delta @ ctx.back(ctx.kept).T, None, None, None


class Swish(torch.autograd.Function):
    """An activation that keeps what it read, in another form, and a figure for every column."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.turned, ctx.columns, ctx.mask = x.T, torch.ones(1, x.shape[1], dtype=x.dtype), torch.ones(3, 5) > 0
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        sigmoid = x.sigmoid()
        return delta * (sigmoid + x * sigmoid * (1 - sigmoid)) * ctx.columns


class Remade(torch.autograd.Function):
    """Checkpointing of somebody's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        result: Tensor = module(x)
        return result

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), delta)
        return x.grad, None


class Sign(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return delta


def _quantised(weight: Tensor) -> Tensor:
    return weight + (torch.round(8 * weight) / 8 - weight).detach()


def _without_gradients(odd: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return odd.layer(x)


def _recomputed(odd: Any, x: Tensor) -> Tensor:
    """What is saved is numbered, and made again from the input when it is asked for."""
    count = [0]

    def pack(tensor: Tensor) -> int:
        count[0] += 1
        return count[0] - 1

    def unpack(index: int) -> Tensor:
        made: list[Tensor] = []
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: made.append(t) or t, lambda t: t):
            odd.layer(x.detach().requires_grad_())
        return made[index]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return odd.layer(x)


WRONG: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], str]] = {
    "checkpoint": (lambda o, x: checkpoint(o.layer, x, use_reentrant=False), (1,), r"'odd\.layer' runs once more"),
    "reentrant": (
        lambda o, x: checkpoint(o.layer, x, use_reentrant=True),
        (1,),
        r"'odd\.layer' was run without gradients",
    ),
    "checkpointed function": (
        lambda o, x: checkpoint(lambda z: F.linear(z, o.layer.weight), x, use_reentrant=False),
        (1,),
        r"'odd\.layer' runs once more",
    ),
    "checkpoint of one's own": (lambda o, x: Remade.apply(x, o.layer), (1,), r"'odd\.layer' was run without gradients"),
    "without gradients": (lambda o, x: x + _without_gradients(o, x), (1,), r"'odd\.layer' was run without gradients"),
    "drop connect": (lambda o, x: F.linear(x, F.dropout(o.layer.weight)), (1,), r"layer 'odd\.layer' is also used"),
    "noise": (lambda o, x: F.linear(x, o.layer.weight + torch.rand(12, 1)), (1,), r"layer 'odd\.layer' is also used"),
    "quantised": (lambda o, x: F.linear(x, _quantised(o.layer.weight)), (1,), r"layer 'odd\.layer' is also used"),
    "other weights": (
        lambda o, x: torch.func.functional_call(o.layer, {n: 2 * p for n, p in o.layer.named_parameters()}, (x,)),
        (1,),
        r"layer 'odd\.layer' is also used",
    ),
    "detached": (lambda o, x: F.linear(x, o.layer.weight.detach()), (1,), r"after layer 'one' multiplies"),
    "fixed": (lambda o, x: x @ o.fixed, (1,), r"after layer 'one' multiplies"),
    "fixed kernel": (
        lambda o, x: F.conv1d(x[:, None], o.fixed[:1, None, :3], padding=1)[:, 0],
        (1,),
        "after layer 'one'",
    ),
    "in training only": (lambda o, x: o.layer(x) + o.other(x), (1,), r"'odd\.other' \(Linear\)"),
    "product": (lambda o, x: x @ o.weight, (12, 12), r"'odd' \(Odd\).*MmBackward"),
    "einsum": (lambda o, x: torch.einsum("ni,oi->no", x, o.weight), (12, 12), r"'odd' \(Odd\)"),
    "bilinear": (lambda o, x: F.bilinear(x, torch.ones_like(x), o.weight), (12, 12, 12), r"'odd' \(Odd\)"),
    "low rank": (lambda o, x: F.linear(x, o.weight @ o.weight.T), (12, 2), r"'odd' \(Odd\)"),
    "basis": (lambda o, x: F.linear(x, o.fixed @ o.weight), (12, 12), r"'odd' \(Odd\)"),
    "spread": (lambda o, x: (x[:, None] * o.weight).sum(-1), (12, 12), r"'odd' \(Odd\)"),
    "repeated": (lambda o, x: (x[:, None].repeat(1, 12, 1) * o.weight).mean(-1), (12, 12), r"'odd' \(Odd\)"),
    "one row": (lambda o, x: x * (x * o.weight).sum(-1, keepdim=True), (12,), r"'odd' \(Odd\)"),
    "one row, shifted": (lambda o, x: x * (2 * (x * o.weight) + 0.1).sum(-1, keepdim=True), (12,), r"'odd' \(Odd\)"),
    "one row, masked": (lambda o, x: x * F.dropout(x * o.weight).sum(-1, keepdim=True), (12,), r"'odd' \(Odd\)"),
    "one row, in parts": (lambda o, x: (x * o.weight).view(-1, 3, 4).sum(-1).repeat(1, 4), (12,), r"'odd' \(Odd\)"),
    "one row, turned": (
        lambda o, x: (x[:, :, None] * o.weight).permute(0, 2, 1).mean(-1).repeat(1, 12),
        (12, 1),
        r"'odd' \(Odd\)",
    ),
    "prototypes": (lambda o, x: (x[:, None] - o.weight).square().sum(-1), (12, 12), r"'odd' \(Odd\).*PowBackward"),
    "prototypes by product": (
        lambda o, x: ((x[:, None] + o.weight) * (x[:, None] + o.weight)).mean(-1),
        (12, 12),
        r"'odd' \(Odd\).*MulBackward",
    ),
    "distances": (lambda o, x: (x[:, None] - o.weight).abs().sum(-1), (12, 12), r"'odd' \(Odd\)"),
    "norms": (lambda o, x: (x[:, None] - o.weight).norm(dim=-1), (12, 12), r"'odd' \(Odd\)"),
    "by hand": (lambda o, x: Hand.apply(x, o.weight), (12, 12), r"'odd' \(Odd\).*HandBackward"),
    "running sums": (lambda o, x: (x * o.weight).cumsum(-1), (12,), r"'odd' \(Odd\).*MulBackward"),
    "windows": (lambda o, x: F.avg_pool1d((x * o.weight)[:, None], 3, 1, 1)[:, 0], (12,), r"'odd' \(Odd\)"),
    "windows of maps": (
        lambda o, x: F.avg_pool2d(x.view(-1, 3, 2, 2) * o.weight, 2).flatten(1).repeat(1, 4),
        (2, 2),
        r"'odd' \(Odd\)",
    ),
    "one window": (
        lambda o, x: F.adaptive_avg_pool2d(x.view(-1, 2, 2, 3) * o.weight, (1, 2)).flatten(1).repeat(1, 3),
        (2, 3),
        r"'odd' \(Odd\)",
    ),
    "spectrum": (
        lambda o, x: torch.fft.irfft(torch.fft.rfft(x) * o.weight, n=12),
        (7,),
        r"'odd' \(Odd\)",
    ),
    "kept on a context": (
        lambda o, x: Keeps.apply(x, o.fixed, lambda m: m, lambda m: m),
        (1,),
        "after layer 'one' multiplies",
    ),
    "kept in a list": (
        lambda o, x: Keeps.apply(x, o.fixed, lambda m: [{"m": m}], lambda m: m[0]["m"]),
        (1,),
        "after layer 'one' multiplies",
    ),
    "kept in a function": (
        lambda o, x: Keeps.apply(x, o.fixed, lambda m: lambda: m, lambda f: f()),
        (1,),
        "after layer 'one' multiplies",
    ),
    "kept in a module": (
        lambda o, x: Keeps.apply(x, o.other.weight.detach(), lambda m: o.other, lambda m: m.weight.detach()),
        (1,),
        r"'odd\.other' \(Linear\)",
    ),
    "latent": (lambda o, x: (o.weight @ x.T).T.repeat(1, 3), (4, 12), r"'odd' \(Odd\)"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WRONG)
def test_what_shows_in_training_only_is_refused_by_name(name: str, rule: Callable[[], Algorithm]) -> None:
    """When the rule was attached, in eval mode, all was well; the first training pass says what is not."""
    run, shape, message = WRONG[name]
    if "runs once more" in message and not TOLD:
        pytest.skip("this PyTorch does not tell in the forward pass that something is checkpointed")
    algorithm = attached(_around(Odd(lambda o, x: run(o, x.double()), shape, late=True)), rule())
    with pytest.raises(ValueError, match=message):
        next(algorithm.updates(ROWS))


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_that_was_not_seen_is_refused_by_the_backward_pass(
    rule: Callable[[], Algorithm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of PyTorch 2.6, which does not tell that what is saved will be made once more."""
    monkeypatch.setattr("locallearn.algorithms.feedback_alignment.inside_checkpoint", lambda: False)
    checkpointed = Odd(lambda o, x: checkpoint(o.layer, x, use_reentrant=False), (1,), late=True)
    (update,) = attached(_around(checkpointed), rule()).updates(ROWS)
    with pytest.raises(RuntimeError, match=r"lost its feedback weights|recomputed|different number of tensors"):
        update.backward()


def test_a_forward_pass_that_is_made_again_unseen_does_not_pass_for_feedback() -> None:
    """The plain layer saves W in the place of B, and in its shape."""
    algorithm = attached(_around(Odd(_recomputed, late=True)), FeedbackAlignment())
    (update,) = algorithm.updates(ROWS)
    with pytest.raises(RuntimeError, match="has lost its feedback weights"):
        update.backward()


@pytest.mark.parametrize(
    "layer",
    [
        nn.utils.parametrizations.spectral_norm(nn.Linear(12, 12)),
        nn.GRU(12, 12),
        nn.GRUCell(12, 12),
        nn.Sequential(nn.Unflatten(1, (12, 1, 1, 1)), nn.Conv3d(12, 12, 1), nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, (1, 12)), nn.TransformerEncoderLayer(12, 2, 8, batch_first=True), nn.Flatten()),
    ],
    ids=["spectral", "gru", "cell", "3-d", "encoder"],
)
def test_what_shows_at_once_is_refused_when_the_rule_is_attached(layer: nn.Module) -> None:
    def run(inner: nn.Module, x: Tensor) -> Tensor:
        result = inner(x)
        return result[0] if isinstance(result, tuple) else result

    block = Odd(lambda o, x: run(o.inner, x))
    block.inner = layer
    with pytest.raises(ValueError, match=r"'odd\.inner"):
        attached(_around(block), FeedbackAlignment())


def _lined(o: Any, x: Tensor) -> Tensor:
    return o.layer(x).mul_(o.weight).relu_()


RIGHT: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "positions": (lambda o, x: (x.unflatten(1, (3, 4)) + o.weight).flatten(1), (1, 3, 4)),
    "scale": (lambda o, x: x + o.weight * o.layer(x), (12,)),
    "scale of maps": (lambda o, x: (x.view(-1, 3, 2, 2) * o.weight).flatten(1), (3, 1, 1)),
    "scale of a batch of maps": (lambda o, x: (x.view(-1, 3, 2, 2) * o.weight).flatten(1), (1, 3, 1, 1)),
    "scale before a mean": (lambda o, x: (x.view(-1, 3, 2, 2) * o.weight).mean((-1, -2)).repeat(1, 4), (3, 1, 1)),
    "scale before a mean of what was moved": (
        lambda o, x: (2 * x.view(-1, 3, 2, 2) * o.weight).permute(0, 2, 3, 1).flatten(1, 2).mean(1).repeat(1, 4),
        (3, 1, 1),
    ),
    "queries": (lambda o, x: (x[:, None] + o.weight).tanh().mean(1), (4, 12)),
    "token": (lambda o, x: torch.cat([o.weight.expand(len(x), -1), x[:, 1:]], 1), (1, 1)),
    "choice": (lambda o, x: torch.where(x > 0, x, o.weight), (12,)),
    "slope": (lambda o, x: F.prelu(x, o.weight), (12,)),
    "norm of one's own": (lambda o, x: F.layer_norm(x.unflatten(1, (3, 4)), (3, 4), o.weight).flatten(1), (3, 4)),
    "in place": (_lined, (12,)),
    "straight through": (lambda o, x: o.layer(Sign.apply(x)), (1,)),
    "own weights by call": (
        lambda o, x: torch.func.functional_call(o.layer, dict(o.layer.named_parameters()), (x,)),
        (1,),
    ),
    "own activation": (lambda o, x: o.layer(Swish.apply(x)), (1,)),
    "scale of maps, pooled": (
        lambda o, x: F.avg_pool2d(x.view(-1, 3, 2, 2) * o.weight, 2).flatten(1).repeat(1, 4),
        (3, 1, 1),
    ),
    "running sums of rows alike": (lambda o, x: (x.view(-1, 3, 4) * o.weight).cumsum(1).flatten(1), (4,)),
    "pooled": (lambda o, x: F.avg_pool1d(o.layer(x)[:, None], 3, 1, 1)[:, 0], (1,)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_acts_entry_by_entry_learns_by_its_own_gradient(name: str) -> None:
    """With B = W every gradient is backpropagation's, whatever number of dimensions a parameter has."""
    run, shape = RIGHT[name]
    algorithm = attached(_around(Odd(run, shape)), FeedbackAlignment())
    for name, layer in algorithm.layers.items():
        algorithm.weights(name).fixed.copy_(algorithm.blocks.get_parameter(layer.parameter).detach())
    mine = gradients_of(algorithm, ROWS)
    wanted = gradients_of(attached(copy.deepcopy(algorithm.blocks), Backprop()), ROWS)
    assert mine.keys() == wanted.keys()
    assert ("members.odd.weight" in mine) is (shape != (1,))
    assert all(torch.allclose(mine[n], wanted[n], rtol=0, atol=1e-12) for n in mine)


def test_attention_by_hand_is_warned_of_once() -> None:
    def attend(o: Any, x: Tensor) -> Tensor:
        queries, keys = o.layer(x).unflatten(1, (3, 4)), o.other(x).unflatten(1, (3, 4))
        return ((queries @ keys.mT).softmax(-1) @ keys).flatten(1)

    with pytest.warns(UserWarning, match=r"attention after layer 'odd\.(layer|other)'"):
        algorithm = attached(_around(Odd(attend)), FeedbackAlignment())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(algorithm.updates(ROWS))


def test_what_begins_to_learn_below_the_lowest_layer_is_refused() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(12))
            self.layer = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x + self.shift if self.training else x)
            return result

    net = Blocks({"one": Shifted()}, nn.Linear(12, CLASSES))
    algorithm = attached(net, FeedbackAlignment())
    with pytest.raises(ValueError, match=r"layer 'one\.layer' has no feedback weights"):
        next(algorithm.updates(ROWS))
