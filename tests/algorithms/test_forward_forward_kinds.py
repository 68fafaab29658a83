"""The kinds of Forward-Forward: hybrids, SymBa, channel-wise competition, time steps, unshared receptive fields."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import convolve1d
from sklearn.datasets import load_digits
from torch import Tensor, nn

from locallearn.algorithms import ForwardForward, Locality, TaskInfo
from locallearn.algorithms.forward_forward.channelwise import ChannelwiseForwardForward
from locallearn.algorithms.forward_forward.recurrent import Recurrence, RecurrentForwardForward
from locallearn.algorithms.forward_forward.unsupervised import HybridForwardForward
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional import channelwise, symba
from locallearn.functional import forward_forward as ff
from locallearn.nets import Blocks, cnn, locally_connected, mlp
from locallearn.testing import plain_loop

CLASSES = 4
DRAW = torch.Generator().manual_seed(0)
IMAGES = Batch(torch.rand(12, 2, 6, 6, generator=DRAW), torch.arange(12) % CLASSES)
sgd = partial(torch.optim.SGD, lr=0.1)
adam = partial(torch.optim.Adam, lr=3e-3)


def _info(batch: Batch = IMAGES, outputs: int = CLASSES) -> TaskInfo:
    return TaskInfo(Batch(batch.inputs[:2], batch.targets[:2]), outputs, F.cross_entropy)


def _attached(net: Blocks | None = None, batch: Batch = IMAGES, **options: Any) -> Any:
    torch.manual_seed(0)
    algorithm = ForwardForward(**options)
    algorithm.attach(net or mlp((2, 6, 6), CLASSES, (12, 8, 8)), _info(batch))
    return algorithm


def _normed(x: Tensor) -> Tensor:
    return x / x.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (x.ndim - 1))


def _digits() -> tuple[list[Batch], Batch]:
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    images = F.pad(images, (0, 0, 2, 0))  # two rows above, where labels find room
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test = Batch(images[order[1440:]], labels[order[1440:]])
    return [Batch(images[rows], labels[rows]) for rows in order[:1440].split(48)], test


def _accuracy(algorithm: Any, test: Batch) -> float:
    with torch.no_grad():
        return float((algorithm.eval().predict(test.inputs).argmax(1) == test.targets).float().mean())


# -- one name for all kinds -------------------------------------------------------------------------------------------
def test_options_choose_the_class() -> None:
    assert type(ForwardForward()) is ForwardForward
    assert type(ForwardForward("hybrid")) is HybridForwardForward
    assert type(ForwardForward(negatives="hybrid", loss="symba")) is HybridForwardForward
    assert type(ForwardForward(loss="channelwise")) is ChannelwiseForwardForward
    assert type(ForwardForward(recurrent=8)) is RecurrentForwardForward
    assert [ForwardForward(seed=7).seed, ForwardForward(recurrent=2, seed=7).seed] == [7, 7]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": "hinge"}, "loss is 'hinge', expected 'logistic', 'symba' or 'channelwise'"),
        ({"alpha": 2.0}, "alpha is 2.0, which means nothing with loss=logistic"),
        ({"blurs": 3}, "blurs is 3, which means nothing"),
        ({"loss": "symba", "threshold": 2.0}, "threshold is 2.0, which means nothing with loss=symba"),
        ({"loss": "symba", "minimise": True}, "minimise is True"),
        ({"negatives": "hybrid", "inference": "goodness"}, "answers by 'softmax'"),
        ({"negatives": "hybrid", "label_strength": 2.0}, "label_strength is 2.0"),
        ({"loss": "channelwise", "negatives": "hard"}, "negatives is 'hard', which means nothing"),
        ({"loss": "channelwise", "threshold": 2.0}, "threshold is 2.0"),
        ({"recurrent": 8, "negatives": "hard"}, "recurrent and negatives=hard do not go together"),
        ({"recurrent": 8, "loss": "channelwise"}, "recurrent and loss=channelwise do not go together"),
        ({"threshold": math.nan}, "threshold is nan, expected a finite number"),
        ({"recurrent": 8, "inference": "softmax"}, "recurrent answers by 'goodness'"),
        ({"recurrent": 0}, "recurrent is 0 time steps"),
        ({"recurrent": True}, "recurrent is True time steps"),
        ({"recurrent": {"damping": 1.0}}, "recurrent.damping is 1.0"),
        ({"recurrent": {"step": 3}}, "recurrent has no 'step'; it has steps, damping, read"),
        ({"recurrent": {"read": [3, 9]}}, "recurrent.read is \\[3, 9\\], expected the first and the last of 1 to 8"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ForwardForward(**options)


# -- a readout under a schedule of stages ---------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", ["logistic", "channelwise"])
def test_goodness_judges_the_blocks_until_the_readout_learns(loss: str) -> None:
    """In the last block's stage all blocks are there, and the readout has not learned yet: it would call all labels alike."""
    by_readout, by_goodness = (_attached(loss=loss, inference=how) for how in ("softmax", "goodness"))
    nn.init.normal_(by_readout.readout.weight)
    for stage in ("layer1", "layer2", "layer3"):
        for algorithm in (by_readout, by_goodness):
            algorithm.train_only(frozenset([stage]))
        assert torch.equal(by_readout.predict(IMAGES.inputs), by_goodness.predict(IMAGES.inputs))
    for active in (frozenset(["readout"]), None):
        by_readout.train_only(active)
        features = torch.cat([x.flatten(1) for x in by_readout.activations(IMAGES.inputs)][by_readout.skip_first :], 1)
        torch.testing.assert_close(by_readout.predict(IMAGES.inputs), features @ by_readout.readout.weight.T)


