"""Forward gradients against autograd, against what theory says of their noise, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import ForwardGradient, TaskInfo
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import counting, measure_update
from locallearn.functional.forward_gradient import estimate, relative_error, tangents
from locallearn.nets import Blocks, mlp, vit


def _attached(net: Blocks, batch: Batch, **settings: Any) -> ForwardGradient:
    rule = ForwardGradient(**settings)
    rule.attach(net, TaskInfo(batch._replace(inputs=batch.inputs[:2], targets=batch.targets[:2]), 3, F.cross_entropy))
    return rule


def _flat(rule: ForwardGradient, batch: Batch) -> Tensor:
    [update] = list(rule.updates(batch))
    assert update.gradients is not None
    return torch.cat([update.gradients[p].flatten() for p in rule.blocks.parameters()])


def _true(net: nn.Module, batch: Batch) -> Tensor:
    loss = F.cross_entropy(net(batch.inputs), batch.targets)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def _perceptron(samples: int = 8) -> tuple[Blocks, Batch]:
    return mlp((6,), 3, (5, 4)).double(), Batch(torch.randn(samples, 6).double(), torch.arange(samples) % 3)


def _convolutions() -> tuple[Blocks, Batch]:
    net = Blocks(
        {
            "first": nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.ReLU(inplace=True)),
            "second": nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        },
        readout=nn.Linear(4, 3),
    ).double()
    return net, Batch(torch.randn(5, 2, 9, 9).double(), torch.arange(5) % 3)


def _tokens() -> tuple[Blocks, Batch]:
    net = vit((3, 8, 8), 3, patch=4, width=8, heads=2, depth=2)
    return net.double(), Batch(torch.randn(4, 3, 8, 8).double(), torch.arange(4) % 3)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _encoder() -> tuple[Blocks, Batch]:
    """Whose evaluation has a way of its own that no derivative knows."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    net = Blocks({"layer": layer, "mean": _Mean()}, readout=nn.Linear(6, 3)).double()
    return net, Batch(torch.randn(4, 3, 6).double(), torch.arange(4) % 3)


def _normalised() -> tuple[Blocks, Batch]:
    block = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
    return Blocks({"only": block}, readout=nn.Linear(5, 3)).double(), _perceptron()[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signs_are_fair_and_independent_and_come_in_any_number(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = tangents((5, 1603), "rademacher", generator, dtype=dtype)  # no multiple of eight
    assert drawn.dtype == dtype
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    with counting() as counter:
        assert tangents((3,), "rademacher", generator).shape == (3,)
    assert not counter.uncounted
    many = tangents((4000, 24), "rademacher", generator, dtype=torch.float64)
    covariance = many.T @ many / len(many)
    assert float((covariance - torch.eye(24)).abs().max()) < 5 / len(many) ** 0.5
    assert float(many.mean(0).abs().max()) < 5 / len(many) ** 0.5
    again = torch.Generator().manual_seed(3)
    assert torch.equal(drawn, tangents((5, 1603), "rademacher", again, dtype=dtype))


@pytest.mark.parametrize("make", [_perceptron, _convolutions, _tokens, _encoder, _normalised])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "sphere"])
def test_every_draw_is_the_derivative_times_the_direction(make: Callable[[], tuple[Blocks, Batch]], noise: Any) -> None:
    """ĝ = (g·v) v, with g of autograd and v drawn by hand from the same seed; so ĝ·g is never negative."""
    net, batch = make()
    rule = _attached(net, batch, noise=noise, seed=3)
    size = sum(p.numel() for p in net.parameters())
    v = tangents((1, size), noise, torch.Generator().manual_seed(3), dtype=torch.float64)[0]
    g = _true(net, batch)
    found = _flat(rule, batch)
    assert torch.allclose(found, (g @ v) * v, atol=1e-10)
    assert found @ g >= 0


