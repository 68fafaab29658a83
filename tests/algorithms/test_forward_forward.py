"""Forward-Forward as an algorithm: the properties of its spec that the equations alone cannot show."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from locallearn.algorithms import ForwardForward, TaskInfo
from locallearn.batch import Batch
from locallearn.functional import forward_forward as ff
from locallearn.nets import Blocks, mlp
from locallearn.testing import plain_loop

CLASSES, WIDTH = 4, 12
DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(torch.rand(16, WIDTH, generator=DRAW), torch.randint(CLASSES, (16,), generator=DRAW))
sgd = partial(torch.optim.SGD, lr=0.1)
adam = partial(torch.optim.Adam, lr=3e-3)


def _attached(hidden: tuple[int, ...] = (10, 9, 8), double: bool = False, **options: Any) -> ForwardForward:
    torch.manual_seed(0)
    algorithm = ForwardForward(**options)
    algorithm.attach(mlp((WIDTH,), CLASSES, hidden), TaskInfo(_first_two(), CLASSES, F.cross_entropy))
    return algorithm.double() if double else algorithm


def _first_two() -> Batch:
    return Batch(BATCH.inputs[:2], BATCH.targets[:2])


def _written(inputs: Tensor, labels: list[int]) -> Tensor:
    """Labels over the first slots, by hand."""
    rows = []
    for row, label in zip(inputs.tolist(), labels, strict=True):
        rows.append([1.0 if slot == label else 0.0 for slot in range(CLASSES)] + row[CLASSES:])
    return torch.tensor(rows, dtype=inputs.dtype)


def _normed(x: Tensor) -> Tensor:
    return x / x.square().mean(1, keepdim=True).sqrt()


# -- the step ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("minimise", [False, True])
def test_a_step_is_that_of_the_equations(minimise: bool) -> None:
    """Two layers, one step of SGD, without autograd."""
    algorithm = _attached((10, 9), double=True, minimise=minimise, temperature=2.0)
    inputs = BATCH.inputs.double()
    wrong = ff.wrong_labels_uniform(BATCH.targets, CLASSES, torch.Generator().manual_seed(algorithm.seed))
    good, bad = (_normed(_written(inputs, labels.tolist())) for labels in (BATCH.targets, wrong))
    expected = []
    for block in algorithm.blocks:
        weight, bias = (p.detach().clone() for p in block.parameters())
        gradients = ff.gradients(good, bad, weight, bias, float(len(bias)), 2.0, minimise)
        expected.append((weight - 0.1 * gradients.weight, bias - 0.1 * gradients.bias))
        good, bad = (_normed((x @ weight.T + bias).relu()) for x in (good, bad))
    plain_loop(algorithm, [BATCH._replace(inputs=inputs)], sgd)
    for block, wanted in zip(algorithm.blocks, expected, strict=True):
        for got, want in zip(block.parameters(), wanted, strict=True):
            assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_a_step_of_one_layer_leaves_all_below_alone() -> None:
    """Property 1: the outputs of the blocks below the one that learned are bit-equal."""
    for unit in range(3):
        algorithm = _attached()
        before = list(algorithm.activations(BATCH.inputs))
        algorithm.train_only(frozenset([algorithm.blocks.names[unit]]))
        plain_loop(algorithm, [BATCH], sgd)
        after = list(algorithm.activations(BATCH.inputs))
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i < unit for i in range(3)]


def test_inputs_are_not_written_into() -> None:
    """Property 8."""
    algorithm, inputs = _attached(negatives="hard"), BATCH.inputs.clone()
    plain_loop(algorithm, [BATCH], sgd)
    algorithm.predict(BATCH.inputs)
    assert torch.equal(BATCH.inputs, inputs)


@pytest.mark.parametrize("negatives", ["uniform", "hard"])
def test_no_negative_carries_its_true_label(negatives: str) -> None:
    """Property 5, on what really enters the network; all wrong labels occur."""
    algorithm = _attached(negatives=negatives)
    many = Batch(BATCH.inputs.repeat(200, 1), BATCH.targets.repeat(200))
    with torch.no_grad():
        if algorithm.readout is not None:
            algorithm.readout.weight.normal_()
        prepared = algorithm.prepare(many)
    positive, negative = prepared.inputs[:, :CLASSES].argmax(1).chunk(2)
    assert torch.equal(positive, many.targets)
    assert not (negative == many.targets).any()
    assert torch.bincount(negative * CLASSES + positive).count_nonzero() == CLASSES * (CLASSES - 1)
    assert torch.allclose(prepared.inputs.square().mean(1), torch.ones(len(prepared.inputs)))


def test_hard_negatives_follow_the_readout() -> None:
    algorithm = _attached(negatives="hard")
    assert algorithm.readout is not None
    _, features = torch.split(torch.cat(list(algorithm.activations(BATCH.inputs)), 1), [10, 17], 1)
    with torch.no_grad():  # a readout that believes in class 2, then 1, whatever it sees
        towards = features.mean(0) / features.mean(0).norm()
        algorithm.readout.weight.copy_(torch.tensor([0.0, 50.0, 100.0, 0.0])[:, None] * towards)
        assert (algorithm.readout(features).argmax(1) == 2).all()
        prepared = algorithm.prepare(BATCH)
    negative = prepared.inputs[len(BATCH.inputs) :, :CLASSES].argmax(1)
    assert torch.equal(negative, torch.where(BATCH.targets == 2, 1, 2))


# -- peer normalisation -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("peer", "revived"), [(0.0, False), (0.03, True)])
def test_peer_normalisation_revives_a_dead_unit(peer: float, revived: bool) -> None:
    """Property 6."""
    algorithm = _attached(peer=peer)
    bias = algorithm.blocks[1][0].bias
    with torch.no_grad():
        bias[3] = -50.0
    plain_loop(algorithm, [BATCH], sgd)
    assert (bias[3].item() > -50.0) is revived


def test_peer_means_follow_positive_data_and_rest_in_eval_mode() -> None:
    algorithm = _attached(peer=0.03)
    with torch.no_grad():
        positive = algorithm.prepare(BATCH).inputs[: len(BATCH.inputs)]
        expected = 0.9 * 0.5 + 0.1 * algorithm.blocks[0](positive).mean(0)
    plain_loop(algorithm, [BATCH], partial(torch.optim.SGD, lr=0.0))
    assert torch.allclose(algorithm.local[0].peer_mean, expected)
    before = algorithm.local[0].peer_mean.clone()
    algorithm.eval().predict(BATCH.inputs)
    assert torch.equal(algorithm.local[0].peer_mean, before)


# -- inference --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("minimise", [False, True])
@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("hidden", [(10,), (10, 9, 8)])
def test_goodness_inference_is_the_slow_loop(minimise: bool, skip_first: bool, hidden: tuple[int, ...]) -> None:
    """Every sample with every label, one at a time; a network of one block keeps it."""
    algorithm = _attached(hidden, minimise=minimise, skip_first=skip_first)
    scores = algorithm.predict(BATCH.inputs).detach()
    for i in range(4):
        for label in range(CLASSES):
            x, total = _normed(_written(BATCH.inputs[i : i + 1], [label])), 0.0
            for number, block in enumerate(algorithm.blocks):
                z = (x @ block[0].weight.T + block[0].bias).clamp(min=0)
                if number > 0 or not skip_first or len(hidden) == 1:
                    total += float((z**2).sum().detach())
                x = _normed(z)
            assert scores[i, label].item() == pytest.approx(-total if minimise else total, rel=1e-5)


def test_the_readout_starts_at_zero_and_sends_nothing_into_the_trunk() -> None:
    algorithm = _attached(inference="softmax")
    assert algorithm.readout is not None
    assert not algorithm.readout.weight.any()
    assert algorithm.readout.weight.shape == (CLASSES, 9 + 8)
    assert algorithm.readout.bias is None
    algorithm.train_only(frozenset(["readout"]))
    (update,) = algorithm.updates(BATCH)
    update.backward()
    assert [name for name, p in algorithm.named_parameters() if p.grad is not None] == ["readout.weight"]


def test_one_pass_inference_reads_the_neutral_pass() -> None:
    algorithm = _attached(inference="softmax", label_strength=2.0)
    assert algorithm.readout is not None
    nn.init.normal_(algorithm.readout.weight)
    neutral = torch.cat((torch.full((16, CLASSES), 2.0 / CLASSES), BATCH.inputs[:, CLASSES:]), 1)
    x, seen = _normed(neutral), []
    for block in algorithm.blocks:
        x = _normed(torch.relu(x @ block[0].weight.T))
        seen.append(x)
    expected = torch.cat(seen[1:], 1) @ algorithm.readout.weight.T
    assert torch.allclose(algorithm.predict(BATCH.inputs), expected, atol=1e-5)


# -- learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [{}, {"minimise": True}, {"negatives": "hard", "inference": "softmax", "readout_lr": 1e-2}, {"peer": 0.03}],
    ids=["uniform", "min-ssq", "hard-softmax", "peer"],
)
def test_digits_are_learned(options: dict[str, Any]) -> None:
    data = load_digits()
    images = F.pad(torch.tensor(data.data / 16, dtype=torch.float32), (10, 0))  # slots of their own for the label
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440].split(48), order[1440:]
    torch.manual_seed(0)
    algorithm = ForwardForward(label_strength=3.0, skip_first=False, **options)
    info = TaskInfo(Batch(images[:2], labels[:2]), 10, F.cross_entropy)
    algorithm.attach(mlp((74,), 10, (100, 100)), info)
    plain_loop(algorithm, [Batch(images[rows], labels[rows]) for rows in train] * 10, adam)
    with torch.no_grad():
        accuracy = (algorithm.eval().predict(images[test]).argmax(1) == labels[test]).float().mean().item()
    assert accuracy > 0.9


# -- groups and refusals ----------------------------------------------------------------------------------------------
def test_biases_do_not_decay_and_the_readout_has_its_own_rate() -> None:
    algorithm = _attached(inference="softmax", readout_lr=0.5, readout_weight_decay=0.25)
    decay = partial(torch.optim.SGD, lr=0.1, weight_decay=0.01)
    groups = {unit: decay(groups).param_groups for unit, groups in algorithm.units().items()}
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups["layer1"]] == [(1, 0.1, 0.01), (1, 0.1, 0.0)]
    assert [(g["lr"], g["weight_decay"]) for g in groups["readout"]] == [(0.5, 0.25)]
    assert list(_attached().units()) == ["layer1", "layer2", "layer3"]


def test_what_cannot_be_trained_is_refused_by_name() -> None:
    info = TaskInfo(_first_two(), CLASSES, F.cross_entropy)
    net = mlp((WIDTH,), CLASSES, (8,))
    with pytest.raises(ValueError, match="negatives is 'soft'"):
        ForwardForward(negatives="soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inference is 'energy'"):
        ForwardForward(inference="energy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="too few for the label of 13 classes"):
        ForwardForward().attach(net, TaskInfo(_first_two(), 13, F.cross_entropy))
    with pytest.raises(ValueError, match="this task has none"):
        ForwardForward().attach(net, TaskInfo(_first_two(), CLASSES, F.mse_loss, classes=False))
    with pytest.raises(ValueError, match="a graph"):
        ForwardForward().attach(net, TaskInfo(_first_two()._replace(context=(1,)), CLASSES, F.cross_entropy))
    for activation in (nn.Tanh(), nn.ReLU(inplace=True)):
        blocks = Blocks({"only": nn.Sequential(nn.Linear(WIDTH, 8), activation)})
        with pytest.raises(ValueError, match=r"block 'only'.* no nn.ReLU that leaves its input alone"):
            ForwardForward(peer=0.03).attach(blocks, info)
