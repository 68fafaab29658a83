"""Counter-current learning as an algorithm: the properties of its spec that the equations alone cannot show."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from locallearn.algorithms import Algorithm, TaskInfo
from locallearn.algorithms.counter_current import CounterCurrent
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional import counter_current as ccl
from locallearn.nets import Blocks, autoencoder, cnn, mlp, resnet
from locallearn.testing import plain_loop

CLASSES, WIDTH, HIDDEN = 4, 12, (10, 9, 8)
DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(
    torch.randn(16, WIDTH, generator=DRAW, dtype=torch.float64), torch.randint(CLASSES, (16,), generator=DRAW)
)
IMAGES = Batch(torch.randn(6, 3, 16, 16, generator=DRAW), torch.randint(CLASSES, (6,), generator=DRAW))
sgd = partial(torch.optim.SGD, lr=0.1)


def _attached(net: Blocks | None = None, batch: Batch = BATCH, **options: Any) -> CounterCurrent:
    torch.manual_seed(0)
    if net is None:
        net = mlp((WIDTH,), CLASSES, HIDDEN, activation="elu", bias=False).double()
    algorithm = CounterCurrent(**options)
    algorithm.attach(net, TaskInfo(_first_two(batch), CLASSES, F.cross_entropy))
    return algorithm


def _autoencoder(net: Blocks | None = None, **options: Any) -> CounterCurrent:
    torch.manual_seed(0)
    algorithm = CounterCurrent(**options)
    example = IMAGES.inputs[:2]
    task = TaskInfo(Batch(example, example), example[0].numel(), F.mse_loss, classes=False)
    algorithm.attach(autoencoder((3, 16, 16), (4, 5)) if net is None else net, task)
    return algorithm


def _first_two(batch: Batch) -> Batch:
    return Batch(batch.inputs[:2], batch.targets[:2])


def _weights(algorithm: CounterCurrent) -> tuple[list[Tensor], list[Tensor]]:
    """U_1 … U_L of the forward network and V_1 … V_L of the feedback network, copied."""
    return tuple(  # type: ignore[return-value]
        [p.detach().clone() for p in network.parameters()] for network in (algorithm.blocks, algorithm.feedback)
    )


def _joint(algorithm: CounterCurrent, batch: Batch, clip: float | None = None) -> list[Tensor]:
    """Gradients of one backward pass from the sum of all losses, as the paper's code has it: U_1 … U_L, V_1 … V_L.

    Written without the rule: both passes first, detached between layers, then every pair, then the clipping.
    """
    ahead, back = ([p.detach().requires_grad_() for p in ps] for ps in _weights(algorithm))
    a, b = [batch.inputs], [torch.eye(CLASSES, dtype=batch.inputs.dtype)]
    for i, weight in enumerate(ahead):
        z = a[-1].detach() @ weight.T
        a.append(z if i == len(ahead) - 1 else F.elu(z))
    for i, weight in reversed(list(enumerate(back))):
        z = b[0].detach() @ weight.T
        b.insert(0, z if i == 0 else F.elu(z))
    same = (batch.targets[:, None] == torch.arange(CLASSES)).to(a[0].dtype)
    loss = F.cross_entropy(a[-1], batch.targets)
    for x, signal in zip(a[:-1], b[:-1], strict=True):
        loss = loss + F.mse_loss(x @ signal.T, same) / x.shape[1] * 0.5 * 256
    loss.backward()
    if clip is not None:
        for network in (ahead, back):
            torch.nn.utils.clip_grad_norm_(network, clip)
    gradients = [p.grad for p in (*ahead, *back)]
    assert all(g is not None for g in gradients)
    return [g for g in gradients if g is not None]


# -- the step ---------------------------------------------------------------------------------------------------------
def test_a_step_is_that_of_the_equations() -> None:
    """Every weight of both networks, by hand: no autograd."""
    algorithm = _attached()
    ahead, back = _weights(algorithm)
    a, b, z_a, z_b = [BATCH.inputs], [torch.eye(CLASSES).double()], [], []
    for weight in ahead:
        z_a.append(a[-1] @ weight.T)
        a.append(F.elu(z_a[-1]))
    for i in reversed(range(len(back))):
        z_b.insert(0, b[0] @ back[i].T)
        b.insert(0, F.elu(z_b[0]) if i > 0 else z_b[0])
    wanted_ahead, wanted_back = list(ahead), list(back)
    for i in range(len(ahead)):
        pair = ccl.pair_gradients(a[i], b[i], ccl.class_matches(BATCH.targets, CLASSES))
        if i > 0:
            through = pair.activations * torch.where(z_a[i - 1] > 0, 1.0, z_a[i - 1].exp())
            wanted_ahead[i - 1] = ahead[i - 1] - 0.1 * through.T @ a[i - 1]
        through = pair.signals * (torch.where(z_b[i] > 0, 1.0, z_b[i].exp()) if i > 0 else 1.0)
        wanted_back[i] = back[i] - 0.1 * through.T @ b[i + 1]
    error = (z_a[-1].softmax(1) - F.one_hot(BATCH.targets, CLASSES)) / len(BATCH.targets)
    wanted_ahead[-1] = ahead[-1] - 0.1 * error.T @ a[-2]
    plain_loop(algorithm, [BATCH], sgd)
    for network, wanted in zip(_weights(algorithm), (wanted_ahead, wanted_back), strict=True):
        for got, want in zip(network, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.3, 1e6])
def test_unit_after_unit_is_one_joint_backward_pass(clip: float | None) -> None:
    """Property 7, and the clipping of each network as a whole."""
    algorithm = _attached(clip=clip)
    before = [p for network in _weights(algorithm) for p in network]
    gradients = _joint(algorithm, BATCH, clip)
    plain_loop(algorithm, [BATCH], sgd)
    after = [p for network in _weights(algorithm) for p in network]
    for old, new, gradient in zip(before, after, gradients, strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient, rtol=0, atol=1e-9)
    norm = torch.stack([g.norm() for g in _joint(_attached(), BATCH)[: len(before) // 2]]).norm()
    assert clip is None or (norm > clip) == (clip < 1)  # one of the limits cuts, the other does not


class _Sum(nn.Module):
    """A weight made of two; autograd gives both the same gradient, as one tensor."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight / 2, weight / 2


