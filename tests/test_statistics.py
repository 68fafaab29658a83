import itertools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from locallearn.records import Record
from locallearn.statistics import (
    Row,
    _student_quantile,
    bootstrap_interval,
    compare_table,
    paired,
    summarise,
)


@pytest.mark.parametrize(
    ("df", "wanted"),
    [(1, math.tan(math.pi * 0.475)), (2, 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))), (4, 2.776445), (30, 2.042272)],
)
def test_student_quantile_against_closed_forms_and_tables(df: int, wanted: float) -> None:
    assert _student_quantile(0.975, df) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("level", "t"), [(0.8, 1.475884), (0.95, 2.570582)])
def test_interval_against_the_complete_bootstrap_distribution(level: float, t: float) -> None:
    values = [0.31, 1.13, 1.27, 2.91, 3.37, 4.05]
    n = len(values)
    means = np.array([sum(draw) / n for draw in itertools.product(values, repeat=n)])
    tail = statistics.NormalDist().cdf(-t * math.sqrt(n / (n - 1)))
    assert bootstrap_interval(values, level=level, resamples=200_000) == pytest.approx(
        tuple(np.quantile(means, [tail, 1 - tail])), abs=0.02
    )


def test_interval_of_many_values_approaches_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    half = 1.96 * values.std(ddof=1) / 20
    got = bootstrap_interval(values)
    assert got == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


@pytest.mark.parametrize(("n", "least", "most"), [(5, 0.88, 0.96), (10, 0.92, 0.97)])
def test_interval_covers_what_it_says(n: int, least: float, most: float) -> None:
    draws = np.random.default_rng(2).normal(0.0, 1.0, (1500, n))
    hits = 0
    for draw in draws:
        interval = bootstrap_interval(draw, resamples=1000)
        assert interval is not None
        hits += interval[0] <= 0.0 <= interval[1]
    assert least < hits / len(draws) < most


