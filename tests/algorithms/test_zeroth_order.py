"""Zeroth order: what its steps are, that they leave no trace on the way, and that they can be made again from numbers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from locallearn.algorithms import TaskInfo, ZerothOrder
from locallearn.algorithms.zeroth_order import trajectory
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.functional.zeroth_order import GRID
from locallearn.nets import Blocks, mlp
from locallearn.nets.weights import digest
from locallearn.study._estimates import measure_estimates
from tests.algorithms.steps import flat, sgd, take
from tests.references import reference

VARIANTS: dict[str, dict[str, Any]] = {
    "spsa": {"n": 3},
    "mezo": {"variant": "mezo", "n": 3},
    "fzoo": {"variant": "fzoo", "n": 3},
    "eggroll": {"variant": "eggroll", "n": 3, "rank": 2},
    "qes": {"variant": "qes", "n": 3, "bits": 8},
}


def _batch(rows: int = 12, width: int = 6) -> Batch:
    draw = torch.Generator().manual_seed(1)
    return Batch(torch.randn(rows, width, generator=draw), torch.arange(rows) % 3)


def _attached(
    net: nn.Module, batch: Batch, loss: Callable[..., Tensor] = F.cross_entropy, classes: int = 3, **settings: Any
) -> Any:
    rule = ZerothOrder(**settings)
    blocks = net if isinstance(net, Blocks) else Blocks.cut(net)
    rule.attach(blocks, TaskInfo(batch._replace(inputs=batch.inputs[:2], targets=batch.targets[:2]), classes, loss))
    return rule


def _net() -> Blocks:
    torch.manual_seed(0)
    return mlp((6,), 3, (5, 4))


def _estimate(rule: Any, batch: Batch) -> dict[str, Tensor]:
    names = {id(p): name for name, p in rule.blocks.named_parameters()}
    return {names[id(p)]: g.clone() for update in rule.updates(batch) for p, g in update.gradients.items()}


# -- what an estimate is ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("eps", [1e-3, 0.3, 7.0])
@pytest.mark.parametrize("variant", ["spsa", "mezo"])
def test_on_a_quadratic_both_sides_give_the_derivative(variant: str, eps: float) -> None:
    """c = zᵀ∇L for every ε; one side is off by (ε/2) zᵀHz."""
    batch = Batch(torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64))
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    for p in net[0].parameters():  # one layer learns, so that the squared error is quadratic in the weights
        p.requires_grad_(False)
    torch.manual_seed(3)
    gradients = torch.autograd.grad(F.mse_loss(net(batch.inputs), batch.targets), list(net[1].parameters()))
    rule = _attached(net, batch, F.mse_loss, variant=variant, eps=eps, seed=5)
    made = _estimate(rule, batch)
    c = float(rule.scalars[0])
    z = [made[f"readout.{name}"] / c for name, _ in net[1].named_parameters()]
    slope = sum(float((a * b).sum()) for a, b in zip(z, gradients, strict=True))
    assert c == pytest.approx(slope, rel=2e-6)  # what is sent around is float32

    one = _attached(
        Blocks.cut(copy.deepcopy(net)), batch, F.mse_loss, variant=variant, eps=eps, seed=5, antithetic=False
    )
    _estimate(one, batch)
    moved = nn.Linear(3, 2).double()
    moved.load_state_dict(dict(zip(("weight", "bias"), z, strict=True)))
    curvature = 2 * float(moved(net[0](batch.inputs)).detach().square().mean())
    assert float(one.scalars[0]) - c == pytest.approx(eps / 2 * curvature, rel=1e-4, abs=1e-6 * (1 + abs(c)))


def test_without_a_step_it_is_the_forward_gradient() -> None:
    """ε → 0: c is the directional derivative along the same z, by autograd, on a network that is curved."""
    batch, net = _batch(), _net().double()
    batch = batch._replace(inputs=batch.inputs.double())
    rule = _attached(net, batch, eps=1e-6, seed=2)
    gradients = torch.autograd.grad(F.cross_entropy(net(batch.inputs), batch.targets), list(net.parameters()))
    made = list(_estimate(rule, batch).values())
    c = float(rule.scalars[0])
    assert c == pytest.approx(sum(float((m / c * g).sum()) for m, g in zip(made, gradients, strict=True)), rel=1e-5)


def test_in_place_is_the_same_step() -> None:
    """MeZO is SPSA to rounding, with the optimizer's decay and momentum, and exactly it on the grid."""
    batch = _batch()
    for exact, near in ((False, 1e-3), (True, 0.0)):
        ends = []
        for variant in ("spsa", "mezo"):
            rule = _attached(_net(), batch, variant=variant, n=3, exact=exact)
            optimizers = sgd(rule, weight_decay=0.1, momentum=0.9)
            for _ in range(4):
                take(rule.updates(batch), optimizers)
            ends.append(flat(rule.blocks))
        assert float((ends[0] - ends[1]).abs().max()) <= near