def test_clipping_scales_a_gradient_once_that_two_parameters_share() -> None:
    def gradients(clip: float) -> list[Tensor]:
        net = mlp((WIDTH,), CLASSES, HIDDEN[:1], bias=False).double()
        layer = next(m for m in net.modules() if isinstance(m, nn.Linear))
        nn.utils.parametrize.register_parametrization(layer, "weight", _Sum())
        algorithm = _attached(net, clip=clip)
        found = {p: g for update in algorithm.updates(BATCH) for p, g in (update.gradients or {}).items()}
        return [found[p] for p in algorithm.blocks.parameters()]

    torch.manual_seed(0)
    whole = gradients(1e6)
    torch.manual_seed(0)
    cut = gradients(0.01)
    assert len(whole) == 3
    factor = 0.01 / torch.stack([g.norm() for g in whole]).norm()
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(other, one * factor, rtol=1e-4, atol=0)


def test_every_loss_trains_its_own_two_layers() -> None:
    """Properties 1 and 4."""
    algorithm = _attached()
    layers = {id(p): f"U{i + 1}" for i, p in enumerate(algorithm.blocks.parameters())}
    layers |= {id(p): f"V{i + 1}" for i, p in enumerate(algorithm.feedback.parameters())}
    trained = {}
    for update in algorithm.updates(BATCH):
        update.backward()
        reached = [p for p in algorithm.parameters() if p.grad is not None]
        assert all(p.grad.any() for p in reached if p.grad is not None)
        trained[update.unit] = {layers[id(p)] for p in reached}
        algorithm.zero_grad()
    assert trained == {
        "layer1": {"U1", "V2"},
        "layer2": {"U2", "V3"},
        "layer3": {"U3", "V4"},
        "readout": {"U4"},
        "input": {"V1"},
    }


@pytest.mark.parametrize("clip", [None, 1.0])
def test_mixed_precision_loses_no_gradient(clip: float | None) -> None:
    """The passes without gradients run inside the same autocast as the pairs."""
    algorithm = _attached(clip=clip, flooding=0.9).float()
    updates = algorithm.updates(BATCH._replace(inputs=BATCH.inputs.float()))
    while True:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            update = next(updates, None)
        if update is None:
            break
        update.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in algorithm.parameters())


