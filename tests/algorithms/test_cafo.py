"""Cascaded Forward against the authors' numbers, closed forms, plain loops and backpropagation."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import CaFo, TaskInfo
from locallearn.algorithms.cafo._direct import DirectFeedback
from locallearn.batch import Batch
from locallearn.cost import cache_bytes, measure_update
from locallearn.functional import cafo
from locallearn.nets import Blocks, mlp
from locallearn.nets.border import Border
from locallearn.testing import plain_loop
from tests.references import reference

CLASSES, SAMPLES = 4, 48
PREDICTORS = ["mse", "ce", "sparsemax"]
sgd = partial(torch.optim.SGD, lr=0.1)
adam = partial(torch.optim.Adam, lr=1e-2)


def _net(depth: int = 3, norm: bool = True, readout: bool = True, seed: int = 0) -> Blocks:
    """The paper's blocks, small, float64: images of one channel and 8 x 8 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels, blocks = (1, 3, 4, 5)[: depth + 1], {}
        for k, (before, after) in enumerate(pairwise(channels)):
            layers = [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            blocks[f"conv{k + 1}"] = nn.Sequential(*layers, *([nn.BatchNorm2d(after, eps=1e-4)] if norm else []))
        size = channels[-1] * (8 >> depth) ** 2
        head = nn.Sequential(nn.Flatten(), nn.Linear(size, CLASSES, bias=False)) if readout else None
        return Blocks(blocks, head).double()


def _data(samples: int = SAMPLES, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=draw)
    centres = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    images = centres[labels] + torch.randn(samples, 1, 8, 8, generator=draw)
    return Batch(images.double(), labels, index=torch.arange(samples))


def _part(batch: Batch, rows: Any) -> Batch:
    index = None if batch.index is None else batch.index[rows]
    return Batch(batch.inputs[rows], batch.targets[rows], index=index)


def _info(batch: Batch, **other: Any) -> TaskInfo:
    return TaskInfo(_part(batch, slice(0, 2)), CLASSES, F.cross_entropy, **other)


def _attached(net: Blocks | None = None, batch: Batch | None = None, **settings: Any) -> CaFo:
    algorithm = CaFo(**settings)
    algorithm.attach(_net() if net is None else net, _info(_data() if batch is None else batch))
    return algorithm


def _weights(algorithm: CaFo) -> list[Tensor]:
    return [predictor.weights.detach().clone() for predictor in algorithm.predictors]


def _gathered(algorithm: CaFo, batches: Iterable[Batch]) -> CaFo:
    algorithm.train()
    for batch in batches:
        assert list(algorithm.updates(batch)) == []
    return algorithm


# -- the authors' numbers --------------------------------------------------------------------------------------------------
@pytest.fixture
def official() -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in reference("cafo_official").items()}


def _official_net(official: dict[str, Tensor]) -> Blocks:
    blocks = {}
    for k, (before, after) in enumerate([(1, 2), (2, 3)]):
        conv = nn.Conv2d(before, after, 3, padding=1).double()
        conv.weight.data, conv.bias.data = (official[f"init.{k}.0.{name}"].clone() for name in ("weight", "bias"))
        blocks[f"conv{k + 1}"] = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2))
    return Blocks(blocks)


