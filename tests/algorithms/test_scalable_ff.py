"""Scalable Forward-Forward: the properties of its sheet that the equations alone cannot show."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import ScalableForwardForward, TaskInfo
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional import scalable_ff as sff
from locallearn.losses import ScalableForwardForwardLoss
from locallearn.nets import Blocks, mlp, resnet
from locallearn.nets.residual import ResidualUnit
from locallearn.testing import plain_loop

DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(torch.randn(8, 3, 8, 8, generator=DRAW), torch.arange(8) % 4)
sgd = partial(torch.optim.SGD, lr=0.1)


def _attached(algorithm: Any, net: Blocks | None = None, batch: Batch = BATCH) -> Any:
    if net is None:
        torch.manual_seed(0)
        net = resnet((3, 8, 8), 4, 1, (4, 6))
    algorithm.attach(
        net, TaskInfo(batch._replace(inputs=batch.inputs[:2], targets=batch.targets[:2]), 4, F.cross_entropy)
    )
    return algorithm.train()


def test_a_step_is_that_of_a_loop_by_hand() -> None:
    """Properties 1, 5 and 7: block by block through the unmodified residual units, one pass, no label in the input."""
    algorithm = _attached(ScalableForwardForward(margin=0.5, temperature=2.0))
    blocks, local = copy.deepcopy(algorithm.blocks), copy.deepcopy(algorithm.local)
    plain_loop(algorithm, [BATCH] * 2, sgd)
    optimizers = [sgd([*block.parameters(), *head.parameters()]) for block, head in zip(blocks, local, strict=True)]
    for _ in range(2):
        x = BATCH.inputs
        for block, head, optimizer in zip(blocks, local, optimizers, strict=True):
            h = block(x)
            g = F.conv2d(h, head.layer.weight).square().mean((2, 3))
            y = F.one_hot(BATCH.targets, 4)
            loss = (((g + 0.5 * (1 - y)) / 2).logsumexp(1) - (g * y).sum(1) / 2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            flat = h.detach().flatten(1)
            x = (
                (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            ).view_as(h)
    pairs = zip(
        [*algorithm.blocks.parameters(), *algorithm.local.parameters()],
        [*blocks.parameters(), *local.parameters()],
        strict=True,
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    counts = [int(m.num_batches_tracked) for m in algorithm.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(counts) == {2}


def test_later_blocks_do_not_matter() -> None:
    """Property 1."""
    grads = []
    for other in (False, True):
        algorithm = _attached(ScalableForwardForward())
        if other:
            with torch.no_grad():
                for p in [*algorithm.blocks[1].parameters(), *algorithm.local[1].parameters()]:
                    p.mul_(1.5)
        next(algorithm.updates(BATCH)).backward()
        named = {name: p.grad for name, p in algorithm.named_parameters() if p.grad is not None}
        assert all(name.startswith(("blocks.members.stem.", "local.0.")) for name in named)
        grads.append(named)
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_what_is_handed_over_has_no_length() -> None:
    """Property 4: only the pattern goes on, detached."""
    algorithm = _attached(ScalableForwardForward())
    h = algorithm.blocks[0](BATCH.inputs)
    assert h.requires_grad
    handed = algorithm.emit(0, h)
    assert not handed.requires_grad
    assert torch.allclose(algorithm.emit(0, 10 * h), handed, atol=1e-3)


def test_one_block_is_backpropagation_of_the_goodness_loss() -> None:
    """Property 6."""
    torch.manual_seed(0)
    whole = nn.Sequential(*resnet((3, 8, 8), 4, 1, (4, 6)))
    algorithm = _attached(ScalableForwardForward(), Blocks({"all": whole}))
    twin, head = copy.deepcopy(whole), copy.deepcopy(algorithm.local[0])
    plain_loop(algorithm, [BATCH] * 2, sgd)
    optimizer = sgd([*twin.parameters(), *head.parameters()])
    for _ in range(2):
        F.cross_entropy(head.layer(twin(BATCH.inputs)).square().flatten(2).mean(2), BATCH.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), twin.parameters(), strict=True))


def test_maps_of_zeros_teach_nothing() -> None:
    """Property 8, the reason why they may not start there."""
    algorithm = _attached(ScalableForwardForward())
    nn.init.zeros_(algorithm.local[0].layer.weight)
    next(algorithm.updates(BATCH)).backward()
    grads = [p.grad for p in algorithm.parameters() if p.grad is not None]
    assert grads
    assert not any(g.any() for g in grads)
    for make in (ScalableForwardForward, partial(ScalableForwardForwardLoss, 4, 3)):
        with pytest.raises(ValueError, match="class maps that start at zero get no gradient"):
            make(gain=0.0)


def test_peak_memory_does_not_grow_with_depth() -> None:
    """Property 9."""
    peaks = []
    for depth in (3, 9):
        torch.manual_seed(0)
        net = Blocks({f"unit{i}": ResidualUnit(3, 3) for i in range(depth)})
        peaks.append(measure_update(_attached(ScalableForwardForward(), net), BATCH).activation_peak_bytes)
    assert peaks[0] == peaks[1]


def test_the_network_keeps_its_keys() -> None:
    """Property 10."""
    net = resnet((3, 8, 8), 4, 1, (4, 6))
    keys = list(net.state_dict())
    algorithm = _attached(ScalableForwardForward(), net)
    assert list(net.state_dict()) == keys
    assert algorithm.added_parameters == 4 * (4 + 4 + 6)
    readout = {id(p) for p in net.readout.parameters()}  # type: ignore[union-attr]
    assert not readout & {id(p) for groups in algorithm.units().values() for p in groups[0]["params"]}


def test_predictions() -> None:
    """Mean of the goodness, of its softmax, or the last block's; x goes from block to block normalised."""
    rules = {
        p: _attached(ScalableForwardForward(prediction=p, temperature=2.0)).eval() for p in ("mean", "softmax", "last")
    }
    x, goodness = BATCH.inputs, []
    rule = rules["mean"]
    with torch.no_grad():
        for block, local in zip(rule.blocks, rule.local, strict=True):
            h = block(x)
            goodness.append(local.goodness(h))
            x = sff.normalise(h)
        g: Tensor = torch.stack(goodness)
        assert torch.allclose(rule.predict(BATCH.inputs), g.mean(0), atol=1e-6)
        assert torch.allclose(rules["softmax"].predict(BATCH.inputs), (g / 2).softmax(2).mean(0).log(), atol=1e-5)
        assert torch.allclose(rules["last"].predict(BATCH.inputs), g[-1], atol=1e-6)
        rule.train_only(frozenset(rule.blocks.names[:2]))
        assert torch.allclose(rule.eval().predict(BATCH.inputs), g[:2].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kernel_size": 2}, "kernel_size=2 must be odd"),
        ({"margin": -1.0}, "margin=-1.0 must not be negative"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"prediction": "sum"}, "prediction is 'sum', expected one of mean, softmax, last"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ScalableForwardForward(**settings)


def test_what_gives_no_maps_is_refused_by_name() -> None:
    rows = Batch(torch.randn(8, 6), torch.arange(8) % 4)
    with pytest.raises(ValueError, match="block 'layer1' gives a tensor of shape \\(5,\\) per sample"):
        _attached(ScalableForwardForward(), mlp((6,), 4, (5, 5)), rows)
    with pytest.raises(ValueError, match="at least 2"):
        ScalableForwardForward().attach(resnet((3, 8, 8), 1, 1, (4,)), TaskInfo(BATCH, 1, F.cross_entropy))
    with pytest.raises(ValueError, match="this task has none"):
        ScalableForwardForward().attach(resnet((3, 8, 8), 4, 1, (4,)), TaskInfo(BATCH, 4, F.mse_loss, classes=False))