def test_the_readout_learns_as_in_backpropagation_and_the_blocks_do_not() -> None:
    algorithm = _attached()
    F.cross_entropy(algorithm.blocks(BATCH.inputs), BATCH.targets).backward()
    expected = [p.grad for p in algorithm.blocks.parameters()]
    algorithm.zero_grad()
    for update in algorithm.updates(BATCH):
        update.backward()
    same = [
        torch.equal(p.grad, e) if p.grad is not None and e is not None else None
        for p, e in zip(algorithm.blocks.parameters(), expected, strict=True)
    ]
    assert same == [False, False, False, True]


def test_without_detaching_the_task_loss_is_backpropagation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Property 3."""
    algorithm = _attached()
    F.cross_entropy(algorithm.blocks(BATCH.inputs), BATCH.targets).backward()
    expected = [p.grad for p in algorithm.blocks.parameters()]
    algorithm.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "detach", lambda self: self)
        (loss,) = [u.loss for u in algorithm.updates(BATCH) if u.unit == "readout"]
    assert loss is not None
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(algorithm.blocks.parameters(), expected, strict=True))


def test_signals_do_not_see_the_data_nor_activations_the_labels() -> None:
    """Property 2."""
    algorithm, seen = _attached(), []
    for part in (*algorithm.feedback, *algorithm.blocks):
        part.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))

    def run(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        seen.clear()
        list(algorithm.updates(batch))
        widths = [len(x) for x in seen]
        return [x for x in seen if len(x) == CLASSES], [x for x, n in zip(seen, widths, strict=True) if n != CLASSES]

    first = run(BATCH)
    other_data = run(BATCH._replace(inputs=BATCH.inputs + 1))
    other_labels = run(BATCH._replace(targets=(BATCH.targets + 1) % CLASSES))
    assert len(first[0]) == 2 * 3 + 1  # b_1 … b_3 twice, b_0 once
    assert len(first[1]) == 3
    assert all(torch.equal(x, y) for x, y in zip(first[0], other_data[0], strict=True))
    assert not torch.equal(first[1][0], other_data[1][0])
    assert all(torch.equal(x, y) for x, y in zip(first[1], other_labels[1], strict=True))


@pytest.mark.parametrize("target", ["class", "identity"])
def test_names_of_classes_do_not_matter(target: str) -> None:
    """Property 5: permuted together with the columns of V_L and the rows of U_L."""
    order = torch.tensor([2, 0, 3, 1])  # class order[k] is called k now
    first, second = _attached(target=target), _attached(target=target)
    with torch.no_grad():
        second.blocks.readout.weight.copy_(first.blocks.readout.weight[order])  # type: ignore[union-attr]
        second.feedback[-1][0].weight.copy_(first.feedback[-1][0].weight[:, order])  # type: ignore[index]
    renamed = BATCH._replace(targets=order.argsort()[BATCH.targets])
    for update, other in zip(first.updates(BATCH), second.updates(renamed), strict=True):
        assert update.loss is not None
        assert other.loss is not None
        torch.testing.assert_close(update.loss, other.loss)
        update.backward()
        other.backward()
    for p, q in list(zip(first.blocks.parameters(), second.blocks.parameters(), strict=True))[:-1]:
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(first.feedback.parameters(), second.feedback.parameters(), strict=True):
        torch.testing.assert_close(p.grad[:, order] if p.shape[1] == CLASSES else p.grad, q.grad)


# -- losses and options -----------------------------------------------------------------------------------------------
def _losses(algorithm: CounterCurrent, batch: Batch = BATCH) -> dict[str, float]:
    return {u.unit: float(u.loss.detach()) for u in algorithm.updates(batch) if u.loss is not None}


def test_the_identity_target_takes_samples_of_one_class_for_strangers() -> None:
    """Against a run of the feedback network with one row per sample."""
    algorithm = _attached(target="identity")
    signal = F.one_hot(BATCH.targets, CLASSES).double()
    signals = []
    for layer in reversed(list(algorithm.feedback)):
        signal = layer(signal)
        signals.insert(0, signal)
    activations = [BATCH.inputs, *algorithm.blocks.features(BATCH.inputs)]
    losses = _losses(algorithm)
    for name, a, b in zip(["input", "layer1", "layer2", "layer3"], activations, signals, strict=True):
        wanted = 128 / a.shape[1] * F.mse_loss(a @ b.T, torch.eye(16).double())
        assert losses[name] == pytest.approx(wanted.item())


def test_the_loss_follows_the_network_unless_chosen() -> None:
    assert _attached().kind == "mlp"
    assert _attached(loss="cnn").kind == "cnn"
    assert _attached(cnn((3, 16, 16), CLASSES, (5, 6)), IMAGES).kind == "cnn"
    assert _autoencoder().kind == "autoencoder"
    chosen = _attached(loss="cnn", c=0.25, gram=0.75)
    assert (chosen.local.normalise, chosen.local.c, chosen.local.gram) == (True, 0.25, 0.75)


def test_losses_of_a_convolutional_network_are_those_of_the_code() -> None:
    algorithm = _attached(cnn((3, 16, 16), CLASSES, (5, 6), activation="elu", pool="max", bias=False), IMAGES)
    matches, losses = ccl.class_matches(IMAGES.targets, CLASSES), _losses(algorithm, IMAGES)
    signal, signals = torch.eye(CLASSES), []
    weights = [layer[-2].weight if i > 0 else layer[-1].weight for i, layer in enumerate(algorithm.feedback[:2])]  # type: ignore[index,arg-type,union-attr]
    signal = F.elu(algorithm.feedback[2][0](signal).view(CLASSES, 6, 4, 4))  # type: ignore[index]
    signals.append(signal)
    for weight in reversed(weights):
        signal = F.conv2d(F.interpolate(signal, scale_factor=2), weight, padding=1)
        signals.insert(0, signal if weight is weights[0] else F.elu(signal))
        signal = signals[0]
    activations = [IMAGES.inputs, *algorithm.blocks.features(IMAGES.inputs)]
    for name, a, b in zip(["input", "conv1", "conv2"], activations, signals, strict=True):
        assert a.shape[1:] == b.shape[1:]
        a, b = (F.normalize(x.flatten(1)) for x in (a, b))
        wanted = F.mse_loss(a @ b.T, matches)
        wanted = wanted + 0.5 * F.mse_loss(a @ a.T, torch.eye(6)) + 0.5 * F.mse_loss(b @ b.T, torch.eye(4))
        assert losses[name] == pytest.approx(wanted.item(), rel=1e-5)


def test_losses_of_an_autoencoder_are_those_of_maps_and_images() -> None:
    algorithm = _autoencoder(c=0.5)
    batch = Batch(IMAGES.inputs, IMAGES.inputs + 1)  # a target of its own, as for a noisy input
    signals = [batch.targets]
    for layer in reversed(list(algorithm.feedback)):
        signals.insert(0, layer(signals[0]))
    activations = [batch.inputs, *algorithm.blocks.features(batch.inputs), algorithm.blocks(batch.inputs)]
    losses = _losses(algorithm, batch)
    assert list(losses) == ["encoder1", "encoder2", "decoder1", "readout", "input"]
    wanted = {"input": 0.5 * 16 * F.mse_loss(batch.inputs, signals[0])}
    for name, a, b in zip(algorithm.blocks.names, activations[1:-1], signals[1:-1], strict=True):
        wanted[name] = ccl.centred_map_loss(a, b, 0.5)
    wanted["readout"] = 0.5 * 16 * F.mse_loss(activations[-1], batch.targets)
    assert losses == pytest.approx({name: loss.item() for name, loss in wanted.items()}, rel=1e-5)


def test_warmup_scales_the_losses_and_its_count_is_kept() -> None:
    plain, algorithm = _losses(_attached()), _attached(warmup_steps=4)
    for step in range(1, 7):
        assert _losses(algorithm) == pytest.approx({name: min(1, step / 4) * v for name, v in plain.items()})
        other = _attached(warmup_steps=4)
        other.load_state_dict(algorithm.state_dict())
        algorithm = other


def test_flooding_drops_samples_that_are_learned() -> None:
    """Their rows are zero in every pair, of the input, too; the readout goes on learning from them."""
    probability = _attached().blocks(BATCH.inputs).softmax(1).gather(1, BATCH.targets[:, None])[:, 0]
    threshold = float(probability.detach().median())
    algorithm, plain = _attached(flooding=threshold), _attached()
    kept = probability <= threshold
    assert 0 < int(kept.sum()) < 16
    losses, matches = _losses(algorithm), ccl.class_matches(BATCH.targets, CLASSES)
    signals = algorithm._signals(BATCH.targets)
    first = next(iter(algorithm.blocks.features(BATCH.inputs))).detach()
    assert losses["layer1"] == pytest.approx(ccl.pair_loss(first * kept[:, None], signals[1], matches).item())
    assert losses["readout"] == pytest.approx(_losses(plain)["readout"])
    b_0 = algorithm.feedback[0](signals[1])
    assert losses["input"] == pytest.approx(ccl.pair_loss(BATCH.inputs * kept[:, None], b_0, matches).item())


def test_all_weights_learn_but_scale_and_shift_of_normalisations() -> None:
    norms = (("encoder1", 1), ("encoder2", 1), ("decoder1", 2))
    algorithm = _autoencoder()
    before = {n: p.detach().clone() for n, p in algorithm.named_parameters()}
    plain_loop(algorithm, [Batch(IMAGES.inputs, IMAGES.inputs)] * 2, sgd)
    assert all(p.grad is None for p in algorithm.parameters())  # none is left to pile up where no unit steps it
    still = {n for n, p in algorithm.named_parameters() if torch.equal(p, before[n])}
    assert still == {f"blocks.members.{block}.{at}.{kind}" for block, at in norms for kind in ("weight", "bias")}


def test_flooding_moves_normalisation_statistics_no_second_time() -> None:
    algorithm = _attached(cnn((3, 16, 16), CLASSES, (5,), batch_norm=True), IMAGES, flooding=0.9)
    algorithm.blocks[0][1].eval()  # frozen by the user: must be found as it was
    algorithm.blocks[0][0].train()
    list(algorithm.updates(IMAGES))
    assert [m.training for m in (algorithm.blocks[0][1], algorithm.blocks[0][0])] == [False, True]
    algorithm.train()
    list(algorithm.updates(IMAGES))
    assert int(algorithm.blocks[0][1].num_batches_tracked) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_centralised_step_keeps_the_mean_of_every_unit(clip: float | None) -> None:
    algorithm, gradients = _attached(centralise=True, clip=clip), _joint(_attached(), BATCH)
    before = [p for network in _weights(algorithm) for p in network]
    plain_loop(algorithm, [BATCH], sgd)
    after = [p for network in _weights(algorithm) for p in network]
    central = [g - g.mean(1, keepdim=True) for g in gradients]
    for part in (slice(0, 4), slice(4, 8)):
        norm = torch.stack([g.norm() for g in central[part]]).norm()
        factor = 1.0 if clip is None else min(1.0, clip / float(norm))
        for old, new, gradient in zip(before[part], after[part], central[part], strict=True):
            torch.testing.assert_close(new, old - 0.1 * factor * gradient, rtol=0, atol=1e-6)
            torch.testing.assert_close(new.sum(1), old.sum(1))


def test_the_feedback_network_has_its_own_rate_or_none() -> None:
    own = {unit: sgd(groups).param_groups for unit, groups in _attached(feedback_lr=0.5).units().items()}
    assert [(len(g["params"]), g["lr"]) for g in own["layer1"]] == [(1, 0.1), (1, 0.5)]
    assert [(len(g["params"]), g["lr"]) for g in own["input"]] == [(1, 0.5)]
    frozen = _attached(feedback_lr=0.0, clip=1.0)
    assert list(frozen.units()) == ["layer1", "layer2", "layer3", "readout"]
    assert (frozen.variant, _attached().variant) == ("frozen", None)
    ahead, back = _weights(frozen)
    plain_loop(frozen, [BATCH], partial(torch.optim.SGD, lr=0.1, weight_decay=0.1))
    after = _weights(frozen)
    assert all(torch.equal(x, y) for x, y in zip(back, after[1], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(ahead, after[0], strict=True))


def test_what_couples_layers_is_claimed_and_confirmed() -> None:
    cases: tuple[dict[str, Any], ...] = ({}, {"centralise": True}, {"clip": 0.1}, {"flooding": 0.3})
    for options in cases:
        algorithm = _attached(**options)
        few = {} if "flooding" in options else {"batches": 5, "warmup": 7}  # no sample is learned before some 50 steps
        result = audit(algorithm, BATCH, **few)
        assert result.confirmed, result.reason
        claim = "layer-local" if not {"clip", "flooding"} & options.keys() else "gradient-isolated, parameter-coupled"
        assert (algorithm.locality, result.verdict) == (claim, claim)


# -- costs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("frozen", [False, True])
def test_costs_are_what_a_flop_counter_sees(frozen: bool) -> None:
    """Property 7."""
    flops = measure_update(_attached(feedback_lr=0.0 if frozen else None), BATCH).flops
    assert flops == ccl.update_flops((WIDTH, *HIDDEN), CLASSES, 16, frozen)


# -- the mirror -------------------------------------------------------------------------------------------------------
def _shown(module: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in module.children()]


def test_the_mirror_of_a_perceptron() -> None:
    algorithm = _attached(
        mlp((1, 4, 3), CLASSES, (10, 8), activation="tanh"), BATCH._replace(inputs=torch.zeros(2, 1, 4, 3))
    )
    assert [_shown(layer) for layer in algorithm.feedback] == [
        ["Linear", "Unflatten"],
        ["Linear", "Tanh"],
        ["Linear", "Tanh"],
    ]
    assert [layer[0].weight.shape for layer in algorithm.feedback] == [(12, 10), (10, 8), (8, CLASSES)]  # type: ignore[index]
    assert [layer[0].bias is not None for layer in algorithm.feedback] == [True, True, False]  # type: ignore[index]
    assert not any(layer[0].bias.any() for layer in algorithm.feedback[:2])  # type: ignore[index,union-attr]


def test_the_mirror_of_a_convolutional_network() -> None:
    net = cnn((3, 15, 16), CLASSES, (5, 6), activation="elu", pool="max", batch_norm=True, bias=False)
    algorithm = _attached(net, IMAGES._replace(inputs=torch.randn(2, 3, 15, 16)))
    assert [_shown(layer) for layer in algorithm.feedback] == [
        ["Upsample", "Conv2d"],
        ["Upsample", "Conv2d", "BatchNorm2d", "ELU"],
        ["Linear", "Unflatten", "BatchNorm2d", "ELU"],
    ]
    first = algorithm.feedback[0][1]  # type: ignore[index]
    assert (first.in_channels, first.out_channels, first.padding, first.bias) == (5, 3, (1, 1), None)
    assert algorithm.feedback[0][0].size == (15, 16)  # type: ignore[index]
    assert not list(algorithm.feedback.buffers())  # no statistics that a second run would move


def test_the_mirror_of_an_autoencoder() -> None:
    algorithm = _autoencoder()
    assert [_shown(layer) for layer in algorithm.feedback] == [
        ["Upsample", "Conv2d"],
        ["Upsample", "Conv2d", "BatchNorm2d", "ReLU"],
        ["Conv2d", "BatchNorm2d", "ReLU"],
        ["Conv2d", "BatchNorm2d", "ReLU"],
    ]
    assert [layer[0].stride for layer in algorithm.feedback[2:]] == [(2, 2), (2, 2)]  # type: ignore[index,union-attr]
    assert algorithm.blocks.readout[1].bias is not None  # type: ignore[index,union-attr]
    assert algorithm.feedback[3][0].bias is None  # type: ignore[index]  # the normalisation would take it out again
    weights = [p.detach() for p in algorithm.feedback.parameters() if p.ndim == 4]
    norms = [float(_singular(w).max()) for w in weights]
    assert norms == pytest.approx(
        [0.0, 1e-3, 1.0, 1.0], rel=1e-4
    )  # orthogonal, quiet where maps grow, zero at the image


def _singular(weight: Tensor) -> Tensor:
    """Singular values of a convolution, its larger number of channels in front."""
    wide = weight if weight.shape[0] >= weight.shape[1] else weight.transpose(0, 1)
    return torch.linalg.svdvals(wide.flatten(1).double())


def test_the_feedback_of_an_autoencoder_ends_with_a_bias_as_the_readout_does() -> None:
    """What makes the image has a bias, drawn in PyTorch's range, and it counts in the norm that is clipped."""
    algorithm = _autoencoder()
    last = algorithm.feedback[0][1]  # type: ignore[index]
    bound = last.weight[0].numel() ** -0.5
    assert 0 < last.bias.abs().max() <= bound
    assert all(layer.bias is None for layer in algorithm.feedback[1:].modules() if isinstance(layer, nn.Conv2d))
    net = autoencoder((3, 16, 16), (4, 5))
    net.readout[1].register_parameter("bias", None)  # type: ignore[index]
    plain = _autoencoder(net)
    assert plain.feedback[0][1].bias is None  # type: ignore[index]