@pytest.mark.parametrize(("predictor", "key"), [("mse", "MSE"), ("ce", "CE"), ("sparsemax", "SL")])
def test_features_steps_and_weights_are_those_of_the_authors_code(
    official: dict[str, Tensor], predictor: Any, key: str
) -> None:
    """Whole set as one batch, as there. Theirs normalises the test set by itself, so that is fed to the predictors as it is."""
    batch = Batch(official["x"], official["y"])
    algorithm = _attached(_official_net(official), batch, predictor=predictor, ridge=0.0)
    optimizers = {unit: torch.optim.SGD(groups, lr=0.01) for unit, groups in algorithm.units().items()}
    first: dict[str, tuple[float, Tensor]] = {}
    algorithm.train()
    for _ in range(1 if predictor == "mse" else 3):
        for update in algorithm.updates(batch):
            update.backward()
            (group,) = algorithm.units()[update.unit]
            first.setdefault(update.unit, (float(update.loss), group["params"][0].grad.clone()))
            optimizers[update.unit].step()
            optimizers[update.unit].zero_grad()
    algorithm.eval()
    algorithm.end_epoch()
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
    scores = torch.zeros(12, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        for k, features in enumerate(algorithm.activations(batch.inputs)):
            close(features.flatten(1), official[f"features.{k}"])
            close(algorithm.predictors[k].weights.detach(), official[f"{key}.W.{k}"])
            scores += algorithm._score(algorithm.predictors[k](official[f"features_test.{k}"]))
    close(scores, official[f"{key}.scores_test"])
    for k, name in enumerate(first):
        too_much = 0.5 * (CLASSES - 1) if predictor == "sparsemax" else 0.0  # ½ per class instead of once
        assert first[name][0] == pytest.approx(float(official[f"{key}.first_loss.{k}"]) - too_much, abs=1e-12)
        close(first[name][1], official[f"{key}.first_grad.{k}"])


def test_sparsemax_is_that_of_the_authors_code(official: dict[str, Tensor]) -> None:
    z, labels = official["sparsemax.z"], official["sparsemax.labels"].argmax(1)
    torch.testing.assert_close(cafo.sparsemax(z), official["sparsemax.p"])
    torch.testing.assert_close(cafo.sparsemax_loss(z, labels), official["sparsemax.loss_textbook"])
    z.requires_grad_()
    cafo.sparsemax_loss(z, labels).backward()
    torch.testing.assert_close(z.grad, official["sparsemax.jac"] / len(z))


# -- random blocks ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_random_blocks_stay_as_they_are_and_no_graph_goes_through_them(predictor: Any) -> None:
    algorithm, batch = _attached(predictor=predictor), _data()
    before = {name: value.clone() for name, value in algorithm.blocks.state_dict().items()}
    seen: list[bool] = []
    for block in algorithm.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad or module.training))
    plain_loop(algorithm, [batch] * 3, adam)
    algorithm.end_epoch()
    algorithm.eval().predict(batch.inputs)
    assert len(seen) > 3
    assert not any(seen[:-3])
    assert all(torch.equal(value, before[name]) for name, value in algorithm.blocks.state_dict().items())


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_prediction_does_not_depend_on_its_batch_mates(predictor: Any) -> None:
    algorithm, batch = _attached(predictor=predictor), _data()
    plain_loop(algorithm, [batch] * 2, adam)
    algorithm.eval()
    with torch.no_grad():
        together = algorithm.predict(batch.inputs)
        alone = torch.cat([algorithm.predict(image) for image in batch.inputs.split(1)])
        shifted = algorithm.predict(torch.cat((batch.inputs[:1], 50 * batch.inputs[1:])))
    torch.testing.assert_close(alone, together)
    torch.testing.assert_close(shifted[0], together[0])


