"""Layer-wise distillation: against least squares, singular values and layers that are what is fitted."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from locallearn.distillation import (
    METHODS,
    Distiller,
    Moments,
    Recipe,
    Site,
    check_distillation,
    find_sites,
    install,
    load_student,
    packed,
    replaced,
)
from locallearn.nets import mlp, resnet, vit
from locallearn.nets.random_features import SNNK, EUGen, RandomFeatureLayer

DOUBLE = torch.float64
RANDOM = [m for m in METHODS if m in ("eugen", "snnk")]


def _mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, dtype=DOUBLE), activation()]
    return nn.Sequential(*layers[:-1])


def _sites(net: nn.Module, x: Tensor) -> list[Site]:
    return find_sites(net, net, x[:2])[0]


def _error(net: nn.Module, students: Any, x: Tensor) -> float:
    with torch.no_grad():
        wanted = net(x)
        with replaced(net, students):
            return float((net(x) - wanted).square().mean() / wanted.var())


# -- the closed form ------------------------------------------------------------------------------------------------------
def test_sums_give_the_ridge_regression_of_standardised_features() -> None:
    h, y = torch.randn(50, 6, dtype=DOUBLE) * torch.logspace(-2, 2, 6) + 5, torch.randn(50, 3, dtype=DOUBLE)
    h[:, 2] = 4.0  # a constant has nothing to say beside the intercept
    parts, whole = [Moments(6, 3), Moments(6, 3)], Moments(6, 3)
    whole.add(h, y)
    for part, rows in zip(parts, (slice(33, 50), slice(0, 33)), strict=True):
        part.add(h[rows], y[rows])
    parts[0].join(parts[1])
    weights, bias, unique = whole.solve(0.1)
    again = parts[0].solve(0.1)
    torch.testing.assert_close(again[0], weights, rtol=1e-9, atol=1e-12)
    assert unique
    varies = [0, 1, 3, 4, 5]
    deviation = h[:, varies].std(0, correction=0)
    z = (h[:, varies] - h[:, varies].mean(0)) / deviation
    wanted = torch.linalg.solve(z.T @ z + 50 * 0.1 * torch.eye(5, dtype=DOUBLE), z.T @ (y - y.mean(0)))
    torch.testing.assert_close(weights[varies], wanted / deviation[:, None], rtol=1e-8, atol=1e-11)
    assert float(weights[2].abs().max()) == 0
    torch.testing.assert_close(bias, y.mean(0) - h.mean(0) @ weights)
    assert whole.error(weights, bias) == pytest.approx(float((y - h @ weights - bias).square().sum(1).mean()))
    far = whole.solve(1e12)
    assert float(far[0].abs().max()) < 1e-9
    torch.testing.assert_close(far[1], y.mean(0), rtol=1e-6, atol=1e-8)


def test_dependent_features_are_told_and_solved_with_least_norm() -> None:
    h = torch.randn(30, 3, dtype=DOUBLE)
    moments = Moments(4, 1)
    moments.add(torch.cat((h, h[:, :1]), 1), h[:, :1])
    weights, _, unique = moments.solve(0.0)
    assert not unique
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.5, 0, 0, 0.5], dtype=DOUBLE), rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("convolution", [False, True])
def test_a_layer_of_that_very_form_is_found_exactly(method: Any, convolution: bool) -> None:
    recipe = Recipe(method, 0.6, seed=3)
    plain = nn.Conv2d(2, 40, 3, padding=1, dtype=DOUBLE) if convolution else nn.Linear(9, 40, dtype=DOUBLE)
    x = torch.randn(60, 2, 6, 6, dtype=DOUBLE) if convolution else torch.randn(400, 9, dtype=DOUBLE)
    truth = recipe.blank(plain)
    assert isinstance(truth, RandomFeatureLayer)
    nn.init.normal_(truth.weight)
    nn.init.normal_(truth.bias)
    of_channels = x.movedim(1, -1).flatten(0, -2)
    truth.standardise(of_channels.mean(0), of_channels.var(0, correction=0))

    class Teacher(nn.Linear if not convolution else nn.Conv2d):  # type: ignore[misc]
        def forward(self, inputs: Tensor) -> Tensor:
            return truth(inputs)

    plain.__class__ = Teacher
    net = nn.Sequential(plain)
    distiller = Distiller(net, net, list(x.split(50)), recipe, penalties=[0.0])
    (found,) = distiller.students(_sites(net, x)).values()
    torch.testing.assert_close(found.weight, truth.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.bias, truth.bias, rtol=1e-6, atol=1e-6)
    assert distiller.fits(_sites(net, x))["0"].error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", [*RANDOM, "low_rank"])
def test_student_inputs_make_up_for_what_came_before(method: Any) -> None:
    """On a teacher of four layers the error is smaller than with each layer on its own."""
    net = _mlp(10, 40, 40, 40, 5)
    x, unseen = torch.randn(3000, 10, dtype=DOUBLE), torch.randn(1000, 10, dtype=DOUBLE)
    chosen = _sites(net, x)[:3]
    errors = []
    for inputs in ("teacher", "student"):
        distiller = Distiller(net, net, list(x.split(500)), Recipe(method, 0.5), inputs)  # type: ignore[arg-type]
        errors.append(_error(net, distiller.students(chosen), unseen))
    assert errors[1] < errors[0] < 1.2


def test_random_features_fit_behind_the_activation_and_factors_before_it() -> None:
    net = nn.Sequential(nn.Linear(8, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 4)).double()
    x = torch.randn(500, 8, dtype=DOUBLE)
    net(x)  # statistics that are not those of a fresh one
    before = {name: value.clone() for name, value in net.state_dict().items()}
    (site, readout) = _sites(net, x)
    assert (site.behind, site.activation, site.readout, readout.readout) == (("1", "2"), "ReLU", False, True)
    for method in METHODS:
        students = Distiller(net, net, list(x.split(100)), Recipe(method, 0.7)).students([site])
        with replaced(net, students):
            kinds = [type(module) for module in net[1:3]]
        assert kinds == ([nn.Identity] * 2 if method in RANDOM else [nn.BatchNorm1d, nn.ReLU])
        assert not any(p.requires_grad for student in students.values() for p in student.parameters())
    assert net.training
    assert [type(module) for module in net] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net[0]._forward_hooks
    assert not net[0]._forward_pre_hooks


def test_truncated_singular_values_are_the_best_of_their_rank() -> None:
    for layer, x in (
        (nn.Linear(12, 9, dtype=DOUBLE), torch.randn(3, 12, dtype=DOUBLE)),
        (nn.Conv2d(3, 9, 2, stride=2, padding=1, bias=False, dtype=DOUBLE), torch.randn(2, 3, 5, 5, dtype=DOUBLE)),
    ):
        net = nn.Sequential(layer)
        recipe = Recipe("svd", 0.8)
        (found,) = Distiller(net, net, [x, x], recipe).students(_sites(net, x)).values()
        assert isinstance(found, nn.Sequential)
        product = found[1].weight.flatten(1) @ found[0].weight.flatten(1)
        rank = recipe.size(layer)
        values = torch.linalg.svdvals(layer.weight.flatten(1))
        assert rank == (int(0.8 * sum(p.numel() for p in layer.parameters())) - 9) // 21
        left = (layer.weight.flatten(1) - product).norm()
        torch.testing.assert_close(left, values[rank:].norm(), rtol=1e-9, atol=0)
        bias = 0 if layer.bias is None else layer.bias
        wanted = (
            F.linear(x, product, layer.bias)
            if isinstance(layer, nn.Linear)
            else F.conv2d(x, product.view_as(layer.weight), None, 2, 1) + bias
        )
        torch.testing.assert_close(found(x), wanted)


def test_reduced_rank_regression_knows_the_inputs() -> None:
    """Inputs that lie in few directions need no more, whatever the weights; singular values of the weights cannot know."""
    net = nn.Sequential(nn.Linear(30, 20, dtype=DOUBLE))
    basis = torch.randn(4, 30, dtype=DOUBLE)
    x = torch.randn(400, 4, dtype=DOUBLE) @ basis + 1
    errors = {
        method: _error(net, Distiller(net, net, list(x.split(100)), Recipe(method, 0.5)).students(_sites(net, x)), x)  # type: ignore[arg-type]
        for method in ("svd", "low_rank")
    }
    assert errors["low_rank"] < 1e-8
    assert errors["svd"] > 1e-3
    conv = nn.Sequential(nn.Conv2d(2, 12, 3, stride=2, padding="valid", dtype=DOUBLE), nn.ReLU())
    maps = torch.randn(40, 2, 7, 7, dtype=DOUBLE)
    full = Recipe("low_rank", 0.95)
    layer = conv[0]
    assert isinstance(layer, nn.Conv2d)
    (found,) = Distiller(conv, conv, list(maps.split(10)), full).students(_sites(conv, maps)).values()
    assert 0 < full.size(layer) < 12
    assert found(maps).shape == layer(maps).shape


# -- which layers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["low_rank", "snnk"])
def test_the_error_that_is_told_is_of_samples_that_the_solution_has_not_seen(method: Any) -> None:
    net = nn.Sequential(nn.Linear(30, 12)).double().requires_grad_(False)
    seen, held = torch.randn(40, 30).double(), torch.randn(20, 30).double()
    distiller = Distiller(
        net, net, [seen, held], Recipe(method, 0.5), penalties=[0.0 if method == "low_rank" else 1e-3]
    )
    site = _sites(net, seen)[0]
    distiller.students([site])
    told = distiller.fits([site])["0"]
    if method == "low_rank":  # without noise the full regression finds the layer, whatever it was given
        y = net(seen)
        _, _, v = torch.linalg.svd(y - y.mean(0), full_matrices=False)
        main = v[: told.size].T @ v[: told.size]
        wanted, mean = net(held), y.mean(0)
        left = (wanted - mean) @ main + mean - wanted
        error = float(left.square().sum() / (wanted - wanted.mean(0)).square().sum())
        assert told.error == pytest.approx(error)
    else:
        exact = distiller._made[((), "0")][0]
        left = (exact(held) - net(held)).square().sum() / (net(held) - net(held).mean(0)).square().sum()
        assert told.error is not None
        assert told.error > 1.2 * float(left)  # the student that is kept has seen them


def test_layers_without_a_place_of_their_own_are_left() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.again = nn.Linear(4, 4)
            self.named = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.named(input=self.again(self.first(x)))

    found, left = find_sites(net := Odd(), net, torch.randn(2, 4))
    assert found == []
    assert left == {
        "first": "it stands at several places of the network",
        "named": "it is given its input by name, and not as layer(x)",
    }


def test_layers_are_found_in_the_order_of_inference_and_others_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.groups, self.sequence = nn.Conv1d(1, 2, 3, padding=1), nn.Parameter(torch.ones(6))
            self.twice = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.groups(self.early(x)[:, None]).sum(1) * self.sequence
            return torch.relu(self.late(self.twice(self.twice(x))))

    found, left = find_sites(net := Odd(), net, torch.randn(2, 6))
    assert [(site.name, site.calls) for site in found] == [("early", 1), ("twice", 2), ("late", 1)]
    assert set(left) == {"", "unused", "groups"}
    assert "does not call it" in left["unused"]
    assert "Conv1d" in left["groups"]
    x = torch.randn(300, 6)
    students = Distiller(net, net, list(x.split(50)), Recipe("low_rank", 0.9)).students(found)
    assert len(students) == 3


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (resnet((3, 8, 8), 4, 8), (3, 8, 8)),
        (vit((1, 8, 8), 4, width=12, depth=1, heads=2), (1, 8, 8)),
    ],
)
def test_networks_that_are_no_chain_are_taken_layer_by_layer(net: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(40, *shape)
    found, _ = find_sites(net, net, x[:2])
    chosen = [site for site in found if not site.readout][:4]
    assert len(chosen) == 4
    assert any(site.readout for site in found)
    for method in ("snnk", "low_rank"):
        students = Distiller(net, net, list(x.split(10)), Recipe(method, 0.9), positions=9).students(chosen)  # type: ignore[arg-type]
        assert _error(net, students, x) < 5


def test_maps_of_the_teachers_own_directions_fit_better_where_it_has_few() -> None:
    net = _mlp(30, 20, 20, 4)
    x = torch.randn(1000, 30, dtype=DOUBLE)
    layer = net[0]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight[:, 3:] *= 0.01
    site, *_ = _sites(net, x)
    errors = {}
    for draws in ("isotropic", "teacher"):
        distiller = Distiller(net, net, list(x.split(100)), Recipe("snnk", 0.5, draws=draws))  # type: ignore[arg-type]
        distiller.students([site])
        errors[draws] = distiller.fits([site])["0"].error
    assert errors["teacher"] < 0.8 * errors["isotropic"]  # type: ignore[operator]


def test_depths_share_what_they_can() -> None:
    net = _mlp(6, 20, 20, 20, 3)
    x = torch.randn(400, 6, dtype=DOUBLE)
    sites = _sites(net, x)[:3]
    distiller = Distiller(net, net, list(x.split(100)), Recipe("snnk", 0.5))
    one, three = distiller.students(sites[:1]), distiller.students(sites)
    assert three[sites[0]] is one[sites[0]]
    assert len({layer.seed for layer in three.values() if isinstance(layer, SNNK)}) == 3
    last = distiller.students(sites[1:])
    assert last[sites[1]] is not three[sites[1]]  # behind the teacher's first layer, not a student's
    apart = Distiller(net, net, list(x.split(100)), Recipe("snnk", 0.5), "teacher")
    places = {site.name: number for number, site in enumerate(sites)}
    assert apart.students(sites, places)[sites[1]] is apart.students(sites[1:], places)[sites[1]]


# -- no graph, no growth ------------------------------------------------------------------------------------------------------
class _Alive(TorchDispatchMode):
    """Peak bytes of tensors that were made inside and are still there."""

    def __init__(self, without: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._without = [tensor.untyped_storage() for tensor in without]  # views of them are new tensors, too
        self._seen = {storage._cdata for storage in self._without}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def _peak(depth: int, batches: int) -> int:
    torch.manual_seed(0)
    net = _mlp(*[32] * (depth + 1))
    x = [torch.randn(100, 32, dtype=DOUBLE) for _ in range(batches)]
    sites = _sites(net, x[0])[:2]
    with _Alive([*x, *net.parameters()]) as alive:
        Distiller(net, net, x, Recipe("snnk", 0.5)).students(sites)
    return alive.peak


def test_memory_grows_with_neither_samples_nor_the_teacher() -> None:
    base = _peak(3, 5)
    assert base > 30 * 32 * 8  # something is held
    assert _peak(3, 12) <= 1.05 * base
    assert _peak(7, 5) <= 1.05 * base


def test_it_runs_where_nothing_can_be_differentiated() -> None:
    net = _mlp(6, 20, 20, 3)
    x = torch.randn(300, 6, dtype=DOUBLE)
    sites = _sites(net, x)[:2]
    with torch.inference_mode():
        made = Distiller(net, net, list(x.split(100)), Recipe("eugen", 0.9)).students(sites)
    with replaced(net, made), torch.inference_mode():
        assert net(x).grad_fn is None
    made = Distiller(net, net, list(x.split(100)), Recipe("eugen", 0.9)).students(sites)
    install(net, made)
    assert not net[:4](x).requires_grad


# -- kept ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_student_is_loaded_again(method: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = mlp((6,), outputs=3, hidden=(20, 20))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(300, 6)
    sites = _sites(net, x)[:2]
    distiller = Distiller(net, net, list(x.split(100)), Recipe(method, 0.9, seed=5))
    students = distiller.students(sites)
    with replaced(net, students), torch.no_grad():
        wanted = net(x)
    torch.save(packed(distiller.recipe, students, distiller.fits(sites)), tmp_path / "student.pt")
    other = mlp((6,), outputs=3, hidden=(20, 20))
    other.load_state_dict(state)
    layers = load_student(other, tmp_path / "student.pt")
    assert set(layers) == {site.name for site in sites}
    assert torch.equal(other(x), wanted)
    with pytest.raises(ValueError, match="of another network"):
        load_student(other, tmp_path / "student.pt")  # its layers are replaced already
    with pytest.raises(ValueError, match="of another network"):
        load_student(mlp((7,), outputs=3, hidden=(20, 20)), tmp_path / "student.pt")
    (tmp_path / "none.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no student"):
        load_student(other, tmp_path / "none.pt")
    file = io.BytesIO()
    torch.save({"format": 1, "recipe": {"method": "svd"}, "layers": []}, file)
    (tmp_path / "odd.pt").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="holds no student"):
        load_student(other, tmp_path / "odd.pt")


def test_what_cannot_be_is_one_sentence() -> None:
    net = _mlp(6, 20, 3)
    x = torch.randn(20, 6, dtype=DOUBLE)

    def made(batches: Sequence[Tensor]) -> Distiller:
        return Distiller(net, net, batches, Recipe("svd", 0.5))

    for words, call in (
        ("the method is 'pca'", lambda: Recipe("pca", 0.5)),  # type: ignore[arg-type]
        ("draws is 'wide'", lambda: Recipe("snnk", 0.5, draws="wide")),  # type: ignore[arg-type]
        ("the share is 1", lambda: Recipe("svd", 1)),
        ("inputs is 'both'", lambda: check_distillation("both", [1.0], 1)),
        ("penalties is [-1.0]", lambda: check_distillation("teacher", [-1.0], 1)),
        ("penalties is []", lambda: check_distillation("teacher", [], 1)),
        ("positions is 0", lambda: check_distillation("teacher", [1.0], 0)),
        ("fewer than two samples", lambda: made([])),
        ("fewer than two samples", lambda: made([x[:1]])),
        ("too few numbers for eugen", lambda: Recipe("eugen", 0.01).blank(net[0])),  # type: ignore[arg-type]
        ("no samples", lambda: Moments(2, 2).solve(0.0)),
    ):
        with pytest.raises(ValueError, match=r".") as raised:
            call()
        assert words in str(raised.value)
    nan = [torch.full((10, 6), float("nan"), dtype=DOUBLE), x]
    with pytest.raises(ValueError, match=r"layer '0' cannot be replaced by low_rank: .* not finite"):
        Distiller(net, net, nan, Recipe("low_rank", 0.5)).students(_sites(net, x)[:1])
    assert isinstance(Recipe("eugen", 0.5).blank(nn.Linear(30, 30)), EUGen)
