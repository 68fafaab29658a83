"""Guessed forward gradients against backpropagation, against the authors' numbers, and what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import ForwardGradient, TaskInfo
from locallearn.algorithms.base import Locality
from locallearn.algorithms.forward_gradient._guesses import moved_outputs, sample_gradients
from locallearn.algorithms.forward_gradient._guided import GuidedForwardGradient
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.functional.forward_gradient import guess_scales, guess_slopes
from locallearn.nets import Blocks, cnn, mlp
from locallearn.nets.heads import PooledHead
from tests.references import reference

SPACES, TARGETS, GUESSES = (
    ("weights", "activities"),
    ("global", "local", "next"),
    ("random", "local", "ntk", "fixed-ntk"),
)
CELLS = list(itertools.product(SPACES, TARGETS, GUESSES))


def _attached(net: Blocks, batch: Batch, **settings: Any) -> GuidedForwardGradient:
    rule = ForwardGradient(**settings)
    assert isinstance(rule, GuidedForwardGradient)
    rule.attach(net, TaskInfo(Batch(batch.inputs[:2], batch.targets[:2]), 3, F.cross_entropy))
    rule.train()
    return rule


def _gradients(rule: GuidedForwardGradient, batch: Batch) -> dict[str, Tensor]:
    """By name of the weight."""
    names = {id(p): name for name, p in rule.named_parameters()}
    found: dict[str, Tensor] = {}
    for update in rule.updates(batch):
        made = update.gradients
        if not made:
            update.backward()
            made = {p: p.grad for g in rule.units()[update.unit] for p in g["params"] if p.grad is not None}
        found |= {names[id(p)]: gradient.clone() for p, gradient in made.items()}
    rule.zero_grad(set_to_none=True)
    return found


def _perceptron() -> tuple[Blocks, Batch]:
    torch.manual_seed(0)
    return mlp((6,), 3, (5, 4, 4)).double(), Batch(torch.randn(7, 6).double(), torch.arange(7) % 3)


def _convolutions() -> tuple[Blocks, Batch]:
    """With layers that normalise within a sample, dropout, state, strides and groups."""
    torch.manual_seed(0)
    net = Blocks(
        {
            "first": nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)),
            "second": nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Dropout(0.3), nn.Tanh(), _Counts()),
            "third": nn.Sequential(nn.Flatten(2), nn.Linear(9, 5), nn.LayerNorm((4, 5)), nn.Tanh()),
        },
        readout=nn.Sequential(nn.Flatten(), nn.Linear(20, 3)),
    ).double()
    return net, Batch(torch.randn(7, 2, 9, 9).double(), torch.arange(7) % 3)


class _Counts(nn.Module):
    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return x


def _options(target: str, guess: str) -> dict[str, Any]:
    return {"target": target, "guess": guess, "head_norm": False}


@pytest.mark.parametrize(("space", "target", "guess"), CELLS)
def test_passes_with_tangents_find_what_backpropagation_finds(space: str, target: str, guess: str) -> None:
    """Honest and simulated are the same up to rounding, draws and dropout masks included; state moves once per step."""
    for make in (_perceptron, _convolutions):
        found = []
        for simulated in (False, True):
            net, batch = make()
            rule = _attached(net, batch, seed=1, perturb=space, simulated=simulated, **_options(target, guess))
            torch.manual_seed(3)
            found.append([_gradients(rule, batch), _gradients(rule, batch)])
            assert all(module.passes == 2 for module in net.modules() if isinstance(module, _Counts))
        for honest, projected in zip(*found, strict=True):
            learns = {name for name, p in rule.named_parameters() if p.requires_grad}
            assert set(honest) == set(projected) == learns
            for name, gradient in honest.items():
                assert torch.allclose(gradient, projected[name], atol=1e-12), name
                assert gradient.any(), name


def test_an_estimate_lies_along_its_guess_and_is_no_longer_than_the_target() -> None:
    draw = torch.Generator().manual_seed(0)
    target, guess = torch.randn(2, 50, 4, 3, generator=draw).double()
    made = guess * guess_scales(guess_slopes(target, guess), guess).view(-1, 1, 1)
    along = F.cosine_similarity(made.flatten(1), guess.flatten(1)).abs()
    assert torch.allclose(along, torch.ones(50).double())
    assert bool((made.flatten(1).norm(dim=1) <= target.flatten(1).norm(dim=1)).all())
    assert bool((guess_slopes(made, target) >= 0).all())  # ⟨Ĝ, G⟩ is a square
    assert torch.allclose(target * guess_scales(guess_slopes(target, target), target).view(-1, 1, 1), target)
    assert not guess_scales(torch.zeros(1), torch.zeros(1, 5)).any()
    assert torch.allclose(guess_scales(torch.ones(2), guess[:2], divided=False), torch.ones(2))


@pytest.mark.parametrize("space", SPACES)
def test_a_local_guess_of_the_local_target_is_the_local_gradient(space: str) -> None:
    """Ĝ = G where the guess is right; of the last block always."""
    net, batch = _convolutions()
    net[1][1].p = 0.0  # masks would be others
    rule = _attached(net, batch, perturb=space, guess="local", target="local")
    found = _gradients(rule, batch)
    x = batch.inputs
    for i, block in enumerate(net):
        output = block(x)
        head = rule.heads[str(i)] if i < 2 else net.readout
        assert head is not None
        weights = [*block.parameters(), *head.parameters()]
        wanted = torch.autograd.grad(F.cross_entropy(head(output), batch.targets), weights)
        names = {id(p): name for name, p in rule.named_parameters()}
        for p, gradient in zip(weights, wanted, strict=True):
            assert torch.allclose(found[names[id(p)]], gradient, atol=1e-10)
        x = output.detach()


def test_random_guesses_at_outputs_are_unbiased() -> None:
    net, batch = _perceptron()
    wanted = torch.autograd.grad(F.cross_entropy(net(batch.inputs), batch.targets), [net[0][0].weight])[0]
    for noise in ("gaussian", "rademacher"):
        rule = _attached(net, batch, perturb="activities", guess="random", noise=noise)
        name = next(name for name, p in rule.named_parameters() if p is net[0][0].weight)
        draws = torch.stack([_gradients(rule, batch)[name] for _ in range(60)])
        assert bool(((draws.mean(0) - wanted).abs() <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all())


@pytest.mark.parametrize(("space", "guess"), list(itertools.product(SPACES, ("random", "local"))))
def test_with_local_targets_other_blocks_change_nothing(space: str, guess: str) -> None:
    """No tangent crosses a border; with the next block's target it comes from the next block and no further."""
    for target, reach in (("local", 0), ("next", 1), ("global", 2)):
        net, batch = _perceptron()
        rule = _attached(net, batch, perturb=space, seed=1, **_options(target, guess))
        before = _gradients(rule, batch)
        for later in (1, 2):
            net, batch = _perceptron()
            rule = _attached(net, batch, perturb=space, seed=1, **_options(target, guess))
            with torch.no_grad():
                net[later][0].weight.mul_(1.5)
            found = _gradients(rule, batch)
            name = next(name for name, p in rule.named_parameters() if p is net[0][0].weight)
            assert torch.equal(found[name], before[name]) is (later > reach)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (4, 6)),
        (nn.Linear(6, 5), (4, 3, 2, 6)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 7)),
        (nn.Conv2d(4, 6, 3, dilation=2, padding=1), (4, 4, 7, 7)),
        (nn.Conv3d(2, 3, 2), (4, 2, 3, 3, 3)),
        (nn.BatchNorm1d(6), (4, 6)),
        (nn.BatchNorm2d(3), (4, 3, 5, 5)),
        (nn.BatchNorm2d(3).eval(), (4, 3, 5, 5)),
        (nn.GroupNorm(2, 4), (4, 4, 5)),
        (nn.InstanceNorm2d(3, affine=True), (4, 3, 5, 5)),
        (nn.LayerNorm(6), (4, 6)),
        (nn.LayerNorm((3, 6)), (4, 2, 3, 6)),
        (nn.RMSNorm(6), (4, 2, 6)),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, nn.Module) else "x".join(map(str, given)),
)
def test_gradients_and_movements_of_single_samples(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Against autograd, one sample's output at a time; and ⟨δ_n, ż_n⟩ = ⟨G_n, G̃_n⟩."""
    layer = layer.double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(shape).double()
    output = layer(x)
    delta = torch.randn_like(output)
    found = {id(p): values for p, values in sample_gradients(layer, x, delta)}
    for p in layer.parameters():
        wanted = [torch.autograd.grad((output[n] * delta[n]).sum(), p, retain_graph=True)[0] for n in range(len(x))]
        assert torch.allclose(found[id(p)], torch.stack(wanted), atol=1e-12)
        along = torch.randn_like(found[id(p)])
        moved = moved_outputs(layer, p, x, along, output.detach())
        assert torch.allclose((moved * delta).flatten(1).sum(1), guess_slopes(found[id(p)], along))


# -- the authors' numbers ----------------------------------------------------------------------------------------------
class _Reference:
    """A net of three blocks with the weights of a file, and the rule on it with the heads of that file."""

    def __init__(self, file: str, kind: str, **settings: Any) -> None:
        self.arrays = {k: torch.from_numpy(v) for k, v in reference(file).items()}
        self.kind = kind
        shapes = [
            (p.shape[1], p.shape[0]) for p in (self.init(f"blocks.{k}.block.{self.layer}.weight") for k in range(3))
        ]
        blocks: dict[str, nn.Module] = {}
        for k, (before, after) in enumerate(shapes):
            if kind == "mlp":
                blocks[f"b{k}"] = nn.Sequential(nn.Linear(before, after, bias=False), nn.ReLU())
            else:
                conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
                blocks[f"b{k}"] = nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())
        pooled = [nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()] if kind == "conv" else []
        self.net = Blocks(blocks, nn.Sequential(*pooled, nn.Linear(4, 3))).double()
        self.batch = Batch(self.arrays[f"{kind}/x"], self.arrays[f"{kind}/y"])
        self.rule = _attached(self.net, self.batch, head="linear", **settings)
        with torch.no_grad():
            for name, p in self.weights().items():
                p.copy_(self.init(name))

    @property
    def layer(self) -> str:
        return "0" if self.kind == "mlp" else "conv"

    def init(self, name: str) -> Tensor:
        return self.arrays[f"{self.kind}/init/{name}"]

    def weights(self, heads: Any = None) -> dict[str, nn.Parameter]:
        """By the file's names."""
        found: dict[str, nn.Parameter] = {}
        for k, block in enumerate(self.net):
            found[f"blocks.{k}.block.{self.layer}.weight"] = block[0].weight
            if self.kind == "conv":
                found |= {f"blocks.{k}.block.bn.{name}": p for name, p in block[1].named_parameters()}
        for k, head in enumerate([*self._heads(heads), self.net.readout]):
            prefix = (
                f"blocks.{2 if head is self.net.readout else k}.auxnet.{'classifier.' if self.kind == 'conv' else ''}"
            )
            found |= {f"{prefix}{name}": p for name, p in head.named_parameters()}
        return found

    def _heads(self, heads: Any) -> Iterator[Any]:
        if heads is not None:
            return iter(heads)
        return iter([*self.rule.guess_heads] or self.rule.heads.values())

    def given(self, key: str) -> Tensor:
        return self.arrays[f"{self.kind}/{key}"]

    def gradients(self) -> dict[str, Tensor]:
        names = {id(p): name for name, p in self.rule.named_parameters()}
        found = _gradients(self.rule, self.batch)
        return {theirs: found[names[id(p)]] for theirs, p in self.weights().items() if names[id(p)] in found}


