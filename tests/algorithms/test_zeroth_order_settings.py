"""Zeroth order against plain loops; numbers in units of their size, weighed by curvature, and of every block's own loss."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import TaskInfo, ZerothOrder
from locallearn.algorithms.zeroth_order import trajectory
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional.counter_noise import numbers
from locallearn.functional.zeroth_order import GRID, curvature_weights
from locallearn.nets import Blocks, mlp
from tests.algorithms.steps import flat, sgd, take

_ROWS, _WIDTH = 12, 6


def _batch(dtype: torch.dtype = torch.float64) -> Batch:
    draw = torch.Generator().manual_seed(1)
    return Batch(torch.randn(_ROWS, _WIDTH, generator=draw, dtype=dtype), torch.arange(_ROWS) % 3)


def _net(dtype: torch.dtype = torch.float64) -> Blocks:
    torch.manual_seed(0)
    return mlp((_WIDTH,), 3, (5, 4)).to(dtype)


def _attached(net: Blocks, batch: Batch, loss: Callable[..., Tensor] = F.cross_entropy, **settings: Any) -> Any:
    rule = ZerothOrder(**settings)
    rule.attach(net, TaskInfo(batch, 3, loss))
    return rule


# -- against a plain loop --------------------------------------------------------------------------------------------------
def _drawn(rule: Any, name: str, p: Tensor, step: int, member: int, rank: int | None) -> Tensor:
    """The direction of one weight, from its address alone."""

    def look(stream: str, count: int) -> Tensor:
        return numbers(rule.seed, step, member, rule._words[stream], 0, count, rule.noise).double()

    if rank is None or p.ndim < 2:
        return look(name, p.numel()).view(p.shape)
    a, b = look(f"{name}/A", len(p) * rank).view(-1, rank), look(f"{name}/B", p[0].numel() * rank).view(-1, rank)
    return (a @ b.T / rank**0.5).view(p.shape)


def _plain_loop(rule: Any, net: nn.Module, batch: Batch, steps: int, lr: float, decay: float, **how: Any) -> None:
    """Three steps of whatever these settings say, written out: losses, numbers, estimate, decay of matrices, momentum 0.5."""
    n, eps, antithetic, shaping = how["n"], how["eps"], how.get("antithetic", True), how.get("shaping", "none")
    exponent, normalise, beta2 = how.get("curvature_exponent"), how.get("normalise"), how.get("beta2", 0.999)
    weights = dict(net.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    average = 0.0
    for t in range(steps):
        home = {name: p.detach().clone() for name, p in weights.items()}
        z = [{k: _drawn(rule, k, p, t, i, how.get("rank")) for k, p in weights.items()} for i in range(n)]

        def lost(times: float, way: dict[str, Tensor], home: dict[str, Tensor] = home) -> float:
            with torch.no_grad():
                for name, p in weights.items():
                    p.copy_(home[name] + times * way[name])
                return float(F.cross_entropy(net(batch.inputs), batch.targets))

        plus = [lost(eps, way) for way in z]
        minus = [lost(-eps, way) for way in z] if antithetic else []
        base = lost(0.0, z[0])
        every = torch.tensor(plus + minus, dtype=torch.float64)
        centre = base if how.get("variant") == "fzoo" else float(every.mean())
        c = []
        for i in range(n):
            difference = plus[i] - (minus[i] if antithetic else base if shaping == "none" else centre)
            sides = 2 if antithetic else 1
            if shaping == "none":
                c.append(difference / (sides * eps))
            elif shaping == "zscore":
                c.append(difference / (sides * float(every.std())))
            else:
                c.append(float(difference > 0) - float(difference < 0))
            if exponent is not None:
                c[i] /= max(1.0, abs(plus[i] - 2 * base + minus[i]) / eps**2) ** exponent
        if normalise:
            average = beta2 * average + (1 - beta2) * sum(v * v for v in c) / n**2
            c = [v / (average / (1 - beta2 ** (t + 1))) ** 0.5 for v in c]
        with torch.no_grad():
            for name, p in weights.items():
                estimate = sum(v * way[name] for v, way in zip(c, z, strict=True)) / n
                estimate = estimate + (decay * home[name] if p.ndim > 1 else 0)
                velocity[name] = 0.5 * velocity[name] + estimate
                p.copy_(home[name] - lr * velocity[name])


@pytest.mark.parametrize(
    "how",
    [
        {"variant": "mezo", "n": 3, "normalise": "scalar_ema", "beta2": 0.9},
        {"variant": "spsa", "n": 2, "curvature_exponent": 0.3, "eps": 0.1},
        {"variant": "mezo", "n": 2, "curvature_exponent": 0.1, "normalise": "scalar_ema", "noise": "rademacher"},
        {"variant": "spsa", "n": 3, "antithetic": False, "shaping": "sign"},
        {"variant": "fzoo", "n": 4, "antithetic": False, "shaping": "zscore"},
        {"variant": "eggroll", "n": 5, "rank": 2, "antithetic": False, "shaping": "zscore"},
        {"variant": "eggroll", "n": 4, "rank": 3, "shaping": "none", "curvature_exponent": 0.2, "noise": "rademacher"},
        {"variant": "eggroll", "n": 4, "rank": 1, "shaping": "sign", "normalise": "scalar_ema"},
    ],
    ids=lambda how: "-".join(str(value) for value in how.values()),
)
def test_a_plain_loop_makes_the_same_steps(how: dict[str, Any]) -> None:
    """With decay and momentum, in float64; what is sent around is float32."""
    how = {"eps": 1e-2, **how}
    batch, net = _batch(), _net()
    net[0].append(nn.LayerNorm(5, dtype=torch.float64))
    plain = copy.deepcopy(net)
    rule = _attached(net, batch, seed=3, **how)
    optimizers = sgd(rule, 0.05, momentum=0.5, weight_decay=0.1)
    for _ in range(3):
        take(rule.updates(batch), optimizers)
    _plain_loop(rule, plain, batch, 3, 0.05, 0.1, **how)
    moved = float((flat(net) - flat(_net_with_norm())).abs().max())
    assert float((flat(net) - flat(plain)).abs().max()) < 1e-6 * max(1.0, moved)
    assert moved > 1e-3


def _net_with_norm() -> Blocks:
    net = _net()
    net[0].append(nn.LayerNorm(5, dtype=torch.float64))
    return net


# -- numbers in units of their size --------------------------------------------------------------------------------------
def test_the_scale_of_the_loss_is_gone() -> None:
    """A thousand times the loss makes the same steps; the first moves every weight by its rate times its noise."""
    ends = {}
    for normalise, times in itertools.product((None, "scalar_ema"), (1, 1000)):
        rule = _attached(
            _net(), _batch(), lambda x, y, k=times: k * F.cross_entropy(x, y), variant="mezo", normalise=normalise
        )
        optimizers = sgd(rule, 1e-3)
        before = flat(rule.blocks)
        for step in range(4):
            take(rule.updates(_batch()), optimizers)
            if step == 0 and normalise:
                z = [_drawn(rule, k, p, 0, 0, None).flatten() for k, p in rule.blocks.named_parameters()]
                assert torch.allclose((flat(rule.blocks) - before).abs(), 1e-3 * torch.cat(z).abs(), atol=1e-9)
        ends[normalise, times] = flat(rule.blocks)
    assert torch.allclose(ends["scalar_ema", 1], ends["scalar_ema", 1000], atol=1e-8)
    assert float((ends[None, 1] - ends[None, 1000]).abs().max()) > 0.1


def test_nothing_to_say_is_no_step() -> None:
    rule = _attached(_net(), _batch(), lambda x, y: x.sum() * 0, normalise="scalar_ema")
    before = flat(rule.blocks)
    take(rule.updates(_batch()), sgd(rule))
    assert torch.equal(flat(rule.blocks), before)


def test_the_running_mean_is_in_the_checkpoint() -> None:
    """Training goes on from a checkpoint, and from a copy, as if nothing had been."""
    rule = _attached(_net(), _batch(), normalise="scalar_ema", n=2)
    for _ in range(3):
        take(rule.updates(_batch()), sgd(rule))
    other = _attached(_net(), _batch(), normalise="scalar_ema", n=2)
    other.load_state_dict(rule.state_dict())
    for one in (other, copy.deepcopy(rule)):
        known = copy.deepcopy(rule)
        for made in (known, one):
            for _ in range(2):
                take(made.updates(_batch()), sgd(made))
        assert torch.equal(flat(one.blocks), flat(known.blocks))


# -- curvature -------------------------------------------------------------------------------------------------------------
def test_curvature_is_that_of_the_loss() -> None:
    """On a quadratic the weight is 1/max(1, |zᵀHz|^p) for every ε, and a flat loss has weight 1."""
    draw = torch.Generator().manual_seed(0)
    half = torch.randn(5, 5, generator=draw, dtype=torch.float64)
    hessian, theta = half @ half.T, torch.randn(5, generator=draw, dtype=torch.float64)
    z = torch.randn(7, 5, generator=draw, dtype=torch.float64)

    def loss(at: Tensor) -> Tensor:
        return torch.einsum("ni,ij,nj->n", at, hessian, at) / 2

    for eps, exponent in ((1e-2, 0.1), (3.0, 0.5)):
        found = curvature_weights(loss(theta + eps * z), loss(theta - eps * z), loss(theta[None]), eps, exponent)
        wanted = 1 / torch.einsum("ni,ij,nj->n", z, hessian, z).pow(exponent).clamp(min=1)
        assert torch.allclose(found, wanted, rtol=1e-6)
    assert curvature_weights(torch.ones(2), torch.ones(2), torch.ones(2), 0.1).tolist() == [1.0, 1.0]


def _summing(rule: Any) -> float:
    """Operations per row that Σ c_i z_i takes."""
    return 2 * rule.n * sum(p.numel() for p in rule.parameters()) / _ROWS if rule.n > 1 else 0.0


def test_the_clean_loss_is_one_more_pass() -> None:
    """2n + 1 forward passes instead of 2n, and so where all directions pass at once."""
    batch, forward = _batch(torch.float32), 2 * (_WIDTH * 5 + 5 * 4 + 4 * 3)  # per row
    for variant in ("mezo", "eggroll"):
        costs = []
        for exponent in (None, 0.1):
            rule = _attached(_net(torch.float32), batch, variant=variant, n=3, curvature_exponent=exponent)
            costs.append(measure_update(rule, batch).flops)
        assert costs[1] - costs[0] == forward
        if variant == "mezo":
            assert costs[0] == pytest.approx(2 * 3 * forward + _summing(rule))
    rule = _attached(_net(), _batch(), n=2, curvature_exponent=0.1)
    assert rule.losses(_batch()).shape == (2, 3)
    with pytest.raises(ValueError, match=r"three losses for each of 2 directions, \(2, 3\)"):
        next(rule.learn(torch.zeros(2, 2)))


# -- a loss for every block ------------------------------------------------------------------------------------------------
def _made(rule: Any, batch: Batch) -> dict[str, dict[str, Tensor]]:
    names = {id(p): name for name, p in rule.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {}
    for update in rule.updates(batch):
        found.setdefault(update.unit, {}).update({names[id(p)]: g.clone() for p, g in update.gradients.items()})
    return found


def _local_gradients(rule: Any, batch: Batch) -> list[Tensor]:
    """Of every block's own loss, by autograd, block and head in a row."""
    x, found = batch.inputs, []
    for i, block in enumerate(rule.blocks):
        output = block(x)
        loss = F.cross_entropy(rule.heads.scores(rule.blocks, i, output, batch), batch.targets)
        gradients = torch.autograd.grad(loss, rule._own(i))
        found.append(torch.cat([g.flatten() for g in gradients]))
        x = output.detach()
    return found


