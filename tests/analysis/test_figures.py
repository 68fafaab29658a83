"""Sparsity, ensembles, maps and likeness of layers, against closed forms and the numbers of the paper's code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from locallearn import analysis
from tests.references import reference


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- sparsity ------------------------------------------------------------------------------------------------------------


def test_hoyer_is_one_for_one_unit_none_for_equal_ones_and_neither_scale_nor_order_matter() -> None:
    assert analysis.hoyer(3 * torch.eye(7)).tolist() == pytest.approx([1.0] * 7)
    assert analysis.hoyer(torch.full((2, 9), 0.3)).tolist() == pytest.approx([0.0] * 2, abs=1e-6)
    h = _noise(5, 30).relu()
    for scale in (1e-30, 1e-3, 7.0, 1e30):
        torch.testing.assert_close(analysis.hoyer(scale * h), analysis.hoyer(h))
    assert analysis.hoyer((1e30 * h).float()).isfinite().all()
    torch.testing.assert_close(analysis.hoyer(h[:, torch.randperm(30, generator=torch.Generator())]), analysis.hoyer(h))
    torch.testing.assert_close(analysis.hoyer(h.reshape(5, 2, 3, 5)), analysis.hoyer(h))


def test_hoyer_of_rectified_noise_is_what_nothing_learned_looks_like() -> None:
    assert analysis.sparsity(_noise(200, 784).relu()).mean == pytest.approx(0.45, abs=0.02)


def test_silent_samples_are_counted_and_in_no_mean() -> None:
    h = torch.cat((torch.eye(4), torch.zeros(2, 4), torch.full((1, 4), math.inf)))
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    assert analysis.hoyer(h).isnan().tolist() == [False] * 4 + [True] * 3
    assert analysis.sparsity(h) == (pytest.approx(1.0), 7, 3)
    zero, one, two, three = analysis.class_sparsity(h, labels, 4)
    assert (zero, one[1:]) == ((pytest.approx(1.0), 2, 0), (3, 1))
    assert math.isnan(two.mean)
    assert two[1:] == (2, 2)
    assert math.isnan(three.mean)
    assert three.samples == 0
    assert math.isnan(analysis.sparsity(torch.zeros(0, 5)).mean)
    with pytest.raises(ValueError, match="at least 2"):
        analysis.hoyer(torch.rand(4, 1))


def test_sparsity_and_ensembles_are_those_of_the_papers_code() -> None:
    known = reference("emergent")
    rep, labels = torch.from_numpy(known["rep"]), torch.from_numpy(known["rep_labels"]).long()
    assert analysis.sparsity(rep).mean == pytest.approx(float(known["hoyer.all"]), rel=1e-12)
    assert analysis.sparsity(rep).undefined == 1  # row 3
    found = [one.mean for one in analysis.class_sparsity(rep, labels, 10)]
    np.testing.assert_allclose(found, known["hoyer.class"], rtol=1e-12)
    means = analysis.class_means(rep, labels, 10)
    for tau in (1, 2):
        members = analysis.ensembles(means, tau)
        assert np.array_equal(members.numpy(), known[f"ensemble.tau{tau}"])
        shared = analysis.overlaps(members).numpy()
        theirs = known[f"ensemble.overlap_tau{tau}"]
        off = ~np.eye(10, dtype=bool)
        assert np.array_equal(shared[off], theirs[off])
        assert np.array_equal(
            shared.diagonal(), members.sum(1).numpy()
        )  # sizes; in the paper's notebooks it may be zero


# -- ensembles -----------------------------------------------------------------------------------------------------------


def test_a_member_exceeds_the_mean_of_the_others_and_not_its_own() -> None:
    means = torch.tensor([[3.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0], [0.0] * 4])
    assert analysis.ensembles(means, 1.0).int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0] * 4, [0] * 4]
    assert analysis.ensembles(means, 1.999)[0, 0]
    assert not analysis.ensembles(means, 2.0)[0, 0]  # strictly more than three times the others' mean
    m = _noise(6, 25).abs()
    for tau in (0.0, 0.5, 1.0, 2.0):
        others = torch.stack([m[:, [j for j in range(25) if j != i]].mean(1) for i in range(25)], 1)
        assert torch.equal(analysis.ensembles(m, tau), (m - others) / others > tau)
    assert not analysis.ensembles(m, math.inf).any()
    assert not analysis.ensembles(torch.full((2, 5), math.nan)).any()


def test_planted_ensembles_are_recovered_with_their_sizes_and_overlaps() -> None:
    planted = torch.zeros(4, 40, dtype=torch.bool)
    for c in range(4):
        planted[c, 8 * c : 8 * c + 5 + c] = True
    planted[3, 0] = True  # shared with class 0
    labels = torch.arange(200) % 4
    h = 0.05 * _noise(200, 40).abs() + 4.0 * planted[labels]
    members = analysis.ensembles(analysis.class_means(h, labels, 4), 1.0)
    assert torch.equal(members, planted)
    shared = analysis.overlaps(members)
    assert shared.diagonal().tolist() == [5, 6, 7, 9]
    assert shared[0, 3] == shared[3, 0] == 1
    assert shared[0, 1] == 0
    alike = analysis.jaccard(members)
    assert alike.diagonal().tolist() == [1.0] * 4
    assert alike[0, 3] == pytest.approx(1 / 13)
    split = analysis.sharing(members)
    assert split.unique.tolist() == [4, 6, 7, 8]
    assert (split.shared, split.unassigned) == (1, 40 - 26)
    assert analysis.jaccard(torch.zeros(2, 3, dtype=torch.bool)).isnan().all()


def test_what_the_rule_cannot_judge_is_refused() -> None:
    for means, tau, said in (
        (torch.ones(2, 1), 1.0, "at least 2 units"),
        (torch.ones(4), 1.0, "classes, units"),
        (-torch.ones(2, 3), 1.0, "negative"),
        (torch.ones(2, 3), -1.0, "tau is -1.0"),
        (torch.ones(2, 3), math.nan, "tau is nan"),
    ):
        with pytest.raises(ValueError, match=said):
            analysis.ensembles(means, tau)


def test_maps_are_sorted_by_class_and_thinned_out_evenly() -> None:
    h, labels = torch.arange(60.0).reshape(6, 2, 5), torch.tensor([2, 0, 2, 1, 0, 2])
    whole = analysis.activation_map(h, labels)
    assert whole.labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert whole.rows.tolist() == [1, 4, 3, 0, 2, 5]
    assert torch.equal(whole.values, h.flatten(1)[whole.rows])
    few = analysis.activation_map(h, labels, per_class=1, units=4)
    assert few.rows.tolist() == [1, 3, 0]
    assert few.units.tolist() == [0, 2, 5, 7]
    assert torch.equal(few.values, h.flatten(1)[few.rows][:, few.units])
    assert analysis.activity(torch.tensor([[0.0, 1.0, 0.0], [0.0, -3.0, 2.0]])) == (3.0, pytest.approx(1 / 3))


# -- likeness ------------------------------------------------------------------------------------------------------------


def test_alignment_is_one_under_rotation_and_scale_and_none_for_strangers() -> None:
    x = _noise(60, 12)
    rotation = torch.linalg.qr(_noise(12, 12, seed=1))[0]
    for unbiased in (False, True):
        assert analysis.linear_cka(x, 3 * x @ rotation + 5, unbiased) == pytest.approx(1.0)
        assert analysis.linear_cka(x, x.reshape(60, 3, 4), unbiased) == pytest.approx(1.0)
        assert math.isnan(analysis.linear_cka(x, torch.ones(60, 4), unbiased))
    wide = [analysis.linear_cka(_noise(40, 400, seed=i), _noise(40, 400, seed=99 + i)) for i in range(5)]
    assert min(wide) > 0.8  # with more units than samples everything looks alike
    free = [analysis.linear_cka(_noise(40, 400, seed=i), _noise(40, 400, seed=99 + i), True) for i in range(20)]
    assert abs(np.mean(free)) < 0.02


def test_alignment_is_the_papers_formula() -> None:
    x, y = _noise(30, 6) @ torch.diag(torch.arange(1.0, 7).double()), _noise(30, 9, seed=1)
    y[:, :3] += x[:, :3]
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert analysis.linear_cka(x, y) == pytest.approx(float(expected))

    def u_centred(part: Tensor) -> Tensor:  # Székely and Rizzo 2014: another way to the same estimate
        k = part @ part.T
        n = len(k)
        k.fill_diagonal_(0)
        k = k - k.sum(0) / (n - 2) - k.sum(1, keepdim=True) / (n - 2) + k.sum() / ((n - 1) * (n - 2))
        return k.fill_diagonal_(0)

    p, q = u_centred(x), u_centred(y)
    assert analysis.linear_cka(x, y, True) == pytest.approx(float((p * q).sum() / (p.norm() * q.norm())))


def test_batches_give_what_all_samples_give_whatever_their_size() -> None:
    x = _noise(4000, 20)
    layers = [x, (x @ _noise(20, 50, seed=1)).relu(), _noise(4000, 30, seed=2), torch.zeros(4000, 3)]
    whole = analysis.linear_cka(layers[0], layers[1], unbiased=True)
    for size in (16, 100, 4000):
        batched = analysis.BatchCKA()
        for start in range(0, 4000, size):
            batched.update([layer[start : start + size] for layer in layers])
        found = batched.result()
        assert batched.samples == 4000
        assert found[0, 1] == pytest.approx(whole, abs=0.03)
        assert torch.allclose(found, found.T, equal_nan=True)
        assert found.diagonal()[:3].tolist() == pytest.approx([1.0] * 3)
        assert abs(found[0, 2]) < 0.02
        assert found[3].isnan().all()
    batched.update([layer[:3] for layer in layers])
    assert (batched.samples, batched.left_out) == (4000, 3)
    with pytest.raises(ValueError, match="3 layers were given, expected 4"):
        batched.update([layer[:9] for layer in layers[:3]])
    with pytest.raises(ValueError, match="same samples"):
        batched.update([layers[0][:9], *layers[1:]])
    assert analysis.BatchCKA().result().shape == (0, 0)


def test_dissimilarities_and_their_correlation_are_those_of_numpy_and_scipy() -> None:
    x, y = _noise(25, 8), _noise(25, 5, seed=1)
    y[:, 0] += 2 * x[:, 0]
    np.testing.assert_allclose(analysis.dissimilarities(x).numpy(), 1 - np.corrcoef(x.numpy()), atol=1e-12)
    upper = np.triu_indices(25, 1)
    a, b = (1 - np.corrcoef(part.numpy())[upper] for part in (x, y))
    assert analysis.rsa(x, y) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert analysis.rsa(x, y, "pearson") == pytest.approx(scipy.stats.pearsonr(a, b).statistic)
    tied = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    a, b = (1 - np.corrcoef(part.numpy())[np.triu_indices(6, 1)] for part in (tied, x[:6]))
    assert analysis.rsa(tied, x[:6]) == pytest.approx(scipy.stats.spearmanr(a.round(12), b).statistic, abs=1e-6)
    assert analysis.rsa(x, 2 * x + 1) == pytest.approx(1.0)


def test_dead_samples_are_left_out_of_what_is_correlated() -> None:
    x, y = _noise(12, 8), _noise(12, 8, seed=1)
    dead = y.clone()
    dead[4] = 0.0
    dead[7] = 0.1  # all units alike
    assert analysis.dissimilarities(dead)[4].isnan().all()
    rows = [i for i in range(12) if i not in (4, 7)]
    assert analysis.rsa(x, dead) == pytest.approx(analysis.rsa(x[rows], y[rows]))
    assert math.isnan(analysis.rsa(x, torch.zeros(12, 8)))
    assert math.isnan(analysis.rsa(x[:2], y[:2]))
    with pytest.raises(ValueError, match="same samples"):
        analysis.rsa(x, y[:3])
    with pytest.raises(ValueError, match="expected 'spearman'"):
        analysis.rsa(x, y, "kendall")  # type: ignore[arg-type]
