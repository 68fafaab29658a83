"""Ridge regression in closed form: sums that are gathered batch by batch, and every way of solving for the weights from them.

Sources: Hoerl and Kennard 1970 (ridge); Allen 1974 (leave-one-out residuals of a linear smoother); Plackett 1950 and Haykin,
"Adaptive Filter Theory" (recursive least squares); Saunders, Gammerman, Vovk 1998 (the dual form).

Symbols: N rows, D features, C targets, X ``(N, D)``, Y ``(N, C)``, w the rows' weights ``(N,)``, λ the penalty in *sum* form:

    minimise  Σ_n w_n ‖y_n − Wᵀx_n − b‖² + λ‖W‖²        W (D, C), b (C,)

so λ of a mean loss is λN here. Sums are float64 wherever a rule gathers them: XᵀX squares the condition of X.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

PANEL = 1024
"""Columns of XᵀX that are worked out together; what lies below the diagonal panels is never multiplied."""

Intercept = Literal["none", "free", "penalised"]
"""b = 0; b without a penalty, by centring; b as the weight of a column of ones, under the same penalty as W."""


class Singular(ValueError):
    """The equations have no single solution, to working precision."""


class Solution(NamedTuple):
    """Weights in closed form, and how they were found.

    Attributes:
        weights: W, shape ``(D, C)``.
        residual: ‖(XᵀX + λI) W − XᵀY‖ / ‖XᵀY‖, Frobenius norms; 0 where XᵀY is.
        cholesky: whether a Cholesky factorisation was enough; else W is the solution of least norm, by eigenvalues.
    """

    weights: Tensor
    residual: float
    cholesky: bool


class Fit(NamedTuple):
    """A linear map of features.

    Attributes:
        weights: W, shape ``(D, C)``.
        intercept: b, shape ``(C,)``.
        residual: as in :class:`Solution`; of the dual form, that of its own equations.
    """

    weights: Tensor
    intercept: Tensor
    residual: float

    def __call__(self, features: Tensor) -> Tensor:
        """XW + b, shape ``(N, C)``, for features ``(N, D)``."""
        return features.to(self.weights.dtype) @ self.weights + self.intercept


# -- sums ------------------------------------------------------------------------------------------------------------------
def gather(gram: Tensor, cross: Tensor, features: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
    """Add one batch to XᵀX and XᵀY, in their own dtype and in place.

    Of XᵀX only panels of rows from the diagonal on are written: :func:`symmetric` fills in the rest. That is half of the
    work for many columns.

    Args:
        gram: XᵀX so far, shape ``(D, D)``.
        cross: XᵀY so far, shape ``(D, C)``.
        features: X, shape ``(N, D)``.
        targets: Y, shape ``(N, C)``.
        weights: w, shape ``(N,)``; ``None``: all 1.
    """
    x = features.to(gram.dtype)
    left = x.T if weights is None else (x * weights.to(x.dtype)[:, None]).T
    for start in range(0, len(gram), PANEL):
        gram[start : start + PANEL, start:].addmm_(left[start : start + PANEL], x[:, start:])
    cross.addmm_(left, targets.to(gram.dtype))


def symmetric(gram: Tensor) -> Tensor:
    """All of XᵀX from what :func:`gather` wrote, as a new tensor."""
    whole = gram.clone()
    for start in range(0, len(gram), PANEL):
        stop = start + PANEL
        whole[stop:, start:stop] = gram[start:stop, stop:].T
    return whole


def centre(gram: Tensor, cross: Tensor, sums: Tensor, totals: Tensor, rows: float) -> tuple[Tensor, Tensor]:
    """Take the means of X and Y out of XᵀX and XᵀY, in place: A − nμμᵀ and B − nμνᵀ.

    Args:
        gram: A, all of it, shape ``(D, D)``.
        cross: B, shape ``(D, C)``.
        sums: Σ x, shape ``(D,)``.
        totals: Σ y, shape ``(C,)``.
        rows: n, the sum of the rows' weights.

    Returns:
        μ and ν.
    """
    mean, share = sums / rows, totals / rows
    gram.addr_(mean, mean, alpha=-rows)
    cross.addr_(mean, share, alpha=-rows)
    return mean, share


class Moments(NamedTuple):
    """All that rows leave behind: sums of products. Those of two parts of the data, added, are those of both.

    Attributes:
        gram: Σ w x xᵀ, shape ``(D, D)``, as :func:`gather` writes it.
        cross: Σ w x yᵀ, shape ``(D, C)``.
        sums: Σ w x, shape ``(D,)``.
        totals: Σ w y, shape ``(C,)``.
        rows: Σ w, and the number of rows; shape ``(2,)``.
    """

    gram: Tensor
    cross: Tensor
    sums: Tensor
    totals: Tensor
    rows: Tensor

    @classmethod
    def zeros(cls, features: int, targets: int, device: torch.device | str = "cpu") -> Moments:
        """Of no rows, in float64."""
        shapes = (features, features), (features, targets), (features,), (targets,), (2,)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def gather(self, features: Tensor, targets: Tensor, weights: Tensor | None = None, forgetting: float = 1.0) -> None:
        """Add rows, in place.

        Args:
            features: X, shape ``(N, D)``.
            targets: Y, shape ``(N, C)``.
            weights: w, shape ``(N,)``, at least 0; ``None``: all 1.
            forgetting: γ in (0, 1]: everything loses this factor with every row that comes after it, as in
                :func:`recursive`.

        Raises:
            ValueError: γ out of range, or shapes that do not fit.
        """
        check_rows(features, targets, weights)
        if features.shape[1] != len(self.gram) or targets.shape[1] != len(self.totals):
            raise ValueError(
                f"rows have {features.shape[1]} features and {targets.shape[1]} targets, but the sums were begun with "
                f"{len(self.gram)} and {len(self.totals)}"
            )
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting is {forgetting}, expected a factor above 0 and at most 1")
        if forgetting < 1:
            for held in (self.gram, self.cross, self.sums, self.totals, self.rows[:1]):
                held.mul_(forgetting ** len(features))
            age = torch.arange(len(features) - 1, -1, -1, device=features.device, dtype=torch.float64)
            faded = forgetting**age
            weights = faded if weights is None else faded * weights
        gather(self.gram, self.cross, features, targets, weights)
        if weights is None:
            self.sums.add_(features.sum(0, dtype=torch.float64))
            self.totals.add_(targets.sum(0, dtype=torch.float64))
            self.rows[:1] += len(features)
        else:
            w = weights.to(torch.float64)
            self.sums.add_(w @ features.to(torch.float64))
            self.totals.add_(w @ targets.to(torch.float64))
            self.rows[:1] += w.sum()
        self.rows[1:] += len(features)

    def add(self, other: Moments) -> None:
        """Add the sums of other rows, in place: those of another rank, say."""
        for mine, theirs in zip(self, other, strict=True):
            mine.add_(theirs)


def check_rows(features: Tensor, targets: Tensor, weights: Tensor | None) -> None:
    """Refuse rows whose numbers differ, or weights below 0.

    Raises:
        ValueError: says what came.
    """
    if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
        raise ValueError(
            f"features are of shape {tuple(features.shape)} and targets of shape {tuple(targets.shape)}, expected (N, D) and "
            "(N, C)"
        )
    if weights is not None and (weights.shape != (len(features),) or bool((weights < 0).any())):
        raise ValueError(
            f"weights are of shape {tuple(weights.shape)} for {len(features)} rows, expected one number of at least 0 each"
        )


def check_penalty(penalty: object, name: str = "λ", beside: str = "") -> None:
    """Refuse what is no penalty.

    Args:
        penalty: what was given.
        name: what it is called.
        beside: what else could have been given.

    Raises:
        ValueError: it is below 0, infinite or not a number.
    """
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 <= penalty < float("inf"):
        raise ValueError(f"{name} is {penalty!r}, expected a number of at least 0{beside}")


def _equations(m: Moments, intercept: Intercept) -> tuple[Tensor, Tensor]:
    """A and B of the equations (A + λI) W = B: centred, or with a last row for the column of ones."""
    if intercept not in get_args(Intercept):
        raise ValueError(f"intercept is {intercept!r}, expected one of {', '.join(get_args(Intercept))}")
    if not float(m.rows[0]) > 0:
        raise ValueError("no rows have been gathered, so there is nothing to solve")
    gram, cross = symmetric(m.gram), m.cross.clone()
    if intercept == "free":
        centre(gram, cross, m.sums, m.totals, float(m.rows[0]))
    elif intercept == "penalised":
        gram = torch.cat((torch.cat((gram, m.sums[:, None]), 1), torch.cat((m.sums, m.rows[:1]))[None]))
        cross = torch.cat((cross, m.totals[None]))
    return gram, cross


def _with_intercept(found: Tensor, m: Moments, intercept: Intercept) -> tuple[Tensor, Tensor]:
    """W and b from the solution of :func:`_equations`."""
    if intercept == "penalised":
        return found[:-1], found[-1]
    if intercept == "free":
        return found, (m.totals - m.sums @ found) / m.rows[0]
    return found, torch.zeros_like(m.totals)


# -- solving ---------------------------------------------------------------------------------------------------------------
def _checked(gram: Tensor, cross: Tensor) -> None:
    if not bool(gram.isfinite().all()) or not bool(cross.isfinite().all()):
        raise ValueError("the features are not finite numbers, so they have no closed form")


def _factor(gram: Tensor) -> tuple[Tensor, bool]:
    """Cholesky factor, and whether the matrix is not singular to working precision."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    smallest = len(gram) * torch.finfo(gram.dtype).eps
    return factor, int(failed) == 0 and bool(pivots.min() > smallest * pivots.max())


