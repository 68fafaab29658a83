"""``ll.localize``: which targets and losses a network of one's own is trained by, and what is said of others."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallearn as ll
from locallearn import algorithms
from tests.local.nets import SGD, X, mlp


def test_targets_are_looked_at() -> None:
    local = ll.localize(mlp(), ll.MonoForward(), cuts=["0"], example=torch.randn(4, 5))
    inputs, labels = torch.randn(4, 5), torch.arange(4) % 3
    assert local.step(inputs, labels.int()).keys() == {"0", "2"}
    for wrong, message in (
        (labels.view(-1, 1), r"labels have shape \(4, 1\), expected class ids of shape \(N,\)"),
        ([0, 1, 2, 0], r"targets are a list, expected a tensor"),
        (labels[:0], r"this batch is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            local.step(inputs, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels go from 0 to 7"):
        local.step(inputs, torch.tensor([0, 7, 1, 2]), rows=torch.arange(2))


class _Segments(nn.Module):
    """Gives a dict of maps of the input's size: the size crosses every border, and no single layer is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.head(F.relu(self.b(F.relu(self.a(x)))))
        return {"out": F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)}


def test_segmentation_is_trained_by_the_networks_own_output_and_refused_by_rules_of_one_class_per_sample() -> None:
    x, y = X[:4, :, :8, :8], torch.arange(4 * 64).view(4, 8, 8) % 5
    net = _Segments()
    twin = copy.deepcopy(net)
    local = ll.localize(net, ll.Backprop(), cuts=3, example=x, optimizer=SGD)
    assert local.cuts == ("a", "b")
    optimizer = SGD(twin.parameters())
    F.cross_entropy(twin(x)["out"], y).backward()
    optimizer.step()
    local.step(x, y)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(local.predict(x), net(x)["out"])
    for rule in (ll.MonoForward(), ll.DeepSupervision(), ll.LocalHeads(loss="predsim")):
        with pytest.raises(ValueError, match=r"one class per sample, and these labels have shape \(N, 8, 8\)"):
            ll.localize(_Segments(), rule, cuts=["a"], example=x)


def _rules() -> list[type[ll.Algorithm]]:
    made = [getattr(algorithms, name) for name in algorithms.__all__]
    known = [rule for rule in made if isinstance(rule, type) and issubclass(rule, ll.Algorithm)]
    return [
        rule for rule in known if not inspect.isabstract(rule) and rule not in (ll.Algorithm, algorithms.ForwardGNN)
    ]


_OF_PLACES = (
    *(ll.Backprop, algorithms.BackpropL1, ll.FeedbackAlignment, ll.ProductFeedbackAlignment),
    *(ll.ForwardGradient, ll.ZerothOrder),
)


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: str(rule.__name__))
def test_every_rule_trains_labels_of_places_or_says_that_it_answers_with_one_class_per_sample(
    rule: type[ll.Algorithm],
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    x, y = X[:6, :, :5, :5], torch.arange(150).view(6, 5, 5) % 4
    make = partial(ll.localize, net, rule(), cuts=["1"], example=x, targets=y, optimizer=SGD)
    if rule not in _OF_PLACES:
        with pytest.raises(ValueError, match=r"one class per sample, and these labels have shape \(N, 5, 5\)"):
            make()
        return
    local = make()
    local.step(x, y)
    assert local.predict(x).shape == (6, 4, 5, 5)


def test_ridge_is_told_that_targets_are_not_as_many_as_they_were() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)), X[:6, :, :5, :5]
    local = ll.localize(net, ll.Ridge(), cuts=["1"], example=x, loss=lambda o, t: (o.mean(1) - t).square().mean())
    with pytest.raises(ValueError, match="a sample's targets are 9 numbers and the network's output is 36"):
        local.step(x, torch.zeros(6, 3, 3))


