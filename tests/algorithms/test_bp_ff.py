"""BP/FF beside Forward-Forward: the same forward pass, another reach of the gradient; and activity that is charged for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.algorithms import (
    Algorithm,
    Backprop,
    BackpropForwardForward,
    BackpropL1,
    ForwardForward,
    Locality,
    TaskInfo,
)
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional import emergent
from locallearn.functional import forward_forward as ff
from locallearn.nets import Blocks, mlp

CLASSES, WIDTH = 4, 12


@pytest.fixture
def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    return Batch(torch.rand(30, 20, generator=draw, dtype=torch.float64), torch.arange(30) % CLASSES)


def _net(depth: int = 3) -> Blocks:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp((20,), CLASSES, (WIDTH,) * depth).double()


def _attached(algorithm: Algorithm, batch: Batch, net: Blocks | None = None) -> Any:
    algorithm.attach(net or _net(), TaskInfo(batch, CLASSES, F.cross_entropy))
    return algorithm.double()


def _outputs(algorithm: Algorithm, inputs: Tensor) -> list[Tensor]:
    """What the blocks give in a step of learning, as they give it."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *given: seen.append(given[2])) for block in algorithm.blocks]
    list(algorithm.updates(Batch(inputs, torch.arange(len(inputs)) % CLASSES)))
    for hook in hooks:
        hook.remove()
    return seen