@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "sphere"])
@pytest.mark.parametrize(("count", "combine"), [(1, "mean"), (8, "mean"), (8, "projection")])
def test_the_error_of_the_estimate_is_that_of_theory(noise: Any, count: int, combine: Any) -> None:
    g = torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    draw = torch.Generator().manual_seed(0)
    errors, cosines = [], []
    for _ in range(3000):
        v = tangents((count, 40), noise, draw, dtype=torch.float64)
        made = estimate(v, v @ g, combine)
        errors.append(((made - g) ** 2).sum() / (g**2).sum())
        cosines.append(float(made @ g / (made.norm() * g.norm())))
    cosine = (2 / (math.pi * 40)) ** 0.5 if count == 1 else (count / 40) ** 0.5
    if count > 1 and combine == "mean":
        cosine = (count / (count + 41)) ** 0.5
    assert sum(cosines) / len(cosines) == pytest.approx(cosine, rel=0.06)
    found = torch.stack(errors)
    assert abs(found.mean() - relative_error(40, count, noise, combine)) < 4 * found.std() / len(found) ** 0.5


def test_as_many_independent_directions_as_weights_are_the_gradient() -> None:
    net, batch = _perceptron()
    size = sum(p.numel() for p in net.parameters())
    rule = _attached(net, batch, tangents=size, combine="projection", chunk=20)
    assert torch.allclose(_flat(rule, batch), _true(net, batch), atol=1e-8)


@pytest.mark.parametrize("combine", ["mean", "projection"])
@pytest.mark.parametrize(("make", "noise"), [(_tokens, "rademacher"), (_normalised, "sphere")])
def test_several_directions_are_what_linear_algebra_makes_of_them(
    make: Callable[[], tuple[Blocks, Batch]], noise: Any, combine: Any
) -> None:
    """Five directions that pass two at a time: the mean of derivatives times directions, or the gradient's least-squares fit by
    them, from autograd and directions drawn by hand."""
    net, batch = make()
    rule = _attached(net, batch, noise=noise, seed=3, tangents=5, combine=combine, chunk=2)
    g = _true(net, batch)
    v = tangents((5, len(g)), noise, torch.Generator().manual_seed(3), dtype=torch.float64)
    fitted = v.T @ torch.linalg.lstsq(v.T, g[:, None], driver="gelsd").solution[:, 0]
    wanted = (v @ g) @ v / 5 if combine == "mean" else fitted
    assert torch.allclose(_flat(rule, batch), wanted, atol=1e-9)


def test_directions_that_are_there_twice_count_once() -> None:
    v = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    g = torch.tensor([3.0, 1.0, 5.0])
    assert torch.allclose(estimate(v, v @ g, "projection"), torch.tensor([2.0, 2.0, 5.0]))


