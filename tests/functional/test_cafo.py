"""CaFo's equations against closed forms, autograd, brute force, and what the authors' code gives on a tiny problem."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.cost import FlopCounter
from locallearn.functional import cafo, ridge


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _labels(samples: int, classes: int) -> Tensor:
    return torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(1))


# -- sparsemax -------------------------------------------------------------------------------------------------------------
def _projected(z: Tensor) -> Tensor:
    """The nearest point of the simplex, by bisection of its threshold."""
    low, high = z.max() - 1, z.max()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if (z - tau).clamp_min(0).sum() > 1 else (low, tau)
    return (z - low).clamp_min(0)


def test_sparsemax_is_the_projection_on_the_simplex() -> None:
    z = _draw(40, 7) * 2
    p = cafo.sparsemax(z)
    assert bool((p >= 0).all())
    torch.testing.assert_close(p.sum(1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(p, torch.stack([_projected(row) for row in z]), atol=1e-12, rtol=0)
    assert 0 < int((p == 0).sum()) < p.numel()


def test_sparsemax_does_not_see_a_shift_and_takes_one_class_equal_scores_and_large_ones() -> None:
    z = _draw(5, 4)
    torch.testing.assert_close(cafo.sparsemax(z + 1e6), cafo.sparsemax(z), atol=1e-8, rtol=0)
    torch.testing.assert_close(cafo.sparsemax(torch.full((2, 3), 7.0)), torch.full((2, 3), 1 / 3))
    assert torch.equal(cafo.sparsemax(_draw(3, 1)), torch.ones(3, 1, dtype=torch.float64))
    assert torch.equal(
        cafo.sparsemax(torch.tensor([[1e30, 0.0], [0.0, -1e30]])), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    )
    assert bool(cafo.sparsemax(torch.tensor([[float("nan"), 0.0]])).isnan().any())  # nothing that looks like a result


def test_sparsemax_has_the_jacobian_of_its_support() -> None:
    z = _draw(1, 5)[0]
    support = (cafo.sparsemax(z) > 0).double()
    wanted = torch.diag(support) - torch.outer(support, support) / support.sum()
    torch.testing.assert_close(torch.autograd.functional.jacobian(cafo.sparsemax, z), wanted)


def test_the_sparsemax_loss_is_the_textbooks_and_its_gradient_p_minus_y() -> None:
    z, y = _draw(30, 6), _labels(30, 6)
    z.requires_grad_()
    loss = cafo.sparsemax_loss(z, y)
    loss.backward()
    values = []
    for row, label in zip(z.detach(), y, strict=True):
        p = _projected(row)
        tau = (row[p > 0].sum() - 1) / (p > 0).sum()
        values.append(-row[label] + 0.5 * (row[p > 0] ** 2 - tau**2).sum() + 0.5)
    torch.testing.assert_close(loss.detach(), torch.stack(values).mean())
    torch.testing.assert_close(z.grad, (cafo.sparsemax(z.detach()) - F.one_hot(y, 6)) / 30)
    won = torch.tensor([[3.0, 1.9, 0.0]])
    assert float(cafo.sparsemax_loss(won, torch.tensor([0]))) == 0  # ahead by more than 1


def test_numbers_of_the_authors_code_for_sparsemax() -> None:
    """Two rows of scores as the official code was given them; its loss is ½(C − 1) larger than the textbook's."""
    z = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.5, -1.0, 1.5]], dtype=torch.float64)
    torch.testing.assert_close(cafo.sparsemax(z[1]), torch.tensor([0.75, 0.0, 0.0, 0.25], dtype=torch.float64))
    first = cafo.sparsemax_loss(z[:1], torch.tensor([2]))
    assert float(first) == 0.375 == 1.875 - 0.5 * (4 - 1)


# -- predictors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", ["ce", "sparsemax"])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_a_predictors_gradient_is_autograds_whatever_the_chunk(loss: cafo.Loss, rows: int) -> None:
    x, w, y = _draw(20, 3, 2, 2), _draw(12, 5, seed=2), _labels(20, 5)
    value, gradient = cafo.gradient(x, w, y, loss, rows)
    w.requires_grad_()
    scores = x.flatten(1) @ w
    wanted = F.cross_entropy(scores, y) if loss == "ce" else cafo.sparsemax_loss(scores, y)
    wanted.backward()
    torch.testing.assert_close(value, wanted.detach())
    torch.testing.assert_close(gradient, w.grad)


def test_all_ones_give_every_class_the_same_share() -> None:
    x, y = _draw(20, 9), _labels(20, 4)
    assert float(cafo.gradient(x, torch.ones(9, 4).double(), y, "ce")[0]) == pytest.approx(math.log(4), abs=1e-14)
    assert float(cafo.gradient(x, torch.ones(9, 4).double(), y, "sparsemax")[0]) == pytest.approx(0.375, abs=1e-14)


def test_the_step_makes_no_tensor_of_samples_by_features_by_classes() -> None:
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    x, w, y = _draw(64, 50), _draw(50, 10), _labels(64, 10)
    with Watch():
        cafo.gradient(x, w, y, rows=16)
    assert max(made) <= x.numel() < 64 * 50 * 10