@pytest.mark.parametrize("variant", ["spsa", "mezo"])
def test_every_block_has_the_derivative_of_its_own_loss(variant: str) -> None:
    """c of every block is the derivative of its head's loss along its own noise, and no other block's; the last head is the
    network's readout."""
    batch = _batch()
    rule = _attached(_net(), batch, variant=variant, eps=1e-5, losses="local")
    assert list(rule.units()) == list(rule.blocks.names)
    made = _made(rule, batch)
    wanted = _local_gradients(rule, batch)
    names = {id(p): name for name, p in rule.named_parameters()}
    assert rule.scalars.shape == (2,)
    for i, (unit, slope) in enumerate(zip(rule.blocks.names, rule.scalars.tolist(), strict=True)):
        flat = torch.cat([made[unit][names[id(p)]].flatten() for p in rule._own(i)])
        assert slope == pytest.approx(float(flat / slope @ wanted[i]), rel=1e-5)
    assert "blocks.readout.weight" in made[rule.blocks.names[-1]]
    noise = [made[unit][names[id(rule._own(i)[0])]].flatten()[:9] / rule.scalars[i] for i, unit in enumerate(made)]
    assert not torch.allclose(*noise)


def test_noise_follows_the_weights_of_a_block() -> None:
    """E‖ĝ‖²/‖g‖² of every block is (d + n + 1)/n with d its own weights and its head's, which is the gain of local losses."""
    batch, n, trials = _batch(), 2, 100
    rule = _attached(_net(), batch, n=n, eps=1e-5, losses="local")
    wanted = _local_gradients(rule, batch)
    squares = torch.zeros(trials, 2, dtype=torch.float64)
    for t in range(trials):
        for i, gradients in enumerate(_made(rule, batch).values()):
            squares[t, i] = sum(g.square().sum() for g in gradients.values()) / wanted[i].square().sum()
    for i in range(2):
        theory = (wanted[i].numel() + n + 1) / n
        assert abs(float(squares[:, i].mean()) - theory) < 4 * float(squares[:, i].std()) / trials**0.5
        assert wanted[i].numel() < 0.7 * sum(g.numel() for g in wanted)


