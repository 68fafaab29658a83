"""Layer collaboration: the eight properties of a right implementation, and what every block contributes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from locallearn.algorithms import ForwardForward, LayerCollaboration, Locality, TaskInfo
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional import forward_forward as ff
from locallearn.functional import layer_collaboration as lc
from locallearn.nets import mlp
from locallearn.testing import plain_loop

CLASSES, WIDTH, HIDDEN = 4, 12, (10, 9, 8)
DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(torch.rand(16, WIDTH, generator=DRAW).double(), torch.randint(CLASSES, (16,), generator=DRAW))
INFO = TaskInfo(Batch(BATCH.inputs[:2].float(), BATCH.targets[:2]), CLASSES, F.cross_entropy)
sgd = partial(torch.optim.SGD, lr=0.1)


def _attached(kind: type = LayerCollaboration, hidden: tuple[int, ...] = HIDDEN, **options: Any) -> Any:
    torch.manual_seed(0)
    algorithm = kind(**options)
    algorithm.attach(mlp((WIDTH,), CLASSES, hidden), INFO)
    return algorithm.double()


def _normed(x: Tensor) -> Tensor:
    return x / x.square().mean(1, keepdim=True).sqrt()


def _rows(algorithm: Any) -> Tensor:
    """Positives on top of negatives, as the rule draws them first."""
    wrong = ff.wrong_labels_uniform(BATCH.targets, CLASSES, torch.Generator().manual_seed(algorithm.seed))
    return _normed(torch.cat([ff.embed_label(BATCH.inputs, y, CLASSES) for y in (BATCH.targets, wrong)]))


def _outputs(algorithm: Any, detach: bool = True) -> list[Tensor]:
    x, outputs = _rows(algorithm), []
    for block in algorithm.blocks:
        outputs.append(block(x))
        x = _normed(outputs[-1].detach() if detach else outputs[-1])
    return outputs


def _gradients(algorithm: Any) -> list[list[Tensor]]:
    """Of every block's update, without a step in between."""
    found = []
    for i, update in enumerate(algorithm.updates(BATCH)):
        update.backward()
        for k, block in enumerate(algorithm.blocks):
            given = [p.grad for p in block.parameters()]
            assert all((g is not None) is (k == i) for g in given), "property 1"
        found.append([p.grad.clone() for p in algorithm.blocks[i].parameters()])
        algorithm.zero_grad()
    return found


def _summed_loss(scores: Tensor) -> Tensor:
    over = scores - sum(HIDDEN)
    return -F.logsigmoid(torch.cat([over[:16], -over[16:]])).mean()  # F.softplus cuts beyond 20


def test_all_heard_is_the_summed_loss_with_the_edges_cut() -> None:
    """Property 2, and 1: no update reaches another block."""
    algorithm = _attached(gamma="all")
    found = _gradients(algorithm)
    for detach in (True, False):
        loss = _summed_loss(sum(ff.goodness(z) for z in _outputs(algorithm, detach)))
        for i, block in enumerate(algorithm.blocks):
            wanted = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
            same = [torch.allclose(got, want, rtol=0, atol=1e-12) for got, want in zip(found[i], wanted, strict=True)]
            assert all(same) if detach or i == len(HIDDEN) - 1 else not any(same)