@pytest.mark.parametrize("make", [_perceptron, _convolutions])
def test_perturbed_activities_give_products_of_slopes_directions_and_inputs(
    make: Callable[[], tuple[Blocks, Batch]],
) -> None:
    """Sample by sample: c from autograd's gradients at the layers' outputs, and the products by autograd, too."""
    net, batch = make()
    rule = _attached(net, batch, perturb="activities", tangents=2, seed=5)
    found = _flat(rule, batch)
    draw = torch.Generator().manual_seed(5)
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    wanted = torch.zeros_like(found)
    for _ in range(2):
        outputs: list[Tensor] = []

        def keep(layer: nn.Module, given: Any, output: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
            outputs.append(output)
            return output.clone()  # an activation may write into it

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        losses = F.cross_entropy(net(batch.inputs), batch.targets, reduction="none")
        for hook in hooks:
            hook.remove()
        directions = [tangents(out.shape, "gaussian", draw, dtype=torch.float64) for out in outputs]
        slopes = sum(
            (g * u).flatten(1).sum(1)
            for g, u in zip(torch.autograd.grad(losses.sum(), outputs, retain_graph=True), directions, strict=True)
        )
        assert isinstance(slopes, Tensor)
        weighted = [u * slopes.view(-1, *[1] * (u.ndim - 1)) / len(slopes) for u in directions]
        made = [
            torch.autograd.grad(out, list(layer.parameters()), w, retain_graph=True)
            for layer, out, w in zip(layers, outputs, weighted, strict=True)
        ]
        wanted += torch.cat([g.flatten() for gradients in made for g in gradients]) / 2
    assert torch.allclose(found, wanted, atol=1e-10)


def test_perturbed_activities_are_unbiased() -> None:
    net, batch = _perceptron(4)
    g = _true(net, batch)
    rule = _attached(net, batch, perturb="activities")
    draws = torch.stack([_flat(rule, batch) for _ in range(100)])
    assert bool(((draws.mean(0) - g).abs() <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all())


def test_one_sample_has_p_times_less_noise_under_perturbed_activities() -> None:
    """A layer of p inputs and q outputs alone: (q + 1) against (p q + 1) times the gradient's square (Gaussian)."""
    net = Blocks({"only": nn.Linear(20, 3, bias=False)}, readout=nn.Linear(3, 3)).double()
    assert net.readout is not None
    net.readout.requires_grad_(False)
    batch = Batch(torch.randn(1, 20).double(), torch.zeros(1, dtype=torch.int64))
    weight = net[0].weight
    loss = F.cross_entropy(net(batch.inputs), batch.targets)
    [g] = torch.autograd.grad(loss, [weight])
    for perturb, wanted in (("weights", 20 * 3 + 1), ("activities", 3 + 1)):
        rule = _attached(net, batch, perturb=perturb)
        made = [(update.gradients or {})[weight] for _ in range(60) for update in rule.updates(batch)]
        errors = torch.stack([((estimated - g) ** 2).sum() / (g**2).sum() for estimated in made])
        assert abs(errors.mean() - wanted) < 4 * errors.std() / len(errors) ** 0.5


def test_statistics_move_once_and_are_those_of_a_plain_pass() -> None:
    nets = []
    for count in (0, 1, 4):
        torch.manual_seed(0)
        net, batch = _normalised()
        if count:
            list(_attached(net, batch, tangents=count, chunk=3).updates(batch))
        else:
            net(batch.inputs)
        nets.append(net.state_dict())
    for name in ("0.only.1.running_mean", "0.only.1.running_var", "0.only.1.num_batches_tracked"):
        key = next(key for key in nets[0] if key.endswith(name.rpartition(".")[2]))
        assert torch.equal(nets[0][key], nets[1][key])
        assert torch.equal(nets[0][key], nets[2][key])


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_directions_share_their_dropout_masks(perturb: Any) -> None:
    """Whether they pass together or one by one; the next step has other masks."""
    losses, made = [], []
    for chunk in (None, 1):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.ReLU())
        net, batch = Blocks({"only": block}, readout=nn.Linear(50, 3)).double(), _perceptron()[1]
        rule = _attached(net, batch, tangents=4, chunk=chunk, perturb=perturb)
        [one], [two] = list(rule.updates(batch)), list(rule.updates(batch))
        losses.append((one.loss, two.loss))
        made.append(torch.cat([g.flatten() for g in (one.gradients or {}).values()]))
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    assert torch.allclose(made[0], made[1], atol=1e-12)


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_every_operation_of_an_update_is_known(perturb: Any) -> None:
    net, batch = _perceptron()
    assert measure_update(_attached(net, batch, perturb=perturb, tangents=2), batch).uncounted == ()


def test_nothing_is_kept_for_a_backward_pass() -> None:
    """Peak bytes are flat in depth under perturbed weights; perturbed activities keep what their layers read."""
    batch = Batch(torch.randn(8, 16), torch.arange(8) % 3)
    peaks = {
        perturb: [
            measure_update(_attached(mlp((16,), 3, (16,) * depth), batch, perturb=perturb), batch).activation_peak_bytes
            for depth in (4, 32)
        ]
        for perturb in ("weights", "activities")
    }
    assert peaks["weights"][0] == peaks["weights"][1]
    assert peaks["activities"][1] > 6 * peaks["activities"][0]


@pytest.mark.parametrize(("chunk", "chunks"), [(None, 1), (3, 2), (1, 4)])
def test_operations_are_a_pass_for_every_chunk_and_two_products_for_every_direction(
    chunk: int | None, chunks: int
) -> None:
    batch = Batch(torch.randn(8, 16), torch.arange(8) % 3)
    net = Blocks({"only": nn.Sequential(nn.Linear(16, 16), nn.ReLU())}, readout=nn.Linear(16, 16))
    cost = measure_update(_attached(net, batch, tangents=4, chunk=chunk), batch)
    product = 2 * 16 * 16
    first, second = 2 * chunks + 4, chunks + 2 * 4  # the first layer's input has a derivative of zeros, once per chunk
    mean = 2 * 4 * sum(p.numel() for p in net.parameters()) / len(batch.inputs)
    assert cost.flops == (first + second) * product + mean


def test_frozen_weights_rest() -> None:
    net, batch = _perceptron()
    next(iter(net.members.values())).requires_grad_(False)
    learns = {id(p) for p in net.parameters() if p.requires_grad}
    for perturb in ("weights", "activities"):
        [update] = list(_attached(net, batch, perturb=perturb).updates(batch))
        assert {id(p) for p in update.gradients or {}} == learns


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class _Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: torch.cdist(x, x @ torch.eye(6))[:, :1].expand(-1, 6), "cdist"),
        (_NoForwardMode.apply, "jvp"),
    ],
)
def test_an_operation_without_a_forward_mode_derivative_is_named(function: Any, words: str) -> None:
    net = Blocks({"odd": _Calls(function)}, readout=nn.Linear(6, 3))
    with pytest.raises(ValueError, match=f"forward-mode derivative of every operation.*{words}"):
        _attached(net, Batch(torch.randn(4, 6), torch.arange(4) % 3))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.memory(x.unflatten(1, (2, 3)))[0][:, -1]
        return last


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="elsewhere an LSTM runs plain operations")
@pytest.mark.parametrize("settings", [{}, {"losses": "local"}, {"guess": "local", "perturb": "activities"}])
def test_a_recurrent_layer_is_named_with_what_helps(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Blocks({"first": nn.Linear(6, 6), "second": _Recurrent(), "third": nn.Linear(6, 6)}, readout=nn.Linear(6, 3))
    batch = Batch(torch.randn(4, 6), torch.arange(4) % 3)
    words = (
        r"rnn\S* has none .*, and is run in block 'second' by 'memory' \(LSTM\) .*flags\(enabled=False\).*nn\.Linear"
    )
    hooks = [len(part._forward_hooks) for part in net.modules()]
    with pytest.raises(ValueError, match=words):
        _attached(net, batch, **settings)
    assert hooks == [len(part._forward_hooks) for part in net.modules()]
    with torch.backends.mkldnn.flags(enabled=False):
        for update in _attached(net, batch, **settings).updates(batch):
            assert update.gradients is None or all(g.isfinite().all() for g in update.gradients.values())


class _Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        made: Tensor = self.layer(x)
        return made + x.add_(1)


class _Merges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x.reshape(-1, 3))
        return made.reshape(-1, 6)


