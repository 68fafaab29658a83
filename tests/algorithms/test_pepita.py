"""PEPITA as an algorithm: every variant against a step written out by hand, and the properties of its spec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn.utils import prune

from locallearn.algorithms import TaskInfo
from locallearn.algorithms.pepita import Pepita
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional import pepita
from locallearn.nets import Blocks, cnn, mlp
from locallearn.precision import multiplying
from locallearn.testing import plain_loop

CLASSES, WIDTH, HIDDEN = 4, 12, (10, 9, 8)
DRAW = Generator().manual_seed(0)
BATCH = Batch(torch.rand(16, WIDTH, generator=DRAW).double(), torch.randint(CLASSES, (16,), generator=DRAW))
IMAGES = BATCH._replace(inputs=torch.rand(16, 2, 12, 12, generator=DRAW).double())
VARIANTS = ("standard", "hebbian", "time_local")
sgd = partial(torch.optim.SGD, lr=0.1)


def _attached(
    make: Callable[[], Blocks] | None = None, batch: Batch = BATCH, bias: bool = False, **options: Any
) -> Pepita:
    torch.manual_seed(0)
    algorithm = Pepita(**options)
    net = mlp((WIDTH,), CLASSES, HIDDEN, bias=bias, init="he_uniform") if make is None else make()
    algorithm.attach(net, TaskInfo(Batch(batch.inputs[:2], batch.targets[:2]), CLASSES, F.cross_entropy))
    return algorithm.double()


def _gradients(algorithm: Pepita, batch: Batch = BATCH) -> dict[str, Tensor]:
    """The gradients of one batch by parameter, of two steps their sum; nothing is stepped."""
    names = {id(p): name for name, p in algorithm.blocks.named_parameters()}
    total: dict[str, Tensor] = {}
    for update in algorithm.updates(batch):
        assert update.gradients is not None
        for parameter, gradient in update.gradients.items():
            assert gradient.shape == parameter.shape
            name = names[id(parameter)].removeprefix("members.")
            total[name] = total[name] + gradient if name in total else gradient
    return total


def _weights(algorithm: Pepita) -> list[nn.Linear]:
    return [module for module in algorithm.blocks.modules() if isinstance(module, nn.Linear)]


def _factors(width: int, dropout: float, draw: Generator) -> Tensor:
    """What activities of 16 samples are multiplied with."""
    mask = pepita.dropout_mask((16, width), dropout, draw)
    return (~mask.dropped).double() * mask.factor


def _by_hand(algorithm: Pepita, batch: Batch = BATCH, masks: Sequence[Tensor] = (), **options: Any) -> list[Tensor]:
    """Weights' gradients, and biases' behind them, of an MLP with ReLU: the spec's equations, sample by sample."""
    o = {"variant": "standard", "sign": -1, "output_error": "first", "presynaptic": "modulated", **options}
    layers, count = _weights(algorithm), len(batch.inputs)

    def run(x: Tensor) -> list[Tensor]:
        seen = [x]
        for i, layer in enumerate(layers):
            z = seen[-1] @ layer.weight.T + (0 if layer.bias is None else layer.bias)
            if i == len(layers) - 1:
                seen.append(torch.exp(z) / torch.exp(z).sum(1, keepdim=True))
            else:
                h = z * (z > 0)
                h = h * masks[i] if masks else h
                seen.append(h / (h**2).sum() ** 0.5 if o.get("normalise") else h)
        return seen

    with torch.no_grad():
        wanted = torch.eye(CLASSES, dtype=torch.float64)[batch.targets]
        h = run(batch.inputs)
        error = h[-1] - wanted
        sent = error.sign() if o.get("sign_of_error") else error
        t = run(batch.inputs + o["sign"] * sent @ algorithm.feedback.T)
        weights, biases = [], []
        for i, layer in enumerate(layers):
            last = i == len(layers) - 1
            after = wanted if last else t[i + 1]
            before = t[i + 1] if last and o["output_error"] == "second" else h[i + 1]
            gradient, shift = torch.zeros_like(layer.weight), torch.zeros(len(layer.weight), dtype=torch.float64)
            for n in range(count):
                if o["variant"] == "standard":
                    pre = h[i][n] if o["presynaptic"] == "original" else t[i][n]
                    gradient += torch.outer(before[n] - after[n], pre) / count
                else:
                    gradient += (torch.outer(before[n], h[i][n]) - torch.outer(after[n], t[i][n])) / count
                shift += (before[n] - after[n]) / count
            weights.append(gradient)
            biases.append(shift)
    return [*weights, *(b for b, layer in zip(biases, layers, strict=True) if layer.bias is not None)]


