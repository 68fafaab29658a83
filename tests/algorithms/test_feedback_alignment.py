"""The feedback alignment family on whole networks: the properties of its spec, and what it refuses."""

from __future__ import annotations

import copy
from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from locallearn.algorithms.backprop import Backprop
from locallearn.algorithms.base import TaskInfo
from locallearn.algorithms.feedback_alignment import FeedbackAlignment, Mode
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional import feedback_alignment as fa
from locallearn.nets import Blocks, cnn, mlp
from locallearn.testing import plain_loop
from tests.algorithms.chains import CLASSES, IMAGES, ROWS, attached, batch_of, gradients_of

MODES = get_args(Mode)
CHAINS = [mode for mode in MODES if mode != "dfa"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel"
)  # torch's own, of the plain layer


NETS = ("mlp", "cnn", "resnet", "odd")


def _tie(algorithm: FeedbackAlignment) -> None:
    """Make every B equal to its W; where B is made of W's signs, make W such that it is."""
    generator = torch.Generator().manual_seed(algorithm.seed)
    for name, layer in algorithm.layers.items():
        weight, held = algorithm.blocks.get_parameter(layer.parameter).data, algorithm.weights(name)
        if algorithm.mode == "usf":
            weight.copy_(fa.sign_symmetric(weight))
        elif algorithm.mode == "brsf":
            weight.copy_(fa.sign_magnitude(weight, fa.xavier_uniform(weight, generator)))
        else:
            (held.learned if algorithm.mode == "kolen_pollack" else held.fixed).data.copy_(weight)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=0, atol=1e-12) for n in one)