def test_hard_negatives_want_a_readout_that_learns_with_the_blocks() -> None:
    with pytest.raises(ValueError, match=r"negatives=hard draws wrong labels from the readout, .* use schedule=joint"):
        _ = _attached(negatives="hard").stages
    assert _attached(inference="softmax").stages[-1] == ["readout"]


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "inputs", "outputs", "sentence"),
    [
        ({}, torch.randint(9, (2, 12)), 4, "torch.int64 \\(token ids\\?\\)"),
        ({}, torch.rand(2, 12), 13, "too few for the label of 13 classes"),
        ({}, torch.rand(2, 12), 1, "this task has 1 class"),
        ({"negatives": "hybrid"}, torch.rand(2, 12), 4, "mixes images by masks"),
        ({"negatives": "hybrid", "blurs": -1}, torch.rand(2, 1, 3, 4), 4, "blurs is -1"),
        ({"loss": "channelwise"}, torch.rand(2, 12), 3, "block 'layer1' has 8 channels, .* among 3 classes"),
        ({"recurrent": 3}, torch.randint(9, (2, 12)), 4, "token ids"),
    ],
)
def test_bad_input_is_refused_at_attach(options: dict[str, Any], inputs: Tensor, outputs: int, sentence: str) -> None:
    first: nn.Module = nn.Embedding(9, 4) if not inputs.is_floating_point() else nn.Flatten()
    size = 48 if not inputs.is_floating_point() else 12
    net = Blocks({"layer1": nn.Sequential(first, nn.Flatten(), nn.Linear(size, 8), nn.ReLU())})
    with pytest.raises(ValueError, match=sentence):
        ForwardForward(**options).attach(net, TaskInfo(Batch(inputs, torch.tensor([0, 0])), outputs, F.cross_entropy))


def test_classes_share_out_channels_and_never_tokens() -> None:
    net = Blocks({"embed": nn.Linear(6, 8), "mix": nn.Sequential(nn.Linear(8, 8), nn.ReLU())})
    task = TaskInfo(Batch(torch.rand(2, 4, 6), torch.tensor([0, 1])), 4, F.cross_entropy)
    with pytest.raises(ValueError, match=r"block 'embed' gives tokens of shape \(4, 8\) .* its 4 tokens"):
        ForwardForward(loss="channelwise").attach(net, task)


class _Mixed(nn.Module):
    """Channels that are mixed by a product that nobody takes for a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 8, L)``, as it came."""
        return torch.einsum("oc,ncl->nol", self.weight, x).relu()


def test_classes_share_out_channels_of_which_nothing_is_known() -> None:
    shaped = nn.Sequential(nn.Linear(6, 32), nn.Unflatten(1, (8, 4)), nn.ReLU())
    for inputs, blocks in (
        (torch.rand(2, 6), {"shaped": shaped, "signal": nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU())}),
        (torch.rand(2, 8, 5), {"mixed": _Mixed()}),
    ):
        rule = ForwardForward(loss="channelwise")
        rule.attach(Blocks(blocks), TaskInfo(Batch(inputs, torch.tensor([0, 1])), 4, F.cross_entropy))
        assert all(update.loss is not None for update in rule.updates(Batch(inputs, torch.tensor([0, 1]))))


