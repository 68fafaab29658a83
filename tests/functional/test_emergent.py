"""Forward-Forward with a norm as goodness and BP/FF, against the numbers of the paper's code."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.functional import emergent
from locallearn.functional import forward_forward as ff
from locallearn.losses import SummedGoodnessLoss
from tests.references import reference

THETA = 3.0
_close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def _tensors(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in reference(name).items() if value.dtype.kind in "fiub"}


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(emergent.unit_normalise(x), weight, bias).relu()


def _adam_step(parameters: list[Tensor]) -> list[Tensor]:
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    optimizer.step()
    return [p.detach() for p in parameters]


def _parameters(known: dict[str, Tensor], number: int) -> list[Tensor]:
    """Fresh weights of one layer, from either file."""
    if "W1" in known:
        pair = known[f"W{number + 1}"], known[f"b{number + 1}"]
    else:
        pair = tuple(known[f"init.layers.{number}.linear.{name}"] for name in ("weight", "bias"))  # type: ignore[assignment]
    return [p.clone().requires_grad_() for p in pair]


def _wanted(known: dict[str, Tensor], case: str, number: int) -> dict[str, Tensor]:
    """What the paper's code gave for one layer, under one set of names for both files."""
    if "W1" in known:
        k = number + 1
        named = {
            "goodness_pos": f"{case}_goodness_pos{k if case == 'ff' else ''}",
            "goodness_neg": f"{case}_goodness_neg{k if case == 'ff' else ''}",
            "loss": f"{case}_loss{k if case == 'ff' else ''}",
            "grad_weight": f"{case}_grad_W{k}",
            "grad_bias": f"{case}_grad_b{k}",
            "new_weight": f"{case}_W{k}_after",
            "new_bias": f"{case}_b{k}_after",
        }
    else:
        one = f".{number}" if case != "bpff" else ""
        named = {
            "goodness_pos": f"{case}.g_pos{one}",
            "goodness_neg": f"{case}.g_neg{one}",
            "loss": f"{case}.loss{one}",
            "grad_weight": f"{case}.grad.{number}.weight",
            "grad_bias": f"{case}.grad.{number}.bias",
            "new_weight": f"{case}.new.{number}.weight",
            "new_bias": f"{case}.new.{number}.bias",
        }
    return {name: known[key].squeeze() for name, key in named.items()}