# -- the chain --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", CHAINS)
@pytest.mark.parametrize("net", NETS)
def test_feedback_equal_to_the_weights_is_backpropagation(net: str, mode: Mode) -> None:
    """Property 1, for every parameter, in every mode that has a chain."""
    algorithm = attached(net, FeedbackAlignment(mode, mirror_every=2))
    if mode == "weight_mirror":
        algorithm.batches_seen = 1  # no mirror step before the one that is looked at
    untied = gradients_of(copy.deepcopy(algorithm), batch_of(net))
    _tie(algorithm)
    plain = attached(copy.deepcopy(algorithm.blocks), Backprop(), batch_of(net))
    wanted = gradients_of(plain, batch_of(net))
    assert _same(gradients_of(algorithm, batch_of(net)), wanted)
    assert not _same(untied, wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", NETS)
def test_the_output_layer_learns_as_in_backpropagation(net: str, mode: Mode) -> None:
    """Property 2, whatever B is; a hidden layer does not."""
    wanted = gradients_of(attached(net, Backprop()), batch_of(net))
    got = gradients_of(attached(net, FeedbackAlignment(mode)), batch_of(net))
    last = [name for name in got if name.startswith("readout.") and not name.startswith("readout.0")]
    assert last
    assert _same({name: got[name] for name in last}, {name: wanted[name] for name in last})
    first = next(iter(got))
    assert not torch.allclose(got[first], wanted[first], rtol=1e-2)


def test_with_one_hidden_layer_direct_feedback_is_feedback_alignment() -> None:
    gradients = []
    for mode in ("fa", "dfa"):
        torch.manual_seed(1)
        algorithm = attached(mlp((12,), CLASSES, (10,)), FeedbackAlignment(mode))
        algorithm.weights("readout").fixed.copy_(torch.linspace(-1, 1, 30).reshape(3, 10))
        gradients.append(gradients_of(algorithm, ROWS))
    assert _same(*gradients)
    assert gradients[0]["members.layer1.0.weight"].abs().max() > 1e-3


def test_direct_feedback_is_the_slow_loop() -> None:
    """Two hidden layers by hand: δ_l = (δ_L B) ⊙ relu'."""
    algorithm = attached("mlp", FeedbackAlignment("dfa"))
    got = gradients_of(algorithm, ROWS)
    values = {name: p.detach() for name, p in algorithm.blocks.named_parameters()}
    x = [ROWS.inputs]
    for layer in ("members.layer1.0", "members.layer2.0"):
        x.append(F.relu(x[-1] @ values[f"{layer}.weight"].T + values[f"{layer}.bias"]))
    scores = x[2] @ values["readout.weight"].T + values["readout.bias"]
    error = (scores.softmax(1) - F.one_hot(ROWS.targets, CLASSES)) / len(scores)
    first = (error @ algorithm.weights("layer2.0").fixed) * (x[1] > 0)
    second = (error @ algorithm.weights("readout").fixed) * (x[2] > 0)
    wanted = {
        "members.layer1.0.weight": first.T @ x[0],
        "members.layer1.0.bias": first.sum(0),
        "members.layer2.0.weight": second.T @ x[1],
        "members.layer2.0.bias": second.sum(0),
        "readout.weight": error.T @ x[2],
        "readout.bias": error.sum(0),
    }
    assert _same(got, wanted)


def test_feedback_alignment_is_the_slow_loop() -> None:
    algorithm = attached("mlp", FeedbackAlignment("fa"))
    got = gradients_of(algorithm, ROWS)
    values = {name: p.detach() for name, p in algorithm.blocks.named_parameters()}
    x1 = F.relu(ROWS.inputs @ values["members.layer1.0.weight"].T + values["members.layer1.0.bias"])
    x2 = F.relu(x1 @ values["members.layer2.0.weight"].T + values["members.layer2.0.bias"])
    scores = x2 @ values["readout.weight"].T + values["readout.bias"]
    error = (scores.softmax(1) - F.one_hot(ROWS.targets, CLASSES)) / len(scores)
    second = (error @ algorithm.weights("readout").fixed) * (x2 > 0)
    first = (second @ algorithm.weights("layer2.0").fixed) * (x1 > 0)
    torch.testing.assert_close(got["members.layer1.0.weight"], first.T @ ROWS.inputs, rtol=0, atol=1e-12)
    torch.testing.assert_close(got["members.layer2.0.weight"], second.T @ x1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_change_after_the_forward_pass_change_no_gradient(mode: Mode) -> None:
    gradients = []
    for spoil in (False, True):
        algorithm = attached("odd", FeedbackAlignment(mode))
        (update,) = algorithm.updates(IMAGES)
        for p in algorithm.blocks.parameters():
            if spoil and p.ndim > 1:
                p.data.normal_()
        update.backward()
        gradients.append([p.grad for p in algorithm.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "brsf"])
def test_a_layer_that_runs_twice_gets_the_sum(mode: Mode) -> None:
    """One weight in two places has one B (but for brsf, which draws every time); direct feedback refuses it."""
    shared = nn.Linear(10, 10)
    net = Blocks(
        {"in": nn.Linear(12, 10), "twice": nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh())}, nn.Linear(10, CLASSES)
    )
    algorithm = FeedbackAlignment(mode, mirror_every=2)
    if mode == "dfa":
        with pytest.raises(ValueError, match=r"layer 'twice.0' runs 2 times"):
            attached(net, algorithm)
        return
    attached(net, algorithm)
    algorithm.batches_seen = 1
    _tie(algorithm)
    wanted = gradients_of(attached(copy.deepcopy(algorithm.blocks), Backprop()), ROWS)
    assert _same(gradients_of(algorithm, ROWS), wanted)
    if mode == "kolen_pollack":
        (update,) = algorithm.updates(ROWS)
        update.backward()
        assert torch.equal(algorithm.weights("twice.0").learned.grad, shared.weight.grad)


def test_frozen_layers_stay_and_pass_the_error_on() -> None:
    algorithm = attached("mlp", FeedbackAlignment("fa"))
    whole = gradients_of(algorithm, ROWS)
    for p in algorithm.blocks[1].parameters():
        p.requires_grad_(False)
    part = gradients_of(algorithm, ROWS)
    assert whole.keys() - part.keys() == {"members.layer2.0.weight", "members.layer2.0.bias"}
    assert all(torch.equal(part[name], whole[name]) for name in part)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_keeps_halves_and_gives_gradients_of_full_precision(mode: Mode) -> None:
    batch = IMAGES._replace(inputs=IMAGES.inputs.float())
    torch.manual_seed(0)
    algorithm = FeedbackAlignment(mode)
    info = TaskInfo(Batch(batch.inputs[:2], batch.targets[:2]), CLASSES, F.cross_entropy)
    algorithm.attach(cnn((4, 8, 8), CLASSES, (5, 6)), info)
    full = gradients_of(copy.deepcopy(algorithm), batch)
    kept: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    updates = algorithm.updates(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        update = next(updates)
    update.backward()
    assert torch.bfloat16 in kept
    for name, p in algorithm.blocks.named_parameters():
        assert p.grad is not None
        assert p.grad.dtype is torch.float32
        assert (p.grad - full[name]).norm() < 0.1 * full[name].norm(), name


def test_autocast_takes_what_comes_back_in_full_precision() -> None:
    class Widen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    net = Blocks({"one": nn.Sequential(nn.Linear(12, 8), Widen())}, nn.Linear(8, CLASSES))
    batch = ROWS._replace(inputs=ROWS.inputs.float())
    algorithm = FeedbackAlignment()
    algorithm.attach(net, TaskInfo(batch, CLASSES, F.cross_entropy))
    with torch.autocast("cpu", torch.bfloat16):
        update = next(algorithm.updates(batch))
    update.backward()
    assert all(p.grad.dtype is torch.float32 and p.grad.any() for p in net.parameters())


# -- learned feedback -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("net", ["mlp", "resnet", "odd"])
def test_kolen_pollack_wears_the_difference_away(net: str) -> None:
    """Property 4: W - B = λᵗ (W₀ - B₀), λ = 1 - η · decay."""
    algorithm = attached(net, FeedbackAlignment("kolen_pollack"))

    def gaps() -> list[Tensor]:
        return [(algorithm._weight(name) - algorithm.path(name)).detach().clone() for name in algorithm.layers]

    before = gaps()
    plain_loop(algorithm, [batch_of(net)] * 7, partial(torch.optim.SGD, lr=0.1, weight_decay=0.5))
    assert before
    for now, start in zip(gaps(), before, strict=True):
        torch.testing.assert_close(now, (1 - 0.1 * 0.5) ** 7 * start, rtol=0, atol=1e-13)
    assert not torch.allclose(algorithm.path("readout" if net == "mlp" else "readout.2"), before[-1])


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_the_mirror_comes_to_show_the_weights(net: str) -> None:
    algorithm = attached(net, FeedbackAlignment("weight_mirror", mirror_lr=0.05))
    many = Batch(
        batch_of(net).inputs.repeat(20, *[1] * (batch_of(net).inputs.ndim - 1)), batch_of(net).targets.repeat(20)
    )
    plain_loop(algorithm, [many] * 100, partial(torch.optim.SGD, lr=0.0))
    for name, figures in algorithm.diagnostics().items():
        assert figures["weight_angle"] < 15, name
        assert figures["norm_ratio"] == pytest.approx(1.0, abs=0.1), name


def test_the_mirror_looks_when_it_is_due_and_goes_on_where_it_was() -> None:
    algorithm = attached("mlp", FeedbackAlignment("weight_mirror", mirror_every=3))
    still = partial(torch.optim.SGD, lr=0.0)
    seen = []
    for _ in range(7):
        before = algorithm.path("readout").clone()
        plain_loop(algorithm, [ROWS], still)
        seen.append(not torch.equal(algorithm.path("readout"), before))
        resumed = attached("mlp", FeedbackAlignment("weight_mirror", mirror_every=3))
        resumed.load_state_dict(algorithm.state_dict())
        algorithm = resumed
    assert seen == [True, False, False, True, False, False, True]


def test_batchwise_magnitudes_are_drawn_for_every_batch_and_signs_follow() -> None:
    for mode, moves in (("brsf", True), ("frsf", False), ("usf", False)):
        algorithm = attached("mlp", FeedbackAlignment(mode))
        first, second = (gradients_of(algorithm, ROWS)["members.layer1.0.weight"] for _ in range(2))
        assert torch.equal(first, second) is not moves
        weight = algorithm._weight("layer2.0")
        assert torch.equal(algorithm.path("layer2.0").sign(), weight.sign())
        weight.data.neg_()
        assert torch.equal(algorithm.path("layer2.0").sign(), weight.sign())


# -- what is reported -------------------------------------------------------------------------------------------------
def test_figures_name_every_layer_but_the_first() -> None:
    algorithm = attached("resnet", FeedbackAlignment("fa"))
    figures = algorithm.diagnostics()
    assert list(figures) == [
        "stage1_1.conv1",
        "stage1_1.conv2",
        "stage2_1.conv1",
        "stage2_1.conv2",
        "stage2_1.shortcut.0",
        "readout.2",
    ]
    assert all(set(values) == {"weight_angle", "norm_ratio"} for values in figures.values())
    weight, held = algorithm._weight("readout.2"), algorithm.weights("readout.2").fixed
    cosine = F.cosine_similarity(weight.flatten(), held.flatten(), dim=0).item()
    assert figures["readout.2"]["weight_angle"] == pytest.approx(torch.rad2deg(torch.tensor(cosine).acos()).item())
    assert figures["readout.2"]["norm_ratio"] == pytest.approx((held.norm() / weight.norm()).item())
    assert attached("resnet", FeedbackAlignment("dfa")).diagnostics() == {}


def test_looking_at_the_figures_changes_nothing() -> None:
    algorithm = attached("mlp", FeedbackAlignment("brsf"))
    plain_loop(algorithm, [ROWS], partial(torch.optim.SGD, lr=0.1))
    twin = copy.deepcopy(algorithm)
    algorithm.diagnostics()
    assert _same(gradients_of(algorithm, ROWS), gradients_of(twin, ROWS))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_rule_says_of_itself(mode: Mode) -> None:
    algorithm = FeedbackAlignment(mode)
    assert algorithm.variant == mode
    assert (algorithm.linear_optimizer is not None) is (mode == "kolen_pollack")
    assert "error" in algorithm.broadcast
    assert len({FeedbackAlignment(other).broadcast for other in MODES}) == len(MODES)
    result = audit(attached("mlp", algorithm), ROWS)
    assert result.confirmed, result.reason


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [("fa", 10 * 9 + 9 * CLASSES), ("kolen_pollack", 10 * 9 + 9 * CLASSES), ("dfa", CLASSES * (10 + 9)), ("usf", 0)],
)
def test_feedback_weights_count_as_added_whether_fixed_or_learned(mode: Mode, wanted: int) -> None:
    assert attached("mlp", FeedbackAlignment(mode)).added_parameters == wanted


def test_costs_are_what_the_counter_sees() -> None:
    widths = (12, 10, 9, CLASSES)
    for mode, wanted in (
        ("fa", fa.update_flops(widths)),
        ("usf", fa.update_flops(widths)),
        ("kolen_pollack", fa.update_flops(widths)),
        ("dfa", fa.update_flops(widths, direct=True)),
        ("weight_mirror", fa.update_flops(widths, mirror_every=1)),
    ):
        assert measure_update(attached("mlp", FeedbackAlignment(mode)), ROWS).flops == wanted
    for net in ("resnet", "odd"):
        plain = measure_update(attached(net, Backprop()), IMAGES)
        chain = measure_update(attached(net, FeedbackAlignment("fa")), IMAGES)
        assert chain.flops == plain.flops
        assert chain.activation_peak_bytes <= plain.activation_peak_bytes


# -- learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
def test_digits_are_learned(mode: Mode) -> None:
    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440].split(48), order[1440:]
    torch.manual_seed(0)
    algorithm = FeedbackAlignment(mode)
    info = TaskInfo(Batch(images[:2], labels[:2]), 10, F.cross_entropy)
    algorithm.attach(mlp((64,), 10, (60, 40)), info)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    plain_loop(algorithm, [Batch(images[rows], labels[rows]) for rows in train] * 12, sgd)
    with torch.no_grad():
        accuracy = (algorithm.eval().predict(images[test]).argmax(1) == labels[test]).float().mean().item()
    assert accuracy > 0.85


