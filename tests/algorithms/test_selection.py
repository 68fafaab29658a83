"""Learning from a part of every batch: local rules against loops by hand, backpropagation's control, costs, refusals."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallearn as ll
from locallearn.algorithms import Algorithm, Backprop, LocalHeads, MonoForward, TaskInfo
from locallearn.algorithms._selection import Selection, sample_losses
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.nets import Blocks, mlp, resnet
from locallearn.tasks._checks import check_batch_sizes
from locallearn.testing import plain_loop

DRAW = torch.Generator().manual_seed(0)
ROWS = [
    Batch(
        torch.randn(8, 6, generator=DRAW), torch.randint(4, (8,), generator=DRAW), index=torch.arange(8) + 8 * (i % 2)
    )
    for i in range(4)
]
IMAGES = Batch(torch.randn(8, 3, 8, 8, generator=DRAW), torch.arange(8) % 4)
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def _attached(algorithm: Any, net: Blocks, batch: Batch = ROWS[0], loss: Any = F.cross_entropy) -> Any:
    algorithm.attach(net, TaskInfo(Batch(batch.inputs[:2], batch.targets[:2]), 4, loss))
    return algorithm.train()


def _mlp() -> Blocks:
    torch.manual_seed(0)
    return mlp((6,), 4, (5, 7, 3))


def _hardest(losses: Tensor, kept: int) -> list[int]:
    ranked = sorted(range(len(losses)), key=lambda i: (-float(losses[i]), i))
    return sorted(ranked[:kept])


# -- local rules ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("by", "after"), [("loss", None), ("loss", "layer2"), ("random", None)])
def test_a_part_goes_on_as_in_a_loop_by_hand(by: Any, after: str | None) -> None:
    """Bit for bit: every block up to the one that chooses learns from the batch, the others from what it has chosen."""
    net = _mlp()
    twin = copy.deepcopy(net)
    algorithm = _attached(MonoForward(seed=3, keep=0.375, keep_by=by, keep_after=after), net)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        heads = [nn.init.kaiming_uniform_(nn.Parameter(torch.empty(4, d)), a=math.sqrt(5)) for d in (5, 7)]
    assert twin.readout is not None
    groups = [[*block.parameters(), head] for block, head in zip(twin, [*heads, twin.readout.weight], strict=True)]
    optimizers, draw = [sgd(group) for group in groups], torch.Generator().manual_seed(3)
    plain_loop(algorithm, ROWS, sgd)
    for batch in ROWS:
        x, y = batch.inputs, batch.targets
        for i, (block, group) in enumerate(zip(twin, groups, strict=True)):
            x = block(x)
            scores = F.linear(x, group[-1])
            F.cross_entropy(scores, y).backward()
            optimizers[i].step()
            optimizers[i].zero_grad()
            x = x.detach()
            if i == (0 if after is None else 1):
                losses = F.cross_entropy(scores.detach(), y, reduction="none")
                rows = _hardest(losses, 3) if by == "loss" else sorted(torch.randperm(8, generator=draw)[:3].tolist())
                x, y = x[rows], y[rows]
                assert len(y) == 3
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    "parts",
    [
        {"loss": "predsim", "beta": 0.7},
        {"loss": "sim", "head": "linear"},
        {"loss": "infopro", "reconstruction": (1.0, 0.5), "classification": (0.5, 1.0)},
        {"loss": "infopro", "contrast": True, "classification": (1.0, 1.0)},
        {"smoothing": 0.1},
    ],
)
def test_samples_are_ranked_by_the_blocks_own_loss(parts: dict[str, Any]) -> None:
    """Head and term of every sample by itself have the local loss as their mean; the largest go on."""
    torch.manual_seed(0)
    algorithm = _attached(
        LocalHeads(keep=0.5, **{"head": "conv1", **parts}), resnet((3, 8, 8), 4, 1, (4, 6, 8)), IMAGES
    )
    algorithm.prepare(IMAGES)
    output = algorithm.run(0, IMAGES.inputs, IMAGES)
    loss = algorithm.local_loss(0, output, IMAGES)
    each = algorithm._losses
    assert each.shape == (8,)
    torch.testing.assert_close(each.mean(), loss.detach())
    assert each.std() > 0
    inputs, batch = algorithm.pass_on(0, output.detach(), IMAGES)
    rows = _hardest(each, 4)
    assert torch.equal(inputs, output.detach()[rows])
    assert torch.equal(batch.targets, IMAGES.targets[rows])
    assert torch.equal(batch.inputs, IMAGES.inputs[rows])  # of which InfoPro's decoders make the image
    plain = _attached(LocalHeads(**{"head": "conv1", **parts}), copy.deepcopy(algorithm.blocks), IMAGES)
    plain.load_state_dict(algorithm.state_dict())
    plain.prepare(IMAGES)
    torch.testing.assert_close(plain.local_loss(0, output, IMAGES), loss)


def test_similarity_of_one_sample() -> None:
    """Its row of the matrix, by hand."""
    torch.manual_seed(0)
    algorithm = _attached(LocalHeads(keep=0.5, loss="sim"), _mlp())
    output = algorithm.run(0, ROWS[0].inputs, ROWS[0])
    algorithm.local_loss(0, output, ROWS[0])
    x, y = algorithm.heads.terms[0].layer(output), F.one_hot(ROWS[0].targets, 4).float()
    found, wanted = (torch.corrcoef(t) for t in (x, y))
    torch.testing.assert_close(algorithm._losses, (found - wanted).square().mean(1).detach(), rtol=1e-4, atol=1e-6)


def test_what_goes_on_is_what_was_computed_although_an_optimizer_asks_again() -> None:
    algorithm = _attached(LocalHeads(keep=0.5), _mlp())
    updates = algorithm.updates(ROWS[0])
    first = next(updates)
    before = algorithm._losses.clone()
    with torch.no_grad():
        for p in algorithm.blocks[0].parameters():
            p.add_(torch.randn_like(p))
    assert first.again is not None
    assert first.loss is not None
    assert float(first.again().detach()) != float(first.loss.detach())
    assert torch.equal(algorithm._losses, before)


# -- the control ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [{}, {"checkpoint": 2}, {"accumulate": 2}])
def test_backpropagation_learns_from_what_was_hard_last_time(settings: dict[str, Any]) -> None:
    """Against a loop by hand: samples that never came are first, then those that cost most when they were learned from."""
    net = _mlp()
    twin = copy.deepcopy(net)
    batches = [b._replace(index=None, source=b.index) for b in ROWS * 2]  # as augmented samples come
    plain_loop(_attached(Backprop(keep=0.5, **settings), net), batches, sgd)
    optimizer, known = sgd(twin.parameters()), torch.full((16,), math.inf)
    for batch in batches:
        assert batch.places is not None
        rows = _hardest(known[batch.places], 4)
        x, y = batch.inputs[rows], batch.targets[rows]
        losses = F.cross_entropy(twin(x), y, reduction="none")
        known[batch.places[rows]] = losses.detach()
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert known.isfinite().all()  # nobody is left out for good
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_any_part_by_backpropagation() -> None:
    net, draw = _mlp(), torch.Generator().manual_seed(5)
    twin = copy.deepcopy(net)
    plain_loop(_attached(Backprop(5, keep=0.5, keep_by="random"), net), ROWS, sgd)
    parts = []
    for batch in ROWS:
        rows = torch.randperm(8, generator=draw)[:4].sort().values
        parts.append(Batch(batch.inputs[rows], batch.targets[rows]))
    plain_loop(_attached(Backprop(), twin), parts, sgd)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_last_losses_go_into_a_checkpoint() -> None:
    first, second = (_attached(Backprop(keep=0.5), _mlp()) for _ in range(2))
    plain_loop(first, ROWS, sgd)
    second.load_state_dict(first.state_dict())
    assert len(second.last_losses.losses) == 16
    assert torch.equal(second.last_losses.losses, first.last_losses.losses)
    assert _attached(Backprop(), _mlp()).state_dict().keys() == _mlp_keys()


def _mlp_keys() -> Any:
    return {f"blocks.{key}" for key in _mlp().state_dict()} | {"_extra_state"}


# -- any network ------------------------------------------------------------------------------------------------------
def test_any_network_under_rules_that_take_a_part() -> None:
    """Tried on as many samples as a part can be taken of; the loop says which samples it gives."""

    def made(algorithm: Algorithm, **where: Any) -> ll.Local:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))
        return ll.localize(net, algorithm, example=ROWS[0].inputs[:2], optimizer=sgd, **(where or {"cuts": ["1", "3"]}))

    for keep, by in ((0.5, "loss"), (0.5, "random"), (0.9, "loss")):
        local = made(MonoForward(keep=keep, keep_by=by))  # type: ignore[arg-type]
        twin = copy.deepcopy(local.algorithm)
        local.step(ROWS[0].inputs, ROWS[0].targets)
        plain_loop(twin, [ROWS[0]], sgd)
        assert all(torch.equal(p, q) for p, q in zip(local.algorithm.parameters(), twin.parameters(), strict=True))
    local = made(Backprop(keep=0.5))
    twin = copy.deepcopy(local.algorithm)
    for batch in ROWS:
        local.step(batch.inputs, batch.targets, source=batch.index)
    plain_loop(twin, ROWS, sgd)
    assert all(torch.equal(p, q) for p, q in zip(local.net.parameters(), twin.blocks.parameters(), strict=True))
    with pytest.raises(ValueError, match="give source= to the step"):
        local.step(ROWS[0].inputs, ROWS[0].targets)
    with pytest.raises(ValueError, match=r"source is torch.int64 of shape \(3,\), expected .* int64 of shape \(8,\)"):
        local.step(ROWS[0].inputs, ROWS[0].targets, source=torch.arange(3))


# -- what it costs ----------------------------------------------------------------------------------------------------
def test_later_blocks_cost_a_part() -> None:
    """By hand, of products alone: half of the rows pass blocks 2 and 3; backpropagation halves everything."""
    whole = 2 * (2 * 6 * 5 + 3 * 5 * 4 + 2 * 5 * 7 + 3 * 7 * 4 + 2 * 7 * 3 + 3 * 3 * 4)
    first = 2 * (2 * 6 * 5 + 3 * 5 * 4)
    full = measure_update(_attached(MonoForward(), _mlp()), ROWS[0])
    half = measure_update(_attached(MonoForward(keep=0.5), _mlp()), ROWS[0], other=ROWS[1])
    assert (full.flops, half.flops) == (whole, first + (whole - first) / 2)
    assert half.stages[0].steady
    assert half.stages[0].step_flops == 0
    control = [measure_update(_attached(Backprop(keep=keep), _mlp()), ROWS[0], other=ROWS[1]) for keep in (1, 0.5)]
    assert control[1].flops == control[0].flops / 2
    assert control[1].stages[0].steady


def test_a_part_of_an_odd_batch_costs_what_it_costs() -> None:
    """Of 8 and of 5 samples 2 go on, which lie on no line through the origin; nor does half of 8 say so."""
    algorithm = _attached(MonoForward(keep=0.3), _mlp())
    part = Batch(ROWS[0].inputs[:5], ROWS[0].targets[:5])
    exact = 3 * 8 * measure_update(algorithm, ROWS[0]).flops + 2 * 5 * measure_update(algorithm, part).flops
    stage = measure_update(algorithm, ROWS[0], sizes=[5]).stages[0]
    assert stage.training(5, 34, 8, {8: 3, 5: 2}) == pytest.approx(exact, rel=1e-12)
    assert stage.training(5, 34, 8) != pytest.approx(exact, rel=1e-3)


def test_later_blocks_keep_the_bytes_of_a_part() -> None:
    """A block of 64 outputs over one of 4: the peak is that of the second one, at half of the rows."""
    batch, peaks = Batch(torch.randn(64, 4), torch.arange(64) % 4), []
    for keep in (1.0, 0.5):
        net = mlp((4,), 4, (4, 64))
        peaks.append(measure_update(_attached(MonoForward(keep=keep), net, batch), batch).activation_peak_bytes)
    assert peaks[1] < 0.55 * peaks[0]


def test_units_say_what_they_learn_from() -> None:
    algorithm: Algorithm = _attached(MonoForward(keep=0.3, keep_after="layer2"), _mlp())
    assert [algorithm.learned_from(unit, 10) for unit in algorithm.units()] == [10, 10, 3]
    assert _attached(Backprop(keep=0.3), _mlp()).learned_from("network", 10) == 3
    assert _attached(Backprop(), _mlp()).learned_from("network", 1) == 1


def test_the_variant_of_the_control() -> None:
    assert Backprop(keep=0.5).variant == "keep=0.5, keep_by=loss"
    assert Backprop(checkpoint=2, keep=0.25, keep_by="random").variant == "checkpoint=2, keep=0.25, keep_by=random"


# -- what it refuses --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"keep": 0.0}, "keep is 0.0, expected a share"),
        ({"keep": 1.5}, "keep is 1.5, expected a share"),
        ({"keep": math.nan}, "keep is nan, expected a share"),
        ({"keep": 0.5, "keep_by": "size"}, "keep_by is 'size', expected one of loss, random"),
        ({"keep_by": "random"}, "keep_by=random is for keep below 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], sentence: str) -> None:
    for make in (Backprop, LocalHeads, MonoForward):
        with pytest.raises(ValueError, match=sentence):
            make(**settings)
    with pytest.raises(ValueError, match="keep_after=layer1 is for keep below 1"):
        LocalHeads(keep_after="layer1")


def test_networks_and_tasks_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match="keep_after is 'layer3', expected a block that another one follows: layer1, layer2"
    ):
        _attached(LocalHeads(keep=0.5, keep_after="layer3"), _mlp())
    with pytest.raises(ValueError, match="this network is one block, 'layer1': cut it"):
        _attached(MonoForward(keep=0.5), mlp((6,), 4, (5,)))
    graph = Batch(torch.randn(4, 6), torch.arange(4), rows=torch.arange(2))
    for make in (Backprop, MonoForward):
        with pytest.raises(ValueError, match=r"keep is 0\.5, but a graph is one batch"):
            make(keep=0.5).attach(_mlp(), TaskInfo(graph, 4, F.cross_entropy))

    def together(scores: Tensor, targets: Tensor) -> Tensor:
        return (F.cross_entropy(scores, targets) - scores.mean()).square()

    for make in (Backprop, MonoForward):
        with pytest.raises(ValueError, match="no mean over samples of what each of them costs by itself"):
            _attached(make(keep=0.5), _mlp(), loss=together)
        _attached(make(keep=0.5, keep_by="random"), _mlp(), loss=together)
        with pytest.raises(ValueError, match="no mean over samples"):  # though of the first two classes it is
            _attached(make(keep=0.5), _mlp(), loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 1.0, 3.0])))


def test_batches_that_have_no_part() -> None:
    sentence = r"keep=0.5 takes 1 of a batch of 2 samples: at least 2 must go on"
    for make in (Backprop, MonoForward):
        algorithm = _attached(make(keep=0.5), _mlp())
        small = Batch(ROWS[0].inputs[:2], ROWS[0].targets[:2], index=torch.arange(2))
        with pytest.raises(ValueError, match=sentence):
            list(algorithm.updates(small))
        with pytest.raises(ValueError, match=sentence):
            algorithm.learned_from(list(algorithm.units())[-1], 2)
        info = TaskInfo(small, 4, F.cross_entropy)
        with pytest.raises(ValueError, match=sentence):  # a short last one, before the first is trained
            check_batch_sizes({64, 2}, algorithm.blocks, algorithm, info)
        check_batch_sizes({64, 4}, algorithm.blocks, algorithm, info)
    with pytest.raises(ValueError, match="takes 10 of a batch of 10 samples"):
        Selection(0.99).count(10)
    with pytest.raises(ValueError, match="do not say which samples they hold"):
        list(_attached(Backprop(keep=0.5), _mlp()).updates(ROWS[0]._replace(index=None)))


def test_all_blocks_learn_together() -> None:
    algorithm = _attached(MonoForward(keep=0.5), _mlp())
    with pytest.raises(ValueError, match="use schedule=joint, or keep=1"):
        _ = algorithm.stages
    with pytest.raises(ValueError, match="use schedule=joint, or keep=1"):
        algorithm.train_only(frozenset({"layer2"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_of_samples(dtype: torch.dtype, smoothing: float) -> None:
    """Those of PyTorch; of halves as exact as floats, or many would be equal."""
    scores, targets = torch.randn(32, 4).to(dtype).requires_grad_(), torch.arange(32) % 4
    found = sample_losses(partial(F.cross_entropy, label_smoothing=smoothing), scores, targets)
    wanted = F.cross_entropy(scores.float(), targets, label_smoothing=smoothing, reduction="none")
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted.detach())
    assert len(found.unique()) == 32