def test_a_readout_after_global_pooling_is_mirrored() -> None:
    blocks = {"only": nn.Sequential(nn.Conv2d(3, 5, 5, stride=3), nn.SiLU())}
    readout = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, CLASSES))
    algorithm = _attached(Blocks(blocks, readout), IMAGES)
    assert [_shown(layer) for layer in algorithm.feedback] == [
        ["Upsample", "Conv2d"],
        ["Linear", "Unflatten", "Upsample", "SiLU"],
    ]
    assert set(_losses(algorithm, IMAGES)) == {"only", "readout", "input"}


def test_maps_are_normalised_as_maps_where_a_block_ends_flat() -> None:
    """Cut from a Sequential, whose flattening in front of a hidden linear layer belongs to the block of maps."""
    layers = [nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(8), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(20, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))
    algorithm = _attached(Blocks.cut(net), IMAGES)
    assert [_shown(layer) for layer in algorithm.feedback] == [
        ["Unflatten", "Upsample", "Conv2d"],
        ["Linear", "Unflatten", "BatchNorm2d", "ReLU", "Flatten"],
        ["Linear", "BatchNorm1d", "ReLU"],
    ]
    assert set(_losses(algorithm, IMAGES)) == {"block0", "block1", "readout", "input"}


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}, {"centralise": True}, {"feedback_lr": 0.0}])
def test_a_readout_that_is_frozen_stays(options: dict[str, Any]) -> None:
    algorithm = _attached(**options)
    readout = algorithm.blocks.readout
    assert readout is not None
    readout.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in algorithm.blocks.named_parameters()}
    plain_loop(algorithm, [BATCH] * 2, sgd)
    assert [n for n, p in algorithm.blocks.named_parameters() if torch.equal(p, before[n])] == ["readout.weight"]


