"""Product feedback alignment on whole networks: what R and the path B R come to, and what is refused."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from locallearn.algorithms.backprop import Backprop
from locallearn.algorithms.base import TaskInfo
from locallearn.algorithms.feedback_alignment import FeedbackAlignment
from locallearn.algorithms.product_feedback_alignment import ProductFeedbackAlignment
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional import feedback_alignment as fa
from locallearn.nets import Blocks, mlp
from locallearn.testing import plain_loop
from tests.algorithms.chains import CLASSES, IMAGES, ROWS, attached, batch_of, gradients_of

momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.3)


NETS = ("mlp", "resnet", "grouped")


def _differences(algorithm: ProductFeedbackAlignment) -> list[Tensor]:
    """R - BᵀW of every layer."""
    result = []
    for name, layer in algorithm.layers.items():
        held, weight = algorithm.weights(name), algorithm.blocks.get_parameter(layer.parameter).detach()
        groups = 1 if layer.geometry is None else layer.geometry.groups
        result.append(held.learned.detach() - fa.product_gradient(held.fixed, weight, len(held.learned), groups))
    return result


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_the_difference_obeys_the_optimizer_without_data(net: str, orthogonal: bool) -> None:
    """Property 5: R - BᵀW takes the steps of SGD with momentum and decay on a loss of zero."""
    algorithm = attached(net, ProductFeedbackAlignment(3, orthogonal))
    wanted = [nn.Parameter(part) for part in _differences(algorithm)]
    batches = [batch_of(net)._replace(inputs=batch_of(net).inputs * scale) for scale in (1.0, 0.5, 2.0, 1.0, -1.0)]
    plain_loop(algorithm, batches, momentum)
    free = momentum(wanted)
    for _ in batches:
        for part in wanted:
            part.grad = torch.zeros_like(part)
        free.step()
    for got, want in zip(_differences(algorithm), wanted, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("expansion", [1, 2])
@pytest.mark.parametrize("net", NETS)
def test_an_orthogonal_product_that_has_arrived_is_backpropagation(net: str, expansion: int) -> None:
    algorithm = attached(net, ProductFeedbackAlignment(expansion, orthogonal=True))
    plain = attached(copy.deepcopy(algorithm.blocks), Backprop(), batch_of(net))
    wanted, far = gradients_of(plain, batch_of(net)), gradients_of(copy.deepcopy(algorithm), batch_of(net))
    for name, difference in zip(algorithm.layers, _differences(algorithm), strict=True):
        algorithm.weights(name).learned.data -= difference
    near = gradients_of(algorithm, batch_of(net))
    assert all(torch.allclose(near[name], wanted[name], rtol=0, atol=1e-7) for name in wanted)
    assert not all(torch.allclose(far[name], wanted[name], rtol=0, atol=1e-3) for name in wanted)
    figures = algorithm.diagnostics()
    assert all(
        values["path_angle"] < 1e-4 and values["norm_ratio"] == pytest.approx(1.0) for values in figures.values()
    )


@pytest.mark.parametrize("net", ["mlp", "resnet"])
def test_an_identity_in_front_is_kolen_pollack(net: str) -> None:
    """Property 5."""
    product, twin = ProductFeedbackAlignment(1), FeedbackAlignment("kolen_pollack")
    for algorithm in (attached(net, product), attached(net, twin)):
        assert list(algorithm.layers) == list(product.layers)
    for name in product.layers:
        held = product.weights(name)
        held.fixed.copy_(torch.eye(len(held.fixed), dtype=torch.float64).reshape(held.fixed.shape))
        held.learned.data.copy_(twin.weights(name).learned)
    for algorithm in (product, twin):
        plain_loop(algorithm, [batch_of(net)] * 4, momentum)
    for one, other in zip(product.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_large_decay_turns_the_path_towards_the_weights() -> None:
    """The first epoch of the paper's recipe, on one batch; the angle comes to arctan(1/√k), the ratio to √(1 + 1/k)."""
    torch.manual_seed(0)
    batch = Batch(torch.randn(32, 80), torch.randint(CLASSES, (32,)))
    algorithm = ProductFeedbackAlignment(10)
    algorithm.attach(mlp((80,), CLASSES, (80, 80)), TaskInfo(batch, CLASSES, F.cross_entropy))
    start = algorithm.diagnostics()["layer2.0"]
    assert start["path_angle"] == pytest.approx(90, abs=2)
    plain_loop(algorithm, [batch] * 400, partial(momentum, weight_decay=0.03))
    end = algorithm.diagnostics()["layer2.0"]
    assert end["path_angle"] == pytest.approx(17.55, abs=2)
    assert end["norm_ratio"] == pytest.approx(1.049, abs=0.05)