# -- refusals ---------------------------------------------------------------------------------------------------------
def _around(layer: nn.Module) -> Blocks:
    return Blocks({"one": nn.Linear(12, 12), "odd": layer}, nn.Linear(12, CLASSES))


class Taken(nn.Module):
    """The first output of a module that gives several."""

    def __init__(self, inner: nn.Module, copies: int = 1) -> None:
        super().__init__()
        self.inner = inner
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(*[x[:, None]] * self.copies)[0][:, 0]
        return result


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            Taken(nn.MultiheadAttention(12, 2, batch_first=True), 3),
            r"'odd.inner.in_proj_weight' \(MultiheadAttention\)",
        ),
        (Taken(nn.LSTM(12, 12, batch_first=True)), r"'odd.inner.weight_ih_l0' \(LSTM\)"),
        (
            nn.Sequential(nn.Unflatten(1, (12, 1, 1)), nn.ConvTranspose2d(12, 12, 1), nn.Flatten()),
            r"'odd.1' \(ConvTranspose2d\)",
        ),
        (nn.Sequential(nn.Unflatten(1, (12, 1)), nn.Conv1d(12, 12, 1), nn.Flatten()), r"'odd.1' \(Conv1d\)"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(12, 12)), r"'odd.parametrizations.weight.original0'"),
    ],
    ids=["attention", "lstm", "transposed", "1-d", "weight norm"],
)
def test_what_the_error_would_pass_as_in_backpropagation_is_refused_by_name(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(_around(layer), FeedbackAlignment())


class Again(nn.Module):
    """Two layers whose activations are not kept but made again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return result


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the dry run without gradients
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused(reentrant: bool) -> None:
    """What is made again in the backward pass would be differentiated as in backpropagation."""
    if not reentrant and not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this PyTorch does not tell in the forward pass that something is checkpointed")
    net = _around(Again(reentrant))
    with pytest.raises(ValueError, match=r"layer 'odd\.inner\.0' .*runs once more in the backward pass"):
        attached(net, FeedbackAlignment())
    assert all(p.grad is None for p in net.parameters())


class Tied(nn.Module):
    """A layer whose weight is used a second time, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x).tanh(), self.inner.weight.T)