def _residual(gram: Tensor, weights: Tensor, cross: Tensor) -> float:
    size = float(cross.norm())
    return float((gram @ weights - cross).norm()) / size if size else 0.0


def ridge(gram: Tensor, cross: Tensor, penalty: float) -> Solution:
    """W = (XᵀX + λI)⁻¹ XᵀY by one Cholesky factorisation.

    Where XᵀX + λI is singular to working precision, W is the least-squares solution of least norm instead.

    Args:
        gram: XᵀX, shape ``(D, D)``, float64 for anything but the smallest problems. Overwritten.
        cross: XᵀY, shape ``(D, C)``.
        penalty: λ, at least 0.

    Raises:
        ValueError: an entry is not finite.
    """
    _checked(gram, cross)
    gram.diagonal().add_(penalty)
    factor, good = _factor(gram)
    if good:
        weights = torch.cholesky_solve(cross, factor)
    else:
        values, vectors = torch.linalg.eigh(gram)
        smallest = len(gram) * torch.finfo(gram.dtype).eps
        kept = values > smallest * values.max().clamp_min(torch.finfo(gram.dtype).tiny)
        inverse = torch.where(kept, values, 1).reciprocal() * kept
        weights = vectors @ (inverse[:, None] * (vectors.T @ cross))
    return Solution(weights, _residual(gram, weights, cross), good)