@pytest.mark.parametrize("gamma", ["all", "previous"])
@pytest.mark.parametrize("threshold", ["scaled", "fixed", "midpoint"])
def test_the_others_weigh_a_sample_and_turn_no_gradient(gamma: Any, threshold: Any) -> None:
    """Property 3, by the loss of single rows in every block."""
    algorithm = _attached(gamma=gamma, threshold=threshold)
    found = _gradients(algorithm)
    scores = torch.stack([ff.goodness(z.detach()) for z in _outputs(algorithm)])
    for i, z in enumerate(_outputs(algorithm)):
        heard = scores.sum(0) if gamma == "all" else scores[: i + 1].sum(0)
        size = {"all": sum(HIDDEN), "previous": sum(HIDDEN[: i + 1])}[gamma]
        theta = {"scaled": size, "fixed": HIDDEN[i], "midpoint": (heard[:16].mean() + heard[16:].mean()) / 2}[threshold]
        weight = torch.cat([-(theta - heard[:16]).sigmoid(), (heard[16:] - theta).sigmoid()])
        wanted = torch.autograd.grad((weight * ff.goodness(z)).sum() / 32, list(algorithm.blocks[i].parameters()))
        for got, want in zip(found[i], wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_negatives_may_descend_log_p() -> None:
    good, bad, others = torch.rand(5), torch.rand(5, requires_grad=True), torch.rand(5)
    loss = lc.loss(good, bad, others, others, 1.0, "log_p")
    (slope,) = torch.autograd.grad(loss, bad)
    torch.testing.assert_close(slope, (1 - (bad + others - 1.0).sigmoid()).detach() / 10)


@pytest.mark.parametrize("options", [{"gamma": "all"}, {"gamma": "previous"}, {"order": "gauss_seidel"}])
def test_a_single_block_is_forward_forward_bit_for_bit(options: dict[str, Any]) -> None:
    """Property 4."""
    plain, alone = _attached(ForwardForward, (10,)), _attached(hidden=(10,), **options)
    for algorithm in (plain, alone):
        plain_loop(algorithm, [BATCH] * 5, sgd)
    assert torch.equal(plain.blocks[0][0].weight, alone.blocks[0][0].weight)
    assert torch.equal(plain.predict(BATCH.inputs), alone.predict(BATCH.inputs))


def test_the_first_block_hears_nobody_before_it() -> None:
    """Property 4: under ``previous`` it learns what Forward-Forward's learns."""
    plain, previous = _attached(ForwardForward), _attached(gamma="previous")
    for algorithm in (plain, previous):
        plain_loop(algorithm, [BATCH] * 5, sgd)
    assert torch.equal(plain.blocks[0][0].weight, previous.blocks[0][0].weight)
    assert not torch.equal(plain.blocks[1][0].weight, previous.blocks[1][0].weight)


@pytest.mark.parametrize("gamma", ["all", "previous"])
def test_both_orders_begin_alike(gamma: Any) -> None:
    """Property 5."""
    jacobi, seidel = _attached(gamma=gamma), _attached(gamma=gamma, order="gauss_seidel")
    for algorithm in (jacobi, seidel):
        plain_loop(algorithm, [BATCH], sgd)
    same = [torch.equal(a[0].weight, b[0].weight) for a, b in zip(jacobi.blocks, seidel.blocks, strict=True)]
    assert same == [True, False, False]


def test_gauss_seidel_hears_the_blocks_that_have_learned() -> None:
    algorithm = _attached(order="gauss_seidel")
    updates = algorithm.updates(BATCH)
    for i, update in enumerate(updates):
        want = _summed_loss(sum(ff.goodness(z.detach()) for z in _outputs(algorithm)))
        assert update.loss.item() == pytest.approx(want.item(), rel=1e-12), i
        update.backward()
        with torch.no_grad():
            for p in algorithm.blocks[i].parameters():
                p -= 0.1 * p.grad


def test_each_half_hears_its_own_rows() -> None:
    """Property 6: other wrong labels change what negatives hear, and nothing else."""
    heard = []
    for seed in (0, 1):
        algorithm = _attached(seed=seed)
        next(algorithm.updates(BATCH))
        heard.append(sum(algorithm._scores.values()).chunk(2))
    assert torch.equal(heard[0][0], heard[1][0])
    assert not torch.equal(heard[0][1], heard[1][1])


def test_what_entered_a_sum_is_summed_in_the_end() -> None:
    """Property 7."""
    algorithm = _attached()
    scores = algorithm.predict(BATCH.inputs)
    for label in range(CLASSES):
        x = _normed(ff.embed_label(BATCH.inputs, torch.full((16,), label), CLASSES))
        total = torch.zeros(16, dtype=torch.float64)
        for block in algorithm.blocks:
            z = block(x)
            total = total + z.square().sum(1)
            x = _normed(z)
        torch.testing.assert_close(scores[:, label], total)
    previous = _attached(gamma="previous")
    previous.train_only(frozenset(["layer2"]))
    torch.testing.assert_close(
        previous.predict(BATCH.inputs)[:, 0],
        sum(list(previous.goodness_by_block(BATCH.inputs, 0))[:2]),
    )
    assert len(list(previous.goodness_by_block(BATCH.inputs, 0))) == 2


@pytest.mark.parametrize("options", [{"gamma": "all"}, {"gamma": "previous"}])
def test_one_number_per_row_and_block_is_kept(options: dict[str, Any]) -> None:
    """Property 8."""
    algorithm = _attached(**options)
    for update in algorithm.updates(BATCH):
        assert all(score.shape == (32,) and not score.requires_grad for score in algorithm._scores.values())
        update.backward()
    assert not algorithm._scores


@pytest.mark.parametrize("gamma", ["all", "previous"])
@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
def test_a_step_costs_what_the_formula_says(gamma: Any, order: Any) -> None:
    flops = measure_update(_attached(gamma=gamma, order=order), BATCH).flops
    assert flops == lc.update_flops((WIDTH, *HIDDEN), gamma, order)


# -- contributions ----------------------------------------------------------------------------------------------------
def test_contributions_by_hand() -> None:
    #  three samples, two labels: the first layer knows two of them, the second turns one more and loses none
    first = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    second = torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.0, 3.0]])
    found = lc.contributions(torch.stack([first, second], 2), torch.tensor([0, 1, 1]))
    assert found.alone.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert float(found.together) == 1.0
    assert found.gained.tolist() == pytest.approx([2 / 3, 1 / 3])
    alone = lc.contributions(first.unsqueeze(2), torch.tensor([0, 1, 1]))
    assert alone.alone.tolist() == alone.gained.tolist() == pytest.approx([2 / 3])


