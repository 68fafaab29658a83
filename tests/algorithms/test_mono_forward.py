"""Mono-Forward as an algorithm: the properties of its spec that the equations alone cannot show."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from locallearn.algorithms import Algorithm, Backprop, DeepSupervision, MonoForward, TaskInfo
from locallearn.batch import Batch
from locallearn.functional import mono_forward
from locallearn.nets import Blocks, cnn, mlp
from locallearn.testing import plain_loop

DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(torch.randn(16, 6, generator=DRAW), torch.randint(3, (16,), generator=DRAW))
sgd = partial(torch.optim.SGD, lr=0.1)
adam = partial(torch.optim.Adam, lr=4e-3)


def _attached(algorithm: Any, hidden: tuple[int, ...], double: bool = False) -> Any:
    torch.manual_seed(0)
    algorithm.attach(mlp((6,), 3, hidden), TaskInfo(Batch(*(t[:2] for t in BATCH[:2])), 3, F.cross_entropy))
    return algorithm.double() if double else algorithm


def _gradients(algorithm: Algorithm) -> list[dict[str, Tensor]]:
    """Gradients of every unit, by name of the weight."""
    found = []
    for update in algorithm.updates(BATCH):
        update.backward()
        found.append({n: p.grad.clone() for n, p in algorithm.named_parameters() if p.grad is not None})
        algorithm.zero_grad(set_to_none=True)
    return found


# -- the step ---------------------------------------------------------------------------------------------------------
def test_a_step_is_that_of_the_equations() -> None:
    """Two layers, one step of SGD, without autograd: x goes on with the weights it came in with."""
    algorithm = _attached(MonoForward(), (5, 4), double=True)
    weights = [p.detach().clone() for p in algorithm.blocks.parameters()]  # W1 b1 W2 b2 M2
    heads = [algorithm.heads.projections[0].projection.detach().clone(), weights[4]]
    x, expected = BATCH.inputs.double(), []
    for (weight, bias), head in zip((weights[0:2], weights[2:4]), heads, strict=True):
        gradients = mono_forward.gradients(x, weight, bias, head, BATCH.targets)
        x = (x @ weight.T + bias).clamp(min=0)
        expected.append([p - 0.1 * g for p, g in zip((weight, bias, head), gradients[:3], strict=True)])
    plain_loop(algorithm, [BATCH._replace(inputs=BATCH.inputs.double())], sgd)
    for unit, wanted in zip(algorithm.units().values(), expected, strict=True):
        for got, want in zip(unit[0]["params"], wanted, strict=True):
            assert torch.allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
def test_one_layer_is_backprop(make_optimizer: Any) -> None:
    """Property 3: with one block, Mono-Forward is backpropagation of a network with a bias-free head, bit for bit."""
    local, back = _attached(MonoForward(), (5,)), _attached(Backprop(), (5,))
    for algorithm in (local, back):
        plain_loop(algorithm, [BATCH] * 5, make_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(local.blocks.parameters(), back.blocks.parameters(), strict=True))


def test_other_layers_do_not_matter() -> None:
    """Property 2: weights above, and heads of other layers, leave a layer's gradients bit-equal."""
    one, other = _attached(MonoForward(), (5, 4, 4)), _attached(MonoForward(), (5, 4, 4))
    with torch.no_grad():
        for p in [*other.blocks[2].parameters(), *other.heads.projections[0].parameters(), other.blocks.readout.weight]:
            p.add_(torch.randn_like(p))
    before, after = _gradients(one)[1], _gradients(other)[1]
    assert (
        before.keys()
        == after.keys()
        == {"blocks.members.layer2.0.weight", "blocks.members.layer2.0.bias"} | {"heads.projections.1.projection"}
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_head_of_zeros_teaches_the_head_alone() -> None:
    """Property 9."""
    algorithm = _attached(MonoForward(), (5, 4))
    nn.init.zeros_(algorithm.heads.projections[0].projection)
    first = _gradients(algorithm)[0]
    assert not first["blocks.members.layer1.0.weight"].any()
    assert first["heads.projections.0.projection"].any()


# -- prediction -------------------------------------------------------------------------------------------------------
def test_bp_mode_reads_the_last_projection_only() -> None:
    """Property 8."""
    modes = {mode: _attached(MonoForward(prediction=mode), (5, 4, 4)) for mode in ("bp", "ff")}
    before = {mode: algorithm.predict(BATCH.inputs) for mode, algorithm in modes.items()}
    for algorithm in modes.values():
        for head in algorithm.heads.projections:
            nn.init.constant_(head.projection, math.nan)
    assert torch.equal(modes["bp"].predict(BATCH.inputs), before["bp"])
    assert modes["ff"].predict(BATCH.inputs).isnan().all()


def test_scores_of_both_modes() -> None:
    algorithm = _attached(MonoForward(prediction="ff"), (5, 4))
    first = torch.relu(BATCH.inputs @ algorithm.blocks[0][0].weight.T)
    second = torch.relu(first @ algorithm.blocks[1][0].weight.T)
    last = second @ algorithm.blocks.readout.weight.T
    total = first @ algorithm.heads.projections[0].projection.T + last
    assert torch.allclose(algorithm.predict(BATCH.inputs), total, atol=1e-6)
    assert torch.allclose(_attached(MonoForward(), (5, 4)).predict(BATCH.inputs), last, atol=1e-6)


# -- learning ---------------------------------------------------------------------------------------------------------
def _digits(shape: tuple[int, ...]) -> tuple[list[Batch], Tensor, Tensor]:
    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32).view(-1, *shape), torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440].split(48), order[1440:]
    return [Batch(images[rows], labels[rows]) for rows in train], images[test], labels[test]


