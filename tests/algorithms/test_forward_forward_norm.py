"""Forward-Forward with a norm as goodness, inputs of length 1 and blocks that vote: Tosato et al., and its parts elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import BackpropForwardForward, ForwardForward, TaskInfo
from locallearn.batch import Batch
from locallearn.functional import emergent
from locallearn.functional import forward_forward as ff
from locallearn.losses import ForwardForwardLoss
from locallearn.nets import Blocks, mlp
from tests.references import reference

CLASSES, WIDTH, HIDDEN = 4, 12, (10, 9, 8)
DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(torch.rand(16, WIDTH, generator=DRAW).double(), torch.randint(CLASSES, (16,), generator=DRAW))
PAPER: dict[str, Any] = {"goodness": "norm", "threshold": 3.0, "normalise": "unit", "inference": "vote"}


def _attached(kind: type = ForwardForward, hidden: tuple[int, ...] = HIDDEN, **options: Any) -> Any:
    torch.manual_seed(0)
    algorithm = kind(**options)
    info = TaskInfo(Batch(BATCH.inputs[:2].float(), BATCH.targets[:2]), CLASSES, F.cross_entropy)
    algorithm.attach(mlp((WIDTH,), CLASSES, hidden), info)
    return algorithm.double()


def _written(inputs: Tensor, labels: Tensor, strength: float = 1.0) -> Tensor:
    """Labels over the first slots, by hand."""
    return torch.cat((strength * F.one_hot(labels, CLASSES).to(inputs.dtype), inputs[:, CLASSES:]), 1)


def _unit(x: Tensor) -> Tensor:
    return x / x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


# -- the numbers of the paper's code --------------------------------------------------------------------------------------
def _with_their_weights(known: dict[str, Tensor], **options: Any) -> Any:
    net = Blocks({f"layer{k}": nn.Sequential(nn.Linear(*known[f"W{k}"].T.shape), nn.ReLU()) for k in (1, 2, 3)})
    algorithm = ForwardForward(**{**PAPER, **options})
    example = Batch(known["x"][:2].float(), known["y"][:2])
    algorithm.attach(net, TaskInfo(example, 10, F.cross_entropy))
    algorithm.double()
    with torch.no_grad():
        for k, block in enumerate(net, 1):
            block[0].weight.copy_(known[f"W{k}"])
            block[0].bias.copy_(known[f"b{k}"])
    return algorithm


def _known() -> dict[str, Tensor]:
    arrays = reference("emergent_ff").items()
    return {key: torch.from_numpy(value) for key, value in arrays if value.dtype.kind in "fiub"}


def test_layer_after_layer_learns_as_in_the_papers_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their positives and negatives, a step of Adam per layer; the next layer is fed by the one that has learned."""
    known = _known()
    algorithm = _with_their_weights(known)
    both = Batch(algorithm.scaled(torch.cat((known["x_pos"], known["x_neg"]))), known["y"])
    monkeypatch.setattr(algorithm, "prepare", lambda batch: both)
    for k, stage in enumerate(algorithm.stages, 1):
        algorithm.train_only(frozenset(stage))
        layer = algorithm.blocks[k - 1][0]
        fed: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda module, args, to=fed: to.append(args[0]))
        (update,) = algorithm.updates(both)
        hook.remove()
        update.backward()
        torch.testing.assert_close(update.loss, known[f"ff_loss{k}"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.weight.grad, known[f"ff_grad_W{k}"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.bias.grad, known[f"ff_grad_b{k}"], rtol=1e-12, atol=1e-12)
        wanted = _unit(torch.cat((known[f"ff_in_pos{k}"], known[f"ff_in_neg{k}"])))
        torch.testing.assert_close(fed[0], wanted, rtol=1e-8, atol=1e-8)
        torch.optim.Adam(algorithm.units()[stage[0]], lr=float(known["ff_lr"])).step()
        torch.testing.assert_close(layer.weight.detach(), known[f"ff_W{k}_after"], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer.bias.detach(), known[f"ff_b{k}_after"], rtol=1e-8, atol=1e-8)


def test_layers_vote_and_sum_as_in_the_papers_code() -> None:
    known = _known()
    options = {"label_strength": float(known["x"].max())}
    votes = _with_their_weights(known, **options)
    torch.testing.assert_close(votes.goodness_by_label(known["x"]), known["goodness_per_label"])
    scores = votes.predict(known["x"])
    torch.testing.assert_close(scores, known["vote_scores"])
    assert torch.equal(scores.argmax(1), known["predict"])
    sums = _with_their_weights(known, inference="goodness", skip_first=False, **options).predict(known["x"])
    assert torch.equal(sums.argmax(1), known["predict_old"])


# -- the step, by hand ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("goodness", ["norm", "l1"])
def test_a_step_is_that_of_a_plain_loop(goodness: str) -> None:
    algorithm = _attached(**{**PAPER, "goodness": goodness}, label_strength=2.0)
    wrong = ff.wrong_labels_uniform(BATCH.targets, CLASSES, torch.Generator().manual_seed(algorithm.seed))
    good, bad = (_unit(_written(BATCH.inputs, labels, 2.0)) for labels in (BATCH.targets, wrong))
    for block, update in zip(algorithm.blocks, algorithm.updates(BATCH), strict=True):
        outputs = [(x @ block[0].weight.T + block[0].bias).relu() for x in (good, bad)]
        high, low = (z.norm(dim=1) if goodness == "norm" else z.abs().sum(1) for z in outputs)
        loss = torch.cat((torch.log1p(torch.exp(3.0 - high)), torch.log1p(torch.exp(low - 3.0)))).mean()
        torch.testing.assert_close(update.loss, loss)
        wanted = torch.autograd.grad(loss, list(block.parameters()))
        update.backward()
        for p, want in zip(block.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, want)
        good, bad = (_unit(z.detach()) for z in outputs)


def test_the_error_of_a_norm_has_length_one_and_silence_teaches_nothing() -> None:
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0]], dtype=torch.float64, requires_grad=True)
    ForwardForwardLoss(threshold=1e6, goodness="norm")(z, torch.zeros_like(z)).backward()
    torch.testing.assert_close(-6 * z.grad, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8]], dtype=torch.float64))