# -- the step ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sign": "plus"},
        {"output_error": "second"},
        {"presynaptic": "original"},
        {"sign_of_error": True},
        {"normalise": True},
        {"variant": "hebbian"},
        {"variant": "hebbian", "normalise": True},
        {"variant": "time_local"},
        {"dropout": 0.4},
        {"dropout": 0.4, "variant": "hebbian"},
        {"dropout": 0.4, "variant": "time_local", "normalise": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_step_is_that_of_the_equations(options: dict[str, Any], bias: bool) -> None:
    algorithm = _attached(bias=bias, **{"dropout": 0.0, "feedback_scale": 5.0, "seed": 3, **options})
    if bias:
        for layer in _weights(algorithm)[:-1]:
            nn.init.uniform_(layer.bias)
    masks = []
    if "dropout" in options:
        draw = Generator().manual_seed(3)
        masks = [_factors(width, options["dropout"], draw) for width in HIDDEN]
    expected = _by_hand(algorithm, masks=masks, **{**options, "sign": 1 if options.get("sign") == "plus" else -1})
    gradients = _gradients(algorithm)
    ordered = [g for g in gradients.values() if g.ndim > 1] + [g for g in gradients.values() if g.ndim == 1]
    assert len(ordered) == len(expected) == (7 if bias else 4)
    for got, want in zip(ordered, expected, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "hebbian"},
        {"reduction": "mean"},
        {"reduction": "code", "sign": "plus"},
        {"presynaptic": "original"},
    ],
    ids=str,
)
def test_a_convolution_learns_from_its_map_before_pooling(options: dict[str, Any]) -> None:
    """Property 9, inside a network: two convolutions with poolings, the patches laid out by unfold."""
    algorithm = _attached(
        lambda: cnn((2, 12, 12), CLASSES, (5, 6), pool="max"), IMAGES, dropout=0.0, feedback_scale=2.0, **options
    )
    one, two = (block[0] for block in algorithm.blocks)

    def run(x: Tensor) -> list[Tensor]:
        first = F.conv2d(x, one.weight, one.bias, padding=1).relu()
        pooled = F.max_pool2d(first, 2)
        second = F.conv2d(pooled, two.weight, two.bias, padding=1).relu()
        return [x, first, pooled, second, F.max_pool2d(second, 2).flatten(1)]

    with torch.no_grad():
        h = run(IMAGES.inputs)
        readout = _weights(algorithm)[0]
        error = (h[-1] @ readout.weight.T).softmax(1) - F.one_hot(IMAGES.targets, CLASSES)
        sign = 1 if options.get("sign") == "plus" else -1
        t = run(IMAGES.inputs + sign * (error @ algorithm.feedback.T).view(16, 2, 12, 12))
        gradients = _gradients(algorithm, IMAGES)
        for i, (conv, name) in enumerate(((one, "conv1.0"), (two, "conv2.0"))):
            pre = [F.unfold(x[2 * i], 3, padding=1) for x in (h, t)]
            post = [x[2 * i + 1].flatten(2) for x in (h, t)]
            if options.get("variant") == "hebbian":
                products = [post[j] @ pre[j].transpose(1, 2) for j in range(2)]
                total = (products[0] - products[1]).sum(0)
            else:
                read = pre[0] if options.get("presynaptic") == "original" else pre[1]
                total = ((post[0] - post[1]) @ read.transpose(1, 2)).sum(0)
            positions = pre[0].shape[2]
            scale = 16 * {"sum": 1, "mean": positions, "code": -16 * positions}[options.get("reduction", "sum")]
            torch.testing.assert_close(gradients[f"{name}.weight"], (total / scale).view_as(conv.weight))
            torch.testing.assert_close(gradients[f"{name}.bias"], (post[0] - post[1]).sum((0, 2)) / scale)