def test_nothing_comes_back_from_later_blocks() -> None:
    batch = _batch()
    steps = []
    for change in (False, True):
        rule = _attached(_net(), batch, n=2, losses="local", curvature_exponent=0.1)
        if change:
            with torch.no_grad():
                rule.blocks[1][0].weight.mul_(-3)
                rule.blocks.readout.weight.zero_()
        steps.append(_made(rule, batch))
    first, second = ([made[unit] for made in steps] for unit in rule.blocks.names)
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    assert not all(torch.equal(second[0][name], second[1][name]) for name in second[0])


def test_blocks_run_once_more_than_they_are_probed() -> None:
    rule = _attached(_net(torch.float32), _batch(torch.float32), variant="mezo", n=3, losses="local")
    bodies, heads = [_WIDTH * 5, 5 * 4], [5 * 3, 4 * 3]
    products = sum(7 * body for body in bodies) + sum(6 * head for head in heads)
    assert measure_update(rule, _batch(torch.float32)).flops == pytest.approx(2 * products + _summing(rule))


def test_statistics_of_blocks_move_once() -> None:
    torch.manual_seed(0)
    parts = [
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(5, 4), nn.ReLU()),
    ]
    net = Blocks({"one": parts[0], "two": parts[1]}, nn.Linear(4, 3)).double()
    rule = _attached(net, _batch(), variant="mezo", n=2, losses="local")
    rule.train()
    masks: list[Tensor] = []
    net[0][2].register_forward_hook(lambda module, given, output: masks.append(output == 0))
    take(rule.updates(_batch()), sgd(rule))
    assert int(net[0][1].num_batches_tracked) == 1
    assert len(masks) == 5  # what is handed on, then both sides of two directions
    assert all(torch.equal(mask, masks[1]) for mask in masks[1:])