def test_outputs_are_standardised_by_the_first_batch_once() -> None:
    algorithm, batch = _attached(norm := _net(norm=False)), _data()
    assert norm is algorithm.blocks
    plain_loop(algorithm, [batch], sgd)
    for output in algorithm.activations(batch.inputs):
        mean, variance = output.mean((0, 2, 3)), output.var((0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-12, rtol=0)
        assert bool((variance <= 1).all())
        assert bool((variance > 0.9).all())
    before = [standard.mean.clone() for standard in algorithm.standards]
    plain_loop(algorithm, [batch._replace(inputs=batch.inputs * 9)], sgd)
    assert all(torch.equal(a, b.mean) for a, b in zip(before, algorithm.standards, strict=True))


def test_of_tokens_every_entry_is_a_channel() -> None:
    """As everywhere here, (N, T, D) are T tokens of D entries: one of another scale is levelled, one token is not."""
    net = Blocks({"a": nn.Linear(5, 6), "b": nn.Linear(6, 6)}, nn.Sequential(nn.Flatten(), nn.Linear(18, CLASSES)))
    with torch.no_grad():
        net[0].weight[0] *= 100
    batch = Batch(torch.randn(SAMPLES, 3, 5), torch.arange(SAMPLES) % CLASSES)
    algorithm = _attached(net, batch)
    plain_loop(algorithm, [batch], sgd)
    assert [standard.mean.shape for standard in algorithm.standards] == [(6,), (6,)]
    for output in algorithm.activations(batch.inputs):
        torch.testing.assert_close(output.mean((0, 1)), torch.zeros(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(output.var((0, 1), correction=0), torch.ones(6), atol=1e-2, rtol=0)


def test_a_channel_that_never_varied_keeps_its_scale() -> None:
    algorithm = _attached(mlp((6,), CLASSES, (5,)), one := Batch(torch.randn(1, 6), torch.tensor([1])))
    plain_loop(algorithm, [one], sgd)  # of a single sample nothing varies
    (output,) = algorithm.activations(one.inputs + 1)
    raw = algorithm.blocks[0](one.inputs + 1) - algorithm.blocks[0](one.inputs)
    torch.testing.assert_close(output, raw)


def test_without_normalising_predictors_read_the_blocks_as_they_are() -> None:
    algorithm, batch = _attached(normalise=False), _data()
    plain_loop(algorithm, [batch], sgd)
    algorithm.eval()
    for mine, plain in zip(algorithm.activations(batch.inputs), algorithm.blocks.features(batch.inputs), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_predictors_know_nothing_of_each_other_or_of_later_blocks(predictor: Any) -> None:
    """One more block changes no earlier predictor; the order of fitting is irrelevant; refitting one changes no other."""
    batches = [_data(), _data(seed=1)._replace(index=torch.arange(SAMPLES) + SAMPLES)] * 2
    deep, shallow = _attached(_net(3), predictor=predictor), _attached(_net(2), predictor=predictor)
    for algorithm in (deep, shallow):
        plain_loop(algorithm, batches, adam)
        algorithm.end_epoch()
    for mine, theirs in zip(_weights(shallow), _weights(deep), strict=False):
        assert torch.equal(mine, theirs)
    if predictor == "mse":
        return
    apart = _attached(_net(3), predictor=predictor)
    for name in reversed(apart.blocks.names):
        before = _weights(apart)
        apart.train_only(frozenset({name}))
        plain_loop(apart, batches, adam)
        moved = [not torch.equal(a, b) for a, b in zip(before, _weights(apart), strict=True)]
        assert moved == [name == other for other in apart.blocks.names]
    apart.train_only(None)
    for mine, theirs in zip(_weights(apart), _weights(deep), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_stepped_predictor_is_the_plain_loops() -> None:
    batch, algorithm = _data(), _attached()
    plain_loop(algorithm, [batch] * 4, adam)
    *_, features = (output.detach().flatten(1) for output in algorithm.activations(batch.inputs))
    weights = torch.ones(features.shape[1], CLASSES, dtype=torch.float64, requires_grad=True)
    optimizer = adam([weights])
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(features @ weights, batch.targets).backward()
        optimizer.step()
    torch.testing.assert_close(_weights(algorithm)[2], weights.detach())


def test_a_whole_set_as_one_batch_goes_in_chunks() -> None:
    batch = _data()
    whole, chunked = _attached(), _attached(rows=7)
    sizes: list[int] = []
    chunked.blocks[0].register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    for algorithm in (whole, chunked):
        plain_loop(algorithm, [batch] * 2, sgd)
    assert max(sizes) == 7
    for mine, theirs in zip(_weights(chunked), _weights(whole), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_optimizer_may_ask_for_the_loss_again() -> None:
    algorithm, batch = _attached(), _data()
    optimizers = {
        unit: torch.optim.LBFGS(groups[0]["params"], max_iter=8) for unit, groups in algorithm.units().items()
    }
    losses = []
    for update in algorithm.updates(batch):
        assert update.again is not None

        def closure(again: Callable[[], Tensor] = update.again, unit: str = update.unit) -> Tensor:
            optimizers[unit].zero_grad()
            loss = again()
            loss.backward()
            return loss

        before = optimizers[update.unit].step(closure).detach()
        losses.append((float(before), float(update.again().detach())))
    assert all(after < before - 0.1 and before == pytest.approx(math.log(CLASSES)) for before, after in losses)


@pytest.mark.parametrize("prediction", ["sum", "last"])
@pytest.mark.parametrize("scores", ["probabilities", "logits"])
def test_prediction_is_the_sum_over_blocks(prediction: Any, scores: Any) -> None:
    algorithm, batch = _attached(prediction=prediction, scores=scores, predictor="sparsemax"), _data()
    plain_loop(algorithm, [batch] * 2, sgd)
    algorithm.eval()
    parts = [f.flatten(1) @ w for f, w in zip(algorithm.activations(batch.inputs), _weights(algorithm), strict=True)]
    parts = parts if scores == "logits" else [cafo.sparsemax(part) for part in parts]
    wanted = parts[-1] if prediction == "last" else sum(parts[1:], start=parts[0])
    torch.testing.assert_close(algorithm.predict(batch.inputs), wanted)


# -- closed form -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("centre", [False, True])
def test_the_closed_form_is_ridge_regression_of_all_batches_together(centre: bool) -> None:
    batch = _data(100)
    algorithm = _gathered(
        _attached(predictor="mse", ridge=0.05, centre=centre),
        [_part(batch, rows) for rows in torch.arange(100).split(32)],
    )
    algorithm.eval()
    pending = algorithm.predict(batch.inputs)
    algorithm.end_epoch()
    torch.testing.assert_close(
        algorithm.predict(batch.inputs), pending
    )  # solved when it is asked for, or when it is over
    wanted: Tensor | float = 0.0
    for name, output in zip(algorithm.blocks.names, algorithm.activations(batch.inputs), strict=True):
        x, y = output.detach().flatten(1), F.one_hot(batch.targets, CLASSES).double()
        centred, shares = (x - x.mean(0), y - y.mean(0)) if centre else (x, y)
        penalty = 0.05 * centred.square().sum(0).mean()
        long = torch.cat((centred, penalty.sqrt() * torch.eye(x.shape[1]).double()))
        weights = torch.linalg.lstsq(long, torch.cat((shares, torch.zeros(x.shape[1], CLASSES).double()))).solution
        wanted = wanted + (centred @ weights + (y.mean(0) if centre else 0)).softmax(1)
        figures = algorithm.diagnostics()[name]
        assert figures["residual"] < 1e-12
        assert figures["cholesky"] == 1
        assert figures["ridge"] == pytest.approx(float(penalty))
    torch.testing.assert_close(pending, wanted)


def test_float32_features_are_summed_up_in_float64_and_stay_so() -> None:
    batch = _data(60)
    algorithm = CaFo(predictor="mse", ridge=1e-6)
    algorithm.attach(_net().float(), _info(batch))
    _gathered(algorithm, [batch._replace(inputs=batch.inputs.float())])
    algorithm.to(torch.bfloat16).float()  # whatever the network does
    (x, *_) = (output.detach().flatten(1).double() for output in _gathered_features(algorithm, batch))
    gram = cafo.symmetric(algorithm.predictors[0].gram)
    assert gram.dtype is torch.float64
    torch.testing.assert_close(
        gram.diagonal().sum(), x.square().sum(), rtol=1e-2, atol=0
    )  # x by weights that were rounded
    algorithm.end_epoch()
    assert algorithm.diagnostics()["conv1"]["residual"] < 1e-6
    assert algorithm.predictors[0].weights.dtype is torch.float32


def _gathered_features(algorithm: CaFo, batch: Batch) -> Iterable[Tensor]:
    return algorithm.eval().activations(batch.inputs.float())


def test_a_singular_problem_is_told_in_the_figures() -> None:
    algorithm = _gathered(_attached(predictor="mse", ridge=0.0), [_data(10)])  # 48 entries, 10 samples
    algorithm.end_epoch()
    assert algorithm.diagnostics()["conv1"]["cholesky"] == 0
    assert all(bool(weights.isfinite().all()) for weights in _weights(algorithm))
    regular = _gathered(_attached(predictor="mse"), [_data(10)])
    regular.end_epoch()
    assert regular.diagnostics()["conv1"]["cholesky"] == 1


def test_a_prediction_in_inference_mode_in_mid_epoch_leaves_ordinary_numbers() -> None:
    algorithm = _gathered(_attached(predictor="mse"), [_data(40)])
    with torch.inference_mode():
        algorithm.predict(_data(10).inputs)
    algorithm.end_epoch()
    again = _gathered(_attached(predictor="mse"), [_data(40)])
    again.end_epoch()
    algorithm.load_state_dict(again.state_dict())
    for mine, theirs in zip(_weights(algorithm), _weights(again), strict=True):
        assert torch.equal(mine, theirs)


def test_nothing_is_known_before_the_first_batch() -> None:
    algorithm = _attached(predictor="mse").eval()
    assert algorithm.units() == {}
    assert algorithm.diagnostics() == {}
    scores = algorithm.predict(_data().inputs)
    torch.testing.assert_close(scores, torch.full_like(scores, 3 / CLASSES))


def test_an_epoch_counts_once() -> None:
    """Told by end_epoch, or by samples that come again; without either, λ grows with the sums, so nothing changes."""
    batch = _data(96)
    parts = [_part(batch, rows) for rows in torch.randperm(96, generator=torch.Generator().manual_seed(3)).split(40)]
    once = _gathered(_attached(predictor="mse"), parts)
    once.end_epoch()
    assert once.finished
    for nameless in (False, True):
        given = [part._replace(index=None) for part in parts] if nameless else parts
        for told in (False, True):
            twice = _gathered(_attached(predictor="mse"), given)
            if told:
                twice.end_epoch()
            _gathered(twice, given)
            if told or not nameless:
                assert float(twice.predictors[0].counts.sum()) == 96
            twice.end_epoch()
            for mine, theirs in zip(_weights(twice), _weights(once), strict=True):
                torch.testing.assert_close(mine, theirs)


def test_a_new_epoch_starts_anew_even_with_other_data() -> None:
    first, second = _data(60), _data(60, seed=1)
    algorithm = _gathered(_attached(predictor="mse"), [first])
    algorithm.end_epoch()
    assert not algorithm.predictors[0].gathering
    _gathered(algorithm, [second])
    algorithm.end_epoch()
    fresh = copy.deepcopy(algorithm)
    _gathered(fresh, [second])
    assert float(fresh.predictors[0].counts.sum()) == 60
    fresh.end_epoch()
    assert all(torch.equal(a, b) for a, b in zip(_weights(algorithm), _weights(fresh), strict=True))


def test_a_resumed_epoch_counts_nothing_twice() -> None:
    batch = _data(96)
    parts = [_part(batch, rows) for rows in torch.arange(96).split(32)]
    whole = _gathered(_attached(predictor="mse"), parts)
    half = _gathered(_attached(predictor="mse"), parts[:2])
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = _attached(_net(seed=5), predictor="mse")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    _gathered(resumed, parts[2:])
    assert float(resumed.predictors[0].counts.sum()) == 96
    for algorithm in (whole, resumed):
        algorithm.end_epoch()
    assert all(torch.equal(a, b) for a, b in zip(_weights(whole), _weights(resumed), strict=True))
    assert resumed.predictors[0].gram.numel() == 0  # let go


def test_costs_are_those_of_the_formulas() -> None:
    batch = Batch(torch.randn(16, 12), torch.randint(CLASSES, (16,)), index=torch.arange(16))
    widths = (12, 10, 8)
    forward = sum(a * b for a, b in pairwise(widths))

    def measured(**settings: Any) -> Any:
        return measure_update(_attached(mlp(widths[:1], CLASSES, widths[1:]), batch, **settings), batch, other=None)

    [stage] = measured(predictor="mse").stages
    assert stage.row_flops == 2 * (forward + sum(cafo.gather_macs(size, CLASSES) for size in widths[1:]))
    assert stage.once_flops == sum(cafo.solve_flops(size, CLASSES) for size in widths[1:])
    [stage] = measured(predictor="ce").stages
    assert stage.row_flops == 2 * (forward + cafo.predictor_macs(widths[1:], CLASSES))
    [stage] = measured(predictor="ce", cache=True).stages
    assert stage.row_flops == 2 * cafo.predictor_macs(widths[1:], CLASSES)
    assert stage.once_flops + 16 * stage.fill_flops == 16 * 2 * forward
    # What is kept with positions and flags, and the statistics that standardise it.
    assert stage.cache_bytes == 16 * sum(widths[1:]) * 4 + 2 * 16 + 2 * sum(widths[1:]) * 4
    [stage] = measured(blocks="dfa", predictor="mse").stages
    dfa = 2 * forward + 3 * CLASSES * widths[-1] + CLASSES * widths[1]  # the head in both directions, e B_1
    assert stage.row_flops == 2 * (dfa + sum(cafo.gather_macs(size, CLASSES) for size in widths[1:]))


# -- kept outputs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_kept_outputs_give_the_same_weights(predictor: Any) -> None:
    batch = _data(96)
    parts = [_part(batch, rows) for rows in torch.randperm(96, generator=torch.Generator().manual_seed(3)).split(40)]
    kept, anew = _attached(predictor=predictor, cache=True), _attached(predictor=predictor)
    passes: list[int] = []
    kept.blocks[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    for algorithm in (kept, anew):
        plain_loop(algorithm, parts * 3, adam)
        algorithm.end_epoch()
    assert sum(passes) == 96
    assert all(torch.equal(a, b) for a, b in zip(_weights(kept), _weights(anew), strict=True))
    assert cache_bytes(kept) == 96 * (48 + 16 + 5) * 8 + 3 * 96


def test_kept_outputs_are_those_of_the_weights() -> None:
    """The same weights loaded again, as after a stage, forget nothing; others do."""
    algorithm, batch = _attached(cache=True), _data()
    plain_loop(algorithm, [batch], sgd)
    passes: list[int] = []
    algorithm.blocks[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    algorithm.load_state_dict(copy.deepcopy(algorithm.state_dict()))
    plain_loop(algorithm, [batch], sgd)
    assert not passes
    other = copy.deepcopy(algorithm.state_dict())
    other["blocks.members.conv1.0.weight"] += 1
    algorithm.load_state_dict(other)
    plain_loop(algorithm, [batch], sgd)
    assert passes == [SAMPLES]


def test_outputs_cannot_be_kept_without_positions_beyond_the_limit_or_of_blocks_that_learn() -> None:
    batch = _data()
    with pytest.raises(ValueError, match="batches carry none"):
        list(_attached(cache=True).updates(batch._replace(index=None)))
    with pytest.raises(ValueError, match=r"for 3000000 training samples take .* GiB, and algorithm.memory_gib is 1"):
        list(_attached(cache=True, memory_gib=1).updates(batch._replace(index=batch.index + 2_999_952)))
    with pytest.raises(ValueError, match="schedule=sequential"):
        list(_attached(cache=True, blocks="dfa").updates(batch))


# -- blocks taught by direct feedback --------------------------------------------------------------------------------------
def _gradients(algorithm: CaFo, batch: Batch) -> dict[str, Tensor]:
    algorithm.train()
    for update in algorithm.updates(batch):
        if update.unit in algorithm.blocks.names:
            update.backward()
    return {name: p.grad.clone() for name, p in algorithm.blocks.named_parameters() if p.grad is not None}


def _by_backprop(net: Blocks, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Gradients of weights and of block outputs, and the outputs themselves."""
    outputs = []
    x = batch.inputs
    for block in net.train():
        x = block(x)
        x.retain_grad()
        outputs.append(x)
    F.cross_entropy(net.readout(x), batch.targets).backward()
    return {n: p.grad for n, p in net.named_parameters()}, [h.grad for h in outputs], [h.detach() for h in outputs]


def test_the_true_gradient_in_place_of_the_feedback_is_backpropagation(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, algorithm = _data(), _attached(blocks="dfa")
    wanted, at_outputs, _ = _by_backprop(copy.deepcopy(algorithm.blocks), batch)
    direct = _gradients(copy.deepcopy(algorithm), batch)
    last = ("members.conv3", "readout")
    assert all(torch.allclose(direct[n], wanted[n]) is n.startswith(last) for n in wanted if "bias" not in n)
    monkeypatch.setattr(DirectFeedback, "errors", lambda self, outputs, error: at_outputs[:-1])
    found = _gradients(algorithm, batch)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_a_block_gets_its_own_vector_jacobian_product_with_the_fed_back_error() -> None:
    batch, algorithm = _data(), _attached(blocks="dfa")
    matrices = [algorithm.feedback.get_buffer(f"feedback{k}").clone() for k in range(2)]
    for matrix, size in zip(matrices, (48, 16), strict=True):
        assert matrix.shape == (CLASSES, size)
        torch.testing.assert_close(matrix.norm(dim=1), torch.ones(CLASSES, dtype=torch.float64))
    twin = copy.deepcopy(algorithm.blocks)
    _, _, outputs = _by_backprop(copy.deepcopy(twin), batch)
    error = (twin.readout(outputs[-1]).detach().softmax(1) - F.one_hot(batch.targets, CLASSES)) / SAMPLES
    found = _gradients(algorithm, batch)
    twin.train()
    for k, (inputs, matrix) in enumerate(zip((batch.inputs, outputs[0]), matrices, strict=True)):
        delta = (error @ matrix).view_as(outputs[k])
        parameters = dict(twin[k].named_parameters())
        for name, gradient in zip(
            parameters, torch.autograd.grad(twin[k](inputs), list(parameters.values()), delta), strict=True
        ):
            torch.testing.assert_close(found[f"members.conv{k + 1}.{name}"], gradient)
    plain_loop(algorithm, [batch] * 3, adam)
    assert all(torch.equal(m, algorithm.feedback.get_buffer(f"feedback{k}")) for k, m in enumerate(matrices))
    assert algorithm.added_parameters == CLASSES * (48 + 16 + 5) + CLASSES * (48 + 16)


def test_every_block_runs_once_in_a_step() -> None:
    algorithm, batch = _attached(blocks="dfa"), _data()
    algorithm.train_only(frozenset(algorithm.stages[0]))
    runs: list[tuple[str, bool]] = []
    for name, block in zip(algorithm.blocks.names, algorithm.blocks, strict=True):
        block.register_forward_hook(lambda m, args, output, name=name: runs.append((name, args[0].requires_grad)))
    plain_loop(algorithm, [batch], sgd)
    assert runs == [("conv1", False), ("conv2", False), ("conv3", False)]  # no graph comes in
    assert all(int(block[3].num_batches_tracked) == 1 for block in algorithm.blocks)


@pytest.mark.parametrize("readout", [True, False])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_blocks_learn_first_and_stand_still_while_predictors_are_fitted(predictor: Any, readout: bool) -> None:
    algorithm, batch = _attached(_net(readout=readout), blocks="dfa", predictor=predictor), _data()
    first, second = algorithm.stages
    assert first == ["conv1", "conv2", "conv3"]
    assert second == ([] if predictor == "mse" else [f"{name}_predictor" for name in first])
    assert [*first, *second] == list(algorithm.units())
    algorithm.train_only(frozenset(first))
    before, losses = _weights(algorithm), []
    optimizers = {unit: adam(groups) for unit, groups in algorithm.units().items()}
    algorithm.train()
    for _ in range(60):
        for update in algorithm.updates(batch):
            losses.append(float(update.loss))
            update.backward()
            optimizers[update.unit].step()
            optimizers[update.unit].zero_grad()
    algorithm.end_epoch()
    assert losses[-1] < losses[0] / 4
    assert not algorithm.finished
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(algorithm), strict=True))
    algorithm.eval()
    *_, last = algorithm.blocks.features(batch.inputs)
    head = algorithm.feedback.head
    wanted = algorithm.blocks.readout(last) if readout else head(last.flatten(1))
    torch.testing.assert_close(algorithm.predict(batch.inputs), wanted)  # as far as anything has been trained
    algorithm.train_only(frozenset(second))
    still = {name: value.clone() for name, value in algorithm.blocks.state_dict().items()}
    plain_loop(algorithm, [batch] * 60, adam)
    algorithm.end_epoch()
    assert algorithm.finished is (predictor == "mse")
    assert all(torch.equal(value, still[name]) for name, value in algorithm.blocks.state_dict().items())
    algorithm.train_only(None)
    with torch.no_grad():
        hits = (algorithm.eval().predict(batch.inputs).argmax(1) == batch.targets).double().mean()
    assert float(hits) > 0.9


def test_under_a_joint_schedule_predictors_learn_from_the_same_pass() -> None:
    algorithm, batch = _attached(blocks="dfa"), _data()
    runs: list[Tensor] = []
    algorithm.blocks[2].register_forward_hook(lambda module, args, output: runs.append(output.detach()))
    algorithm.train()
    found = {}
    for update in algorithm.updates(batch):
        update.backward()
        found[update.unit] = update.loss
    assert list(found) == list(algorithm.units())
    (features,) = runs
    gradient = cafo.gradient(features, torch.ones(5, CLASSES).double(), batch.targets)[1]
    torch.testing.assert_close(algorithm.predictors[2].weights.grad, gradient)


def test_a_network_of_one_block_is_taught_by_its_head() -> None:
    batch, algorithm = _data(), _attached(_net(1), blocks="dfa")
    wanted, _, _ = _by_backprop(copy.deepcopy(algorithm.blocks), batch)
    for name, gradient in _gradients(algorithm, batch).items():
        torch.testing.assert_close(gradient, wanted[name])


# -- refusals --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"blocks": "trained"}, "blocks is 'trained', expected one of random, dfa"),
        ({"predictor": "l1"}, "expected one of mse, ce, sparsemax"),
        ({"prediction": "mean"}, "expected one of sum, last"),
        ({"scores": "votes"}, "expected one of probabilities, logits"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"rows": 0}, "rows is 0"),
        ({"memory_gib": 0}, "memory_gib is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CaFo(**settings)


def test_tasks_that_have_no_classes_or_no_samples_by_themselves_are_refused() -> None:
    batch = _data()
    with pytest.raises(ValueError, match="this task has none"):
        CaFo().attach(_net(), _info(batch, classes=False))
    with pytest.raises(ValueError, match="tells classes apart, and this task has 1: it takes at least 2"):
        CaFo().attach(_net(), TaskInfo(_part(batch, slice(0, 2)), 1, F.cross_entropy))
    graph = Batch(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64), (torch.zeros(2, 0, dtype=torch.int64),))

    class Reads(nn.Linear):
        def forward(self, x: Tensor, *context: Any) -> Tensor:
            return super().forward(x)

    with pytest.raises(ValueError, match="context"):
        CaFo().attach(Blocks({"one": Reads(6, 3)}), TaskInfo(graph, CLASSES, F.cross_entropy))
    with pytest.raises(ValueError, match="part of a graph"):
        list(_attached().updates(batch._replace(rows=torch.arange(3))))


def test_a_block_without_rows_of_samples_is_refused_by_name() -> None:
    class Sums(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    with pytest.raises(ValueError, match="'two'"):
        CaFo().attach(
            Blocks({"one": nn.Linear(6, 3), "two": Sums(3, 3)}),
            TaskInfo(Batch(torch.randn(2, 6), torch.tensor([0, 1])), CLASSES, F.cross_entropy),
        )


def test_a_closed_form_that_does_not_fit_is_refused_with_its_size() -> None:
    net, batch = mlp((6,), CLASSES, (40_000,)), Batch(torch.randn(2, 6), torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match=r"11\.9 GiB in float64.*memory_gib is 8 \(block 'layer1' has 40000.*predictor=ce"
    ):
        CaFo(predictor="mse").attach(net, TaskInfo(batch, CLASSES, F.cross_entropy))


@pytest.mark.parametrize("blocks", ["random", "dfa"])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_labels_that_are_no_class_ids_are_refused(blocks: Any, predictor: Any) -> None:
    algorithm, batch = _attached(blocks=blocks, predictor=predictor), _data()
    with pytest.raises(ValueError, match="expected class ids from 0 to 3"):
        list(algorithm.updates(batch._replace(targets=batch.targets + 2)))


def test_names_that_would_clash_are_refused() -> None:
    net = Blocks({"a": nn.Linear(6, 6), "a_predictor": nn.Linear(6, 6)}, nn.Linear(6, CLASSES))
    with pytest.raises(ValueError, match="'a_predictor'"):
        CaFo(blocks="dfa").attach(
            net, TaskInfo(Batch(torch.randn(2, 6), torch.tensor([0, 1])), CLASSES, F.cross_entropy)
        )


# -- blocks that hand over more than one tensor ----------------------------------------------------------------------------
class _Early(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Border:
        return Border(self.layer(x).relu(), {"x": x})


class _Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6).double()

    def forward(self, border: Border) -> Tensor:
        return self.layer(border.main).relu() + border.carried["x"]


@pytest.mark.parametrize("blocks", ["random", "dfa"])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_what_blocks_carry_along_reaches_the_block_that_reads_it(blocks: Any, predictor: Any) -> None:
    torch.manual_seed(0)
    net = Blocks({"early": _Early(), "late": _Late()}, nn.Linear(6, CLASSES).double())
    labels = torch.arange(40) % CLASSES
    batch = Batch(torch.eye(6).double()[labels] + 0.1 * torch.randn(40, 6).double(), labels, index=torch.arange(40))
    algorithm = CaFo(blocks=blocks, predictor=predictor, rows=16, normalise=False)
    algorithm.attach(net, _info(batch))
    for stage in algorithm.stages if blocks == "dfa" else [None]:
        algorithm.train_only(None if stage is None else frozenset(stage))
        plain_loop(algorithm, [batch] * 80, partial(torch.optim.Adam, lr=0.05))
        algorithm.end_epoch()
    algorithm.train_only(None)
    algorithm.eval()
    early, late = algorithm.activations(batch.inputs)
    torch.testing.assert_close(late, net[1].layer(early).relu() + batch.inputs)
    assert float((algorithm.predict(batch.inputs).argmax(1) == labels).double().mean()) > 0.95
