"""Representations are those of the trained blocks, with and without the label, and the network never notices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn import analysis
from locallearn.algorithms import (
    Algorithm,
    Backprop,
    BackpropForwardForward,
    CounterCurrent,
    FeedbackAlignment,
    ForwardForward,
    MonoForward,
    Pepita,
    TaskInfo,
)
from locallearn.batch import Batch
from locallearn.functional import forward_forward as ff
from locallearn.nets import Blocks, mlp

CLASSES = 4
RULES: dict[str, Callable[[], Algorithm]] = {
    "backprop": Backprop,
    "mono_forward": MonoForward,
    "feedback_alignment": FeedbackAlignment,
    "pepita": Pepita,
    "counter_current": CounterCurrent,
    "forward_forward": ForwardForward,
    "forward_forward-hard-peer": partial(ForwardForward, negatives="hard", peer=0.03),
    "bp_ff": BackpropForwardForward,
}


def _batch(rows: int = 40) -> Batch:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % CLASSES
    centres = torch.rand(CLASSES, 20, generator=draw)
    return Batch(centres[labels] + 0.1 * torch.rand(rows, 20, generator=draw), labels)


def _attached(make: Callable[[], Algorithm], net: Blocks | None = None) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = net or mlp((20,), CLASSES, (16, 12))
    algorithm = make()
    algorithm.attach(net, TaskInfo(_batch(2), CLASSES, F.cross_entropy))
    return algorithm


def _all(algorithm: Algorithm, batches: list[Batch], label: Any = None) -> analysis.Representations:
    pieces = list(analysis.representations(algorithm, batches, label))
    names = pieces[0].layers
    return analysis.Representations(
        {name: torch.cat([piece.layers[name] for piece in pieces]) for name in names},
        torch.cat([piece.labels for piece in pieces]),
        torch.cat([piece.predictions for piece in pieces]),
    )


@pytest.mark.parametrize("name", RULES)
def test_looking_leaves_no_trace(name: str) -> None:
    algorithm = _attached(RULES[name])
    batch = _batch()
    for update in algorithm.updates(batch):  # gradients and generators are somewhere
        update.backward()
    algorithm.blocks[0].eval()  # and modes are mixed
    state = copy.deepcopy(algorithm.state_dict())
    drawn = {key: value.clone() for key, value in algorithm.get_extra_state().items()}
    modes = [part.training for part in algorithm.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in algorithm.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in algorithm.parameters()]
    versions = [p._version for p in algorithm.parameters()]
    attributes = {key: id(value) for key, value in vars(algorithm).items()}
    random = torch.get_rng_state()
    inputs = batch.inputs.clone()

    analysis.analyse(algorithm, [batch], CLASSES, only_right=False, per_class=2, units=5)
    analysis.similarity({"a": (algorithm, [batch]), "b": (algorithm, [batch])}, CLASSES, only_right=False, per_class=3)

    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(batch.inputs, inputs)
    assert {key: id(value) for key, value in vars(algorithm).items()} == attributes
    assert modes == [part.training for part in algorithm.modules()]
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in algorithm.modules()]
    assert versions == [p._version for p in algorithm.parameters()]
    after = algorithm.get_extra_state()
    assert drawn.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in drawn.items())
    for key, value in algorithm.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, state[key]), key
    for before, p in zip(grads, algorithm.parameters(), strict=True):
        assert (before is None) == (p.grad is None)
        assert before is None or torch.equal(before, p.grad)


def test_a_rule_with_time_steps_is_shown_what_it_settles_on() -> None:
    """The label lies above its top block; one upward pass with the label in the image is nothing that it learns from."""
    assert analysis.passes(_attached(partial(ForwardForward, recurrent=3)), _batch()) == ("plain",)


@pytest.mark.parametrize("name", RULES)
def test_what_is_collected_is_what_a_plain_pass_gives(name: str) -> None:
    algorithm = _attached(RULES[name])
    batches = [_batch(), _batch(300)]  # longer than a piece
    inputs, labels = (torch.cat(parts) for parts in zip(*[(b.inputs, b.targets) for b in batches], strict=True))
    writes = isinstance(algorithm, ForwardForward | BackpropForwardForward)
    known = analysis.passes(algorithm, batches[0])
    assert known == (("true", "neutral") if writes else ("plain",))
    for label in known:
        found = _all(algorithm, batches, label)
        x = inputs
        if writes:
            x = ff.embed_label(x, labels, CLASSES) if label == "true" else ff.embed_neutral(x, CLASSES)
        for block, layer in zip(algorithm.blocks.eval(), found.layers.values(), strict=True):
            x = ff.rms_normalise(x) if writes else x
            x = block(x)
            torch.testing.assert_close(layer, x)  # not normalised: before the hand-over
        assert torch.equal(found.labels, labels)
        assert torch.equal(found.predictions, algorithm.eval().predict(inputs).argmax(1))


def test_normalisation_and_dropout_rest_and_blocks_in_place_are_seen_as_they_gave() -> None:
    net = Blocks(
        {
            "one": nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10), nn.ReLU()),
            "two": nn.Sequential(nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True), nn.Linear(10, 8), nn.ELU()),
        },
        nn.Linear(8, CLASSES),
    )
    algorithm = _attached(Backprop, net)
    statistics = net[0][1].running_mean.clone()
    found = _all(algorithm, [_batch()])
    again = _all(algorithm, [_batch()])
    net.eval()
    for layer, other, plain in zip(
        found.layers.values(), again.layers.values(), net.features(_batch().inputs), strict=True
    ):
        assert torch.equal(layer, other)
        assert torch.equal(layer, plain)
    assert torch.equal(net[0][1].running_mean, statistics)


def test_maps_are_flattened_and_negative_activations_are_told() -> None:
    net = Blocks(
        {"conv": nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh())}, nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net(torch.zeros(1, 1, 5, 5))
    algorithm = MonoForward()
    batch = Batch(torch.rand(20, 1, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % CLASSES)
    algorithm.attach(net, TaskInfo(batch, CLASSES, F.cross_entropy))
    (layer,) = analysis.analyse(algorithm, [batch], CLASSES, only_right=False)["passes"]["plain"]["layers"]
    assert layer["units"] == 27
    assert layer["signed"] is True
    h = net.eval()[0](batch.inputs).flatten(1)
    assert layer["hoyer"] == pytest.approx(analysis.sparsity(h).mean, rel=1e-4)
    means = analysis.class_means(h.abs(), batch.targets, CLASSES)
    assert layer["sizes"] == analysis.ensembles(means).sum(1).tolist()


def test_only_what_was_trained_is_looked_at() -> None:
    algorithm = _attached(ForwardForward)
    algorithm.train_only(frozenset({"layer1"}))
    for label in ("true", "neutral"):
        assert list(_all(algorithm, [_batch()], label).layers) == ["layer1"]


def test_the_summary_is_made_of_the_functions() -> None:
    algorithm = _attached(ForwardForward)
    optimizers = {name: torch.optim.Adam(groups, lr=0.02) for name, groups in algorithm.units().items()}
    for _ in range(150):
        for update in algorithm.updates(_batch()):
            update.backward()
            optimizers[update.unit].step()
            optimizers[update.unit].zero_grad()
    batches = [_batch(), _batch(300)]
    result = analysis.analyse(algorithm, batches, CLASSES, tau=0.5, per_class=3, units=6)
    assert list(result["passes"]) == ["true", "neutral"]
    for label, part in result["passes"].items():
        whole = _all(algorithm, batches, label)
        kept = whole.chosen(whole.right)
        assert result["accuracy"] == pytest.approx(float(whole.right.double().mean()))
        assert part["counts"] == torch.bincount(kept.labels, minlength=CLASSES).tolist()
        for figures, (name, h) in zip(part["layers"], kept.layers.items(), strict=True):
            assert figures["name"] == name
            assert figures["hoyer"] == pytest.approx(analysis.sparsity(h).mean, rel=1e-5)
            assert figures["undefined"] == analysis.sparsity(h).undefined
            by_class = [one.mean for one in analysis.class_sparsity(h, kept.labels, CLASSES)]
            assert figures["hoyer_by_class"] == pytest.approx(by_class, rel=1e-5)
            members = analysis.ensembles(analysis.class_means(h, kept.labels, CLASSES), 0.5)
            assert figures["sizes"] == members.sum(1).tolist()
            assert figures["overlap"] == analysis.overlaps(members).tolist()
            assert figures["never_active"] == pytest.approx(analysis.activity(h).never_active)
            assert figures["maximum"] == pytest.approx(analysis.activity(h).maximum, rel=1e-5)
            assert figures["columns"] == analysis.activation_map(h, kept.labels, units=6).units.tolist()
            drawn = analysis.activation_map(h, kept.labels, per_class=3, units=6)
            assert figures["map"]["labels"] == drawn.labels.tolist()
            scaled = (100 * drawn.values / drawn.values.max()).round().int()
            assert figures["map"]["values"] == scaled.tolist()


@pytest.mark.parametrize("only_right", [True, False])
def test_what_is_classified_wrongly_is_left_out_unless_it_is_asked_for(only_right: bool) -> None:
    algorithm, batch = _attached(Backprop), _batch(80)
    optimizers = {name: torch.optim.Adam(groups, lr=0.02) for name, groups in algorithm.units().items()}
    for _ in range(30):
        for update in algorithm.updates(batch):
            update.backward()
            optimizers[update.unit].step()
            optimizers[update.unit].zero_grad()
    wrong = torch.arange(80) < 9  # by their labels: three of class 1, two of the others
    given = batch._replace(targets=torch.where(wrong, (batch.targets + 1) % CLASSES, batch.targets))
    assert torch.equal(_all(algorithm, [given]).right, ~wrong)

    result = analysis.analyse(algorithm, [given], CLASSES, only_right=only_right, per_class=99)
    kept = ~wrong if only_right else torch.ones(80, dtype=torch.bool)
    assert (result["samples"], result["accuracy"]) == (80, pytest.approx(71 / 80))
    assert result["passes"]["plain"]["counts"] == torch.bincount(given.targets[kept], minlength=CLASSES).tolist()
    whole = _all(algorithm, [given])
    for figures, h in zip(result["passes"]["plain"]["layers"], whole.chosen(kept).layers.values(), strict=True):
        assert figures["hoyer"] == pytest.approx(analysis.sparsity(h).mean, rel=1e-5)
        assert figures["map"]["labels"] == given.targets[kept].sort().values.tolist()
    alike = analysis.similarity({"a": (algorithm, [given]), "b": (algorithm, [given])}, CLASSES, only_right=only_right)
    assert alike["samples"] == int(kept.sum())


def test_likeness_of_two_networks_is_over_the_samples_that_both_know() -> None:
    one, two = _attached(Backprop), _attached(ForwardForward)
    for algorithm, seed in ((one, 1), (two, 2)):
        draw = torch.Generator().manual_seed(seed)
        for p in algorithm.blocks.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=draw)
    batches = [_batch(), _batch(300)]
    a, b = _all(one, batches), _all(two, batches)
    both = a.right & b.right
    assert 10 < int(both.sum()) < 340
    found = analysis.similarity({"bp": (one, batches), "ff": (two, batches)}, CLASSES, per_class=5)
    assert found["rows"] == [("bp", "layer1"), ("bp", "layer2"), ("ff", "layer1"), ("ff", "layer2")]
    assert found["shown"] == {"bp": "plain", "ff": "true"}
    layers = [*a.chosen(both).layers.values(), *b.chosen(both).layers.values()]
    assert found["samples"] >= int(both.sum()) - 6
    for i in range(4):
        assert found["cka"][i][i] == pytest.approx(1.0)
        for j in range(4):
            assert found["cka"][i][j] == pytest.approx(analysis.linear_cka(layers[i], layers[j], True), abs=0.12)
    labels = a.labels[both]
    few = torch.cat([(labels == c).nonzero().squeeze(1)[:5] for c in range(CLASSES)]).sort().values
    assert found["pairs_of"] == len(few)
    assert found["rsa"][0][3] == pytest.approx(analysis.rsa(layers[0][few], layers[3][few]), rel=1e-4)
    with pytest.raises(ValueError, match="given 300 and 340 samples"):
        analysis.similarity({"bp": (one, batches), "ff": (two, batches[1:])}, CLASSES)
    turned = [batch._replace(targets=batch.targets.flip(0)) for batch in batches]
    with pytest.raises(ValueError, match="different labels"):
        analysis.similarity({"bp": (one, batches), "ff": (two, turned)}, CLASSES)


def test_classes_that_were_never_trained_are_taken_whole_and_probed_without_their_label() -> None:
    algorithm = _attached(ForwardForward)
    batch = _batch(400)
    result = analysis.analyse(algorithm, [batch], CLASSES, only_right=False, unseen=[3], per_class=4, units=6)
    whole = _all(algorithm, [batch])
    seen = whole.labels != 3
    assert result["accuracy"] == pytest.approx(float(whole.right[seen].double().mean()))
    assert (result["samples"], result["unseen"]) == (300, [3])
    assert result["passes"]["neutral"]["counts"] == [100] * 4
    for layer in result["passes"]["neutral"]["layers"]:
        assert layer["probe"] > 0.9  # four clusters, in a random network
        assert layer["probe_unseen"] > 0.9
    assert all("probe" not in layer for layer in result["passes"]["true"]["layers"])  # there the label is in the input
    for p in algorithm.blocks.parameters():
        p.data.zero_()
    dead = analysis.analyse(algorithm, [batch], CLASSES, only_right=False, unseen=[3])["passes"]["neutral"]["layers"][0]
    assert dead["probe"] <= 0.3
    assert (dead["hoyer"], dead["undefined"], dead["never_active"]) == (None, 400, 1.0)
    right = analysis.analyse(algorithm, [batch], CLASSES, unseen=[1, 2, 3])  # all are called 0 now
    assert right["passes"]["neutral"]["counts"] == [100] * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda batch: batch._replace(context=(torch.zeros(2, 3),)), "nodes of a graph"),
        (lambda batch: batch._replace(rows=torch.arange(3)), "nodes of a graph"),
        (lambda batch: batch._replace(targets=batch.inputs), "no class labels"),
        (lambda batch: batch._replace(targets=torch.zeros_like(batch.targets)), "not one sample of classes 1, 2, 3"),
    ],
)
def test_what_cannot_be_analysed_is_refused(change: Callable[[Batch], Batch], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        analysis.analyse(_attached(Backprop), [change(_batch())], CLASSES)


def test_labels_that_a_rule_does_not_write_and_blocks_of_one_unit_are_refused() -> None:
    with pytest.raises(ValueError, match="label is 'true', expected 'plain' for Backprop"):
        list(analysis.representations(_attached(Backprop), [_batch()], "true"))
    with pytest.raises(ValueError, match="label is 'plain', expected 'true' or 'neutral'"):
        list(analysis.representations(_attached(ForwardForward), [_batch()], "plain"))
    thin = _attached(Backprop, mlp((20,), CLASSES, (8, 1)))
    with pytest.raises(ValueError, match="block 'layer2' has one unit"):
        analysis.analyse(thin, [_batch()], CLASSES, only_right=False)
    with pytest.raises(ValueError, match="no sample to analyse"):
        analysis.analyse(_attached(Backprop), [], CLASSES)
    with pytest.raises(ValueError, match=r"no sample of class 3 among the 3 given"):
        analysis.analyse(_attached(Backprop), [_batch(3)], CLASSES, only_right=False)