def test_blocks_that_take_nothing_from_above_are_refused() -> None:
    for layers, sentence in (
        ([nn.Conv2d(2, 3, 3), nn.ReLU()], "block 'only' gives \\(3, 4, 4\\)"),
        ([nn.Flatten(), nn.Linear(72, 8), nn.Tanh()], "block 'only' has 0"),
        ([nn.Flatten(), nn.Linear(72, 8), nn.ReLU(inplace=True)], "in-place"),
        ([nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 8)], "end in their ReLU"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ForwardForward(recurrent=3).attach(Blocks({"only": nn.Sequential(*layers)}), _info())


def test_a_hybrid_needs_two_images() -> None:
    algorithm = _attached(negatives="hybrid")
    with pytest.raises(ValueError, match="this batch has one"):
        list(algorithm.updates(Batch(IMAGES.inputs[:1], IMAGES.targets[:1])))


# -- hybrids ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("blurs", [0, 1, 6])
def test_masks_are_blurred_bits(blurs: int) -> None:
    draw = torch.Generator().manual_seed(3)
    bits = torch.randint(2, (5, 9, 7), generator=torch.Generator().manual_seed(3)).double().numpy()
    for _ in range(blurs):
        for axis in (1, 2):
            bits = convolve1d(bits, np.array([0.25, 0.5, 0.25]), axis=axis, mode="nearest")
    mask = ff.hybrid_masks(5, 9, 7, blurs, draw)
    clear = np.abs(bits - 0.5) > 1e-6
    assert mask.shape == (5, 9, 7)
    assert (mask.numpy() == (bits > 0.5))[clear].all()


def test_hybrids_are_mixed_from_two_images() -> None:
    images = torch.arange(1.0, 7.0).view(6, 1, 1, 1) * torch.ones(1, 2, 28, 28)
    draw = torch.Generator().manual_seed(0)
    partners = []
    for _ in range(60):
        mixed = ff.hybrid_images(images, 6, draw)
        assert torch.equal(mixed[:, 0], mixed[:, 1])  # one mask for all channels
        for own, image in enumerate(mixed[:, 0]):
            other = sorted(set(image.unique().tolist()) - {own + 1.0})
            assert len(other) == 1, "an image was mixed with itself or with two"
            partners.append((own, int(other[0]) - 1))
    assert len(set(partners)) == 6 * 5  # anybody with anybody else
    assert 0.3 < float((mixed == images).float().mean()) < 0.7
    assert torch.equal(images, torch.arange(1.0, 7.0).view(6, 1, 1, 1) * torch.ones(1, 2, 28, 28))


def test_no_label_enters_the_blocks() -> None:
    one, other = _attached(negatives="hybrid"), _attached(negatives="hybrid")
    plain_loop(one, [IMAGES] * 3, sgd)
    plain_loop(other, [IMAGES._replace(targets=(IMAGES.targets + 1) % CLASSES)] * 3, sgd)
    assert all(torch.equal(a, b) for a, b in zip(one.blocks.parameters(), other.blocks.parameters(), strict=True))
    assert not torch.equal(one.readout.weight, other.readout.weight)


@pytest.mark.parametrize("joint", [True, False])
def test_the_readout_reads_the_images_through_all_blocks_but_the_first(joint: bool) -> None:
    algorithm = _attached(negatives="hybrid").double()
    batch = IMAGES._replace(inputs=IMAGES.inputs.double())
    assert algorithm.readout.weight.shape == (CLASSES, 8 + 8)
    nn.init.normal_(algorithm.readout.weight)
    x, seen = _normed(batch.inputs), []
    for block in algorithm.blocks:
        x = _normed(block(x).detach())
        seen.append(x)
    want = F.cross_entropy(torch.cat(seen[1:], 1) @ algorithm.readout.weight.T, batch.targets)
    if not joint:
        algorithm.train_only(frozenset(["readout"]))
    *blocks, last = algorithm.updates(batch)
    assert [update.unit for update in blocks] == (["layer1", "layer2", "layer3"] if joint else [])
    torch.testing.assert_close(last.loss, want)
    torch.testing.assert_close(algorithm.predict(batch.inputs), torch.cat(seen[1:], 1) @ algorithm.readout.weight.T)


def test_a_stage_without_labels_cannot_be_judged() -> None:
    algorithm = _attached(negatives="hybrid")
    assert algorithm.stages[-1] == ["readout"]
    judged = []
    for stage in algorithm.stages:
        algorithm.train_only(frozenset(stage))
        judged.append(algorithm.judges)
    assert judged == [False, False, False, True]
    assert ForwardForward().judges


def test_hybrids_cost_no_pass_for_the_readout() -> None:
    widths = (72, 12, 8, 8)
    flops = measure_update(_attached(negatives="hybrid"), IMAGES).flops
    assert flops == ff.update_flops(widths) + 4 * CLASSES * (8 + 8)


# -- SymBa ------------------------------------------------------------------------------------------------------------
def test_symba_compares_pairs_in_every_block() -> None:
    algorithm = _attached(loss="symba", alpha=2.0)
    prepared = algorithm.prepare(IMAGES).inputs
    algorithm = _attached(loss="symba", alpha=2.0)
    x = prepared
    for update, block in zip(algorithm.updates(IMAGES), algorithm.blocks, strict=True):
        z = block(x)
        good, bad = z.square().mean(1).chunk(2)
        torch.testing.assert_close(update.loss, symba.loss(good, bad, 2.0))
        x = _normed(z.detach())
    scores = algorithm.predict(IMAGES.inputs)
    labelled = _normed(ff.embed_label(IMAGES.inputs, torch.full((12,), 1), CLASSES))
    second = algorithm.blocks[1](_normed(algorithm.blocks[0](labelled)))
    third = algorithm.blocks[2](_normed(second))
    torch.testing.assert_close(scores[:, 1], second.square().mean(1) + third.square().mean(1))


# -- channel-wise competition -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("competition", ["cwc", "pvn", "cwg"])
def test_channels_compete_in_every_block(competition: str) -> None:
    algorithm = _attached(cnn((2, 6, 6), CLASSES, (8, 4)), loss="channelwise", competition=competition)
    x = IMAGES.inputs
    for update, block in zip(algorithm.updates(IMAGES), algorithm.blocks, strict=True):
        z = block(x)
        good = channelwise.group_goodness(z, CLASSES)
        torch.testing.assert_close(update.loss, getattr(channelwise, competition)(good, IMAGES.targets))
        x = z.detach()
    assert algorithm.locality is Locality.LAYER_LOCAL
    torch.testing.assert_close(algorithm.predict(IMAGES.inputs), good)


def test_channels_answer_by_the_last_block_or_the_sum_or_a_readout() -> None:
    net = cnn((2, 6, 6), CLASSES, (8, 4))
    nets = [_attached(deepcopy(net), loss="channelwise", inference=i) for i in ("last", "goodness")]
    outputs = list(nets[0].blocks.features(IMAGES.inputs))
    groups = [channelwise.group_goodness(z, CLASSES) for z in outputs]
    torch.testing.assert_close(nets[0].predict(IMAGES.inputs), groups[1])
    torch.testing.assert_close(nets[1].predict(IMAGES.inputs), groups[0] + groups[1])
    read = _attached(deepcopy(net), loss="channelwise", inference="softmax")
    nn.init.normal_(read.readout.weight)
    features = torch.cat([z.flatten(1) for z in outputs], 1)
    torch.testing.assert_close(read.predict(IMAGES.inputs), features @ read.readout.weight.T)
    *_, last = read.updates(IMAGES)
    torch.testing.assert_close(last.loss, F.cross_entropy(features @ read.readout.weight.T, IMAGES.targets))


def test_frozen_blocks_can_be_cached_where_nothing_is_drawn() -> None:
    _attached(loss="channelwise").cache_frozen(True)
    with pytest.raises(ValueError, match="cannot be cached"):
        _attached(negatives="hybrid").cache_frozen(True)


# -- time steps -------------------------------------------------------------------------------------------------------
def _loop(algorithm: Any, images: Tensor, labels: Tensor, steps: int) -> list[list[Tensor]]:
    """Activities after every time step, by the formula; those from before the first one in front."""
    above = _normed(F.one_hot(labels, CLASSES).to(images.dtype))
    flat = _normed(images).flatten(1)
    states, x = [], flat
    for block in algorithm.blocks:
        linear = block[-2]
        states.append(torch.relu(x @ linear.weight.T + linear.bias))
        x = _normed(states[-1])
    course = [states]
    for _ in range(steps):
        scaled = [flat, *(_normed(h) for h in states), above]
        new = []
        for i, block in enumerate(algorithm.blocks):
            u, b, v = block[-2].weight, block[-2].bias, algorithm.from_above[i].weight
            drive = torch.relu(scaled[i] @ u.T + scaled[i + 2] @ v.T + b)
            new.append(0.3 * states[i] + 0.7 * drive)
        states = new
        course.append(states)
    return course


def test_all_blocks_step_at_once_and_each_learns_alone() -> None:
    """One batch of eight time steps with steps of zero: losses and gradients are those of the formula."""
    algorithm = _attached(recurrent=8).double()
    batch = IMAGES._replace(inputs=IMAGES.inputs.double())
    wrong = ff.wrong_labels_uniform(batch.targets, CLASSES, torch.Generator().manual_seed(algorithm.seed))
    images, labels = torch.cat([batch.inputs] * 2), torch.cat([batch.targets, wrong])
    with torch.no_grad():
        course = _loop(algorithm, images, labels, 8)
    updates = list(zip(range(24), algorithm.updates(batch), strict=True))
    assert [update.unit for _, update in updates] == ["layer1", "layer2", "layer3"] * 8
    for number, update in updates:
        time, i = number // 3 + 1, number % 3
        good, bad = course[time][i].square().sum(1).chunk(2)
        width = course[time][i].shape[1]
        want = -F.logsigmoid(torch.cat([good - width, width - bad])).mean()
        torch.testing.assert_close(update.loss, want)
    algorithm = _attached(recurrent=8).double()
    for number, update in enumerate(algorithm.updates(batch)):
        update.backward()
        i = number % 3
        given = {name for name, p in algorithm.named_parameters() if p.grad is not None}
        assert given == {f"blocks.members.layer{i + 1}.{'1' if i == 0 else '0'}.{k}" for k in ("weight", "bias")} | {
            f"from_above.{i}.weight"
        }
        algorithm.zero_grad()


def test_the_label_whose_goodness_lasts_is_the_answer() -> None:
    algorithm = _attached(recurrent=8).double()
    images = IMAGES.inputs.double()
    scores = algorithm.predict(images)
    with torch.no_grad():
        for label in range(CLASSES):
            course = _loop(algorithm, images, torch.full((12,), label), 5)
            want = sum(h.square().sum(1) for states in course[3:] for h in states)
            torch.testing.assert_close(scores[:, label], want)
    assert len(list(algorithm.activations(images))) == 3
    torch.testing.assert_close(algorithm.blocks(images), _attached(recurrent=8).double().blocks(images))


def test_blocks_that_share_their_relu_hear_once_from_above() -> None:
    one = nn.ReLU()
    scores = []
    for relus in ([one, one], [nn.ReLU(), nn.ReLU()]):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Flatten(), nn.Linear(72, 8)), nn.Linear(8, 8)]
        net = Blocks({f"b{i}": nn.Sequential(*pair) for i, pair in enumerate(zip(layers, relus, strict=True))})
        scores.append(_attached(net, recurrent=3).predict(IMAGES.inputs))
    torch.testing.assert_close(*scores)