def _fed(
    made: _Reference, draws: Callable[[int, nn.Parameter | None], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feed random guesses from a file instead of drawing them."""
    from locallearn.algorithms.forward_gradient._guesses import Guess, learning

    space = made.rule._space

    def draw(block: nn.Module, output: Tensor, noise: Any, generator: Any) -> list[Guess]:
        index = next(i for i, known in enumerate(made.net) if known is block)
        weights: list[Any] = learning(block) if made.rule.perturb == "weights" else [None]
        return [Guess(p, draws(index, p)) for p in weights]

    monkeypatch.setattr(space, "draw", draw)


@pytest.mark.parametrize("simulated", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        "global-local-weight",
        "local-local-weight",
        "global-ntk-weight",
        "global-fixed-ntk-weight",
        "global-random-weight",
        "global-random-weight-rademacher",
        "local-random-weight",
        "local-random-weight-rademacher",
    ],
)
def test_weights_of_a_perceptron_are_those_of_the_authors(
    run: str, simulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every weight, but for the heads that their code leaves untrained under random guesses."""
    target, guess = run.split("-")[0], "fixed-ntk" if "ntk" in run else run.split("-")[1]
    made = _Reference("f23_mlp_weight", "mlp", target=target, guess=guess, simulated=simulated)
    redrawn = {k: v for k, v in made.arrays.items() if k.startswith(f"mlp/{run}/") and "aux_redrawn" in k}
    with torch.no_grad():
        for key, values in redrawn.items():  # the draw of their one batch, given to heads that are drawn once
            made.weights()[key.rpartition("aux_redrawn.")[2]].copy_(values)
    assert bool(redrawn) is ("-ntk" in run and "fixed" not in run)
    _fed(made, lambda index, p: made.given(f"{run}/block{index}.0.guess.weight"), monkeypatch)
    found = made.gradients()
    wanted = {k.partition("grad.")[2]: v for k, v in made.arrays.items() if k.startswith(f"mlp/{run}/grad.")}
    assert len(wanted) >= 5
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-14), name
    if guess == "random" and target == "local":
        assert all(found[f"blocks.{k}.auxnet.0.weight"].any() for k in range(2))


@pytest.mark.parametrize("run", ["global-local", "local-local", "global-random", "global-random-rademacher"])
def test_weights_of_a_convolution_are_those_of_the_authors(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their estimate for a BatchNorm's bias lies in its weight's place; the weight's own is worked out from their gradients."""
    target, guess, *noise = run.split("-")
    key = "-".join([target, guess, "weight", *noise])
    made = _Reference("f23_conv", "conv", target=target, guess=guess, simulated=True)

    def place(index: int, p: nn.Parameter | None) -> str:
        block: Any = made.net[index]
        where = {id(block[0].weight): "conv.{}.weight", id(block[1].weight): "bn.{}.weight"}.get(id(p), "bn.{}.bias")
        return f"{key}/block{index}.{where}"

    _fed(made, lambda index, p: made.given(place(index, p).format("guess")), monkeypatch)
    found = made.gradients()
    for k in range(2):
        wanted = {
            "conv.weight": made.given(f"{key}/grad.blocks.{k}.block.conv.weight"),
            "bn.bias": made.given(f"{key}/grad.blocks.{k}.block.bn.weight"),  # the authors' slip
        }
        goal, along = (made.given(f"{key}/block{k}.bn.{kind}.weight") for kind in ("target", "guess"))
        scales = (goal * along).sum(1) / ((along * along).sum(1) + float(made.arrays["eps"]))
        wanted["bn.weight"] = (scales[:, None] * along).sum(0)
        for name, gradient in wanted.items():
            assert torch.allclose(found[f"blocks.{k}.block.{name}"], gradient, atol=1e-14), name
    for name, gradient in found.items():
        if ".auxnet." in name or name.startswith("blocks.2."):
            assert torch.allclose(gradient, made.given(f"{key}/grad.{name}"), atol=1e-14), name
    for k in range(3):
        mean = made.given(f"global-local-weight/buf.blocks.{k}.block.bn.running_mean")
        assert torch.allclose(made.net[k][1].running_mean, mean, atol=1e-14)  # moved once, whatever the run


@pytest.mark.parametrize(
    "run", ["global-local-activation", "global-random-activation", "global-random-activation-rademacher"]
)
def test_outputs_of_a_convolution_are_those_of_the_authors(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _Reference("f23_conv", "conv", perturb="activities", guess=run.split("-")[1], simulated=True)
    _fed(made, lambda index, p: made.given(f"{run}/noise_block{index}"), monkeypatch)
    found = made.gradients()
    wanted = {k.partition("grad.")[2]: v for k, v in made.arrays.items() if k.startswith(f"conv/{run}/grad.")}
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-14), name


# -- claims, state, refusals -------------------------------------------------------------------------------------------
def test_a_head_for_guesses_is_drawn_for_every_batch_or_once() -> None:
    for guess in ("ntk", "fixed-ntk"):
        net, batch = _convolutions()
        rule = _attached(net, batch, guess=guess, simulated=True)
        heads = []
        for _ in range(2):
            _gradients(rule, batch)
            heads.append([p.clone() for p in rule.guess_heads.parameters()])
        assert all(module.training for module in rule.guess_heads.modules())
        same = [torch.equal(a, b) for a, b in zip(*heads, strict=True)]
        assert all(same) if guess == "fixed-ntk" else not any(same[-2:])  # their BatchNorms begin at 1 and 0
        assert not {id(p) for p in rule.guess_heads.parameters()} & {
            id(p) for groups in rule.units().values() for group in groups for p in group["params"]
        }


@pytest.mark.parametrize(
    ("kind", "shape"), [("linear", (3, 5, 5)), ("mlp", (3, 1, 4)), ("cnn", (3, 8, 8)), ("mlp", (4, 6))]
)
@pytest.mark.parametrize("norm", [True, False])
def test_heads_read_what_blocks_give(kind: Any, shape: tuple[int, ...], norm: bool) -> None:
    head = PooledHead(kind, shape, 3, width=None if kind == "linear" else 7, norm=norm)
    assert head(torch.randn(4, *shape)).shape == (4, 3)
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in head) is norm
    with pytest.raises(ValueError, match="head reads"):
        PooledHead("cnn", (5,), 3)


def test_the_audit_tells_what_comes_back() -> None:
    """One number per sample is no error that comes back, where blocks become narrow; the claim is the weaker one."""
    for target, claim in (("local", Locality.LAYER_LOCAL), ("global", Locality.GLOBAL)):
        torch.manual_seed(0)
        net, batch = mlp((12,), 3, (64, 6)), Batch(torch.randn(24, 12), torch.arange(24) % 3)
        result = audit(_attached(net, batch, guess="local", target=target), batch, batches=2, warmup=2)
        assert result.confirmed
        assert result.claim is claim
        assert result.verdict is (claim if target == "local" else Locality.COUPLED)


def test_simulated_says_so_everywhere() -> None:
    rule = ForwardGradient(guess="local", simulated=True)
    assert rule.variant == "simulated=true, guess=local, target=global"
    assert ForwardGradient(guess="random", head_norm=False).variant == "guess=random, target=global"
    assert "simulated" in rule.broadcast
    assert rule.locality is Locality.GLOBAL
    assert rule.untimed is not None
    assert ForwardGradient(guess="local").untimed is None
    assert ForwardGradient().untimed is None


def test_without_a_guess_nothing_has_changed() -> None:
    assert type(ForwardGradient()) is ForwardGradient
    assert ForwardGradient().variant is None


class _Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x - x.mean(0))
        return made


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_what_cannot_be_learned_is_refused() -> None:
    for settings, words in (
        ({"guess": "wild"}, "guess is 'wild', expected random, local, ntk, fixed-ntk"),
        ({"guess": "local", "target": "above"}, "target is 'above', expected global, local, next"),
        ({"guess": "local", "head": "deep"}, "head is 'deep', expected linear, mlp, cnn"),
        ({"target": "local"}, "belong to a guess, and guess is null"),
        ({"simulated": True}, "belong to a guess, and guess is null"),
        ({"guess": "local", "tangents": 2}, "tangents=2, combine=mean are of directions drawn for the whole network"),
        ({"guess": "local", "noise": "rademacher"}, "noise=rademacher is of random guesses"),
        ({"guess": "random", "head": "mlp"}, "has no heads: leave head and head_width out"),
        ({"guess": "local", "head_width": 5}, "head_width=5 is of hidden layers"),
        ({"guess": "local", "head": "mlp", "head_width": 0}, "head_width is 0, expected a whole number"),
        ({"guess": "local", "simulated": True, "chunk": 1}, "chunk is of passes that carry tangents"),
        ({"guess": "local", "target": "local", "chunk": 2}, "target=local needs none: leave it out"),
        ({"guess": "local", "simulated": "yes"}, "simulated is 'yes', expected true or false"),
        ({"guess": "local", "head_norm": 1}, "head_norm is 1, expected true or false"),
        ({"guess": "random", "perturb": "activities", "mask": True}, "guess=random puts none there: leave mask out"),
        ({"guess": "local", "perturb": "activities", "groups": 2}, "only losses=local"),
        ({"guess": "local", "losses": "local"}, "which are two rules"),
        ({"losses": "local", "target": "next"}, "belong to a guess, and guess is null"),
    ):
        with pytest.raises(ValueError, match=words):
            ForwardGradient(**settings)
    net, batch = _perceptron()
    with pytest.raises(ValueError, match="this network is one block, 'only': cut it"):
        _attached(Blocks({"only": nn.Linear(6, 4)}, nn.Linear(4, 3)).double(), batch, guess="local")
    with pytest.raises(ValueError, match=r"block 'layer1': a cnn head reads maps.*; use another head"):
        _attached(net, batch, guess="local", head="cnn")
    normed, images = cnn((2, 8, 8), 3, (4, 4), batch_norm=True), Batch(torch.randn(6, 2, 8, 8), torch.arange(6) % 3)
    with pytest.raises(ValueError, match=r"'conv2\.1' is an nn\.BatchNorm2d.*set simulated=true, or use another"):
        _attached(normed, images, guess="local", perturb="activities")
    plain = cnn((2, 8, 8), 3, (4, 4, 4))
    with pytest.raises(
        ValueError, match=r"'head of conv2\.0' is an nn\.BatchNorm2d.*set head_norm=false, simulated=true"
    ):
        _attached(plain, images, guess="local", target="next")
    mixing = Blocks({"a": nn.Linear(6, 5), "b": _Mixes()}, nn.Linear(5, 3)).double()
    for space in SPACES:
        with pytest.raises(ValueError, match="what block 'a' makes of one sample changes the loss of another"):
            _attached(mixing, batch, guess="random", perturb=space)
    own = Blocks({"a": _Own(), "b": nn.Linear(6, 5)}, nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match="the weight 'weight' of block 'a' belongs to no linear, convolutional or"):
        _attached(own, batch, guess="random")
    weighted = TaskInfo(
        Batch(batch.inputs[:2], batch.targets[:2]), 3, nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 2.0]).double())
    )
    with pytest.raises(ValueError, match=r"the mean of the samples' losses is .*: set simulated=true"):
        ForwardGradient(guess="local").attach(_perceptron()[0], weighted)
    regression = TaskInfo(Batch(batch.inputs[:2], torch.randn(2, 3)), 3, F.mse_loss, classes=False)
    with pytest.raises(ValueError, match="the heads of guesses tell classes apart"):
        ForwardGradient(guess="local").attach(_perceptron()[0], regression)


def test_values_that_no_sample_has_may_be_anything() -> None:
    """A regression has no heads, and random guesses need none."""
    net, batch = _perceptron()
    rule = ForwardGradient(guess="random", perturb="activities")
    values = torch.randn(7, 3).double()
    rule.attach(net, TaskInfo(Batch(batch.inputs[:2], values[:2]), 3, F.mse_loss, classes=False))
    assert all(
        g.isfinite().all() for u in rule.updates(Batch(batch.inputs, values)) for g in (u.gradients or {}).values()
    )