def test_a_weight_that_is_also_used_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the weight of layer 'odd\.inner' is also used outside of F\.linear"):
        attached(_around(Tied()), FeedbackAlignment())


class Attending(nn.Module):
    """Attention of one head, written with linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x.unflatten(1, (3, 4))).chunk(3, -1)
        result: Tensor = self.out(F.scaled_dot_product_attention(queries, keys, values)).flatten(1)
        return result


def test_attention_between_linear_layers_is_warned_of_and_carried() -> None:
    with pytest.warns(UserWarning, match=r"attention after layer 'odd\.qkv'"):
        algorithm = attached(_around(Attending()), FeedbackAlignment())
    assert list(algorithm.layers) == ["odd.qkv", "odd.out", "readout"]
    _tie(algorithm)
    mine = gradients_of(algorithm, ROWS)
    F.cross_entropy(algorithm.blocks(ROWS.inputs), ROWS.targets).backward()
    assert _same(mine, {name: p.grad for name, p in algorithm.blocks.named_parameters() if p.grad is not None})


def test_scales_of_normalisations_are_no_weights_that_carry_an_error() -> None:
    maps = nn.Sequential(nn.Unflatten(1, (3, 4)), nn.LayerNorm([3, 4]), nn.Flatten(), nn.Linear(12, 12))
    algorithm = attached(_around(maps), FeedbackAlignment())
    assert list(algorithm.layers) == ["odd.3", "readout"]


def test_other_misfits_are_named() -> None:
    with pytest.raises(ValueError, match="mode is 'dfb', expected one of fa, dfa"):
        FeedbackAlignment("dfb")  # type: ignore[arg-type]
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="mirror_lr is"):
            FeedbackAlignment(mirror_lr=rate)
    with pytest.raises(ValueError, match="mirror_every is 0"):
        FeedbackAlignment(mirror_every=0)
    with pytest.raises(ValueError, match="this network has no readout"):
        attached(Blocks({"only": nn.Linear(12, CLASSES)}), FeedbackAlignment())
    with pytest.raises(ValueError, match="layer 'odd' is lazy"):
        FeedbackAlignment().attach(_around(nn.LazyLinear(12)), TaskInfo(ROWS, CLASSES, F.cross_entropy))


def test_a_table_of_rows_learns_as_in_backpropagation_because_no_error_passes_it() -> None:
    words = nn.Sequential(nn.Embedding(5, 12), nn.Flatten())
    batch = Batch(torch.arange(5)[:, None], torch.arange(5) % CLASSES)
    net = Blocks({"words": words, "next": nn.Linear(12, 12)}, nn.Linear(12, CLASSES))
    algorithm = FeedbackAlignment()
    algorithm.attach(net.double(), TaskInfo(batch, CLASSES, F.cross_entropy))
    assert list(algorithm.layers) == ["next", "readout"]
    _tie(algorithm)
    mine = gradients_of(algorithm, batch)
    F.cross_entropy(net(batch.inputs), batch.targets).backward()
    assert _same(mine, {name: p.grad for name, p in net.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("mode", ["dfa", "brsf", "weight_mirror"])
def test_a_loss_made_anew_has_the_same_draws_and_takes_no_more(mode: Mode) -> None:
    """For optimizers that ask several times in one step: the same field of directions all along the step."""
    algorithm, twin = (attached("mlp", FeedbackAlignment(mode)) for _ in range(2))
    for _ in range(2):
        (update,), (other,) = algorithm.updates(ROWS), twin.updates(ROWS)
        update.backward()
        other.backward()
        first = [p.grad.clone() for p in algorithm.blocks.parameters() if p.grad is not None]
        algorithm.zero_grad()
        assert update.again is not None
        update.again().backward()
        second = [p.grad for p in algorithm.blocks.parameters() if p.grad is not None]
        assert len(first) > 3
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        algorithm.zero_grad()
        twin.zero_grad()
    assert all(
        torch.equal(a, b)
        for a, b in zip(algorithm.get_extra_state().values(), twin.get_extra_state().values(), strict=True)
    )