def test_few_time_steps_are_read_as_far_as_they_go() -> None:
    assert Recurrence.of(8) == Recurrence(8, 0.3, (3, 5))
    assert Recurrence.of(4).read == (3, 4)
    assert Recurrence.of(1).read == (1, 1)
    assert Recurrence.of({"steps": 6, "damping": 0, "read": [2, 2]}) == Recurrence(6, 0.0, (2, 2))


# -- unshared receptive fields ----------------------------------------------------------------------------------------
def test_peers_of_unshared_weights_are_single_outputs() -> None:
    net = partial(locally_connected, (2, 6, 6), CLASSES, (3, 4), (3, 2), (3, 1))
    algorithm = _attached(net(), peer=0.03)
    assert [local.peer_mean.shape for local in algorithm.local] == [(3 * 4,), (4 * 1,)]
    dead = algorithm.blocks[0][0].bias
    with torch.no_grad():
        dead[5] = -50.0  # one output of one position
        positive = algorithm.prepare(IMAGES).inputs[:12]
        expected = 0.9 * 0.5 + 0.1 * algorithm.blocks[0](positive).flatten(1).mean(0)
    plain_loop(algorithm, [IMAGES], sgd)
    assert dead[5] > -50.0
    torch.testing.assert_close(algorithm.local[0].peer_mean, expected)
    result = audit(_attached(net(), peer=0.03), IMAGES)
    assert result.confirmed, result.reason


# -- learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "epochs", "least"),
    [
        ({"negatives": "hybrid", "readout_lr": 0.02, "blurs": 2}, 6, 0.85),
        ({"loss": "symba", "label_strength": 2.0, "skip_first": False}, 8, 0.85),
        ({"loss": "channelwise"}, 6, 0.9),
        ({"recurrent": 5}, 3, 0.7),
    ],
    ids=["hybrid", "symba", "channelwise", "recurrent"],
)
def test_digits_are_learned(options: dict[str, Any], epochs: int, least: float) -> None:
    train, test = _digits()
    torch.manual_seed(0)
    algorithm = ForwardForward(**options)
    algorithm.attach(mlp((1, 10, 8), 10, (100, 100)), _info(test, 10))
    plain_loop(algorithm, train * epochs, adam)
    assert _accuracy(algorithm, test) > least
    figures = algorithm.examine(test)
    if options.get("negatives") != "hybrid":  # property 9: blocks answer alone, too
        assert figures["layer1"]["accuracy_alone"] > 0.5