# -- from numbers alone ----------------------------------------------------------------------------------------------------
_REPLAYED: dict[str, dict[str, Any]] = {
    "normalised": {"variant": "mezo", "n": 2, "normalise": "scalar_ema"},
    "curved": {"variant": "mezo", "n": 2, "curvature_exponent": 0.1},
    "local": {"variant": "mezo", "n": 2, "losses": "local", "normalise": "scalar_ema"},
    "local-signs": {"variant": "eggroll", "n": 3, "losses": "local", "shaping": "sign"},
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", _REPLAYED)
def test_replay(name: str, exact: bool, tmp_path: Path) -> None:
    """The file holds numbers alone: running means and heads are made again from them."""
    settings = {**_REPLAYED[name], "exact": exact}
    batch, file = _batch(torch.float32), tmp_path / "t.bin"
    rule = _attached(_net(torch.float32), batch, **settings)
    optimizers = sgd(rule, 0.02, momentum=0.9)
    with trajectory.Writer(file, rule, list(optimizers.values())) as writer:
        for _ in range(5):
            writer.before()
            take(rule.updates(batch), optimizers)
            writer.step()
    known = trajectory.read(file)
    again = _attached(_net(torch.float32), batch, **settings)
    assert list(trajectory.replay(again, sgd(again, 9.0, momentum=0.9), known)) == [1, 2, 3, 4, 5]
    apart = float((flat(rule.blocks) - flat(again.blocks)).abs().max())
    assert apart == 0 if exact else apart < 1e-5
    assert float((flat(rule.blocks) - flat(_net(torch.float32))).abs().max()) > 1e-3
    assert all(len(step.c) == rule.numbers for step in known.steps)
    without = {
        key: value for key, value in settings.items() if key not in ("normalise", "curvature_exponent", "losses")
    }
    with pytest.raises(ValueError, match="its settings is"):
        next(trajectory.replay(_attached(_net(torch.float32), batch, **without), optimizers, known))


@pytest.mark.parametrize("losses", ["global", "local"])
def test_directions_shared_out(losses: str) -> None:
    """Three parties that look at a direction each end where one ends that looks at all, bit by bit."""
    batch = _batch(torch.float32)
    settings = {"variant": "mezo", "n": 3, "exact": True, "normalise": "scalar_ema", "curvature_exponent": 0.1}
    rules = [_attached(_net(torch.float32), batch, losses=losses, **settings) for _ in range(4)]
    before = flat(rules[0])
    assert torch.equal(before, (before / GRID).round() * GRID)  # heads, too
    rules[0].losses(batch)
    assert torch.equal(flat(rules[0]), before)
    for _ in range(2):
        take(rules[0].updates(batch), sgd(rules[0]))
        shared = torch.cat([rule.losses(batch, [i]) for i, rule in enumerate(rules[1:])])
        for rule in rules[1:]:
            take(rule.learn(shared), sgd(rule))
    for rule in rules[1:]:
        assert torch.equal(flat(rule), flat(rules[0]))
    if losses == "local":
        with pytest.raises(ValueError, match=r"3 directions and 2 blocks, \(3, 2, 3\)"):
            next(rules[0].learn(torch.zeros(3, 2)))
        with pytest.raises(ValueError, match="a step has 6 numbers"):
            next(rules[0].follow(torch.zeros(3)))


# -- what is refused -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"normalise": "adam"}, "normalise is 'adam', expected scalar_ema"),
        ({"beta2": 1.0, "normalise": "scalar_ema"}, "beta2 is 1.0, expected a share from 0 to below 1"),
        ({"beta2": 0.9}, "only normalise=scalar_ema has a use for it"),
        ({"curvature_exponent": 0}, "curvature_exponent is 0, expected a number above 0"),
        ({"curvature_exponent": True}, "curvature_exponent is True"),
        ({"curvature_exponent": 0.1, "variant": "fzoo", "n": 2}, "variant=fzoo looks at one side"),
        ({"curvature_exponent": 0.1, "antithetic": False}, "looks at one side here"),
        ({"curvature_exponent": 0.1, "variant": "qes"}, "its two sides give none"),
        ({"curvature_exponent": 0.1, "shaping": "sign"}, "shaping=sign sends signs alone"),
        ({"losses": "blockwise"}, "losses is 'blockwise', expected global, local"),
        ({"losses": "local", "variant": "qes"}, "heads of losses=local have none"),
        ({"losses": "local", "variant": "eggroll", "chunk": 3}, "only variant=eggroll with losses=global"),
        ({"head_limit": 4}, "only losses=local has a use for it"),
        ({"losses": "local", "head_limit": 0}, "head_limit is 0, expected a whole number"),
    ],
)
def test_settings_that_do_not_go(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ZerothOrder(**settings)


def test_local_losses_need_classes() -> None:
    batch = Batch(torch.randn(6, 6), torch.randn(6, 3))
    with pytest.raises(ValueError, match="losses=local compares every block with class labels"):
        ZerothOrder(losses="local").attach(_net(torch.float32), TaskInfo(batch, 3, F.mse_loss, classes=False))