def _regular(matrix: Tensor, wanted: Tensor, penalty: float, what: str) -> tuple[Tensor, float]:
    """X of (A + λI) X = B, and its residual; A is overwritten. ``what`` A is made of, for the refusal of a singular one."""
    _checked(matrix, wanted)
    matrix.diagonal().add_(penalty)
    factor, good = _factor(matrix)
    if not good:
        matrix.diagonal().sub_(penalty)
        values = torch.linalg.eigvalsh(matrix)
        rank = int((values > len(matrix) * torch.finfo(matrix.dtype).eps * values[-1].clamp_min(0)).sum())
        raise Singular(
            f"{what} have rank {rank} of {len(matrix)} and λ is {penalty:g}, so the equations have no single solution: a λ "
            "above 0 gives them one"
        )
    found = torch.cholesky_solve(wanted, factor)
    return found, _residual(matrix, found, wanted)


def solve(moments: Moments, penalty: float, intercept: Intercept = "none") -> Fit:
    """W and b from sums, by one Cholesky factorisation. Nothing singular is solved in silence.

    Raises:
        Singular: XᵀX + λI is singular to working precision; says its rank.
        ValueError: λ below 0, no rows, or an entry that is not finite.
    """
    check_penalty(penalty)
    gram, cross = _equations(moments, intercept)
    found, residual = _regular(gram, cross, penalty, f"the features of {int(moments.rows[1])} rows")
    return Fit(*_with_intercept(found, moments, intercept), residual)