class _Tokens(nn.Module):
    """Scores for every token, classes last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(ids))))


def _of_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=-100)


def test_a_target_per_token_goes_through_the_users_own_loss() -> None:
    ids, targets = torch.arange(40).view(8, 5) % 9, torch.arange(40).view(8, 5) % 7
    for classes in (None, True, False):
        torch.manual_seed(0)
        net = _Tokens()
        twin = copy.deepcopy(net)
        local = ll.localize(
            net, ll.Backprop(), ["embed"], example=ids, targets=targets, loss=_of_tokens, classes=classes, optimizer=SGD
        )
        assert local.task.outputs == (5 if classes is False else 7)
        optimizer = SGD(twin.parameters())
        some = torch.where(targets == 3, -100, targets)
        _of_tokens(twin(ids), some).backward()
        optimizer.step()
        local.step(ids, some)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    for rule in (ll.algorithms.ZerothOrder(), ll.algorithms.ForwardGradient()):
        net = _Tokens()
        before = net.out.weight.detach().clone()
        ll.localize(net, rule, ["embed"], example=ids, targets=targets, loss=_of_tokens, optimizer=SGD).step(
            ids, targets
        )
        assert not torch.equal(before, net.out.weight)


def test_targets_that_were_made_up_are_said_to_be() -> None:
    ids, targets = torch.arange(40).view(8, 5) % 9, torch.arange(40).view(8, 5) % 7
    for given, message in (
        (
            {"loss": _of_tokens},
            r"^loss= fails on outputs of shape \(N, 5, 7\) and targets .* made up .*: give .* as targets=",
        ),
        (
            {"targets": targets},
            r"^targets have shape \(N, 5\), and class ids .* have shape \(N, 7\): .*classes in dimension 1;",
        ),
        ({"targets": targets[:3], "loss": _of_tokens}, r"^the example has 8 samples, and targets have shape \(3, 5\)"),
        ({"targets": [1], "loss": _of_tokens}, r"^targets are a list, expected a tensor"),
        (
            {"targets": targets, "loss": lambda o, t: F.cross_entropy(o, t)},
            r"^loss= fails on outputs of shape \(N, 5, 7\) and the given targets of shape \(N, 5\), torch.int64",
        ),
        ({"targets": targets, "loss": lambda o, t: o}, r"gives a tensor of shape \(2, 5, 7\), expected .* one number"),
    ):
        with pytest.raises(ValueError, match=message):
            ll.localize(_Tokens(), ll.Backprop(), ["embed"], example=ids, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one class per sample, and these labels have shape \(N, 5\): use a rule"):
        ll.localize(_Tokens(), ll.MonoForward(), ["embed"], example=ids, targets=targets, loss=_of_tokens)
    with pytest.raises(ValueError, match=r"labels have shape \(N, 7\).*\(these labels were made up: without targets="):
        ll.localize(_Tokens(), ll.MonoForward(), ["embed"], example=ids)
    local = ll.localize(_Tokens(), ll.Backprop(), ["embed"], example=ids)
    with pytest.raises(
        ValueError, match=r"^labels have shape \(N, 5\), expected .* \(N, 7\): .* dimension 1 .* and targets=$"
    ):
        local.step(ids, targets)


@pytest.mark.parametrize("loss", [F.mse_loss, nn.L1Loss(), partial(F.huber_loss, delta=0.5), F.poisson_nll_loss])
def test_targets_that_fit_only_by_broadcasting_are_refused(loss: Any) -> None:
    net, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(6, 5)
    said = r"^targets have shape \(N,\), and \w+ compares them entry by entry with outputs of shape \(N, 1\): give"
    local = ll.localize(net, ll.Backprop(), cuts=1, example=x, loss=loss)
    with pytest.raises(ValueError, match=said):
        local.step(x, torch.rand(6))
    with pytest.raises(ValueError, match=said):
        ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=torch.rand(6), loss=loss)
    local = ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=torch.rand(6, 1), loss=loss)
    local.step(x, torch.rand(6, 1))
    with pytest.raises(ValueError, match=r"^targets have shape \(N, 3\), and"):
        local.step(x, torch.rand(6, 3))


class _Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


@pytest.mark.parametrize("given", [True, False], ids=["targets", "none"])
@pytest.mark.parametrize(
    ("label", "loss"),
    [
        (-100, F.cross_entropy),
        (255, partial(F.cross_entropy, ignore_index=255)),
        (255, nn.CrossEntropyLoss(ignore_index=255)),
    ],
    ids=["usual", "partial", "module"],
)
def test_labels_of_places_that_the_loss_leaves_out_are_no_class_ids(label: int, loss: Any, given: bool) -> None:
    torch.manual_seed(0)
    net, images = _Places(), torch.randn(4, 3, 5, 5)
    labels = torch.randint(4, (4, 5, 5))
    labels[:, :2] = label
    by_hand = copy.deepcopy(net)
    targets = {"targets": labels} if given else {}
    local = ll.localize(
        net,
        ll.Backprop(),
        cuts=["one"],
        example=images,
        loss=loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        **targets,
    )
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(2):
        local.step(images, labels)
        optimizer.zero_grad()
        loss(by_hand(images), labels).backward()
        optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(net.parameters(), by_hand.parameters(), strict=True))
    labels[0, 3, 3] = 77
    with pytest.raises(ValueError, match="to 77, expected class ids 0 to 3"):
        local.step(images, labels)
    with pytest.raises(ValueError, match=f"all labels of this batch are {label}, which the loss leaves out"):
        local.step(images, torch.full_like(labels, label))


def test_all_targets_of_the_example_say_whether_they_are_class_ids() -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(12, 8)
    numbers = torch.tensor([1, 3, 40, 2, 5, 9, 11, 0, 1, 2, 3, 60])

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.mean(1) - targets).square().mean()

    local = ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=numbers, loss=squares)
    assert local.task.classes is False
    local.step(x, numbers)
    with pytest.raises(
        ValueError, match=r"labels go from 0 to 60, expected class ids 0 to 4: .* a loss for them and classes=False"
    ):
        ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=numbers, classes=True)


def test_samples_that_the_loss_leaves_out_whole_have_to_be_left_out_of_the_batch() -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(12, 8)
    labels = torch.arange(12) % 5
    some = torch.where(torch.arange(12) == 7, -100, labels)
    told = "labels go from -100 to 4, .*; samples labelled -100, which the loss leaves out, have to be left out, too"
    for rule in (ll.Backprop(), ll.MonoForward()):
        with pytest.raises(ValueError, match=told):
            ll.localize(copy.deepcopy(net), rule, cuts=["1"], example=x, targets=some)
        local = ll.localize(copy.deepcopy(net), rule, cuts=["1"], example=x)
        with pytest.raises(ValueError, match=told):
            local.step(x, some)
        with pytest.raises(
            ValueError, match=r"labels go from -1 to 4, .* 5 outputs; .* give a loss for them and classes=False"
        ):
            local.step(x, torch.where(some < 0, -1, some))
        local.step(x[some >= 0], some[some >= 0])


def test_numbers_that_looked_like_class_ids_are_told_the_way_out() -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(12, 8)
    ratings = torch.arange(12) % 5

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.mean(1) - targets).square().mean()

    local = ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=ratings, loss=squares)
    with pytest.raises(
        ValueError, match=r"labels go from 3 to 7, .*; where they are numbers to predict, give classes=False"
    ):
        local.step(x, ratings + 3)
    with pytest.raises(ValueError, match=r"labels are torch.float32, .* give classes=False"):
        local.step(x, ratings + 0.5)
    local = ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=ratings, loss=squares, classes=False)
    local.step(x, ratings + 3)
    soft = torch.rand(12, 5).softmax(1)
    with pytest.raises(ValueError, match=r"labels are torch.float32, .* or probabilities, give classes=False"):
        ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=soft)
    ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=soft, classes=False).step(x, soft)


def test_a_sample_whose_labels_are_all_left_out_is_not_the_hardest() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 5, 5), torch.randint(4, (4, 5, 5))
    labels[2] = -100
    local = ll.localize(_Places(), ll.Backprop(keep=0.75), cuts=1, example=images, targets=labels)
    assert isinstance(local.algorithm, ll.Backprop)
    assert local.algorithm.last_losses is not None
    for _ in range(3):
        local.step(images, labels, source=torch.arange(4))
    assert local.algorithm.last_losses.losses[2] == 0
    assert all(local.algorithm.last_losses.losses[[0, 1, 3]] > 0)  # which all have learned since


def test_a_loss_that_is_at_fault_itself_is_not_mended_by_targets() -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(12, 8)

    def marked(outputs: Tensor, targets: Tensor, *, margin: float) -> Tensor:
        return (outputs - targets - margin).square().mean()

    for loss, told in (
        (marked, r"called as loss\(outputs, targets\), and says: .*missing 1 required keyword-only argument"),
        (nn.CrossEntropyLoss(reduction="none"), "gives a tensor of shape .2,., expected a tensor of one number"),
        (
            nn.CosineEmbeddingLoss(),
            r"called as loss\(outputs, targets\), and says: .*missing 1 required positional argument",
        ),
    ):
        with pytest.raises(ValueError, match=told) as error:
            ll.localize(net, ll.Backprop(), cuts=1, example=x, loss=loss)
        assert "targets=" not in str(error.value)