def _refused(net: Blocks, batch: Batch = BATCH, **options: Any) -> str:
    try:
        _attached(net, batch, **options)
    except ValueError as refusal:
        return str(refusal)
    return "nothing was refused"


def test_what_has_no_mirror_is_refused_by_name() -> None:
    flat, readout = BATCH._replace(inputs=BATCH.inputs.float()), nn.Linear(8, CLASSES)
    two = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 8))
    assert "'deep' holds 2 linear or convolutional layers" in _refused(Blocks({"deep": two}, readout), flat)
    assert "'stage1_1' contains a ResidualUnit" in _refused(resnet((3, 16, 16), CLASSES, 1), IMAGES)
    dropout = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout())
    assert "'noisy' contains a Dropout" in _refused(Blocks({"noisy": dropout}, readout), flat)
    early = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 8))
    assert "'early' has BatchNorm1d in front of its weights" in _refused(Blocks({"early": early}, readout), flat)
    rest = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    grouped = nn.Conv2d(3, 6, 3, groups=3)
    assert "'apart' has a convolution of 3 groups" in _refused(Blocks({"apart": grouped}, rest), IMAGES)
    assert "kernel (2, 2)" in _refused(Blocks({"even": nn.Conv2d(3, 6, 2)}, rest), IMAGES)
    late = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Upsample(scale_factor=2))
    assert "'late' has nn.Upsample elsewhere" in _refused(Blocks({"late": late}, rest), IMAGES)
    uneven = nn.Sequential(nn.Upsample(size=(24, 24)), nn.Conv2d(3, 6, 3, padding=1))
    assert "'uneven' upsamples (16, 16) to (24, 24)" in _refused(Blocks({"uneven": uneven}, rest), IMAGES)
    partly = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(2))
    assert "'partly' flattens some dimensions only" in _refused(
        Blocks({"partly": partly}, nn.Sequential(nn.Flatten(), nn.Linear(6 * 196, CLASSES))), IMAGES
    )
    narrow = nn.Sequential(nn.Linear(WIDTH + 1, 8))
    assert "'narrow': Linear cannot take shape (2, 12)" in _refused(Blocks({"narrow": narrow}, readout), flat)
    assert "this network has none" in _refused(Blocks({"a": nn.Linear(WIDTH, 8)}), flat)
    assert "a block is named 'input'" in _refused(Blocks({"input": nn.Linear(WIDTH, 8)}, readout), flat)