@pytest.mark.parametrize(("goodness", "ones"), [("squares", 6.0), ("norm", math.sqrt(6.0)), ("l1", 6.0)])
def test_undecided_is_an_output_of_ones_and_a_loss_of_log_two(goodness: Any, ones: float) -> None:
    z = torch.ones(5, 2, 3, dtype=torch.float64)
    assert emergent.undecided(6, goodness) == ones
    loss = ForwardForwardLoss(goodness=goodness)(z, z)
    torch.testing.assert_close(loss, torch.tensor(math.log(2.0), dtype=torch.float64))
    known = ForwardForwardLoss(ones, goodness=goodness)(0.3 * z, 2 * z)
    torch.testing.assert_close(ForwardForwardLoss(goodness=goodness)(0.3 * z, 2 * z), known)


def test_forward_passes_and_votes_are_those_of_bp_ff() -> None:
    local, control = _attached(**PAPER), _attached(BackpropForwardForward, **PAPER)
    torch.testing.assert_close(local.prepare(BATCH).inputs, control.prepare(BATCH).inputs)
    torch.testing.assert_close(local.predict(BATCH.inputs), control.predict(BATCH.inputs))
    for a, b in zip(local.activations(BATCH.inputs), control.activations(BATCH.inputs), strict=True):
        torch.testing.assert_close(a, b)


# -- inference --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("minimise", [False, True])
@pytest.mark.parametrize("skip_first", [None, True])
def test_votes_are_the_slow_loop(minimise: bool, skip_first: bool | None) -> None:
    algorithm = _attached(**PAPER, minimise=minimise, skip_first=skip_first)
    goodness = torch.zeros(16, CLASSES, 3, dtype=torch.float64)
    for label in range(CLASSES):
        x = _unit(_written(BATCH.inputs, torch.full((16,), label)))
        for i, block in enumerate(algorithm.blocks):
            z = (x @ block[0].weight.T + block[0].bias).relu()
            goodness[:, label, i] = z.norm(dim=1).detach()
            x = _unit(z)
    powers = torch.exp(-goodness if minimise else goodness)
    votes = powers / powers.sum(1, keepdim=True)
    counted = votes[:, :, 1:] if skip_first else votes
    torch.testing.assert_close(algorithm.predict(BATCH.inputs), counted.sum(2))
    figures = algorithm.examine(BATCH)  # what a block adds is what it adds to the votes
    for i, name in enumerate(algorithm.blocks.names):
        alone = (votes[:, :, i].argmax(1) == BATCH.targets).double().mean()
        assert figures[name]["accuracy_alone"] == pytest.approx(float(alone))
    without = (counted[:, :, :-1].sum(2).argmax(1) == BATCH.targets).double().mean()
    together = (counted.sum(2).argmax(1) == BATCH.targets).double().mean()
    assert figures["layer3"]["accuracy_gained"] == pytest.approx(float(together - without))