def test_autograd_never_runs() -> None:
    """Property 1."""
    for variant in VARIANTS:
        algorithm = _attached(variant=variant)
        result = audit(algorithm, BATCH)
        assert result.confirmed
        assert result.verdict is algorithm.locality
        for update in algorithm.updates(BATCH):
            assert update.gradients
            assert not any(gradient.requires_grad for gradient in update.gradients.values())
            assert update.loss is None or not update.loss.requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_feedback_the_output_layer_alone_learns_by_the_delta_rule(variant: str) -> None:
    """Property 2, with dropout: were the masks not the same in both passes, hidden layers would move, too."""
    algorithm = _attached(variant=variant, dropout=0.5)
    algorithm.feedback.zero_()
    gradients = _gradients(algorithm)
    assert not any(gradients[f"layer{i}.0.weight"].any() for i in (1, 2, 3))
    draw = Generator().manual_seed(0)
    masks = [_factors(width, 0.5, draw) for width in HIDDEN]
    x = BATCH.inputs
    for layer, mask in zip(_weights(algorithm)[:-1], masks, strict=True):
        x = (x @ layer.weight.T).relu().detach() * mask
    readout = _weights(algorithm)[-1].weight.detach().clone().requires_grad_()
    F.cross_entropy(x @ readout.T, BATCH.targets).backward()
    torch.testing.assert_close(gradients["readout.weight"], readout.grad)


def test_with_little_feedback_it_is_feedback_alignment_through_the_jacobian() -> None:
    """Property 3: (h − h̃) / ε → e Fᵀ Jᵀ with an error of order ε, on a smooth network; J by autograd."""
    errors, smooth = [], partial(mlp, (WIDTH,), CLASSES, HIDDEN, activation="tanh")
    for epsilon in (1e-2, 1e-3, 1e-4):
        algorithm = _attached(smooth, dropout=0.0, feedback_scale=1.0)
        algorithm.feedback.mul_(epsilon)
        gradients = _gradients(algorithm)
        with torch.no_grad():
            error = algorithm.predict(BATCH.inputs).softmax(1) - F.one_hot(BATCH.targets, CLASSES)
            direction = error @ algorithm.feedback.T / epsilon
        worst, below = 0.0, BATCH.inputs
        for i in range(3):

            def up_to(x: Tensor, depth: int = i + 1, algorithm: Pepita = algorithm) -> Tensor:
                for block in list(algorithm.blocks)[:depth]:
                    x = block(x)
                return x

            h, change = torch.autograd.functional.jvp(up_to, BATCH.inputs, direction)
            want = change.T @ below / 16
            got = gradients[f"layer{i + 1}.0.weight"] / epsilon
            worst = max(worst, float(((got - want).norm() / want.norm()).detach()))
            below = h
        errors.append(worst)
    assert errors[0] < 0.1
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.2)


def test_either_sign_with_opposite_feedback_goes_the_same_way() -> None:
    """Property 4."""
    minus, plus = _attached(feedback_scale=1.0), _attached(feedback_scale=1.0, sign="plus")
    start = minus.blocks[0][0].weight.detach().clone()
    plus.feedback.neg_()
    for algorithm in (minus, plus):
        plain_loop(algorithm, [BATCH] * 5, sgd)
    assert not torch.equal(start, minus.blocks[0][0].weight)
    for one, other in zip(minus.blocks.parameters(), plus.blocks.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_the_output_layer_learns_as_under_backprop_from_what_it_really_read() -> None:
    """Property 5."""
    algorithm = _attached(presynaptic="original", dropout=0.0)
    F.cross_entropy(algorithm.predict(BATCH.inputs), BATCH.targets).backward()
    torch.testing.assert_close(_gradients(algorithm)["readout.weight"], _weights(algorithm)[-1].weight.grad)


def test_hebbian_and_standard_differ_by_the_change_of_the_input() -> None:
    """Property 6."""
    options: dict[str, Any] = {"dropout": 0.0, "feedback_scale": 5.0}
    standard, hebbian = (_attached(variant=variant, **options) for variant in ("standard", "hebbian"))
    first, second = _gradients(standard), _gradients(hebbian)
    with torch.no_grad():
        h = [BATCH.inputs, *standard.activations(BATCH.inputs)]
        h.append(standard.predict(BATCH.inputs).softmax(1))
        modulated = BATCH.inputs - (h[-1] - F.one_hot(BATCH.targets, CLASSES)) @ standard.feedback.T
        t = [modulated, *standard.activations(modulated)]
    for i, name in enumerate(first):
        torch.testing.assert_close(second[name] - first[name], h[i + 1].T @ (h[i] - t[i]) / 16, rtol=1e-9, atol=1e-13)


def test_hebbian_is_the_gradient_of_the_squared_lengths() -> None:
    """Property 7: ½ Σ (‖h‖² − ‖h̃‖²) / N with detached inputs, as in Forward-Forward; by autograd."""
    algorithm = _attached(variant="hebbian", dropout=0.0, feedback_scale=5.0, bias=True)
    gradients = _gradients(algorithm)
    with torch.no_grad():
        error = algorithm.predict(BATCH.inputs).softmax(1) - F.one_hot(BATCH.targets, CLASSES)
    h, t = BATCH.inputs, BATCH.inputs - error @ algorithm.feedback.T
    for block in algorithm.blocks:
        h, t = block(h.detach()), block(t.detach())
        (0.5 * (h.square().sum() - t.square().sum()) / 16).backward()
    for name, parameter in algorithm.blocks.members.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-13)