# -- closed form -----------------------------------------------------------------------------------------------------------
def _sums(x: Tensor, y: Tensor, classes: int, chunk: int) -> tuple[Tensor, Tensor]:
    gram, cross = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], classes).double()
    for start in range(0, len(x), chunk):
        cafo.gather(gram, cross, x[start : start + chunk], y[start : start + chunk])
    return cafo.symmetric(gram), cross


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_the_closed_form_solves_the_normal_equations(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "PANEL", 4)  # several panels, and a last one that is smaller
    x, y = _draw(50, 11), _labels(50, 3)
    targets = F.one_hot(y, 3).double()
    gram, cross = _sums(x, y, 3, 50)
    torch.testing.assert_close(gram, x.T @ x)
    solution = cafo.ridge(gram.clone(), cross, penalty)
    assert solution.cholesky
    assert solution.residual < 1e-12
    left = x.T @ (x @ solution.weights) + penalty * solution.weights - x.T @ targets
    assert float(left.norm() / (x.T @ targets).norm()) < 1e-12
    longer = torch.cat((x, penalty**0.5 * torch.eye(11, dtype=torch.float64)))
    wanted = torch.linalg.lstsq(longer, torch.cat((targets, torch.zeros(11, 3).double()))).solution
    torch.testing.assert_close(solution.weights, wanted)
    for chunk in (1, 7, 49):
        torch.testing.assert_close(cafo.ridge(*_sums(x, y, 3, chunk), penalty).weights, solution.weights)


def test_fewer_samples_than_features_work_by_ridge() -> None:
    x, y = _draw(20, 48), _labels(20, 3)
    solution = cafo.ridge(*_sums(x, y, 3, 20), 1e-3)
    assert solution.cholesky
    assert solution.residual < 1e-6
    dual = x.T @ torch.linalg.solve(x @ x.T + 1e-3 * torch.eye(20).double(), F.one_hot(y, 3).double())
    torch.testing.assert_close(solution.weights, dual, rtol=1e-6, atol=1e-9)


def test_a_singular_problem_says_so_and_has_the_solution_of_least_norm() -> None:
    x, y = _draw(20, 48), _labels(20, 3)
    x[:, 5] = x[:, 6] = 1.0  # two constant features
    solution = cafo.ridge(*_sums(x, y, 3, 20), 0.0)
    assert not solution.cholesky
    torch.testing.assert_close(solution.weights, torch.linalg.pinv(x) @ F.one_hot(y, 3).double(), rtol=1e-6, atol=1e-8)
    nothing = cafo.ridge(torch.zeros(3, 3).double(), torch.zeros(3, 2).double(), 0.0)
    assert not nothing.cholesky
    assert not bool(nothing.weights.any())


def test_features_that_are_not_finite_have_no_closed_form() -> None:
    with pytest.raises(ValueError, match="not finite"):
        cafo.ridge(torch.full((2, 2), float("nan")).double(), torch.zeros(2, 2).double(), 1.0)


def test_costs_are_those_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "PANEL", 4)
    x, y = _draw(20, 11), _labels(20, 3)
    gram, cross = torch.zeros(11, 11).double(), torch.zeros(11, 3).double()
    with FlopCounter() as counter:
        cafo.gather(gram, cross, x, y)
    assert counter.total == 2 * 20 * cafo.gather_macs(11, 3)
    with FlopCounter() as counter:
        cafo.ridge(cafo.symmetric(gram), cross, 1.0)
    assert counter.total == cafo.solve_flops(11, 3)
    assert not counter.uncounted
    with FlopCounter() as counter:
        cafo.gradient(x, _draw(11, 3), y, rows=8)
    assert counter.total == 2 * 20 * cafo.predictor_macs([11], 3)


# -- direct feedback -------------------------------------------------------------------------------------------------------
def test_the_error_is_the_gradient_of_the_mean_loss_and_feedback_has_unit_rows() -> None:
    z, y = _draw(9, 4).requires_grad_(), _labels(9, 4)
    F.cross_entropy(z, y).backward()
    torch.testing.assert_close(cafo.output_error(z, y), z.grad)
    matrix = cafo.unit_rows(4, 30, torch.zeros(1))
    torch.testing.assert_close(matrix.norm(dim=1), torch.ones(4))


# -- refusals --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (torch.tensor([0, 4, 1]), "from 0 to 4, expected class ids from 0 to 3"),
        (torch.tensor([0, -1, 1]), "from -1 to 1"),
        (torch.tensor([0, 1]), r"shape \(2,\) for 3 samples"),
        (torch.rand(3), "give class ids"),
        (F.one_hot(torch.tensor([0, 1, 2]), 4), r"shape \(3, 4\)"),
    ],
)
def test_targets_that_are_no_class_ids_are_refused(targets: Tensor, says: str) -> None:
    x = _draw(3, 5)
    for use in (
        lambda: cafo.gradient(x, torch.ones(5, 4).double(), targets),
        lambda: cafo.sparsemax_loss(_draw(3, 4), targets),
        lambda: cafo.gather(torch.zeros(5, 5).double(), torch.zeros(5, 4).double(), x, targets),
    ):
        with pytest.raises(ValueError, match=says):
            use()


def test_features_that_do_not_fit_and_empty_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="have 6 entries per sample but the predictor reads 5"):
        cafo.gradient(_draw(3, 6), torch.ones(5, 4).double(), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="empty"):
        cafo.gradient(_draw(0, 5), torch.ones(5, 4).double(), torch.zeros(0, dtype=torch.int64))