def test_tasks_and_settings_that_do_not_go_together_are_refused() -> None:
    net = mlp((WIDTH,), CLASSES, (8,))
    flat = BATCH._replace(inputs=BATCH.inputs.float())
    with pytest.raises(ValueError, match=r"a graph\?"):
        CounterCurrent().attach(net, TaskInfo(_first_two(flat)._replace(context=(1,)), CLASSES, F.cross_entropy))
    assert "use 'mlp' or 'cnn'" in _refused(net, flat, loss="autoencoder")
    for option in ({"gram": 0.1}, {"flooding": 0.9}, {"target": "identity"}, {"loss": "mlp"}):
        with pytest.raises(ValueError, match=r"this task has (none|no class labels|no classes)"):
            _autoencoder(**option)
    image = TaskInfo(Batch(flat.inputs[:2], flat.inputs[:2]), WIDTH, F.mse_loss, classes=False)
    with pytest.raises(ValueError, match=r"'layer1' gives \(8,\) per sample.* use a convolutional autoencoder"):
        CounterCurrent().attach(mlp((WIDTH,), WIDTH, (8,)), image)
    smaller = Blocks({"a": nn.Conv2d(3, 4, 3, padding=1)}, nn.Sequential(nn.Conv2d(4, 3, 3)))
    with pytest.raises(ValueError, match=r"targets are \(3, 16, 16\) .* gives \(3, 14, 14\)"):
        _autoencoder(smaller)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"target": "pair"}, "target is 'pair'"),
        ({"loss": "mse"}, "loss is 'mse'"),
        ({"c": 0.0}, "c is 0.0, expected a factor above 0"),
        ({"gram": -0.5}, "gram is -0.5"),
        ({"flooding": 1.0}, "flooding is 1.0, expected a probability"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"feedback_lr": -0.1}, "feedback_lr is -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CounterCurrent(**option)


