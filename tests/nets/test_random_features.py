"""Layers of random features: against closed forms, plain unfolding, and numbers of the authors' code."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.nets.random_features import (
    SNNK,
    EUGen,
    RandomFeatureLayer,
    Window,
    arc_cosine_features,
    arc_cosine_kernel,
    directions,
    exponential_features,
    features_within,
    geometry,
    polynomial_features,
)
from tests.references import reference

DOUBLE = torch.float64
ALL = [
    (EUGen, {"degree": 1}),
    (EUGen, {"degree": 3}),
    (SNNK, {"kind": "relu"}),
    (SNNK, {"kind": "cos"}),
    (SNNK, {"kind": "exp"}),
]


def _filled(layer: RandomFeatureLayer) -> RandomFeatureLayer:
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.standardise(torch.rand_like(layer.shift), 0.1 + torch.rand_like(layer.shift))
    return layer


# -- numbers of the authors' code -----------------------------------------------------------------------------------------
def test_features_are_those_of_the_authors_code() -> None:
    numbers = {name: torch.from_numpy(array) for name, array in reference("snnk").items()}
    x, w, maps, x3 = (numbers[name] for name in ("x", "w", "G", "x3"))
    for threshold in (0.0, -0.1):
        mine = [arc_cosine_features(side, maps, threshold) for side in (x, w)]
        for side, name in zip(mine, ("phi_x", "phi_w"), strict=True):
            torch.testing.assert_close(side, numbers[f"relu/c{threshold}/{name}"], rtol=0, atol=1e-14)
        torch.testing.assert_close(mine[0] @ mine[1].T, numbers[f"relu/c{threshold}/inner"], rtol=0, atol=1e-14)
    normalised = arc_cosine_features(F.normalize(x, dim=1), maps)
    torch.testing.assert_close(normalised, numbers["relu/normalized_phi_x"], rtol=0, atol=1e-14)
    torch.testing.assert_close(arc_cosine_features(x3, maps), numbers["relu/phi_x3"], rtol=0, atol=1e-14)
    for name, rate in (("urf", 2j * torch.pi * numbers["xis"]), ("exp", 1.0)):
        left, right = exponential_features(x, maps, rate), exponential_features(w, maps)
        torch.testing.assert_close(left, numbers[f"{name}/phi_x"], rtol=1e-13, atol=1e-14)
        theirs = numbers[f"{name}/phi_w"]
        torch.testing.assert_close(right.to(theirs.dtype), theirs, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(left @ right.T.to(left.dtype), numbers[f"{name}/inner"], rtol=1e-12, atol=1e-13)


def test_three_dimensions_keep_the_half_that_the_authors_code_drops() -> None:
    numbers = {name: torch.from_numpy(array) for name, array in reference("snnk").items()}
    x, rate = numbers["x3"], 2j * torch.pi * numbers["xis"]
    mine = exponential_features(x, numbers["G"], rate)
    torch.testing.assert_close(mine[1], exponential_features(x[1], numbers["G"], rate))
    dropped = mine * (-rate.square() * x.square().sum(-1, keepdim=True) / 2).exp()
    torch.testing.assert_close(dropped, numbers["urf/phi_x3"], rtol=1e-12, atol=1e-13)


def test_orthogonal_maps_are_of_the_authors_kind() -> None:
    """Rows orthogonal in blocks of d, with lengths of Gaussian vectors."""
    theirs = torch.from_numpy(reference("snnk")["orthogonal/G_seed3"])
    mine = directions(*theirs.shape, seed=3, orthogonal=True)
    for maps in (theirs, mine):
        products = maps[:4] @ maps[:4].T
        assert float((products - products.diag().diag()).abs().max()) < 1e-12
        assert 0.5 < float(maps.norm(dim=1).mean()) / 2 < 1.5


# -- estimates ------------------------------------------------------------------------------------------------------------
def _estimates(make: type[RandomFeatureLayer], x: Tensor, count: int, **given: object) -> tuple[Tensor, Tensor]:
    """Outputs of so many draws of a layer made from one linear layer, and wᵀx + b."""
    torch.manual_seed(0)
    teacher = nn.Linear(x.shape[1], 3, dtype=DOUBLE).requires_grad_(False)
    start = given.pop("start", ())
    made = [
        make(x.shape[1], 3, seed=seed, dtype=DOUBLE, **given).start_from(teacher, *start)(x)  # type: ignore[arg-type, operator, misc]
        for seed in range(count)
    ]
    return torch.stack(made).detach(), teacher(x)


def _bias(draws: Tensor, wanted: Tensor) -> float:
    """Of the mean over draws and entries, in standard errors; entries of a draw depend on each other, draws do not."""
    errors = (draws - wanted).flatten(1).mean(1)
    return float(errors.mean().abs() / (errors.std() / len(errors) ** 0.5))


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("features", [1, 16])
def test_a_polynomial_is_estimated_without_bias(features: int, orthogonal: bool) -> None:
    x = torch.randn(4, 5, dtype=DOUBLE) / 3
    coefficients = [0.2, 0.5, 0.3, -0.1]
    given = {"features": features, "degree": 3, "orthogonal": orthogonal, "start": (coefficients,)}
    draws, z = _estimates(EUGen, x, 300, **given)
    wanted = sum(a * z**i for i, a in enumerate(coefficients))
    assert isinstance(wanted, Tensor)
    assert _bias(draws, wanted) < 3
    worst = (draws.mean(0) - wanted).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert float(worst.max()) < 4  # of twelve entries


def test_the_variance_halves_when_the_features_double() -> None:
    x = torch.randn(6, 5, dtype=DOUBLE) / 3
    variances = [
        float(_estimates(EUGen, x, 400, features=m, degree=2, start=([0.0, 1.0, 1.0],))[0].var(0).mean())
        for m in (16, 32, 64)
    ]
    for wide, narrow in zip(variances[1:], variances, strict=False):
        assert 0.4 < wide / narrow < 0.6, variances


def test_orthogonal_maps_lower_the_variance() -> None:
    x = torch.randn(6, 8, dtype=DOUBLE) / 3
    plain, orthogonal = (
        float(_estimates(EUGen, x, 300, features=8, degree=1, orthogonal=o, start=([0.0, 1.0],))[0].var(0).mean())
        for o in (False, True)
    )
    assert orthogonal < 0.9 * plain


def test_relu_features_estimate_the_arc_cosine_kernel_and_not_the_relu() -> None:
    x = torch.randn(4, 5, dtype=DOUBLE) / 2
    draws, z = _estimates(SNNK, x, 400, features=32, kind="relu")
    torch.manual_seed(0)
    teacher = nn.Linear(5, 3, dtype=DOUBLE).requires_grad_(False)
    one = torch.ones(4, 1, dtype=DOUBLE)
    kernel = arc_cosine_kernel(torch.cat((x, one), 1), torch.cat((teacher.weight, teacher.bias[:, None]), 1))
    assert _bias(draws, kernel) < 3
    assert _bias(draws, z.relu()) > 10


@pytest.mark.parametrize(("kind", "function"), [("cos", torch.cos), ("exp", torch.exp)])
def test_complex_features_give_their_real_part_in_the_end(kind: str, function: object) -> None:
    x = torch.randn(4, 5, dtype=DOUBLE) / 3
    draws, z = _estimates(SNNK, x, 400, features=32, kind=kind)
    assert _bias(draws, function(z)) < 3  # type: ignore[operator]


def test_cos_is_the_real_part_of_the_complex_product() -> None:
    layer = SNNK(5, 3, 7, kind="cos", dtype=DOUBLE)
    nn.init.normal_(layer.weight)
    x = torch.randn(4, 5, dtype=DOUBLE) / 3
    augmented = torch.cat((x, torch.ones(4, 1, dtype=DOUBLE)), 1)
    maps = torch.cat((layer.maps, layer.offsets[:, None]), 1)
    psi = torch.complex(layer.weight[:, :7], layer.weight[:, 7:])
    torch.testing.assert_close(layer(x), (exponential_features(augmented, maps, 1j) @ psi.T).real)


def test_blocks_are_products_of_their_own_maps() -> None:
    layer = EUGen(5, 3, 4, degree=3, dtype=DOUBLE)
    x = torch.randn(2, 6, 5, dtype=DOUBLE)
    whole = torch.cat((x, torch.ones(2, 6, 1, dtype=DOUBLE), x.norm(dim=-1, keepdim=True)), -1)
    assert layer.slopes is not None
    maps = torch.cat((layer.maps, layer.offsets[:, None], layer.slopes[:, None]), 1).split(4)
    wanted = [polynomial_features(whole, part) for part in (maps[:1], maps[1:3], maps[3:])]
    torch.testing.assert_close(layer.phi(x), torch.cat(wanted, -1))


# -- as modules -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("make", "given"), ALL)
@pytest.mark.parametrize("padding", [(1, 2), "same"])
def test_a_convolution_is_the_same_layer_on_unfolded_patches(
    make: type[RandomFeatureLayer], given: dict[str, object], padding: object
) -> None:
    stride, dilation = (1, 1) if padding == "same" else (2, 1), (1, 2)
    conv = nn.Conv2d(3, 5, (3, 2), stride=stride, padding=padding, dilation=dilation, dtype=DOUBLE)  # type: ignore[arg-type]
    layer = _filled(make(**geometry(conv), features=4, **given))
    flat = make(18, 5, 4, dtype=DOUBLE, **given)
    flat.load_state_dict({**layer.state_dict(), "shift": torch.zeros(18), "scale": torch.ones(())})
    x = torch.randn(2, 3, 7, 6, dtype=DOUBLE)
    shifted = (x - layer.shift[:, None, None]) / layer.scale
    shape = conv(x).shape
    pads = conv._reversed_padding_repeated_twice
    patches = F.unfold(F.pad(shifted, pads), conv.kernel_size, stride=conv.stride, dilation=conv.dilation)
    wanted = flat(patches.transpose(1, 2)).transpose(1, 2).reshape(shape)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize(("make", "given"), ALL)
def test_state_is_complete_and_the_maps_can_be_drawn_again(
    make: type[RandomFeatureLayer], given: dict[str, object]
) -> None:
    layer = _filled(make(6, 3, 5, seed=7, orthogonal=True, **given))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make(6, 3, 5, seed=1, **given)
    assert not torch.equal(other.maps, layer.maps)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 4, 6)
    assert torch.equal(other(x), layer(x))
    assert other.get_extra_state()["seed"] == 7
    assert other.get_extra_state()["distribution"] == "orthogonal"
    assert layer.regenerable()
    assert other.regenerable()
    for name in layer.state_dict():
        assert name == "_extra_state" or name in dict(layer.named_parameters()) | dict(layer.named_buffers())
    other.maps[0, 0] += 1
    assert not other.regenerable()
    weights = torch.randn(9, 6)
    layer.draw_from(weights)
    assert layer.regenerable(weights)
    assert not layer.regenerable()
    assert not layer.get_extra_state()["isotropic"]


@pytest.mark.parametrize(("make", "given"), ALL)
def test_dtypes_share_one_draw_and_weights_alone_are_trained(
    make: type[RandomFeatureLayer], given: dict[str, object]
) -> None:
    exact = _filled(make(6, 3, 5, dtype=DOUBLE, **given))
    single = make(6, 3, 5, **given)
    assert torch.equal(single.maps, exact.maps.float())
    x = torch.randn(3, 2, 6, dtype=DOUBLE)
    torch.testing.assert_close(copy.deepcopy(exact).float()(x.float()).double(), exact(x), rtol=1e-3, atol=1e-3)
    half = copy.deepcopy(exact).bfloat16()(x.bfloat16())
    assert half.dtype is torch.bfloat16
    assert half.isfinite().all()
    exact(x).sum().backward()
    assert {name for name, p in exact.named_parameters() if p.grad is not None} == {"weight", "bias"}
    assert exact.maps.grad is None
    with torch.inference_mode():
        assert exact(x).shape == (3, 2, 3)


def test_maps_are_drawn_within_what_a_layer_looks_at() -> None:
    """Combinations of its rows, of their second moment, and as long as isotropic maps."""
    rows = torch.randn(4, 2, dtype=DOUBLE) @ torch.randn(2, 6, dtype=DOUBLE)
    layer = SNNK(6, 3, 4000, dtype=DOUBLE)
    layer.draw_from(rows)
    moment = layer.maps.T @ layer.maps / 4000
    torch.testing.assert_close(moment, rows.T @ rows * 6 / rows.square().sum(), rtol=0, atol=0.3)
    assert torch.linalg.matrix_rank(layer.maps) == 2


def test_three_dimensions_are_rows() -> None:
    for make, given in ALL:
        layer = _filled(make(6, 3, 5, dtype=DOUBLE, **given))
        x = torch.randn(2, 4, 6, dtype=DOUBLE)
        torch.testing.assert_close(layer(x), layer(x.flatten(0, 1)).view(2, 4, 3))


@pytest.mark.parametrize(("make", "given"), ALL)
def test_numbers_are_counted_and_kept_within(make: type[RandomFeatureLayer], given: dict[str, object]) -> None:
    conv = nn.Conv2d(3, 20, 3)
    for layer_of in (nn.Linear(30, 20), conv):
        own = geometry(layer_of)
        layer = make(**own, features=4, **given)
        scaling = layer.shift.numel() + 1
        maps = layer.maps.numel() + layer.offsets.numel() + (0 if layer.slopes is None else layer.slopes.numel())
        assert layer.numbers == scaling + maps + layer.learned
        for learned in (False, True):
            for budget in (50, 400, 777):
                m = features_within(lambda own=own, **more: make(**{**own, **more}, **given), budget, learned=learned)
                held = [
                    getattr(make(**own, features=size, **given), "learned" if learned else "numbers")
                    for size in (max(m, 1), m + 1)
                ]
                assert held[1] > budget
                assert m == 0 or held[0] <= budget


def test_what_cannot_be_is_one_sentence() -> None:
    for words, call in (
        ("features is 0", lambda: EUGen(4, 3, 0)),
        ("degree is 0", lambda: EUGen(4, 3, 2, degree=0)),
        ("kind is 'sin'", lambda: SNNK(4, 3, 2, kind="sin")),  # type: ignore[arg-type]
        ("expected (..., 4)", lambda: SNNK(4, 3, 2)(torch.zeros(2, 5))),
        ("expected (N, 3, H, W)", lambda: SNNK(27, 3, 2, window=Window(3, (3, 3)))(torch.zeros(2, 1, 5, 5))),
        ("has 27 entries", lambda: SNNK(26, 3, 2, window=Window(3, (3, 3)))),
        ("2 groups", lambda: geometry(nn.Conv2d(4, 4, 3, groups=2))),
        ("'circular'", lambda: geometry(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))),
        ("expected 3: a_0", lambda: EUGen(4, 3, 2).start_from(nn.Linear(4, 3), [1.0])),
        ("0 directions", lambda: directions(0, 3, seed=0)),
    ):
        with pytest.raises(ValueError, match=r".") as raised:
            call()
        assert words in str(raised.value)