def _digits() -> tuple[list[Batch], Batch]:
    data = load_digits()
    images = F.pad(torch.tensor(data.data / 16, dtype=torch.float32), (10, 0))  # slots of their own for the label
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [Batch(images[rows], labels[rows]) for rows in order[:1440].split(48)], Batch(
        images[order[1440:]], labels[order[1440:]]
    )


def test_digits_are_learned_together_but_not_alone() -> None:
    """The signature of the sheet: blocks stop to be classifiers by themselves, while their sum stays one."""
    train, test = _digits()
    alone = {}
    for name, options in {"plain": None, "all": {"threshold": "fixed"}}.items():
        torch.manual_seed(0)
        rule = LayerCollaboration(label_strength=3.0, **options) if options else None
        algorithm = rule or ForwardForward(label_strength=3.0, skip_first=False)
        algorithm.attach(mlp((74,), 10, (80, 80, 80)), TaskInfo(Batch(*(t[:2] for t in test[:2])), 10, F.cross_entropy))
        plain_loop(algorithm, train * 8, partial(torch.optim.Adam, lr=3e-3))
        algorithm.eval()
        with torch.no_grad():
            accuracy = (algorithm.predict(test.inputs).argmax(1) == test.targets).double().mean().item()
        assert accuracy > 0.85, name
        figures = algorithm.examine(test)
        assert list(figures) == ["layer1", "layer2", "layer3"]
        alone[name] = [block["accuracy_alone"] for block in figures.values()]
        assert all(-1 <= block["accuracy_gained"] <= 1 for block in figures.values())
    assert min(alone["plain"][:2]) > 0.75  # property 9 of Forward-Forward
    assert all(together < single - 0.1 for together, single in zip(alone["all"], alone["plain"], strict=True))


# -- claims and refusals ----------------------------------------------------------------------------------------------
def test_claims_and_stages() -> None:
    assert _attached(gamma="previous").locality is Locality.LAYER_LOCAL
    assert _attached().locality is Locality.COUPLED
    assert _attached(gamma="previous").stages == [["layer1"], ["layer2"], ["layer3"]]
    with pytest.raises(ValueError, match=r"algorithm\.gamma=previous, or use schedule=joint"):
        _ = _attached().stages


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gamma": "none"}, "gamma is 'none', expected 'all' or 'previous'"),
        ({"threshold": "high"}, "'scaled' or 'fixed' or 'midpoint'"),
        ({"negative_loss": "x"}, "'softplus' or 'log_p'"),
        ({"order": "x"}, "'jacobi' or 'gauss_seidel'"),
        ({"threshold": "midpoint", "theta": 2.0}, "theta is 2.0"),
    ],
)
def test_unknown_choices_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LayerCollaboration(**options)