@pytest.mark.parametrize(
    ("net", "shape", "least", "loss_of_depth"),  # pooling an 8x8 image twice leaves the second block little to read
    [
        (partial(mlp, (64,), 10, (100, 100)), (64,), 0.94, 0.01),
        (partial(cnn, (1, 8, 8), 10, (16, 32)), (1, 8, 8), 0.88, 0.05),
    ],
    ids=["mlp", "cnn"],
)
def test_digits_are_learned_in_both_modes(net: Any, shape: tuple[int, ...], least: float, loss_of_depth: float) -> None:
    """Property 7, on the embedded digits: every loss falls, depth helps or does no harm, both modes are right."""
    torch.manual_seed(0)
    blocks = net()
    batches, images, labels = _digits(shape)
    algorithm = MonoForward()
    algorithm.attach(blocks, TaskInfo(Batch(images[:2], labels[:2]), 10, F.cross_entropy))
    whole = Batch(torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches]))
    before = [float(u.loss.detach()) for u in algorithm.updates(whole) if u.loss is not None]
    plain_loop(algorithm, batches * 8, adam)
    after = [float(u.loss.detach()) for u in algorithm.updates(whole) if u.loss is not None]
    assert all(end < 0.3 * start for start, end in zip(before, after, strict=True))
    accuracy = {}
    with torch.no_grad():
        for mode in ("bp", "ff"):
            algorithm.prediction = mode  # type: ignore[assignment]
            accuracy[mode] = (algorithm.predict(images).argmax(1) == labels).float().mean().item()
        first = algorithm.heads.scores(blocks, 0, blocks[0](images), whole)
    assert min(accuracy.values()) > least
    assert accuracy["bp"] >= (first.argmax(1) == labels).float().mean().item() - loss_of_depth


def test_a_network_without_readout_gets_a_last_projection() -> None:
    torch.manual_seed(0)
    net = Blocks({"a": nn.Sequential(nn.Linear(6, 5), nn.ReLU()), "b": nn.Sequential(nn.Linear(5, 4), nn.ReLU())})
    algorithm = MonoForward()
    algorithm.attach(net, TaskInfo(Batch(*(t[:2] for t in BATCH[:2])), 3, F.cross_entropy))
    assert [tuple(head.projection.shape) for head in algorithm.heads.projections] == [(3, 5), (3, 4)]
    assert algorithm.added_parameters == 3 * 5 + 3 * 4
    assert algorithm.predict(BATCH.inputs).shape == (16, 3)


def test_heads_are_those_of_deep_supervision_under_the_same_seed() -> None:
    mono, deep, other = (
        _attached(a, (5, 4)) for a in (MonoForward(seed=3), DeepSupervision(seed=3), MonoForward(seed=4))
    )
    assert torch.equal(mono.heads.projections[0].projection, deep.heads.projections[0].projection)
    assert not torch.equal(mono.heads.projections[0].projection, other.heads.projections[0].projection)


def test_deep_supervision_is_the_sum_of_all_losses() -> None:
    """Its gradient for the first layer is more than Mono-Forward's, for the last layer's head the same."""
    deep, mono = _attached(DeepSupervision(), (5, 4), double=True), _attached(MonoForward(), (5, 4), double=True)
    hidden = [torch.relu(BATCH.inputs.double() @ deep.blocks[0][0].weight.T)]
    hidden.append(torch.relu(hidden[0] @ deep.blocks[1][0].weight.T))
    heads = [deep.heads.projections[0].projection, deep.blocks.readout.weight]
    total = sum(F.cross_entropy(h @ m.T, BATCH.targets) for h, m in zip(hidden, heads, strict=True))
    (update,) = deep.updates(BATCH._replace(inputs=BATCH.inputs.double()))
    assert update.loss is not None
    assert torch.allclose(update.loss, torch.as_tensor(total))
    update.backward()
    *_, last = mono.updates(BATCH._replace(inputs=BATCH.inputs.double()))
    last.backward()
    assert torch.allclose(deep.blocks.readout.weight.grad, mono.blocks.readout.weight.grad)
    assert torch.allclose(
        deep.blocks[0][0].weight.grad,
        torch.autograd.grad(total, deep.blocks[0][0].weight)[0],  # type: ignore[arg-type]
    )


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_what_cannot_be_trained_is_refused_by_name() -> None:
    info = TaskInfo(Batch(*(t[:2] for t in BATCH[:2])), 3, F.cross_entropy)
    with pytest.raises(ValueError, match="prediction is 'last'"):
        MonoForward(prediction="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Mono-Forward compares every block with class labels"):
        MonoForward().attach(mlp((6,), 3, (5,)), TaskInfo(info.example, 3, F.mse_loss, classes=False))
    with pytest.raises(ValueError, match="block 'layer1' cannot take what comes before it, of shape \\(2, 6\\)"):
        MonoForward().attach(mlp((7,), 3, (5,)), info)
    with pytest.raises(ValueError, match="has no readout"):
        Backprop().attach(Blocks({"a": nn.Linear(6, 5)}), info)
