"""The equations against theory, explicit sums, and the authors' numbers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from locallearn.functional.counter_noise import numbers
from locallearn.functional.zeroth_order import (
    GRID,
    ExactSum,
    Noise,
    Shaping,
    fire,
    integer_noise,
    low_rank,
    low_rank_estimate,
    on_grid,
    quantise,
    scalars,
    second_moment,
    second_moment_of_rank,
    within,
)
from tests.references import reference


@pytest.mark.parametrize("noise", get_args(Noise))
@pytest.mark.parametrize("n", [1, 4])
def test_second_moment(noise: Noise, n: int) -> None:
    """E‖ĝ‖²/‖g‖² on a linear loss, of the noise that is really used."""
    d, trials = 50, 4000
    z = numbers(0, 0, torch.arange(n * trials), 1, 0, d, noise).view(trials, n, d).double()
    g = torch.linspace(-1, 2, d, dtype=torch.float64)
    made = torch.einsum("tnd,tne,e->td", z, z, g) / n
    found = made.square().sum(1) / g.square().sum()
    theory = second_moment(d, n, noise)
    assert abs(float(found.mean()) - theory) < 4 * float(found.std()) / trials**0.5
    assert float((made.mean(0) - g).norm() / g.norm()) < 4 * (theory / trials) ** 0.5


@pytest.mark.parametrize("rank", [1, 2, 4, 16])
def test_rank_law(rank: int) -> None:
    """One matrix of 16 × 12, linear loss: the mean is the gradient at every rank, and the variance follows the law."""
    m, n, trials = 16, 12, 6000
    a = numbers(0, 0, torch.arange(trials), 1, 0, m * rank).view(trials, m, rank).double()
    b = numbers(0, 0, torch.arange(trials), 2, 0, n * rank).view(trials, n, rank).double()
    g = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    e = low_rank(a, b)
    made = e * (e * g).sum((1, 2), keepdim=True)
    found = made.square().sum((1, 2)) / g.square().sum()
    theory = second_moment_of_rank(m, n, rank)
    assert abs(float(found.mean()) - theory) < 4 * float(found.std()) / trials**0.5
    assert float((made.mean(0) - g).norm() / g.norm()) < 4 * (theory / trials) ** 0.5


@pytest.mark.parametrize("rank", [1, 3])
def test_the_factored_sum_is_the_sum(rank: int) -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(9, 5, rank, dtype=torch.float64, generator=draw)
    b = torch.randn(9, 7, rank, dtype=torch.float64, generator=draw)
    c = torch.randn(9, dtype=torch.float64, generator=draw)
    explicit = sum(c[i] * a[i] @ b[i].T / rank**0.5 for i in range(9))
    assert torch.allclose(low_rank_estimate(c, a, b), explicit, atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(torch.einsum("i,inm->nm", c, low_rank(a, b)), explicit, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("shaping", get_args(Shaping))
def test_what_shaping_does_not_see(shaping: Shaping) -> None:
    draw = torch.Generator().manual_seed(0)
    plus, minus = torch.rand(2, 6, dtype=torch.float64, generator=draw)
    c = scalars(plus, minus, None, 0.1, shaping)
    assert torch.allclose(scalars(plus + 3, minus + 3, None, 0.1, shaping), c, rtol=1e-6)
    assert torch.allclose(scalars(minus, plus, None, 0.1, shaping), -c)
    if shaping != "none":
        assert torch.allclose(scalars(5 * plus, 5 * minus, None, 0.2, shaping), c, rtol=1e-6)
        flat = torch.ones(6, dtype=torch.float64)
        assert bool((scalars(flat, flat, None, 0.1, shaping) == 0).all())
    one = scalars(plus, None, plus.mean(), 0.1, shaping)
    if shaping != "none":  # the mean stands for a loss that nobody looked at
        assert torch.equal(scalars(plus, None, None, 0.1, shaping), one)


def test_shaping_is_what_the_table_says() -> None:
    plus, minus = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 6.0])
    assert scalars(plus, minus, None, 0.5).tolist() == [2.0, -1.0]
    assert scalars(plus, None, torch.tensor(2.0), 0.5).tolist() == [2.0, 6.0]
    spread = torch.tensor([3.0, 5.0, 1.0, 6.0]).std()
    assert torch.allclose(scalars(plus, minus, None, 0.5, "zscore"), torch.tensor([1.0, -0.5]) / spread)
    assert torch.allclose(scalars(plus, None, torch.tensor(2.0), 0.5, "zscore"), torch.tensor([1.0, 3.0]) / plus.std())
    for given, sentence in (
        ((plus, None, None, 0.5, "none"), "need the loss"),
        ((plus[:1], None, None, 0.5, "zscore"), "at least two"),
        ((plus, minus, None, 0.5, "rank"), "expected none, zscore, sign"),
    ):
        with pytest.raises(ValueError, match=sentence):
            scalars(*given)  # type: ignore[arg-type]


def test_exact_sums_do_not_know_their_order() -> None:
    draw = torch.Generator().manual_seed(0)
    c = torch.randn(200, generator=draw)
    terms = torch.randn(200, 50, generator=draw) * c[:, None]
    ways = []
    for order in (range(200), reversed(range(200)), torch.randperm(200, generator=draw).tolist()):
        total = ExactSum(terms[0], c)
        for i in order:
            total.add(terms[i])
        ways.append(total.value(200))
    assert torch.equal(ways[0], ways[1])
    assert torch.equal(ways[0], ways[2])
    assert torch.allclose(ways[0], terms.double().mean(0).float(), atol=1e-6)
    assert not torch.equal(terms.sum(0), terms.flip(0).sum(0))  # plain sums do


def test_the_grid_adds_without_rounding() -> None:
    draw = torch.Generator().manual_seed(0)
    w = on_grid(torch.rand(1000, generator=draw) * 4 - 2)
    z = on_grid(torch.randn(1000, generator=draw) * 1e-3)
    assert torch.equal(w + z - 2 * z + z, w)
    assert torch.equal(w.double() / GRID, (w.double() / GRID).round())
    chance = on_grid(torch.full((100_000,), 0.3 * GRID), torch.rand(100_000, generator=draw))
    assert float(chance.mean() / GRID) == pytest.approx(0.3, abs=0.01)


def test_codes() -> None:
    weight = torch.tensor([[0.7, -0.3, 0.02], [0.0, 0.0, 0.0]])
    codes, scale = quantise(weight, 4)
    assert codes.tolist() == [[7, -3, 0], [0, 0, 0]]
    assert torch.allclose(codes * scale, torch.tensor([[0.7, -0.3, 0.0], [0.0, 0.0, 0.0]]))


def test_qes_as_its_authors_code_does_it() -> None:
    """Moves at the border, noise, and three updates with a full residual (kept in float16 there), step by step."""
    numbers_of = reference("qes")
    known = {key: torch.from_numpy(value) for key, value in numbers_of.items() if value.dtype.kind in "fiub"}
    sigma, alpha, decay = (float(known[key]) for key in ("sigma", "alpha", "decay"))

    def noise(seed: int) -> torch.Tensor:
        z = torch.randn((6, 3, 8), generator=torch.Generator().manual_seed(abs(seed)))
        chance = torch.rand((6, 3, 8), generator=torch.Generator().manual_seed(abs(seed) + 12345))
        return (1 if seed > 0 else -1) * integer_noise(z, 1 - chance, sigma)

    codes = known["int4/codes"].float()
    for seed in (11, -11, 29):
        u = known[f"int4/u_seed{seed}"].float()
        assert torch.equal(noise(seed), u)
        moved = within(codes, u, 0, 15)
        assert torch.equal(moved.int(), known[f"int4/perturbed_seed{seed}"].int())
        assert torch.equal(moved != codes + u, known[f"int4/gated_seed{seed}"])
    residual, now = known["int4/residual_init"].double(), codes.double()
    for t in range(3):
        step = torch.zeros_like(now)
        for seed, coefficient in known[f"int4/step{t}/coeffs"].tolist():
            step += coefficient * (within(now, noise(int(seed)).double(), 0, 15) - now) * alpha / sigma
        now, residual = fire(now, step, residual, decay, 0, 15)
        assert torch.equal(now, known[f"int4/step{t}/codes"].double())
        assert float((residual - known[f"int4/step{t}/residual"]).abs().max()) < 2e-3
        residual = known[f"int4/step{t}/residual"].double()