# -- learning ---------------------------------------------------------------------------------------------------------
def _digits_accuracy(
    make: Callable[[], Algorithm], net: Blocks, shape: tuple[int, ...], lr: float, epochs: int, momentum: float = 0.0
) -> float:
    data = load_digits()
    images, labels = torch.tensor(data.data / 8 - 1, dtype=torch.float32).view(-1, *shape), torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440].split(48), order[1440:]
    algorithm = make()
    algorithm.attach(net, TaskInfo(Batch(images[:2], labels[:2]), 10, F.cross_entropy))
    batches = [Batch(images[rows], labels[rows]) for rows in train] * epochs
    plain_loop(algorithm, batches, partial(torch.optim.SGD, lr=lr, momentum=momentum))
    with torch.no_grad():
        return (algorithm.eval().predict(images[test]).argmax(1) == labels[test]).float().mean().item()


@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 0.5, "centralise": True, "flooding": 0.9, "warmup_steps": 20}, {"feedback_lr": 0.0}],
    ids=["plain", "stabilised", "frozen"],
)
def test_digits_are_learned(options: dict[str, Any]) -> None:
    """Property 8 with the feedback network frozen."""
    torch.manual_seed(0)
    net = mlp((64,), 10, (64, 64), activation="elu", bias=False)
    assert _digits_accuracy(partial(CounterCurrent, **options), net, (64,), lr=0.3, epochs=15) > 0.9