def _weighted(
    features: Tensor, targets: Tensor, intercept: Intercept, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows times √w, in float64, centred or with a column of ones; and the means that were taken out."""
    check_rows(features, targets, weights)
    x, y = features.double(), targets.double()
    w = x.new_ones(len(x)) if weights is None else weights.double()
    if not float(w.sum()) > 0:
        raise ValueError("no rows have been gathered, so there is nothing to solve")
    if intercept == "penalised":
        x = torch.cat((x, x.new_ones(len(x), 1)), 1)
    mean, share = x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1])
    if intercept == "free":
        mean, share = w @ x / w.sum(), w @ y / w.sum()
    root = w.sqrt()[:, None]
    return (x - mean) * root, (y - share) * root, mean, share


def solve_rows(
    features: Tensor, targets: Tensor, penalty: float, intercept: Intercept = "none", weights: Tensor | None = None
) -> Fit:
    """W and b from the rows themselves: by the dual form Xᵀ(XXᵀ + λI)⁻¹Y where there are fewer rows than features.

    Args:
        features: X, shape ``(N, D)``.
        targets: Y, shape ``(N, C)``.
        penalty: λ, at least 0.
        intercept: see :data:`Intercept`.
        weights: w, shape ``(N,)``; ``None``: all 1.

    Raises:
        Singular: XXᵀ + λI is singular to working precision; with an intercept that is free, it is at λ = 0.
        ValueError: as :func:`solve`.
    """
    check_penalty(penalty)
    if len(features) >= features.shape[1]:
        moments = Moments.zeros(features.shape[1], targets.shape[1], features.device)
        moments.gather(features, targets, weights)
        return solve(moments, penalty, intercept)
    x, y, mean, share = _weighted(features, targets, intercept, weights)
    dual, residual = _regular(x @ x.T, y, penalty, f"{len(x)} rows of {features.shape[1]} features")
    found = x.T @ dual
    if intercept == "penalised":
        return Fit(found[:-1], found[-1], residual)
    return Fit(found, share - mean @ found, residual)


# -- every penalty at once -------------------------------------------------------------------------------------------------
class Path(NamedTuple):
    """The solutions for every λ, from one eigendecomposition A = UΛUᵀ: W(λ) = U(Λ + λ)⁻¹UᵀB.

    Attributes:
        values: Λ, shape ``(R,)``, at least 0, upwards.
        vectors: U, shape ``(D, R)``, with ``intercept="penalised"`` ``(D + 1, R)``.
        projected: UᵀB, shape ``(R, C)``.
        mean: μ, taken out of X, shape ``(D,)``; zeros but for ``intercept="free"``.
        share: ν, taken out of Y, shape ``(C,)``.
        rows: Σ w, shape ``()``; what a free intercept costs a row's leverage.
    """

    values: Tensor
    vectors: Tensor
    projected: Tensor
    mean: Tensor
    share: Tensor
    rows: Tensor

    def fit(self, penalty: float, intercept: Intercept) -> Fit:
        """W and b for this λ.

        Raises:
            Singular: λ is 0, and so is an eigenvalue to working precision.
        """
        inverse = self._inverse(penalty)
        found = self.vectors @ (inverse[:, None] * self.projected)
        size = float(self.projected.norm())
        left = (self.values + penalty)[:, None] * (self.vectors.T @ found) - self.projected
        residual = float(left.norm()) / size if size else 0.0
        if intercept == "penalised":
            return Fit(found[:-1], found[-1], residual)
        return Fit(found, self.share - self.mean @ found, residual)

    def left_out(
        self, features: Tensor, targets: Tensor, penalty: float, intercept: Intercept, weights: Tensor | None = None
    ) -> Tensor:
        """What is left of y_n when the fit has not seen row n, exactly: (y_n − ŷ_n)/(1 − h_n), shape ``(N, C)``.

        h_n = w_n x_nᵀ(A + λI)⁻¹x_n, of centred rows, and for a free intercept w_n/Σw more.

        Args:
            features: X, rows that were gathered, shape ``(N, D)``.
            targets: Y, shape ``(N, C)``.
            penalty: λ.
            intercept: that of the path.
            weights: w as gathered, shape ``(N,)``.

        Raises:
            Singular: as :meth:`fit`.
        """
        x = features.double()
        if intercept == "penalised":
            x = torch.cat((x, x.new_ones(len(x), 1)), 1)
        w = x.new_ones(len(x)) if weights is None else weights.double()
        z = (x - self.mean if intercept == "free" else x) @ self.vectors
        scaled = z * self._inverse(penalty)
        leverage = (scaled * z).sum(1) + (1 / self.rows if intercept == "free" else 0)
        return (targets.double() - self.share - scaled @ self.projected) / (1 - w * leverage)[:, None]

    def _inverse(self, penalty: float) -> Tensor:
        check_penalty(penalty)
        shifted = self.values + penalty
        if not len(shifted):
            raise Singular("the features do not vary at all, so nothing can be fitted to them")
        if not bool(shifted[0] > len(self.vectors) * torch.finfo(shifted.dtype).eps * shifted[-1]):
            floor = len(self.vectors) * torch.finfo(shifted.dtype).eps * self.values[-1]
            rank = int((self.values > floor).sum())
            raise Singular(
                f"the features have rank {rank} of {len(self.vectors)} and λ is {penalty:g}, so the equations have no single "
                "solution: a λ above 0 gives them one"
            )
        return shifted.reciprocal()


def path(moments: Moments, intercept: Intercept = "none") -> Path:
    """One eigendecomposition of the equations' matrix.

    Raises:
        ValueError: no rows, or an entry that is not finite.
    """
    gram, cross = _equations(moments, intercept)
    _checked(gram, cross)
    values, vectors = torch.linalg.eigh(gram)
    mean, share = torch.zeros_like(moments.sums), torch.zeros_like(moments.totals)
    if intercept == "free":
        mean, share = moments.sums / moments.rows[0], moments.totals / moments.rows[0]
    return Path(values.clamp_min(0), vectors, vectors.T @ cross, mean, share, moments.rows[0].clone())


def path_of_rows(
    features: Tensor, targets: Tensor, intercept: Intercept = "none", weights: Tensor | None = None
) -> Path:
    """The same from the rows themselves: of XXᵀ where there are fewer rows than features, U = XᵀV Λ^-½.

    At λ = 0 it holds the solution of least norm, which fits every row, so that nothing is left to leave out.

    Raises:
        ValueError: no rows, or an entry that is not finite.
    """
    if len(features) >= features.shape[1]:
        moments = Moments.zeros(features.shape[1], targets.shape[1], features.device)
        moments.gather(features, targets, weights)
        return path(moments, intercept)
    x, y, mean, share = _weighted(features, targets, intercept, weights)
    kernel = x @ x.T
    _checked(kernel, y)
    values, dual = torch.linalg.eigh(kernel)
    kept = values > len(kernel) * torch.finfo(values.dtype).eps * values[-1]
    values, vectors = values[kept], x.T @ dual[:, kept] * values[kept].rsqrt()
    rows = y.new_tensor(float(len(x))) if weights is None else weights.double().sum()
    return Path(values, vectors, vectors.T @ (x.T @ y), mean, share, rows)


def penalties(path: Path, decades: Sequence[float] = range(-8, 3)) -> list[float]:
    """A grid for λ: powers of ten times the mean of the diagonal of the equations' matrix."""
    scale = float(path.values.sum()) / len(path.vectors)
    return [scale * 10.0**decade for decade in decades]


# -- one row after the other -----------------------------------------------------------------------------------------------
def recursive(
    inverse: Tensor, weights: Tensor, features: Tensor, targets: Tensor, forgetting: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Recursive least squares: P and W after one more row, without a matrix to invert.

        k = P x / (γ + xᵀ P x),   W ← W + k (y − xᵀ W),   P ← (P − k xᵀ P) / γ

    Begun with P = I/λ and W = 0, W is that of :func:`ridge` over all rows so far; with γ < 1 rows and the penalty itself lose
    that factor with every row.

    Args:
        inverse: P, shape ``(D, D)``.
        weights: W, shape ``(D, C)``.
        features: x, shape ``(D,)``; for an intercept its last entry is 1.
        targets: y, shape ``(C,)``.
        forgetting: γ in (0, 1].

    Returns:
        P and W, new.

    Raises:
        ValueError: γ out of range.
    """
    if not 0 < forgetting <= 1:
        raise ValueError(f"forgetting is {forgetting}, expected a factor above 0 and at most 1")
    moved = inverse @ features
    gain = moved / (forgetting + features @ moved)
    return (inverse - torch.outer(gain, moved)) / forgetting, weights + torch.outer(gain, targets - features @ weights)


# -- costs -----------------------------------------------------------------------------------------------------------------
def gather_macs(features: int, targets: int) -> int:
    """MACs per row of XᵀX, in panels from the diagonal on, and XᵀY; about D²/2 + CD for many columns."""
    return (
        sum(min(PANEL, features - start) * (features - start) for start in range(0, features, PANEL))
        + targets * features
    )


def solve_flops(features: int, targets: int) -> int:
    """FLOPs of one closed form by Cholesky: D³/3, two triangular solves 2D²C, and the residual 2D²C."""
    return features**3 // 3 + 4 * features**2 * targets