def test_time_local_steps_become_the_hebbian_step() -> None:
    """Property 8: with a smaller learning rate the second pass sees less changed weights; the error is of its order."""
    wanted = _gradients(_attached(variant="hebbian", feedback_scale=5.0))
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        algorithm = _attached(variant="time_local", feedback_scale=5.0)
        before = {name: p.detach().clone() for name, p in algorithm.blocks.named_parameters()}
        plain_loop(algorithm, [BATCH], partial(torch.optim.SGD, lr=lr))
        moved = {
            name.removeprefix("members."): (before[name] - p.detach()) / lr
            for name, p in algorithm.blocks.named_parameters()
        }
        errors.append(max(float((moved[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted))
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.2)
    assert errors[2] < 1e-2


def test_time_local_updates_every_unit_twice_in_forward_order() -> None:
    units = [*(f"layer{i}" for i in (1, 2, 3)), "readout"]
    assert [update.unit for update in _attached(variant="time_local").updates(BATCH)] == units * 2
    assert [update.unit for update in _attached().updates(BATCH)] == units == list(_attached().units())


def test_the_readout_reports_the_loss_of_the_first_pass() -> None:
    for variant in VARIANTS:
        algorithm = _attached(variant=variant, dropout=0.0)
        losses = [update.loss for update in algorithm.updates(BATCH) if update.loss is not None]
        expected = F.cross_entropy(algorithm.predict(BATCH.inputs), BATCH.targets)
        assert len(losses) == 1
        torch.testing.assert_close(losses[0], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_does_not_reach_the_passes(variant: str) -> None:
    """Nor is it left switched off where the driver goes on, or where it walks away."""
    gradients = []
    for enabled in (False, True):
        algorithm = _attached(variant=variant).float()
        batch = BATCH._replace(inputs=BATCH.inputs.float())
        gradients.append({})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for number, update in enumerate(algorithm.updates(batch)):
                assert torch.is_autocast_enabled("cpu") is enabled
                gradients[-1] |= {(number, i): g for i, g in enumerate((update.gradients or {}).values())}
            next(algorithm.updates(batch))
            assert torch.is_autocast_enabled("cpu") is enabled
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_coarser_products_do_not_reach_the_passes(variant: str) -> None:
    """TF32 or bfloat16 inside products would drown h − h̃, and cuDNN's convolutions have TF32 by default."""
    seen = []
    algorithm = _attached(variant=variant)
    for layer in _weights(algorithm):
        layer.register_forward_hook(lambda *_: seen.append(_products()))
    with multiplying("medium", convolutions=True):
        outside = _products()
        for _ in algorithm.updates(BATCH):
            assert _products() == outside
        next(algorithm.updates(BATCH))
        assert _products() == outside
    assert set(seen) == {("highest", False)}


def _products() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


# -- inference --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("normalise", [False, True])
def test_prediction_is_the_first_pass_without_dropout(normalise: bool) -> None:
    algorithm = _attached(normalise=normalise, dropout=0.5, bias=True)
    x = BATCH.inputs
    with torch.no_grad():
        for layer, output in zip(_weights(algorithm), algorithm.activations(BATCH.inputs), strict=False):
            x = (x @ layer.weight.T + layer.bias).relu()
            x = x / x.norm() if normalise else x
            torch.testing.assert_close(output, x)
        torch.testing.assert_close(algorithm.predict(BATCH.inputs), x @ _weights(algorithm)[-1].weight.T)


# -- weight mirroring -------------------------------------------------------------------------------------------------
def test_mirroring_happens_before_the_first_update_and_every_so_many_batches() -> None:
    algorithm = _attached(mirror_steps=2, mirror_every=3)
    assert _changes_of_feedback(algorithm, 8) == [True, False, False, True, False, False, True, False]
    assert _changes_of_feedback(_attached(mirror_steps=1), 3) == [True, False, False]
    assert _changes_of_feedback(_attached(mirror_every=2), 4) == [False, False, True, False]
    assert _changes_of_feedback(_attached(), 3) == [False] * 3
    resumed = _attached(mirror_steps=2, mirror_every=3)
    resumed.load_state_dict(algorithm.state_dict())
    assert _changes_of_feedback(resumed, 3) == [False, True, False]  # batches 8, 9, 10


def _changes_of_feedback(algorithm: Pepita, batches: int) -> list[bool]:
    changes = []
    for _ in range(batches):
        before = algorithm.feedback.clone()
        list(algorithm.updates(BATCH))
        changes.append(not torch.equal(before, algorithm.feedback))
    return changes


def test_mirroring_turns_every_mirror_to_its_weights_and_keeps_the_size_of_the_feedback() -> None:
    """Property 10, before anything is learned; F stays the product of the mirrors."""
    algorithm = _attached(mirror_steps=400, mirror_lr=0.5, mirror_decay=0.01)
    before = algorithm.diagnostics()
    list(algorithm.updates(BATCH._replace(inputs=BATCH.inputs.repeat(4, 1), targets=BATCH.targets.repeat(4))))
    after = algorithm.diagnostics()
    assert list(after) == ["input", "layer1", "layer2", "layer3", "readout"]
    assert all(before[name]["mirror_angle"] > 60 for name in list(after)[1:])
    assert all(after[name]["mirror_angle"] < 35 for name in list(after)[1:])
    assert after["input"]["feedback_angle"] < 50 < before["input"]["feedback_angle"]
    assert algorithm.feedback.std().item() == pytest.approx(0.05 * (2 / WIDTH) ** 0.5, rel=1e-5)
    mirrors = [algorithm.get_buffer(f"mirror{i}") for i in (1, 2, 3, 4)]
    torch.testing.assert_close(torch.linalg.multi_dot(mirrors), algorithm.feedback)


@pytest.mark.parametrize("normalise", [False, True])
def test_the_noise_of_mirroring_passes_dropout_and_norm_as_activities_do(normalise: bool) -> None:
    """One step by hand: ζ = softmax at the output, else masked, then divided by the norm of the batch."""
    algorithm = _attached(mirror_steps=1, dropout=0.4, normalise=normalise, seed=3)
    draw = Generator().manual_seed(3)
    masks = [_factors(width, 0.4, draw) for width in HIDDEN]
    mirrors = []
    with torch.no_grad():
        for i, layer in enumerate(_weights(algorithm)):
            noise = 0.1 * torch.randn(16, layer.in_features, generator=draw, dtype=torch.float64)
            noise -= noise.mean()
            answer = noise @ layer.weight.T
            if i < len(HIDDEN):
                answer = answer.clamp(min=0) * masks[i]
                answer = answer / answer.square().sum().sqrt() if normalise else answer
            else:
                answer = answer.softmax(1)
            old = algorithm.get_buffer(f"mirror{i + 1}")
            mirrors.append(old + 0.1 * (noise.T @ answer / 16 - 0.5 * old))
    list(algorithm.updates(BATCH))
    for i, mirror in enumerate(mirrors):
        got = algorithm.get_buffer(f"mirror{i + 1}")
        torch.testing.assert_close(got / got.norm(), mirror / mirror.norm(), rtol=1e-9, atol=1e-12)


# -- learning ---------------------------------------------------------------------------------------------------------
def _digits() -> tuple[list[Batch], Tensor, Tensor]:
    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    train = [Batch(images[rows], labels[rows]) for rows in order[:1440].split(48)]
    return train, images[order[1440:]], labels[order[1440:]]


@pytest.mark.parametrize(
    ("options", "lr"),
    [
        ({}, 0.1),
        ({"sign": "plus", "output_error": "second"}, 0.1),
        ({"variant": "hebbian"}, 0.1),
        ({"variant": "time_local"}, 0.003),
        ({"mirror_steps": 20, "mirror_every": 30}, 0.1),
    ],
    ids=str,
)
def test_digits_are_learned_and_the_weights_turn_to_the_feedback(options: dict[str, Any], lr: float) -> None:
    """Property 10: with the sign of the first paper they turn away from it.

    The time-local variant's two steps are much larger than their sum, so that it needs a smaller rate and learns less.
    """
    train, images, labels = _digits()
    torch.manual_seed(0)
    algorithm = Pepita(**options)
    algorithm.attach(mlp((64,), 10, (128,), bias=False, init="he_uniform"), TaskInfo(train[0], 10, F.cross_entropy))
    start = algorithm.diagnostics()["input"]["feedback_angle"]
    plain_loop(algorithm, train * 15, partial(torch.optim.SGD, lr=lr, momentum=0.9))
    end = algorithm.diagnostics()["input"]["feedback_angle"]
    with torch.no_grad():
        accuracy = (algorithm.eval().predict(images).argmax(1) == labels).float().mean().item()
    assert accuracy > (0.75 if "time_local" in options.values() else 0.9)
    if options.get("sign") == "plus":
        assert end > max(start, 92)
    else:
        assert end < min(start, 88)


@pytest.mark.parametrize(
    ("variant", "output_error"), [*((variant, "first") for variant in VARIANTS), ("standard", "second")]
)
def test_a_step_costs_what_the_formula_says(variant: str, output_error: Any) -> None:
    algorithm = _attached(variant=variant, output_error=output_error)
    flops = pepita.update_flops((WIDTH, *HIDDEN), CLASSES, output_error, 1 if variant == "standard" else 2)
    assert measure_update(algorithm, BATCH).flops == flops


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "local"}, "variant is 'local', expected one of standard, hebbian, time_local"),
        ({"sign": "-"}, "sign is '-'"),
        ({"output_error": "third"}, "output_error is 'third'"),
        ({"presynaptic": "both"}, "presynaptic is 'both'"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"variant": "hebbian", "output_error": "second"}, "the hebbian variant leaves no choice"),
        ({"variant": "time_local", "presynaptic": "original"}, "the time_local variant leaves no choice"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"feedback_scale": 0.0}, "feedback_scale is 0.0"),
        ({"mirror_every": 0}, "mirror_every 0"),
        ({"mirror_steps": -1}, "mirror_steps is -1"),
        ({"mirror_lr": 0.0}, "mirror_lr is 0.0"),
        ({"mirror_steps": 1, "sign": "plus"}, "use sign=minus"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pepita(**options)


class Halved(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight / 2)


def _pruned(layer: nn.Linear) -> nn.Module:
    pruned: nn.Module = prune.l1_unstructured(layer, "weight", 0.5)
    return pruned


def _halved(layer: nn.Linear) -> nn.Module:
    """A forward put on the object, as some libraries of quantisation do."""
    layer.forward = lambda input: F.linear(input, layer.weight / 2, layer.bias)  # type: ignore[method-assign]
    return layer


MADE: list[Callable[[nn.Linear], nn.Module]] = [
    nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.spectral_norm,
    nn.utils.parametrizations.orthogonal,
    nn.utils.spectral_norm,
    _pruned,
    _halved,
    lambda layer: Halved(layer.in_features, layer.out_features),
]


@pytest.mark.parametrize("make", MADE[:-1])
def test_a_weight_that_is_made_from_another_after_all_is_refused(make: Callable[[nn.Linear], nn.Module]) -> None:
    algorithm = _attached()
    make(algorithm.blocks[1][0])
    with pytest.raises(ValueError, match=r"'layer2' has a .*Linear that makes its weight from something else"):
        next(algorithm.updates(BATCH))


def _net(*layers: nn.Module, readout: nn.Module | None = None) -> Blocks:
    head = nn.Linear(8, CLASSES) if readout is None else readout
    return Blocks({"first": nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU()), "odd": nn.Sequential(*layers)}, head)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (_net(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "block 'odd' has two layers of weights"),
        (_net(nn.Linear(8, 8), nn.Dropout(0.1)), "block 'odd' has an nn.Dropout, .* set algorithm.dropout"),
        (_net(nn.Linear(8, 8), nn.BatchNorm1d(8)), "block 'odd' has a BatchNorm1d"),
        *((_net(make(nn.Linear(8, 8))), "'odd' has a .* that makes its weight from something else") for make in MADE),
        (_net(nn.Linear(8, 8), nn.PReLU()), "block 'odd' has a PReLU"),
        (_net(nn.ReLU(), nn.Linear(8, 8)), "block 'odd' has a ReLU where"),
        (_net(nn.MultiheadAttention(8, 2)), "block 'odd' has a MultiheadAttention"),
        (_net(nn.ReLU()), "block 'odd' has a ReLU where"),
        (_net(nn.Flatten()), "block 'odd' has no nn.Linear or nn.Conv2d"),
        (_net(nn.Linear(7, 8)), "block 'odd' cannot take"),
        (_net(nn.Conv2d(1, 8, 3, padding="same")), "block 'odd' has a convolution with padding='same'"),
        (_net(nn.Linear(8, 8), readout=nn.Sequential(nn.Linear(8, 4), nn.Softmax(1))), "'readout' has a Softmax"),
        (_net(nn.Linear(8, 8), readout=nn.Sequential(nn.Linear(8, 4), nn.ReLU())), "nothing after it"),
        (_net(nn.Linear(8, 8), readout=nn.Linear(8, 5)), "5 outputs for 4 classes"),
        (_net(nn.Linear(8, 8), readout=nn.Linear(9, 4)), "'readout' reads 9 numbers .* shape \\(2, 8\\)"),
        (Blocks({"only": nn.Linear(WIDTH, 8)}), "no readout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_networks_it_cannot_train_are_refused_by_name(net: Blocks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _attached(net.double)


def test_tasks_it_cannot_train_are_refused() -> None:
    first = Batch(BATCH.inputs[:2].float(), BATCH.targets[:2])
    net = mlp((WIDTH,), CLASSES, (8,))
    with pytest.raises(ValueError, match="has no classes"):
        Pepita().attach(net, TaskInfo(first, CLASSES, F.mse_loss, classes=False))
    for graph in (first._replace(context=(1,)), first._replace(rows=torch.tensor([0]))):
        with pytest.raises(ValueError, match="a graph"):
            Pepita().attach(net, TaskInfo(graph, CLASSES, F.cross_entropy))
    with pytest.raises(ValueError, match=r"these are torch.int64 \(token ids\?\)"):
        Pepita().attach(net, TaskInfo(first._replace(inputs=first.inputs.long()), CLASSES, F.cross_entropy))
    with pytest.raises(ValueError, match="weight mirroring needs a network of linear layers"):
        _attached(cnn((2, 12, 12), CLASSES, (5,)).double, IMAGES, mirror_steps=1)
    flat = Blocks({"flat": nn.Sequential(nn.Linear(12, 8), nn.ReLU())}, nn.Linear(8, CLASSES))
    with pytest.raises(ValueError, match=r"'flat' .* shape \(2, 2, 12, 12\): put an nn.Flatten"):
        _attached(flat.double, IMAGES)


def test_only_the_time_local_variant_asks_for_a_linear_optimizer() -> None:
    assert [Pepita(variant=variant).linear_optimizer is None for variant in VARIANTS] == [True, True, False]  # type: ignore[arg-type]
    assert [Pepita(variant=variant).variant for variant in VARIANTS] == list(VARIANTS)  # type: ignore[arg-type]


def test_feedback_counts_as_added_weights() -> None:
    assert _attached().added_parameters == WIDTH * CLASSES
    widths = [WIDTH, *HIDDEN, CLASSES]
    mirrors = sum(one * two for one, two in pairwise(widths))
    assert _attached(mirror_steps=1).added_parameters == WIDTH * CLASSES + mirrors


def test_networks_with_convolutions_report_no_angle() -> None:
    assert _attached(lambda: cnn((2, 12, 12), CLASSES, (5,)), IMAGES).diagnostics() == {}
    algorithm = _attached(lambda: mlp((WIDTH,), CLASSES, (8,)))
    one, two = (layer.weight.detach() for layer in _weights(algorithm))
    algorithm.feedback.copy_((two @ one).T)
    assert algorithm.diagnostics() == {"input": {"feedback_angle": pytest.approx(0.0, abs=1e-4)}}