def test_forward_passes_are_those_of_forward_forward(batch: Batch) -> None:
    control = _attached(BackpropForwardForward(), batch)
    local = _attached(ForwardForward(skip_first=False), batch)
    for a, b in zip(_outputs(control, batch.inputs), _outputs(local, batch.inputs), strict=True):
        torch.testing.assert_close(a, b)  # positives, negatives and their draws
    torch.testing.assert_close(control.predict(batch.inputs), local.predict(batch.inputs))
    for a, b in zip(control.activations(batch.inputs), local.activations(batch.inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_last_layers_gradient_differs_from_forward_forwards_by_one_weight_per_sample(batch: Batch) -> None:
    """A positive counts with σ(θ − Σg) instead of σ(θ − g_L), a negative with σ(Σg − θ) instead of σ(g_L − θ)."""
    control = _attached(BackpropForwardForward("norm", threshold=3.0, normalise="unit"), batch)
    weight = control.blocks[2][0].weight
    for i, sign in ((0, 1.0), (1, -1.0)):
        outputs = control.outputs_of_blocks(control.hand_on(batch.inputs[i : i + 1]))
        last, total = emergent.goodness(outputs[2]), emergent.summed_goodness(outputs)
        (own,) = torch.autograd.grad(F.softplus(sign * (3.0 - last)).sum(), weight, retain_graph=True)
        (joint,) = torch.autograd.grad(F.softplus(sign * (3.0 - total)).sum(), weight)
        ratio = torch.sigmoid(sign * (3.0 - total)) / torch.sigmoid(sign * (3.0 - last))
        torch.testing.assert_close(joint, ratio * own)
        assert not torch.allclose(joint, own, rtol=1e-3)


def test_gradients_cross_the_borders_and_in_forward_forward_they_do_not(batch: Batch) -> None:
    control = _attached(BackpropForwardForward("norm", threshold=3.0, normalise="unit"), batch)
    for rule, reaches in ((control, True), (_attached(ForwardForward(), batch), False)):
        first = list(rule.blocks[0].parameters())
        found = []
        for update in rule.updates(batch):
            found.append(torch.autograd.grad(update.loss, first, allow_unused=True, retain_graph=True))
        assert any(g is not None for g in found[-1]) is reaches  # the last loss, the first block
    # not by its own term alone: the first block hears from the last one's goodness, through the normalisation between
    outputs = control.outputs_of_blocks(control.prepare(batch).inputs)
    (heard,) = torch.autograd.grad(emergent.goodness(outputs[2]).sum(), control.blocks[0][0].weight)
    assert heard.abs().max() > 1e-6
    result = audit(control, batch)
    assert result.confirmed
    assert result.claim == Locality.GLOBAL


def test_the_step_is_that_of_a_plain_loop(batch: Batch) -> None:
    control = _attached(BackpropForwardForward("norm", threshold=3.0, normalise="unit", label_strength=2.0), batch)
    (update,) = control.updates(batch)
    update.backward()
    wrong = ff.wrong_labels_uniform(batch.targets, CLASSES, torch.Generator().manual_seed(0))
    net, total = _net(), []
    for labels in (batch.targets, wrong):
        x = batch.inputs.clone()
        x[:, :CLASSES] = 2.0 * F.one_hot(labels, CLASSES)
        length = 0.0
        for block in net:
            x = block(x / x.norm(dim=1, keepdim=True))
            length = length + x.norm(dim=1)
        total.append(length)
    loss = torch.cat((torch.log1p(torch.exp(3.0 - total[0])), torch.log1p(torch.exp(total[1] - 3.0)))).mean()
    torch.testing.assert_close(update.loss, loss.detach())
    loss.backward()
    for mine, theirs in zip(control.units()["network"][0]["params"], net.members.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_votes_and_sums_predict_alike_with_one_block(batch: Batch) -> None:
    scores = {
        inference: _attached(BackpropForwardForward(inference=inference), batch, _net(1)).predict(batch.inputs)
        for inference in ("goodness", "vote")
    }
    assert torch.equal(scores["vote"].argmax(1), scores["goodness"].argmax(1))


def test_it_learns_and_costs_what_the_formula_says() -> None:
    torch.manual_seed(0)
    centres = torch.rand(CLASSES, 20)
    labels = torch.arange(200) % CLASSES
    batch = Batch((centres[labels] + 0.1 * torch.randn(200, 20)), labels)
    algorithm = BackpropForwardForward()
    algorithm.attach(mlp((20,), CLASSES, (32, 32)), TaskInfo(batch, CLASSES, F.cross_entropy))
    assert measure_update(algorithm, batch).flops == emergent.update_flops((20, 32, 32))
    optimizer = torch.optim.Adam(algorithm.units()["network"], lr=1e-2)
    for _ in range(80):
        for update in algorithm.updates(batch):
            update.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (algorithm.predict(batch.inputs).argmax(1) == labels).double().mean() > 0.95


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"goodness": "cubes"}, "goodness is 'cubes'"),
        ({"normalise": "max"}, "normalise is 'max'"),
        ({"inference": "softmax"}, "inference is 'softmax'"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BackpropForwardForward(**settings)


def test_what_it_cannot_train_is_refused(batch: Batch) -> None:
    for info, said in (
        (TaskInfo(batch, CLASSES, F.mse_loss, classes=False), "this task has none"),
        (TaskInfo(batch, 1, F.cross_entropy), "this task has 1 class: it needs at least 2"),
        (TaskInfo(batch._replace(context=(torch.zeros(1),)), CLASSES, F.cross_entropy), "context of this task"),
        (TaskInfo(batch._replace(inputs=batch.inputs[:, :3]), CLASSES, F.cross_entropy), "too few for the label"),
    ):
        with pytest.raises(ValueError, match=said):
            _build(info)


def _build(info: TaskInfo) -> None:
    algorithm = BackpropForwardForward()
    algorithm.blocks, algorithm.outputs = _net(), info.outputs
    algorithm.build(info)


def test_charged_backpropagation_pays_for_every_blocks_activity(batch: Batch) -> None:
    charged, plain = _attached(BackpropL1(penalty=0.01), batch), _attached(Backprop(), batch)
    (update,), (base,) = list(charged.updates(batch)), list(plain.updates(batch))
    outputs = list(charged.blocks.features(batch.inputs))
    expected = base.loss + 0.01 * sum(h.abs().sum(1).mean() for h in outputs)
    torch.testing.assert_close(update.loss, expected)
    grads = torch.autograd.grad(update.loss, list(charged.blocks.parameters()))
    free = _attached(BackpropL1(penalty=0.0), batch)
    (unpaid,) = free.updates(batch)
    for a, b, c in zip(
        torch.autograd.grad(unpaid.loss, list(free.blocks.parameters())),
        torch.autograd.grad(base.loss, list(plain.blocks.parameters())),
        grads,
        strict=True,
    ):
        torch.testing.assert_close(a, b)
        assert a.shape == c.shape
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="penalty is"):
            BackpropL1(penalty=wrong)