class _Mixes(_Calls):
    def __init__(self) -> None:
        super().__init__(lambda x: x - x.mean(0))


class _Ties(_Calls):
    """A decoder with the encoder's weight."""

    def __init__(self) -> None:
        super().__init__(lambda x: F.linear(torch.tanh(x), self.layer.weight.T))


class _Bypasses(_Calls):
    def __init__(self) -> None:
        super().__init__(torch.relu)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_Overwrites, "what the layer '.*layer' has read is written into afterwards"),
        (_Merges, "the layer '.*layer' puts out rows that are not one per sample"),
        (_Mixes, "for one sample changes the outputs of another"),
        (_Ties, "the weight '.*layer.weight' is used by more than its linear or convolutional layers"),
        (_Bypasses, "the layer '.*layer' is not called as a module"),
    ],
)
def test_layers_whose_gradient_would_be_another_are_refused(make: Callable[[], nn.Module], words: str) -> None:
    net, batch = Blocks({"odd": make()}, readout=nn.Linear(6, 3)), Batch(torch.randn(4, 6), torch.arange(4) % 3)
    with pytest.raises(ValueError, match=words):
        _attached(net, batch, perturb="activities")
    assert _flat(_attached(net, batch), batch).isfinite().all()  # the way that is named can


class _Remembers(nn.Module):
    """Keeps state in buffers: one that it writes into, one that it puts anew."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        if self.training:
            self.count += 1
            self.mean = 0.9 * self.mean + 0.1 * made.mean(0)
        return made


@pytest.mark.parametrize("perturb", ["weights", "activities"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_state_moves_once_however_many_directions_pass(perturb: Any, chunk: int | None) -> None:
    net = Blocks({"only": _Remembers()}, readout=nn.Linear(6, 3))
    batch = Batch(torch.randn(4, 6), torch.arange(4) % 3)
    rule = _attached(net, batch, perturb=perturb, tangents=3, chunk=chunk)
    assert not net[0].count
    list(rule.updates(batch))
    assert net[0].count == 1
    assert torch.allclose(net[0].mean, 0.1 * net[0].layer(batch.inputs).mean(0), atol=1e-6)


def test_what_only_training_does_is_found_before_training() -> None:
    block = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"forward-mode derivative of every operation, and .*out has none"):
        _attached(Blocks({"odd": block}, readout=nn.Linear(6, 3)), _perceptron()[1]._replace(inputs=torch.randn(8, 6)))


def test_operations_that_take_one_direction_at_a_time_need_chunks_of_one() -> None:
    net = Blocks({"odd": nn.Sequential(nn.Linear(6, 6), nn.RReLU())}, readout=nn.Linear(6, 3))
    batch = Batch(torch.randn(4, 6), torch.arange(4) % 3)
    with pytest.raises(ValueError, match=r"several directions cannot pass at once.*set chunk=1"):
        _attached(net, batch, tangents=3)
    assert _flat(_attached(net, batch, tangents=3, chunk=1), batch).isfinite().all()


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_perturbed_activities_know_convolutions_of_any_dimension(kind: Any) -> None:
    places = [4] * (1 if kind is nn.Conv1d else 3)
    block = nn.Sequential(kind(2, 3, 3), nn.ReLU(), nn.Flatten())
    batch = Batch(torch.randn(4, 2, *places), torch.arange(4) % 3)
    net = Blocks({"only": block}, readout=nn.LazyLinear(3))
    net(batch.inputs)
    assert _flat(_attached(net, batch, perturb="activities"), batch).isfinite().all()


def test_batch_normalisation_that_rests_lets_samples_be() -> None:
    frozen = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).requires_grad_(False)
    net = Blocks({"frozen": frozen, "only": nn.Linear(6, 5)}, readout=nn.Linear(5, 3))
    batch = Batch(torch.randn(4, 6), torch.arange(4) % 3)
    rule = _attached(net, batch, perturb="activities")
    list(rule.updates(batch))
    frozen.requires_grad_(True)
    with pytest.raises(ValueError, match="through which samples see one another"):
        list(rule.updates(batch))


@pytest.mark.parametrize("settings", [{"tangents": 4}, {"perturb": "activities"}])
def test_autocast_leaves_estimates_in_the_precision_of_the_weights(settings: dict[str, Any]) -> None:
    block = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten())
    net, batch = Blocks({"only": block}, readout=nn.Linear(12, 3)), Batch(torch.randn(4, 1, 4, 4), torch.arange(4) % 3)
    rule = _attached(net, batch, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [update] = list(rule.updates(batch))
        v, g = torch.randn(6, 10), torch.randn(10)
        projected = estimate(v, v.mv(g).float(), "projection")
    assert {gradient.dtype for gradient in (update.gradients or {}).values()} == {torch.float32}
    assert projected.dtype == torch.float32


def test_low_precision_does_not_spoil_the_projection() -> None:
    v = tangents((8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    g = torch.linspace(1, 2, 8)
    weights = torch.linalg.solve(v.T.double(), g.double())
    found = estimate(v, v.double() @ g.double(), "projection").double()
    rounded = weights.bfloat16().double() @ v.double()
    assert (found - g).norm() < 3 * (rounded - g).norm() + 0.05


def test_the_widest_of_several_precisions_is_drawn_in() -> None:
    net = Blocks({"only": nn.Linear(6, 5).bfloat16()}, readout=nn.Linear(5, 3))
    assert net.readout is not None
    net.readout.register_forward_pre_hook(lambda layer, given: (given[0].float(),))
    batch = Batch(torch.randn(4, 6).bfloat16(), torch.arange(4) % 3)
    assert _flat(_attached(net, batch), batch).dtype == torch.float32


def test_what_cannot_be_learned_is_refused() -> None:
    net, batch = _perceptron()
    with pytest.raises(ValueError, match="tangents is 999, and the network has 71 weights that learn"):
        _attached(net, batch, tangents=999, combine="projection")
    with pytest.raises(ValueError, match=r"is an nn\.BatchNorm1d, through which samples see one another"):
        _attached(*_normalised(), perturb="activities")
    weighted = TaskInfo(
        batch._replace(inputs=batch.inputs[:2], targets=batch.targets[:2]),
        3,
        nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 2.0]).double()),
    )
    with pytest.raises(ValueError, match=r"the mean of the samples' losses is .* and the loss of the batch"):
        ForwardGradient(perturb="activities").attach(net, weighted)
    tokens, images = _tokens()
    with pytest.raises(ValueError, match=r"belongs to no linear or convolutional layer.*use perturb=weights"):
        _attached(tokens, images, perturb="activities")
    for settings, words in (
        ({"perturb": "both"}, "perturb is 'both', expected weights, activities"),
        ({"noise": "pink"}, "noise is 'pink', expected gaussian, rademacher, sphere"),
        ({"tangents": 0}, "tangents is 0, expected a whole number of at least 1"),
        ({"chunk": 0}, "chunk is 0, expected"),
        ({"perturb": "activities", "combine": "projection"}, "only combine=mean"),
        ({"perturb": "activities", "noise": "sphere"}, "noise is gaussian or rademacher there"),
        ({"perturb": "activities", "chunk": 2}, "leave chunk out"),
    ):
        with pytest.raises(ValueError, match=words):
            ForwardGradient(**settings)
    with pytest.raises(ValueError, match="5 directions are more than the 3 entries"):
        estimate(torch.ones(5, 3), torch.ones(5), "projection")


@pytest.mark.parametrize("norm", [nn.LayerNorm(6, elementwise_affine=False), nn.GroupNorm(2, 6, affine=False)])
def test_who_watches_changes_nothing(norm: nn.Module) -> None:
    """PyTorch's derivatives of normalisation round in another order once something looks at its operations."""
    net = Blocks({"first": nn.Sequential(nn.Linear(6, 6), norm, nn.ReLU()), "second": nn.Linear(6, 5)}, nn.Linear(5, 3))
    batch = Batch(torch.randn(16, 6), torch.arange(16) % 3)
    result = audit(_attached(net, batch, perturb="activities"), batch, batches=2, warmup=1)
    assert result.confirmed, result.reason