def test_votes_and_sums_agree_with_one_block_and_with_the_blocks_that_are_trained() -> None:
    """Property 6; in a sequential schedule those that have not trained do not vote."""
    vote, total = (_attached(hidden=(10,), **{**PAPER, "inference": i}) for i in ("vote", "goodness"))
    assert torch.equal(vote.predict(BATCH.inputs).argmax(1), total.predict(BATCH.inputs).argmax(1))
    algorithm = _attached(**PAPER)
    algorithm.train_only(frozenset(["layer2"]))
    scores = algorithm.predict(BATCH.inputs)
    torch.testing.assert_close(scores.sum(1), torch.full((16,), 2.0, dtype=torch.float64))


# -- its parts in other kinds -----------------------------------------------------------------------------------------
def test_hybrids_take_any_goodness_and_length() -> None:
    torch.manual_seed(0)
    images = Batch(torch.rand(12, 2, 6, 6), torch.arange(12) % CLASSES)
    algorithm = ForwardForward(negatives="hybrid", goodness="norm", threshold=2.0, normalise="unit")
    info = TaskInfo(Batch(images.inputs[:2], images.targets[:2]), CLASSES, F.cross_entropy)
    algorithm.attach(mlp((2, 6, 6), CLASSES, (12, 8)), info)
    mixed = ff.hybrid_images(images.inputs, 6, torch.Generator().manual_seed(algorithm.seed))
    x = _unit(torch.cat((images.inputs, mixed)))
    nn.init.normal_(algorithm.readout.weight)
    *updates, last = algorithm.updates(images)
    for block, update in zip(algorithm.blocks, updates, strict=True):
        z = block(x).detach()
        good, bad = z.norm(dim=1).chunk(2)
        torch.testing.assert_close(update.loss, F.softplus(torch.cat((2.0 - good, bad - 2.0))).mean())
        x = _unit(z)
    torch.testing.assert_close(last.loss, F.cross_entropy(x[:12] @ algorithm.readout.weight.T, images.targets))


def test_time_steps_take_any_goodness_and_length() -> None:
    algorithm = _attached(hidden=(10, 9), recurrent=2, goodness="norm", threshold=2.0, normalise="unit")
    labels = torch.full((16,), 1)
    image, above = _unit(BATCH.inputs), F.one_hot(labels, CLASSES).double()
    (u1, b1), (u2, b2) = ([*block.parameters()] for block in algorithm.blocks)
    v1, v2 = (layer.weight for layer in algorithm.from_above)
    one = (image @ u1.T + b1).relu()
    two = (_unit(one) @ u2.T + b2).relu()
    for _ in range(2):
        one, two = (
            0.3 * one + 0.7 * (image @ u1.T + _unit(two) @ v1.T + b1).relu(),
            0.3 * two + 0.7 * (_unit(one) @ u2.T + above @ v2.T + b2).relu(),
        )
    scores = algorithm.predict(BATCH.inputs)  # two steps: the second alone is read
    torch.testing.assert_close(scores[:, 1], one.norm(dim=1) + two.norm(dim=1))
    *_, update = algorithm.updates(BATCH)
    assert algorithm.local[0].goodness == "norm"
    assert update.loss.isfinite()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"goodness": "cubes"}, "goodness is 'cubes', expected 'squares'"),
        ({"normalise": "max"}, "normalise is 'max', expected 'rms'"),
        ({"loss": "symba", "goodness": "norm"}, "goodness is 'norm', which means nothing with loss=symba"),
        ({"loss": "channelwise", "goodness": "norm"}, "goodness is 'norm', which means nothing with loss=channelwise"),
        ({"loss": "channelwise", "normalise": "unit"}, "normalise is 'unit', which means nothing"),
        ({"loss": "channelwise", "inference": "vote"}, "answers by 'last' or 'goodness' or 'softmax'"),
        ({"negatives": "hybrid", "inference": "vote"}, "answers by 'softmax'"),
        ({"recurrent": 3, "inference": "vote"}, "recurrent answers by 'goodness'"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ForwardForward(**options)


def test_blocks_of_symba_vote_too() -> None:
    scores = _attached(loss="symba", normalise="unit", inference="vote").predict(BATCH.inputs)
    torch.testing.assert_close(scores.sum(1), torch.full((16,), 3.0, dtype=torch.float64))