def test_digits_are_learned_by_a_convolutional_network() -> None:
    torch.manual_seed(0)
    net = cnn((1, 8, 8), 10, (8, 16), activation="elu", pool="max", bias=False)
    make = partial(CounterCurrent, clip=0.3, centralise=True)
    untrained = copy.deepcopy(net).requires_grad_(False)
    assert untrained.readout is not None
    untrained.readout.requires_grad_(True)
    accuracy, bound = (
        _digits_accuracy(make, blocks, (1, 8, 8), lr=1.0, epochs=6, momentum=0.8) for blocks in (net, untrained)
    )
    assert accuracy > 0.85
    assert accuracy > bound + 0.02  # what a readout learns from random maps is not enough


def test_an_autoencoder_learns_to_give_back_its_images() -> None:
    x = F.interpolate(torch.randn(8, 3, 2, 2, generator=DRAW), scale_factor=8)
    algorithm = _autoencoder(autoencoder((3, 16, 16), (16, 32)), clip=0.2)
    plain_loop(algorithm, [Batch(x, x)] * 150, partial(torch.optim.SGD, lr=0.01, momentum=0.9))
    with torch.no_grad():  # in training mode still: with the statistics of these images
        error = F.mse_loss(algorithm.predict(x), x).item()
    assert error < 0.2 * float(x.var())