def test_mezo_as_its_authors_code_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise given, losses, the number and the weights after a step with decay are theirs, in float64."""
    known = reference("mezo")
    names = ["lin.weight", "lin.bias", "layer_norm.weight", "layer_norm.bias", "head.weight", "head.bias"]
    names = [name for name in names if f"f64/w0/{name}" in known]
    tensors = {key: torch.from_numpy(value) for key, value in known.items() if value.dtype.kind == "f"}
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=len(names) == 6)).double()
    for p, name in zip(net.parameters(), names, strict=True):
        p.data.copy_(tensors[f"f64/w0/{name}"])
    noise = {id(p): tensors[f"f64/z/{name}"].flatten()[None] for p, name in zip(net.parameters(), names, strict=True)}

    def made(way: Any, segment: Any, members: Tensor) -> list[Tensor]:
        return [noise[id(part.weight)] for part in segment]

    monkeypatch.setattr("locallearn.algorithms.zeroth_order._dense.Dense._made", made)
    batch = Batch(tensors["f64/x"], torch.from_numpy(known["f64/y"]))
    rule = _attached(net, batch, classes=2, variant="mezo", eps=float(known["zo_eps"]))
    assert float(F.cross_entropy(net(batch.inputs), batch.targets).detach()) == pytest.approx(
        float(known["f64/loss_clean"])
    )
    seen = rule.losses(batch)
    assert seen[0].tolist() == pytest.approx([float(known["f64/loss_plus"]), float(known["f64/loss_minus"])], abs=1e-12)
    take(rule.learn(seen), sgd(rule, float(known["lr"]), weight_decay=float(known["weight_decay"])))
    assert float(rule.scalars[0]) == pytest.approx(float(known["f64/projected_grad"]), rel=1e-6)
    for p, name in zip(net.parameters(), names, strict=True):
        assert float((p.detach() - tensors[f"f64/w1/{name}"]).abs().max()) < 1e-8  # the number is float32 here


@pytest.mark.parametrize(("variant", "noise"), [("spsa", "rademacher"), ("mezo", "gaussian")])
def test_how_far_estimates_are_from_the_gradient(variant: str, noise: str) -> None:
    """The error that is announced is the one against autograd, for either noise."""
    rule = _attached(_net(), batch := _batch(), variant=variant, noise=noise, n=2)
    found = measure_estimates("zeroth_order", rule, TaskInfo(batch, 3, F.cross_entropy), batch, rule.n, 100)
    size = sum(p.numel() for p in rule.blocks.parameters())
    assert found.size == size
    assert found.theory == pytest.approx((size + (1 if noise == "gaussian" else -1)) / 2)
    assert abs(found.error - found.theory) < 4 * (found.standard_error or 0.0)
    assert rule.estimates_along == "n"


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "eggroll", "shaping": "none"},
        {"variant": "fzoo", "n": 2},
        {"antithetic": False},
        {"shaping": "sign"},
    ],
)
def test_estimates_without_a_law(settings: dict[str, Any]) -> None:
    assert ZerothOrder(**settings).expected_error(100) is None


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", [*VARIANTS, "sign", "one side"])
def test_a_loss_that_is_not_finite_is_told(name: str, exact: bool) -> None:
    """One bad loss of many is neither left out of the mean nor taken for a spread of zero."""
    settings = {"sign": {"n": 3, "shaping": "sign"}, "one side": {"n": 3, "antithetic": False}} | VARIANTS
    for bad in (float("nan"), float("inf")):
        rule = _attached(_net(), _batch(), **settings[name], exact=exact)
        seen = rule.losses(_batch())
        seen[0] = bad
        updates = list(rule.learn(seen))
        assert not torch.isfinite(updates[0].loss)
        if bad != bad and name != "sign":  # of which a sign is zero
            assert torch.isnan(rule.scalars).any()


class _Mixed(nn.Module):
    """Convolutions, normalisation with weights, and a linear layer on maps."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.two = nn.Sequential(
            nn.Conv2d(4, 4, 3, stride=2, bias=False), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(16)
        )
        self.readout = nn.Linear(16, 3)

    def blocks(self) -> Blocks:
        return Blocks({"one": self.one, "two": self.two}, self.readout)