def test_gaps_stay_open() -> None:
    algorithm = attached("grouped", ProductFeedbackAlignment(5, density=0.4))
    closed = {}
    for name in algorithm.layers:
        held = algorithm.weights(name)
        closed[name] = ~held.mask
        assert closed[name].any()
        assert not held.learned[closed[name]].any()
    share = algorithm.weights("grouped.0").mask.double().mean().item()
    assert share == pytest.approx(0.4, abs=0.05)
    plain_loop(algorithm, [IMAGES] * 3, momentum)
    for name in algorithm.layers:
        held = algorithm.weights(name)
        assert not held.learned[closed[name]].any()
        held.learned.data[closed[name]] = 7.0
        assert algorithm.path(name).abs().max() < 5  # what is put into a gap carries nothing


def test_weights_that_change_after_the_forward_pass_change_no_gradient() -> None:
    gradients = []
    for spoil in (False, True):
        algorithm = attached("resnet", ProductFeedbackAlignment(2))
        (update,) = algorithm.updates(IMAGES)
        for p in algorithm.blocks.parameters():
            if spoil and p.ndim > 1:
                p.data.normal_()
        update.backward()
        gradients.append([p.grad for p in algorithm.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_layer_that_runs_twice_keeps_the_rule() -> None:
    shared = nn.Linear(10, 10)
    twice = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh())
    net = Blocks({"in": nn.Linear(12, 10), "twice": twice}, nn.Linear(10, CLASSES))
    with pytest.warns(UserWarning, match=r"layer 'twice\.0' runs 2 times in a forward pass"):
        algorithm = attached(net, ProductFeedbackAlignment(2))
    (update,) = algorithm.updates(ROWS)
    update.backward()
    held = algorithm.weights("twice.0")
    torch.testing.assert_close(held.learned.grad, held.fixed.T @ shared.weight.grad, rtol=0, atol=1e-12)
    assert held.learned.grad.abs().max() > 1e-4


def test_costs_are_what_the_counter_sees() -> None:
    widths = (12, 10, 9, CLASSES)
    for expansion in (1, 2, 10):
        measured = measure_update(attached("mlp", ProductFeedbackAlignment(expansion)), ROWS)
        assert measured.flops == fa.product_update_flops(widths, len(ROWS.inputs), expansion)
    many = Batch(ROWS.inputs.repeat(20, 1), ROWS.targets.repeat(20))
    measured = measure_update(attached("mlp", ProductFeedbackAlignment()), many)
    assert measured.flops == pytest.approx(fa.product_update_flops(widths, len(many.inputs)))


def test_digits_are_learned() -> None:
    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440].split(48), order[1440:]
    torch.manual_seed(0)
    algorithm = ProductFeedbackAlignment()
    info = TaskInfo(Batch(images[:2], labels[:2]), 10, F.cross_entropy)
    algorithm.attach(mlp((64,), 10, (60, 40)), info)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    plain_loop(algorithm, [Batch(images[rows], labels[rows]) for rows in train] * 12, sgd)
    with torch.no_grad():
        accuracy = (algorithm.eval().predict(images[test]).argmax(1) == labels[test]).float().mean().item()
    assert accuracy > 0.85


def test_what_the_rule_says_of_itself() -> None:
    random, orthogonal = ProductFeedbackAlignment(), ProductFeedbackAlignment(1, orthogonal=True)
    assert (random.variant, orthogonal.variant) == (None, "orthogonal")
    assert "same steps" in random.linear_optimizer
    algorithm = attached("resnet", random)
    weights = [algorithm.blocks.get_parameter(layer.parameter) for layer in algorithm.layers.values()]
    assert algorithm.added_parameters == 10 * sum(w.numel() + len(w) ** 2 for w in weights)  # R and B, k = 10
    assert set(algorithm.diagnostics()["stage2_1.shortcut.0"]) == {"path_angle", "norm_ratio"}
    result = audit(algorithm, IMAGES, batches=5, warmup=7)  # as in the conformance suite
    assert result.confirmed, result.reason


def test_misfits_are_named() -> None:
    with pytest.raises(ValueError, match="expansion is 0"):
        ProductFeedbackAlignment(0)
    for density in (0.0, 1.1):
        with pytest.raises(ValueError, match="density is"):
            ProductFeedbackAlignment(density=density)
    with pytest.raises(ValueError, match=r"orthogonal feedback has no gaps, and density is 0\.5"):
        ProductFeedbackAlignment(1, orthogonal=True, density=0.5)
    with pytest.raises(ValueError, match="this network has no readout"):
        attached(Blocks({"only": nn.Linear(12, CLASSES)}), ProductFeedbackAlignment())