def test_interval_of_nothing_and_of_equal_values() -> None:
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([1.0]) is None
    assert bootstrap_interval([0.1, 0.1, 0.1]) == (0.1, 0.1)
    assert bootstrap_interval([1, 2, 4]) == bootstrap_interval([1, 2, 4])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0, math.nan], {}, "finite"),
        ([1, 2], {"level": 95}, "between 0 and 1"),
        ([1, 2], {"resamples": 5}, "at least 100"),
    ],
)
def test_interval_refuses(values: list[float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)


def test_summary_against_the_standard_library() -> None:
    values = [0.91, 0.94, 0.935]
    got = summarise([*enumerate(values), (9, None)])
    assert got.n == 3
    assert got.mean == pytest.approx(statistics.mean(values))
    assert got.std == pytest.approx(statistics.stdev(values))
    assert summarise([(0, 0.5)]).std is None
    assert summarise([(0, None)]).mean is None


def test_summary_refuses_a_spread_over_repeated_seeds() -> None:
    with pytest.raises(ValueError, match="seed 7 occurs more than once"):
        summarise([(7, 0.1), (8, 0.2), (7, 0.1)])


def test_pairing_removes_what_the_seeds_share() -> None:
    base = {seed: float(seed) for seed in range(6)}
    got = paired({seed: value + 0.5 for seed, value in base.items()}, base)
    assert (got.n, got.mean, got.lo, got.hi) == (6, 0.5, 0.5, 0.5)
    assert got.ratio is None  # seed 0 has a baseline of 0


def test_pairing_takes_common_known_seeds_only() -> None:
    got = paired({0: 2.0, 1: 6.0, 2: None, 3: 1.0}, {0: 4.0, 1: 4.0, 2: 4.0, 9: 1.0})
    assert (got.n, got.mean, got.ratio) == (2, 0.0, 1.0)
    assert (got.lo, got.hi) == bootstrap_interval([-2.0, 2.0])
    assert (got.ratio_lo, got.ratio_hi) == bootstrap_interval([0.5, 1.5])
    one = paired({0: 2.0}, {0: 4.0})
    assert (one.n, one.mean, one.ratio, one.lo, one.ratio_lo) == (1, -2.0, 0.5, None, None)
    none = paired({0: 2.0}, {1: 4.0})
    assert (none.n, none.mean, none.ratio) == (0, None, None)


def record(algorithm: str, seed: int, accuracy: float | None = 0.9, **values: Any) -> Record:
    data = {
        "id": f"{algorithm}-{seed}-{values.get('finished', '')}",
        "algorithm": algorithm,
        "dataset": "digits",
        "net": "mlp",
        "seed": seed,
        "status": "done",
        "test": {"accuracy": accuracy},
        **values,
    }
    return Record(Path(str(data["id"])), data)


def by_label(rows: list[Row]) -> Mapping[str, Row]:
    return {row.label: row for row in rows}


def test_table_pairs_each_rule_with_the_baseline_of_its_own_group() -> None:
    records = [record("mono", 1, 0.8), record("backprop", 1, 0.5), record("backprop", 2, 0.7), record("mono", 2, 0.8)]
    records += [record("backprop", 1, 0.1, net="cnn"), record("mono", 1, 0.1, dataset="mnist"), record("x", 3, None)]
    records += [record("mono", 5, 0.0, status="failed"), record("mono", 1, 0.3, mode="target")]
    rows = compare_table(records)
    assert [(r.dataset, r.net, r.mode, r.algorithm) for r in rows] == [
        ("digits", "cnn", None, "backprop"),
        ("digits", "mlp", None, "backprop"),
        ("digits", "mlp", None, "mono"),
        ("digits", "mlp", None, "x"),
        ("digits", "mlp", "target", "mono"),
        ("mnist", "mlp", None, "mono"),
    ]
    figure = rows[2].figures["test/accuracy"]
    assert figure.paired is not None
    assert figure.paired.mean == pytest.approx((0.3 + 0.1) / 2)
    assert figure.paired.ratio == pytest.approx((0.8 / 0.5 + 0.8 / 0.7) / 2)
    assert figure.summary.n == 2
    assert rows[1].figures["test/accuracy"].paired is None
    assert rows[3].figures == {}
    assert rows[4].figures["test/accuracy"].paired is None  # its mode has no baseline
    assert rows[5].figures["test/accuracy"].paired is None


def test_table_takes_the_newest_of_repeated_seeds_and_says_so() -> None:
    old = record("mono", 1, 0.1, finished="2026-01-01")
    new = record("mono", 1, 0.9, finished="2026-02-01")
    for order in ([old, new], [new, old]):
        (row,) = compare_table(order)
        assert row.figures["test/accuracy"].summary.n == 1
        assert row.figures["test/accuracy"].summary.mean == 0.9
        assert row.notes == ("Seed 1 was run 2 times; only the newest run is counted.",)


def test_table_says_when_more_than_the_seed_differs() -> None:
    def run(seed: int, lr: float) -> Record:
        return record("mono", seed, config={"seed": seed, "data_dir": str(seed), "optimizer": {"lr": lr, "seed": seed}})

    (same,) = compare_table([run(0, 0.1), run(1, 0.1)])
    assert same.notes == ()
    (mixed,) = compare_table([run(0, 0.1), run(1, 0.2)])
    assert "optimizer.lr" in mixed.notes[0]
    assert "data_dir" not in mixed.notes[0]


def test_variants_stand_apart_and_share_the_plain_baseline() -> None:
    records = [record("backprop", 0, 0.5), record("mono", 0, 0.6), record("mono", 0, 0.7, variant="sequential")]
    rows = by_label(compare_table(records))
    assert list(rows) == ["backprop", "mono", "mono · sequential"]
    figure = rows["mono · sequential"].figures["test/accuracy"]
    assert figure.paired is not None
    assert figure.paired.mean == pytest.approx(0.2)


def run(rule: str, seed: int, accuracy: float, finished: str = "2026-01-01", **config: Any) -> Record:
    return record(rule, seed, accuracy, finished=finished, config={"seed": seed, **config})


def test_runs_of_one_seed_with_other_settings_are_rows_of_their_own() -> None:
    records = [
        run("mono", seed, accuracy + seed / 100, optimizer={"lr": lr}, trainer={"probe_samples": probes, "epochs": 3})
        for seed in (0, 1)
        for lr, accuracy, probes in ((0.1, 0.5, 0), (0.01, 0.7, 9))
    ]
    rows = by_label(compare_table(records))
    assert list(rows) == ["mono · optimizer.lr=0.01", "mono · optimizer.lr=0.1"]
    for row, mean in zip(rows.values(), (0.705, 0.505), strict=True):
        assert row.figures["test/accuracy"].summary.n == 2
        assert row.figures["test/accuracy"].summary.mean == pytest.approx(mean)
        assert row.notes == ()


def test_a_row_is_told_by_what_sets_it_apart_and_by_no_more() -> None:
    sgd = {"_target_": "torch.optim.SGD", "momentum": 0.9}
    adam = {"_target_": "torch.optim.Adam", "lr": 0.001, "betas": [0.9, 0.99]}
    records = [
        run("mono", 0, 0.1, optimizer={**sgd, "lr": 0.1}, net={"bias": True}, scheduler=None),
        run("mono", 0, 0.2, optimizer={**sgd, "lr": 0.2}, net={"bias": False}, scheduler={"_target_": "a.Cosine"}),
        run("mono", 0, 0.3, optimizer=adam, net={"bias": True}, scheduler=None),
    ]
    rows = by_label(compare_table(records))
    assert {label: row.figures["test/accuracy"].summary.mean for label, row in rows.items()} == {
        "mono · optimizer=SGD, net.bias=true, scheduler=null": 0.1,
        "mono · optimizer=SGD, scheduler=Cosine, net.bias=false": 0.2,
        "mono · optimizer=Adam, net.bias=true, scheduler=null": 0.3,
    }
    two = [run("mono", 0, lr, optimizer={**sgd, "lr": lr}) for lr in (0.1, 0.2)] + [run("mono", 0, 0.3, optimizer=adam)]
    assert list(by_label(compare_table(two))) == [
        "mono · optimizer=Adam, optimizer.lr=0.001",
        "mono · optimizer=SGD, optimizer.lr=0.1",
        "mono · optimizer=SGD, optimizer.lr=0.2",
    ]


def test_a_sweep_is_paired_with_the_baseline_of_its_own_settings() -> None:
    records = [
        run(name, 0, a, optimizer={"lr": lr}) for name, lr, a in (("backprop", 0.1, 0.5), ("backprop", 0.2, 0.9))
    ]
    records += [run("mono", 0, 0.6, optimizer={"lr": lr}, algorithm={"c": 1}) for lr in (0.1, 0.2)]
    rows = by_label(compare_table(records))
    found = {label: row.figures["test/accuracy"].paired for label, row in rows.items()}
    assert found["backprop · optimizer.lr=0.1"] is None
    for lr, difference in (("0.1", 0.1), ("0.2", -0.3)):
        pair = found[f"mono · optimizer.lr={lr}"]
        assert pair is not None
        assert pair.mean == pytest.approx(difference)
        assert rows[f"mono · optimizer.lr={lr}"].notes == (f"Its baseline is backprop with optimizer.lr={lr}.",)
    (alone,) = [row for row in compare_table([*records[:2], records[3]]) if row.algorithm == "mono"]
    assert alone.label == "mono"
    assert alone.notes == ("Its baseline is backprop with optimizer.lr=0.2.",)