@pytest.mark.parametrize("variant", ["spsa", "mezo", "eggroll"])
def test_weights_in_float16_learn_from_losses(variant: str) -> None:
    """Large models are tuned so; rules that make gradients refuse them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).half()
    x = torch.randn(32, 8, dtype=torch.float16)
    batch = Batch(x, (x.float().sum(1) > 0).long())
    rule = _attached(net, batch, variant=variant, n=8, eps=1e-2)
    optimizers = {unit: torch.optim.SGD(groups, lr=0.05) for unit, groups in rule.units().items()}
    before = F.cross_entropy(net(x).float(), batch.targets)
    for _ in range(60):
        for update in rule.updates(batch):
            update.backward()
            optimizers[update.unit].step()
            optimizers[update.unit].zero_grad()
    assert F.cross_entropy(net(x).float(), batch.targets) < 0.7 * before


class _Functional(nn.Module):
    """Its first layer is never called: its weight is used all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(F.linear(x, self.one.weight, self.one.bias)))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.look, self.mid, self.out = nn.Embedding(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.out.weight = self.look.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.mid(self.look(x.long() % 16).mean(1))))


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("make", [_Functional, _Tied, lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU())])
def test_weights_outside_of_the_known_layers_pass_one_after_another_however_small_the_steps(
    make: Callable[[], nn.Module], eps: float
) -> None:
    """Numbers are those of directions that are written out: a small step hides what a joint pass leaves out."""
    torch.manual_seed(0)
    net = make()
    batch = Batch(torch.randint(0, 16, (16, 8)).float(), torch.arange(16) % 3)
    rule = _attached(Blocks({"all": net}, nn.Linear(16, 3)), batch, variant="eggroll", n=4, eps=eps)
    rule.losses(batch)
    assert rule._factored is isinstance(net, nn.Sequential)


class _Counting(nn.Module):
    """It fails in a way of its own on other rows than it was given."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(8, 8), error

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        if len(found) != len(x):
            raise self.error("rows")
        return found.relu()


@pytest.mark.parametrize("error", [AssertionError, KeyError, AttributeError, RuntimeError])
def test_a_network_that_counts_its_rows_passes_one_after_another(error: type[Exception]) -> None:
    torch.manual_seed(0)
    batch = Batch(torch.randn(16, 8), torch.arange(16) % 3)
    rule = _attached(Blocks({"all": _Counting(error)}, nn.Linear(8, 3)), batch, variant="eggroll", n=4)
    assert rule.losses(batch).isfinite().all()
    assert rule._factored is False


def test_a_batch_of_one_row_decides_as_any_other() -> None:
    """The input that goes around the first layer has not been repeated; of one row alone nobody would see it."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.layer(x))

    torch.manual_seed(0)
    batch = Batch(torch.randn(16, 8), torch.arange(16) % 3)
    rule = _attached(Blocks({"all": Around()}, nn.Linear(8, 3)), batch, variant="eggroll", n=4)
    rule.losses(Batch(batch.inputs[:1], batch.targets[:1]))
    assert rule._factored is False
    assert rule.losses(batch).isfinite().all()


