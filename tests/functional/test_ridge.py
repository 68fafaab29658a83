"""Ridge regression: every way of solving against the others, against PyTorch's least squares, and against refitting."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from locallearn.algorithms._closed_form import Sums
from locallearn.cost import FlopCounter
from locallearn.functional import cafo, ridge
from locallearn.functional.ridge import Fit, Intercept, Moments, Singular

INTERCEPTS = get_args(Intercept)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _problem(rows: int = 40, features: int = 9, targets: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = _draw(rows, features) + _draw(features, seed=1)
    return x, _draw(rows, targets, seed=2) + 1, _draw(rows, seed=3).abs()


def _moments(x: Tensor, y: Tensor, w: Tensor | None = None, chunk: int = 1000) -> Moments:
    moments = Moments.zeros(x.shape[1], y.shape[1])
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        moments.gather(x[part], y[part], None if w is None else w[part])
    return moments


def _by_lstsq(x: Tensor, y: Tensor, penalty: float, intercept: str, w: Tensor | None = None) -> Fit:
    """By least squares on rows that stand for the penalty, with a column of ones for the intercept."""
    ones = x.new_ones(len(x), 1)
    longer = x if intercept == "none" else torch.cat((x, ones), 1)
    root = torch.ones(len(x)).double() if w is None else w.sqrt()
    rows = penalty**0.5 * torch.eye(longer.shape[1], dtype=torch.float64)
    if intercept == "free":
        rows[-1, -1] = 0
    a = torch.cat((longer * root[:, None], rows))
    b = torch.cat((y * root[:, None], y.new_zeros(len(rows), y.shape[1])))
    found = torch.linalg.lstsq(a, b, driver="gelsd").solution
    if intercept == "none":
        return Fit(found, y.new_zeros(y.shape[1]), 0.0)
    return Fit(found[:-1], found[-1], 0.0)


def _close(one: Fit, other: Fit, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=tolerance)
    torch.testing.assert_close(one.intercept, other.intercept, rtol=0, atol=tolerance)


@pytest.mark.parametrize("intercept", INTERCEPTS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [40, 6])
def test_every_way_gives_the_same_weights(intercept: Intercept, weighted: bool, rows: int) -> None:
    """Sums, rows (dual where there are fewer than features), eigenvectors, and least squares on longer rows."""
    x, y, w = _problem(rows)
    given = w if weighted else None
    wanted = _by_lstsq(x, y, 0.7, intercept, given)
    _close(ridge.solve(_moments(x, y, given), 0.7, intercept), wanted)
    _close(ridge.solve_rows(x, y, 0.7, intercept, given), wanted)
    _close(ridge.path(_moments(x, y, given), intercept).fit(0.7, intercept), wanted)
    _close(ridge.path_of_rows(x, y, intercept, given).fit(0.7, intercept), wanted)
    fit = ridge.solve(_moments(x, y, given), 0.7, intercept)
    left = (w if weighted else torch.ones(rows).double())[:, None] * (fit(x) - y)
    assert float((x.T @ left + 0.7 * fit.weights).norm()) < 1e-10 * float((x.T @ y).norm())  # stationary
    assert fit.residual < 1e-12


@pytest.mark.parametrize("chunk", [1, 7, 39])
def test_split_order_and_ranks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "PANEL", 4)  # several panels, and a last one that is smaller
    x, y, w = _problem()
    wanted = ridge.solve(_moments(x, y, w), 0.3, "free")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    _close(ridge.solve(_moments(x[order], y[order], w[order], chunk), 0.3, "free"), wanted, 1e-12)
    one, other = _moments(x[:chunk], y[:chunk], w[:chunk]), _moments(x[chunk:], y[chunk:], w[chunk:])
    one.add(other)
    _close(ridge.solve(one, 0.3, "free"), wanted, 1e-12)


@pytest.mark.parametrize("form", ["sums", "rows"])
def test_state_dicts_add(form: str) -> None:
    x, y, _ = _problem()
    parts = [Sums(form) for _ in range(3)]  # type: ignore[arg-type]
    for part, rows in zip(parts, (slice(0, 5), slice(5, 30), slice(30, 40)), strict=True):
        part.gather(x[rows], y[rows])
    whole = Sums(form)  # type: ignore[arg-type]
    for part in parts:
        whole.merge(part.state_dict())
    _close(whole.fit(0.3, "free"), ridge.solve(_moments(x, y), 0.3, "free"), 1e-12)
    whole.forget()
    assert not whole.gathering
    assert whole.bytes == 0


@pytest.mark.parametrize("intercept", INTERCEPTS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [20, 6])
def test_a_row_left_out_is_a_fit_without_it(intercept: Intercept, weighted: bool, rows: int) -> None:
    x, y, w = _problem(rows)
    given = w if weighted else None
    found = ridge.path_of_rows(x, y, intercept, given).left_out(x, y, 0.7, intercept, given)
    for i in range(rows):
        others = torch.arange(rows) != i
        fit = ridge.solve_rows(x[others], y[others], 0.7, intercept, w[others] if weighted else None)
        torch.testing.assert_close(found[i], y[i] - fit(x[i : i + 1])[0], rtol=0, atol=1e-10)


def test_a_huge_penalty_leaves_the_mean_and_none_is_least_squares() -> None:
    x, y, _ = _problem()
    fit = ridge.solve(_moments(x, y), 1e14, "free")
    assert float(fit.weights.abs().max()) < 1e-10
    torch.testing.assert_close(fit.intercept, y.mean(0))
    plain = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(ridge.solve(_moments(x, y), 0.0).weights, plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(ridge.path(_moments(x, y)).fit(0.0, "none").weights, plain, rtol=0, atol=1e-10)


def test_more_features_never_raise_the_penalised_objective() -> None:
    x, y, _ = _problem(40, 12)
    values = []
    for features in range(1, 13):
        fit = ridge.solve_rows(x[:, :features], y, 2.0, "free")
        values.append(float((y - fit(x[:, :features])).square().sum() + 2.0 * fit.weights.square().sum()))
    assert all(after <= before + 1e-12 for before, after in pairwise(values))
    assert values[-1] < values[0]


def test_a_row_of_weight_two_is_two_rows() -> None:
    x, y, _ = _problem(10)
    w = torch.tensor([0.0, 1, 2, 1, 1, 3, 1, 1, 1, 2]).double()
    repeated = torch.arange(10).repeat_interleave(w.long())
    _close(ridge.solve_rows(x, y, 0.5, "free", w), ridge.solve_rows(x[repeated], y[repeated], 0.5, "free"))


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
def test_row_after_row_is_all_rows_at_once(forgetting: float) -> None:
    """The start, P = I/λ, is forgotten like a row."""
    x, y, _ = _problem(12, 5)
    inverse, weights = torch.eye(5).double() / 0.7, torch.zeros(5, 3).double()
    for features, targets in zip(x, y, strict=True):
        inverse, weights = ridge.recursive(inverse, weights, features, targets, forgetting)
    for chunk in (1, 5, 12):
        moments = Moments.zeros(5, 3)
        for start in range(0, 12, chunk):
            moments.gather(x[start : start + chunk], y[start : start + chunk], forgetting=forgetting)
        _close(ridge.solve(moments, 0.7 * forgetting**12), Fit(weights, torch.zeros(3).double(), 0.0))


def test_what_is_singular_is_refused_with_its_rank() -> None:
    x, y, _ = _problem(40, 9)
    x[:, 5] = x[:, 6]
    for solve in (
        lambda: ridge.solve(_moments(x, y), 0.0, "free"),
        lambda: ridge.path(_moments(x, y), "free").fit(0.0, "free"),
    ):
        with pytest.raises(Singular, match=r"rank 8 of 9 and λ is 0, .* a λ above 0"):
            solve()
    with pytest.raises(Singular, match="6 rows of 9 features have rank 5 of 6"):
        ridge.solve_rows(*_problem(6)[:2], 0.0, "free")
    with pytest.raises(Singular, match="rank 6 of 9"):
        ridge.solve(_moments(*_problem(6)[:2]), 0.0)
    with pytest.raises(Singular, match="do not vary at all"):
        ridge.path_of_rows(torch.ones(3, 9), torch.ones(3, 1), "free").fit(1.0, "free")


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda x, y: ridge.solve(_moments(x, y), -1.0), "λ is -1.0, expected a number of at least 0"),
        (lambda x, y: ridge.solve_rows(x, y, float("nan")), "λ is nan"),
        (lambda x, y: ridge.solve(_moments(x, y), 1.0, "fre"), "intercept is 'fre', expected one of none, free, pen"),  # type: ignore[arg-type]
        (lambda x, y: ridge.solve(Moments.zeros(9, 3), 1.0), "no rows have been gathered"),
        (lambda x, y: ridge.solve(_moments(x / 0, y), 1.0), "not finite"),
        (lambda x, y: ridge.solve_rows(x[:5] / 0, y[:5], 1.0), "not finite"),
        (lambda x, y: _moments(x, y[1:]), r"features are of shape \(40, 9\) and targets of shape \(39, 3\)"),
        (
            lambda x, y: Moments.zeros(8, 3).gather(x, y),
            "9 features and 3 targets, but the sums were begun with 8 and 3",
        ),
        (lambda x, y: _moments(x, y, -y[:, 0]), "expected one number of at least 0 each"),
        (lambda x, y: Moments.zeros(9, 3).gather(x, y, forgetting=0.0), "forgetting is 0.0"),
        (lambda x, y: ridge.recursive(x, x, x, y, 1.1), "forgetting is 1.1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(use, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        use(*_problem()[:2])


def test_costs_are_those_that_are_counted_and_cafo_has_the_same_solver() -> None:
    x, y, _ = _problem()
    with FlopCounter() as counter:
        moments = _moments(x, y)
    assert counter.total == 2 * 40 * ridge.gather_macs(9, 3)
    with FlopCounter() as counter:
        ridge.solve(moments, 1.0)
    assert counter.total == ridge.solve_flops(9, 3)
    assert not counter.uncounted
    with FlopCounter() as counter:
        ridge.path(moments, "free").left_out(x, y, 1.0, "free")
    assert not counter.uncounted
    for name in ("PANEL", "Solution", "symmetric", "ridge", "gather_macs", "solve_flops"):
        assert getattr(cafo, name) is getattr(ridge, name)