@pytest.mark.parametrize(
    ("file", "case", "kind"),
    [("emergent", "ff", "norm"), ("emergent", "ff_l1", "l1"), ("emergent_ff", "ff", "norm")],
)
def test_greedy_layers_learn_as_those_of_the_paper(file: str, case: str, kind: Any) -> None:
    known = _tensors(file)
    positive, negative = known["x_pos"], known["x_neg"]
    loss = SummedGoodnessLoss(THETA, kind)
    for number in range(3):
        wanted = _wanted(known, case, number)
        parameters = _parameters(known, number)
        good, bad = _layer(positive, *parameters), _layer(negative, *parameters)
        _close(emergent.goodness(good, kind), wanted["goodness_pos"])
        _close(emergent.goodness(bad, kind), wanted["goodness_neg"])
        found = loss(good, bad)
        _close(found, wanted["loss"])
        found.backward()
        _close(parameters[0].grad, wanted["grad_weight"])
        _close(parameters[1].grad, wanted["grad_bias"])
        weight, bias = _adam_step(parameters)
        torch.testing.assert_close(weight, wanted["new_weight"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(bias, wanted["new_bias"], rtol=1e-9, atol=1e-9)
        # the next layer is fed by the layer as it is after its step
        positive, negative = _layer(positive, weight, bias), _layer(negative, weight, bias)


@pytest.mark.parametrize("file", ["emergent", "emergent_ff"])
def test_one_loss_over_all_layers_is_bp_ff(file: str) -> None:
    known = _tensors(file)
    layers = [_parameters(known, number) for number in range(3)]
    outputs: dict[str, list[Tensor]] = {"x_pos": [], "x_neg": []}
    for name, found in outputs.items():
        x = known[name]
        for parameters in layers:
            x = _layer(x, *parameters)
            found.append(x)
    wanted = _wanted(known, "bpff", 0)
    _close(emergent.summed_goodness(outputs["x_pos"]), wanted["goodness_pos"])
    _close(emergent.summed_goodness(outputs["x_neg"]), wanted["goodness_neg"])
    loss = SummedGoodnessLoss(THETA, "norm")(outputs["x_pos"], outputs["x_neg"])
    _close(loss, wanted["loss"])
    loss.backward()
    for number, parameters in enumerate(layers):
        wanted = _wanted(known, "bpff", number)
        _close(parameters[0].grad, wanted["grad_weight"])
        _close(parameters[1].grad, wanted["grad_bias"])
        weight, bias = _adam_step(parameters)
        torch.testing.assert_close(weight, wanted["new_weight"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(bias, wanted["new_bias"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("file", "goodness", "votes", "voted", "summed"),
    [
        ("emergent", "goodness_label_layer", "label_score", "predict", "predict_sum_goodness"),
        ("emergent_ff", "goodness_per_label", "vote_scores", "predict", "predict_old"),
    ],
)
def test_votes_and_sums_predict_as_in_the_paper(file: str, goodness: str, votes: str, voted: str, summed: str) -> None:
    known = _tensors(file)
    strength = float(known["x"].max())
    layers = [_parameters(known, number) for number in range(3)]
    found = torch.zeros_like(known[goodness])
    for label in range(10):
        x = ff.embed_label(known["x"], torch.full((len(known["x"]),), label), 10, strength)
        for number, parameters in enumerate(layers):
            x = _layer(x, *parameters).detach()
            found[:, label, number] = emergent.goodness(x)
    _close(found, known[goodness])
    _close(emergent.vote(found), known[votes])
    assert torch.equal(emergent.vote(found).argmax(1), known[voted])
    assert torch.equal(found.sum(2).argmax(1), known[summed])


def test_labels_are_written_into_every_channel_of_the_first_row() -> None:
    known = _tensors("emergent")
    x, labelled = known["rgb.x"], known["rgb.labelled"]
    label = labelled[:, 0, 0, :10].argmax(1)
    kept = x.clone()
    _close(emergent.embed_label_in_channels(x, label, 10, float(x.max())), labelled)
    assert torch.equal(x, kept)


def test_a_vote_and_a_sum_agree_for_one_layer_and_need_not_for_two() -> None:
    draw = torch.Generator().manual_seed(0)
    one = 30 * torch.rand(200, 10, 1, generator=draw)
    assert torch.equal(emergent.vote(one).argmax(1), one.sum(2).argmax(1))
    several = torch.tensor([[[20.0, 0.0, 0.0], [0.0, 9.0, 0.5]]])  # the loud first layer has one vote of three
    assert several.sum(2).argmax(1).item() == 0
    assert emergent.vote(several).argmax(1).item() == 1


def test_static_negatives_are_drawn_once_without_repeats_and_are_never_true() -> None:
    labels = torch.arange(600) % 4
    source, wrong = emergent.static_negatives(labels, 4, torch.Generator().manual_seed(0))
    assert source.shape == wrong.shape == labels.shape
    assert not (wrong == labels[source]).any()
    assert len(set(zip(source.tolist(), wrong.tolist(), strict=True))) == 600
    times = torch.bincount(source, minlength=600)
    assert times.max() > 1  # unpaired: one image several times, another one not at all
    assert times.min() == 0
    again = emergent.static_negatives(labels, 4, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], source)
    spread = torch.bincount((wrong - labels[source]) % 4, minlength=4)[1:].double() / 600
    assert ((spread - 1 / 3).abs() < 0.07).all()
    with pytest.raises(ValueError, match="at least 2 classes"):
        emergent.static_negatives(labels, 1, torch.Generator())


@pytest.mark.parametrize("kind", ["squares", "norm", "l1"])
def test_goodness_is_finite_at_nothing_and_at_much(kind: Any) -> None:
    quiet = torch.zeros(2, 6, requires_grad=True)
    emergent.goodness(quiet, kind).sum().backward()
    assert quiet.grad is not None
    assert torch.equal(quiet.grad, torch.zeros(2, 6))
    loud = torch.full((2, 6), 40.0, requires_grad=True)
    loss = SummedGoodnessLoss(THETA, kind)(loud, loud)
    loss.backward()
    assert loss.isfinite()
    assert loud.grad is not None
    assert loud.grad.isfinite().all()
    assert emergent.goodness(torch.rand(3, 2, 4, 4).bfloat16(), kind).dtype == torch.float32


def test_the_norms_derivative_has_unit_length() -> None:
    h = torch.rand(5, 7, dtype=torch.float64, requires_grad=True)
    emergent.goodness(h, "norm").sum().backward()
    _close(h.grad.norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_without_a_threshold_it_is_the_goodness_of_ones() -> None:
    good, bad = torch.rand(4, 9), torch.rand(4, 9)
    for kind, theta in (("squares", 18.0), ("norm", 6.0), ("l1", 18.0)):
        own = SummedGoodnessLoss(None, kind)([good, good], [bad, bad])  # type: ignore[arg-type]
        assert own == SummedGoodnessLoss(theta, kind)([good, good], [bad, bad])  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'squares'"):
        SummedGoodnessLoss(goodness="cubes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many negatives as positives"):
        SummedGoodnessLoss()(torch.rand(3, 4), torch.rand(2, 4))
    with pytest.raises(ValueError, match="as many negatives"):
        SummedGoodnessLoss()([torch.rand(3, 4)] * 2, [torch.rand(3, 4)])
    with pytest.raises(ValueError, match="no layer"):
        emergent.summed_goodness([])
    with pytest.raises(ValueError, match="row of 10 pixels"):
        emergent.embed_label_in_channels(torch.rand(2, 3, 4, 5), torch.zeros(2, dtype=torch.long), 10)