def test_a_weight_that_thaws_passes_one_after_another() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(8, 16), nn.Parameter(torch.zeros(16), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.shift

    torch.manual_seed(0)
    net, batch = Shifted(), Batch(torch.randn(16, 8), torch.arange(16) % 3)
    rule = _attached(Blocks({"all": net}, nn.Linear(16, 3)), batch, variant="eggroll", n=4)
    rule.losses(batch)
    assert rule._factored is True
    net.shift.requires_grad_(True)
    rule.losses(batch)
    assert rule._factored is False
    net.shift.requires_grad_(False)
    rule.losses(batch)
    assert rule._factored is True


@pytest.mark.parametrize("eps", [1e-2, 1e-4])
@pytest.mark.parametrize(
    "make", [_Functional, _Tied, lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU())]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trial_of_the_joint_pass_decides_the_same_in_low_precision(
    make: Callable[[], nn.Module], eps: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    net = make()
    batch = Batch(torch.randint(0, 16, (16, 8)).float(), torch.arange(16) % 3)
    rule = _attached(Blocks({"all": net}, nn.Linear(16, 3)), batch, variant="eggroll", n=4, eps=eps)
    with torch.autocast("cpu", dtype):
        rule.losses(batch)
    assert rule._factored is isinstance(net, nn.Sequential)


def test_the_trial_of_the_joint_pass_leaves_no_trace() -> None:
    """Weights, statistics and the random numbers of the run are what they are without it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
    batch = Batch(torch.randn(16, 8), torch.arange(16) % 3)
    blocks = Blocks({"all": net}, nn.Linear(16, 3))
    rule = _attached(blocks, batch, variant="eggroll", n=4)
    rule.losses(batch)
    assert rule._factored is True
    found, state = [], {name: value.clone() for name, value in blocks.state_dict().items()}
    for tried in (True, None):  # None: tried anew
        blocks.load_state_dict(state)
        rule._factored = tried
        torch.manual_seed(1)
        losses = rule.losses(batch)
        found.append((losses, torch.get_rng_state(), *(value.clone() for value in blocks.state_dict().values())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("variant", ["spsa", "mezo", "fzoo", "eggroll", "qes"])
def test_a_network_that_is_frozen_as_a_whole_stays_as_it_is_and_thaws(variant: str) -> None:
    torch.manual_seed(0)
    batch = Batch(torch.randn(16, 8), torch.arange(16) % 3)
    blocks = Blocks({"all": nn.Sequential(nn.Linear(8, 16), nn.ReLU())}, nn.Linear(16, 3))
    rule = _attached(blocks, batch, variant=variant, n=4)
    for wanted in (False, True):
        blocks.requires_grad_(wanted)
        updates = list(rule.updates(batch))
        assert any(update.gradients for update in updates) is wanted


@pytest.mark.parametrize("rank", [1, 3])
def test_many_at_once_are_what_they_are_one_by_one(rank: int) -> None:
    """Factored = written out, forward and step, for linear layers, convolutions and normalisation, in float64."""
    torch.manual_seed(0)
    blocks = _Mixed().blocks().double()
    for p in blocks.parameters():
        nn.init.normal_(p, std=0.5)
    batch = Batch(torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.arange(5) % 3)
    rule = _attached(blocks, batch, variant="eggroll", n=4, rank=rank, eps=0.1)
    blocks.train()
    together = rule.losses(batch)
    assert rule._factored is True
    rule._factored = False
    blocks[0][1].reset_running_stats()
    alone = copy.deepcopy(rule)
    rule._factored = True
    blocks[0][1].reset_running_stats()
    for chunk in (None, 3):
        rule.chunk = chunk
        blocks[0][1].reset_running_stats()
        assert torch.allclose(rule.losses(batch), alone.losses(batch), atol=1e-12) is (chunk is None) or chunk == 3
        alone.blocks[0][1].reset_running_stats()
        blocks[0][1].reset_running_stats()
    assert torch.allclose(rule.losses(batch), together, atol=1e-12)
    way = rule._way()
    way.begin(0)
    before = {name: p.detach().clone() for name, p in blocks.named_parameters()}
    c = torch.tensor([0.5, -1.0, 2.0, 0.25])
    explicit = {name: torch.zeros_like(p) for name, p in before.items()}
    with torch.no_grad():
        for i, weight in enumerate(c.tolist()):
            way.visit(i, 1)
            for name, p in blocks.named_parameters():
                explicit[name] += weight * (p - before[name]) / rule.eps / 4
            way.home()
        made = next(way.estimates(c))
    for name, p in blocks.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.allclose(made[p], explicit[name], atol=1e-12), name


# -- no trace ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", VARIANTS)
def test_looking_leaves_the_weights(name: str) -> None:
    """Home after losses, bit by bit where there is a copy or a grid; in place within 1.5 ulp of what was added per cycle."""
    batch = _batch()
    rule = _attached(_net(), batch, **VARIANTS[name])
    before = flat(rule.blocks)
    cycles = 5
    for _ in range(cycles):
        rule.losses(batch)
    drift = (flat(rule.blocks) - before).abs()
    if name in ("mezo", "fzoo"):
        ulp = torch.finfo(torch.float32).eps * (before.abs() + 2 * rule.eps * 4.4)
        assert bool((drift <= cycles * rule.n * 1.5 * ulp).all())
        assert float(drift.max()) > 0 or name == "fzoo"  # else the test would say nothing
    else:
        assert float(drift.max()) == 0


def test_exact_comes_home_after_thousands_of_moves() -> None:
    rule = _attached(_net(), _batch(), variant="mezo", exact=True, eps=1e-3)
    before = flat(rule.blocks)
    assert bool((before / GRID == (before / GRID).round()).all())
    way = rule._way()
    way.begin(0)
    part, z = way._groups[0][0][0], torch.full((30,), 1.234)
    target = part.of(part.weight)
    with torch.no_grad():
        for _ in range(2500):
            for times in (1, -2, 1):
                way._move(target, z[: part.count], times)
    assert torch.equal(flat(rule.blocks), before)


@pytest.mark.parametrize("name", VARIANTS)
def test_buffers_masks_and_generators(name: str) -> None:
    """Statistics move once per batch, as a pass at θ moves them; all losses see the same masks; draws are those of one pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    batch = _batch()
    rule = _attached(net, batch, **VARIANTS[name])
    rule.train()
    twin = copy.deepcopy(rule.blocks)
    masks: list[Tensor] = []
    net[2].register_forward_hook(lambda module, given, output: masks.append(output == 0))
    torch.manual_seed(7)
    rule.losses(batch)
    state = torch.get_rng_state()
    assert all(torch.equal(mask, masks[1]) for mask in masks[1:])
    torch.manual_seed(7)
    twin(batch.inputs)
    twin(batch.inputs)  # dropout draws in the pass that moves statistics, too
    assert torch.equal(state, torch.get_rng_state())
    norm, other = net[1], twin[0][1]
    assert torch.equal(norm.num_batches_tracked, torch.tensor(1))
    once = copy.deepcopy(rule.blocks)
    once[0][1].reset_running_stats()
    once(batch.inputs)
    assert torch.allclose(norm.running_mean, once[0][1].running_mean, atol=1e-5)
    assert norm.training
    assert other.num_batches_tracked == 2


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_differentiated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph is made, and it works where none could be."""
    batch = _batch()
    rule = _attached(_net(), batch, **VARIANTS[name])

    def fail(*given: Any, **named: Any) -> None:
        raise AssertionError("the engine ran")

    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", fail)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", fail)
    rule.blocks.register_forward_hook(lambda module, given, output: fail() if output.requires_grad else None)
    before = flat(rule.blocks)
    take(rule.updates(batch), sgd(rule, 1.0))
    assert float((flat(rule.blocks) - before).abs().max()) > 0


def test_the_audit_confirms_codes() -> None:
    """The other variants are in the conformance suite."""
    result = audit(_attached(_net(), _batch(), variant="qes", n=1, bits=8), _batch(), batches=2, warmup=1)
    assert result.confirmed, result.reason


class _Live(TorchDispatchMode):
    """Bytes of all storages that operators have made, at their peak; weights that they have written into are none."""

    def __init__(self, without: nn.Module) -> None:
        super().__init__()
        self._without = {p.untyped_storage().data_ptr() for p in without.parameters()}
        self.peak = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._without:
                    self._seen[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._seen = {key: held for key, held in self._seen.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._seen.values()))
        return made


def _peak(net: nn.Module, run: Callable[[], Any]) -> int:
    with _Live(net) as live:
        run()
    return live.peak


def _memory(depth: int, **settings: Any) -> tuple[int, int, int]:
    """Bytes of the weights, and what inference and a step make beside them at their peaks."""
    net, batch = mlp((1024,), 10, (1024,) * depth), Batch(torch.randn(2, 1024), torch.tensor([0, 1]))
    with torch.no_grad():
        inference = _peak(net, lambda: net(batch.inputs))
    rule = _attached(net, batch, **settings)
    optimizers = sgd(rule)
    return (
        sum(p.numel() * 4 for p in net.parameters()),
        inference,
        _peak(net, lambda: take(rule.updates(batch), optimizers)),
    )


def test_mezo_in_the_memory_of_inference() -> None:
    """At most 1.05 times what weights, inference and the largest weight take, and pieces of noise that are always as large."""
    largest, noise = 4 * 1024**2, 6 * 2**20
    peaks = []
    for depth in (2, 6):
        weights, inference, peak = _memory(depth, variant="mezo")
        assert weights + peak <= 1.05 * (weights + inference + largest) + noise
        peaks.append(peak)
    assert peaks[1] <= 1.01 * peaks[0]  # flat in depth
    weights, _, peak = _memory(6)
    assert peak > 2 * weights  # a copy, directions, and gradients


# -- from numbers alone ------------------------------------------------------------------------------------------------------
def _trained(tmp_path: Path, steps: int = 8, **settings: Any) -> tuple[Any, Path]:
    """A rule that has trained on data, with its rate falling, and its trajectory."""
    rule, file = _attached(_net(), _batch(), **settings), tmp_path / "t.bin"
    optimizers = sgd(rule, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizers["network"], 0.9)
    draw = torch.Generator().manual_seed(0)
    with trajectory.Writer(file, rule, list(optimizers.values())) as writer:
        for _ in range(steps):
            writer.before()
            rows = torch.randint(12, (6,), generator=draw)
            take(rule.updates(Batch(_batch().inputs[rows], _batch().targets[rows])), optimizers)
            writer.step()
            scheduler.step()
        writer.epoch()
    return rule, file


def _replayed(file: Path, **settings: Any) -> Any:
    rule = _attached(_net(), _batch(), **settings)
    for _ in trajectory.replay(rule, sgd(rule, 123.0, momentum=0.9, weight_decay=0.01), trajectory.read(file)):
        pass
    return rule


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_replay(name: str, exact: bool, tmp_path: Path) -> None:
    """The weights, from where they began and the file; what is drawn again is drawn alike."""
    settings = {**VARIANTS[name], "exact": exact, "seed": 4}
    rule, file = _trained(tmp_path, **settings)
    again = _replayed(file, **settings)
    apart = float((flat(rule.blocks) - flat(again.blocks)).abs().max())
    assert apart == 0 if exact or name not in ("mezo", "fzoo") else 0 < apart < 1e-5
    assert float((flat(rule.blocks) - flat(_net())).abs().max()) > 1e-3
    found = trajectory.read(file)
    assert len(found.steps) == 8
    assert found.weights[8] == bytes.fromhex(digest(trajectory.weights_of(rule)))[:8]


def test_signs_take_little_room(tmp_path: Path) -> None:
    settings = {"variant": "eggroll", "n": 7, "shaping": "sign"}
    rule, file = _trained(tmp_path, steps=40, **settings)
    assert torch.equal(flat(rule.blocks), flat(_replayed(file, **settings).blocks))
    header = trajectory.read(file).checks[0][1]
    rates = 40 * (2 + 2 * 16)  # falling in every step
    assert file.stat().st_size - header == rates + 40 * (1 + 2) + 2 * 9


def test_a_changed_file_is_found_out(tmp_path: Path) -> None:
    _, file = _trained(tmp_path, variant="mezo", steps=70)
    content = bytearray(file.read_bytes())
    last = trajectory.read(file)
    assert [done for done, _ in last.checks] == [0, 64, 70]
    for place, where in (
        (last.steps[30].end - 1, "steps 1 to 64"),
        (last.steps[66].end - 2, "steps 65 to 70"),
        (40, "its header"),
    ):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=where):
            trajectory.read(file)
    file.write_bytes(content[: last.steps[67].end - 1])  # a kill in the middle of a write
    assert len(trajectory.read(file).steps) == 67
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no trajectory"):
        trajectory.read(file)


def test_a_trajectory_goes_with_its_training_only(tmp_path: Path) -> None:
    _, file = _trained(tmp_path, variant="mezo")
    with pytest.raises(ValueError, match="its seed is 0, and here it is 1"):
        _replayed(file, variant="mezo", seed=1)
    with pytest.raises(ValueError, match="its settings is"):
        _replayed(file, variant="spsa")
    rule = _attached(_net(), _batch(), variant="mezo")
    with torch.no_grad():
        next(rule.blocks.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="not those that the training began with"):
        next(trajectory.replay(rule, sgd(rule), trajectory.read(file)))
    with pytest.raises(ValueError, match="never overwritten"):
        trajectory.Writer(file, rule, list(sgd(rule).values()))


def test_going_on_with_a_trajectory(tmp_path: Path) -> None:
    """After a kill the file is cut to the checkpoint's step, and goes on as if nothing had been."""
    rule, file = _trained(tmp_path, variant="mezo", steps=10)
    whole = trajectory.read(file).steps
    optimizers = sgd(rule, momentum=0.9, weight_decay=0.01)
    with trajectory.Writer(file, rule, list(optimizers.values()), steps=6) as writer:
        rule.scalars = torch.tensor([9.0])
        writer.step()
    found = trajectory.read(file)
    assert [float(step.c[0]) for step in found.steps] == [*(float(step.c[0]) for step in whole[:6]), 9.0]
    assert found.checks[-1][0] == 7
    with pytest.raises(ValueError, match="goes on after 20"):
        trajectory.Writer(file, rule, list(optimizers.values()), steps=20)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("variant", ["mezo", "eggroll"])
def test_directions_shared_out(variant: str, ranks: int) -> None:
    """Whoever looks at which directions, the weights are the same, bit by bit; only losses go around."""
    batch = _batch()
    make = partial(_attached, batch=batch, variant=variant, n=4, exact=True)
    alone, parties = make(_net()), [make(_net()) for _ in range(ranks)]
    for rule in (alone, *parties):
        rule.optimizers = sgd(rule, momentum=0.5)
    for _ in range(3):
        take(alone.updates(batch), alone.optimizers)
        shared = torch.empty(4, 2, dtype=torch.float64)
        for rank, rule in enumerate(parties):
            own = [i for i in reversed(range(4)) if i % ranks == rank]
            shared[own] = rule.losses(batch, own)
        for rule in parties:
            take(rule.learn(shared), rule.optimizers)
    for rule in parties:
        assert torch.equal(flat(rule.blocks), flat(alone.blocks))


def test_whoever_stops_in_the_middle_finds_the_weights_home() -> None:
    rule = _attached(_net(), _batch(), variant="mezo", exact=True)
    before = flat(rule.blocks)
    updates = rule.updates(_batch())
    next(updates)
    updates.close()
    assert torch.equal(flat(rule.blocks), before)

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyboardInterrupt

    rule._loss = broken
    with pytest.raises(KeyboardInterrupt):
        next(rule.updates(_batch()))
    assert torch.equal(flat(rule.blocks), before)


def test_codes_stay_codes() -> None:
    """Weights of QES are on their levels after every step, vectors stay, and codes move."""
    rule = _attached(_net(), _batch(), variant="qes", n=4, bits=4, residual_decay=1.0)
    start = [held.codes.clone() for held in rule.coded]
    vectors = [p.detach().clone() for p in rule.blocks.parameters() if p.ndim < 2]
    optimizers = sgd(rule, 0.5)
    for _ in range(6):
        take(rule.updates(_batch()), optimizers)
        matrices = [p for p in rule.blocks.parameters() if p.ndim > 1]
        for held, p in zip(rule.coded, matrices, strict=True):
            assert torch.equal(p.detach(), held.weight())
            assert -8 <= int(held.codes.min()) <= int(held.codes.max()) <= 7
    assert any(not torch.equal(held.codes, codes) for held, codes in zip(rule.coded, start, strict=True))
    assert all(
        torch.equal(p.detach(), v)
        for p, v in zip([p for p in rule.blocks.parameters() if p.ndim < 2], vectors, strict=True)
    )


# -- what is refused -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"variant": "adam"}, "variant is 'adam', expected spsa"),
        ({"n": 0}, "n is 0, expected a whole number"),
        ({"eps": 0.0}, "eps is 0.0, expected a number above 0"),
        ({"noise": "cauchy"}, "noise is 'cauchy'"),
        ({"shaping": "rank"}, "shaping is 'rank'"),
        ({"rank": 2}, "only variant=eggroll has a use for it"),
        ({"bits": 8}, "only variant=qes has a use for it"),
        ({"variant": "fzoo", "n": 4, "antithetic": True}, "looks at one side"),
        ({"variant": "fzoo", "n": 1}, "set n=2 or more"),
        ({"antithetic": False, "shaping": "sign"}, "set n=2 or more"),
        ({"variant": "qes", "antithetic": False}, "both sides"),
        ({"variant": "qes", "bits": 9}, "bits is 9"),
        ({"decay": "none"}, "decay is 'none', expected matrices, all"),
        ({"exact": "maybe"}, "exact is 'maybe', expected true or false"),
        ({"antithetic": 1}, "antithetic is 1, expected true or false"),
        ({"variant": "qes", "residual_decay": "half"}, "residual_decay is 'half', expected a share"),
        ({"trajectory": 5}, "trajectory is 5, expected the name of a file"),
    ],
)
def test_settings_that_do_not_go(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ZerothOrder(**settings)


def test_networks_that_do_not_go() -> None:
    batch = _batch()
    dropout = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="exact=true gives the same weights wherever"):
        _attached(dropout, batch, exact=True)
    dropout[1].p = 0.0
    with torch.no_grad():
        dropout[0].weight[0, 0] = 2.5
    with pytest.raises(ValueError, match=r"between -2 and 2, and the largest of 'members\.block0\.0\.weight' is 2\.5"):
        _attached(dropout, batch, exact=True)
    for eps in (1e-8, 0.5):
        with pytest.raises(ValueError, match=r"use an eps from 1e-6 to 0\.45, or exact=false"):
            _attached(_net(), batch, exact=True, eps=eps)
    with pytest.raises(ValueError, match=r"two losses for each of 1 directions, \(1, 2\)"):
        next(_attached(_net(), batch).learn(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="one per direction"):
        next(_attached(_net(), batch).follow(torch.zeros(2)))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_probes_are_seen_under_autocast(variant: str) -> None:
    """Autocast keeps casts of weights, and would go on with those from before they were moved."""
    rule = _attached(_net(), _batch(), **{**VARIANTS[variant], "eps": 0.5})  # seen in bfloat16
    before = [p.clone() for p in rule.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        take(rule.updates(_batch()), sgd(rule, 10.0))
    moved = [not torch.equal(p, known) for p, known in zip(rule.parameters(), before, strict=True) if p.ndim > 1]
    assert all(moved)  # qes leaves vectors
