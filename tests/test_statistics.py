import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml

from locallearn.records import Record
from locallearn.statistics import (
    Row,
    Summary,
    compare_table,
    holm,
    paired,
    sign_flip_p,
    smallest_p,
    summarise,
    t_interval,
)
from locallearn.statistics._identity import differing, settings

ROOT = Path(__file__).parents[1]
T_975 = {2: 4.302653, 4: 2.776445, 9: 2.262157}  # from a printed table


# -- intervals and tests ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_is_the_textbooks(n: int) -> None:
    values = np.random.default_rng(n).normal(5.0, 2.0, n)
    half = T_975[n - 1] * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.mean(values)
    assert t_interval(values) == pytest.approx((mean - half, mean + half), rel=1e-6)


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("scale", ["normal", "log-normal"])
def test_paired_intervals_cover_what_they_say(n: int, scale: str) -> None:
    """Of 2,000 comparisons 95 % hold the true effect, however few seeds they have; three standard errors are allowed."""
    random, hits, runs = np.random.default_rng(n), 0, 2000
    shared, own, effect = random.normal(0, 3, (runs, n)), random.normal(0.3, 1, (runs, n)), 0.3
    for base, difference in zip(shared, own, strict=True):
        if scale == "normal":
            found = paired(dict(enumerate(base + difference)), dict(enumerate(base)))
            lo, hi = found.lo, found.hi
        else:  # costs: a ratio of e^0.3 in the middle
            found = paired(dict(enumerate(np.exp(base + difference))), dict(enumerate(np.exp(base))), log=True)
            assert found.ratio_lo is not None
            assert found.ratio_hi is not None
            lo, hi = math.log(found.ratio_lo), math.log(found.ratio_hi)
        assert lo is not None
        assert hi is not None
        hits += lo <= effect <= hi
    assert abs(hits / runs - 0.95) < 3 * math.sqrt(0.95 * 0.05 / runs)


def test_there_is_no_interval_below_three_and_one_without_width_of_equal_values() -> None:
    assert t_interval([]) is None
    assert t_interval([1.0]) is None
    assert t_interval([1.0, 2.0]) is None
    assert t_interval([0.1, 0.1, 0.1]) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [([1.0, math.nan, 2.0], {}, "finite"), ([1, 2, 3], {"level": 95}, "between 0 and 1")],
)
def test_interval_refuses(values: list[float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        t_interval(values, **options)


def test_numbers_near_the_largest_there_is_break_nothing() -> None:
    big = [1e308, 1.2e308, 1.1e308]
    assert summarise(enumerate(big)).mean == pytest.approx(1.1e308)
    found = paired(dict(enumerate(big)), dict(enumerate([1e-300, 1e-300, 1e-300])), log=True)
    assert (found.ratio, found.ratio_lo) == (None, None)  # no such number
    assert paired({0: 1e308}, {0: -1e308}).mean is None


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_sign_flips_are_counted_one_by_one(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.5, 1.0, n)
    sums = [abs(float(np.dot(signs, differences))) for signs in itertools.product((1, -1), repeat=n)]
    wanted = sum(total >= abs(differences.sum()) - 1e-12 for total in sums) / 2**n
    assert sign_flip_p(differences) == pytest.approx(wanted)


def test_sign_flips_agree_with_scipy_beyond_what_is_counted() -> None:
    differences = np.random.default_rng(0).normal(0.4, 1.0, 20)
    wanted = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=50_000
    ).pvalue
    assert sign_flip_p(differences) == pytest.approx(wanted, abs=0.01)
    assert sign_flip_p(differences) == sign_flip_p(list(differences))
    assert sign_flip_p(differences + 9) == smallest_p(20) == 1 / 65_536


@pytest.mark.parametrize(("n", "least"), [(3, 0.25), (5, 0.0625), (10, 2 / 2**10)])
def test_the_smallest_p_is_reached_when_all_signs_agree(n: int, least: float) -> None:
    assert smallest_p(n) == least
    assert sign_flip_p([0.1] * n) == least
    assert sign_flip_p([-0.3] * n) == least
    assert sign_flip_p([0.0] * n) == 1.0


def test_all_signs_are_counted_up_to_sixteen_pairs() -> None:
    assert smallest_p(16) == sign_flip_p([1.0] * 16) == 2 / 2**16
    assert smallest_p(17) == 1 / 65_536
    drawn = sign_flip_p([1.0] * 17)
    assert drawn is not None
    assert drawn < 1e-4


def test_holm_against_an_example_worked_by_hand() -> None:
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


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
    assert (got.n, got.mean, got.lo, got.hi, got.p, got.p_least) == (6, 0.5, 0.5, 0.5, 2 / 64, 2 / 64)
    assert got.ratio is None  # seed 0 has a baseline of 0
    assert got.reason == "there is no ratio to or of a value that is not above 0"


def test_pairing_takes_common_known_seeds_only() -> None:
    got = paired({0: 2.0, 1: 8.0, 2: None, 3: 1.0}, {0: 4.0, 1: 4.0, 2: 4.0, 9: 1.0})
    assert (got.n, got.mean, got.ratio) == (2, 1.0, pytest.approx(1.0))  # half and twice: no ratio but 1 will do
    assert (got.lo, got.hi, got.ratio_lo, got.ratio_hi, got.p) == (None,) * 5
    one = paired({0: 2.0}, {0: 4.0})
    assert (one.n, one.mean, one.ratio, one.lo, one.ratio_lo) == (1, -2.0, pytest.approx(0.5), None, None)
    none = paired({0: 2.0}, {1: 4.0})
    assert (none.n, none.mean, none.ratio) == (0, None, None)


def test_a_cost_is_tested_on_a_logarithmic_scale() -> None:
    """Its ratios are 1.1, 0.1 and 2: one large saving, of which the differences make little."""
    a, b = {0: 11.0, 1: 0.1, 2: 2.0}, {0: 10.0, 1: 1.0, 2: 1.0}
    cost, quality = paired(a, b, log=True), paired(a, b)
    assert cost.ratio == pytest.approx(0.22 ** (1 / 3))
    logs = np.log([1.1, 0.1, 2])
    ends = scipy.stats.t.interval(0.95, 2, loc=logs.mean(), scale=scipy.stats.sem(logs))
    assert (cost.ratio_lo, cost.ratio_hi) == pytest.approx(tuple(np.exp(ends)))
    assert (cost.p, quality.p) == (
        1.0,
        0.5,
    )  # of four sums |±0.095 ± 2.303 ± 0.693| none is smaller; of |±1 ± 0.9 ± 1| two


# -- rows -------------------------------------------------------------------------------------------------------------
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
    assert figure.paired.ratio == pytest.approx(math.sqrt(0.8 / 0.5 * 0.8 / 0.7))
    assert figure.summary.n == 2
    assert (rows[2].seeds, rows[2].notes) == ("2 of 3", ("Seed 5: failed: no reason was recorded.",))
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


def test_a_finished_run_counts_though_a_later_one_failed() -> None:
    done, failed = record("mono", 1, 0.9, serial=1), record("mono", 1, 0.1, serial=2, status="failed")
    for order in ([done, failed], [failed, done]):
        (row,) = compare_table(order)
        assert (row.records, row.missing) == ((done,), ())
        assert row.notes == ("Seed 1 was run 2 times (1 failed); only the newest finished run is counted.",)


def test_the_centre_of_a_cost_is_its_geometric_mean() -> None:
    costs = (10.0, 20.0, 80.0)
    (row,) = compare_table(
        [record("x", seed, 0.5 + cost / 200, cost={"train_s": cost}) for seed, cost in enumerate(costs)]
    )
    logs = np.log(costs)
    ends = scipy.stats.t.interval(0.95, 2, loc=logs.mean(), scale=scipy.stats.sem(logs))
    assert row.figures["train_s"].centre == pytest.approx(16_000 ** (1 / 3))
    assert row.figures["train_s"].interval == pytest.approx(tuple(np.exp(ends)))
    assert row.figures["test/accuracy"].centre == pytest.approx(0.5 + 110 / 600)
    (row,) = compare_table([record("x", seed, cost={"train_s": 0.1}) for seed in range(3)])
    assert (row.figures["train_s"].centre, row.figures["train_s"].interval) == (0.1, (0.1, 0.1))  # to the last digit


def test_a_rerun_that_was_made_otherwise_is_told() -> None:
    old, new = (
        record("mono", 1, finished=f"2026-0{n}-01", source={"commit": f"c{n}", "dirty": n == 2}, hardware={"cpu": "A"})
        for n in (1, 2)
    )
    (row,) = compare_table([new, old])
    (note,) = row.notes
    assert note.endswith("They were not made alike, oldest first: commit c1 / c2 with uncommitted changes.")


def test_values_that_do_not_vary_have_no_spread_whatever_their_digits() -> None:
    for value in (0.95, 0.1, 1e-7, 1e200):
        assert summarise((seed, value) for seed in range(3)) == Summary(3, value, 0.0)
    assert summarise([(0, 0.1)]) == Summary(1, 0.1, None)


def test_table_says_when_more_than_the_seed_differs() -> None:
    def run(seed: int, lr: float) -> Record:
        return record("mono", seed, config={"seed": seed, "data_dir": str(seed), "optimizer": {"lr": lr, "seed": seed}})

    (same,) = compare_table([run(0, 0.1), run(1, 0.1)])
    assert same.notes == ()
    (mixed,) = compare_table([run(0, 0.1), run(1, 0.2)])
    assert "optimizer.lr" in mixed.notes[0]
    assert "data_dir" not in mixed.notes[0]


def test_a_target_under_a_schedule_as_long_as_the_cap_is_told() -> None:
    """Its cost is then the cap's, too; a constant rate, another length and another mode say nothing."""

    def notes(mode: str, scheduler: dict[str, Any] | None) -> tuple[str, ...]:
        values = {"scheduler": scheduler, "trainer": {"max_epochs": 20}}
        (row,) = compare_table([record("mono", seed, mode=mode, config={"seed": seed, **values}) for seed in (0, 1)])
        return row.notes

    (told,) = notes("target", {"_target_": "CosineAnnealingLR", "T_max": 20})
    assert "a schedule of 20 epochs, all that trainer.max_epochs allows" in told
    assert not notes("target", None)
    assert not notes("target", {"_target_": "CosineAnnealingLR", "T_max": 5})
    assert not notes("matched", {"_target_": "CosineAnnealingLR", "T_max": 20})


def test_a_setting_that_came_later_sets_older_runs_apart_only_where_it_is_used() -> None:
    later = {"channels_last": False, "compile": None, "compile_backend": "inductor"}
    older = run("mono", 0, 0.5, trainer={"devices": 1})
    assert list(by_label(compare_table([older, run("mono", 0, 0.6, trainer={"devices": 1, **later})]))) == ["mono"]
    faster = run("mono", 0, 0.6, trainer={"devices": 1, **later, "compile": "blocks"})
    assert len(compare_table([older, faster])) == 2


def test_a_setting_of_one_rule_that_came_later_is_known_by_its_class() -> None:
    """Two rules may have settings of one name and defaults of their own."""
    zeroth, forward = "locallearn.algorithms.ZerothOrder", "locallearn.algorithms.ForwardForward"
    later = {"normalise": None, "beta2": 0.999, "curvature_exponent": None, "losses": "global", "head_limit": None}
    older = run("zo", 0, 0.5, algorithm={"_target_": zeroth, "n": 4})
    assert len(compare_table([older, run("zo", 0, 0.6, algorithm={"_target_": zeroth, "n": 4, **later})])) == 1
    local = {**later, "losses": "local"}
    assert len(compare_table([older, run("zo", 0, 0.6, algorithm={"_target_": zeroth, "n": 4, **local})])) == 2
    older = run("ff", 0, 0.5, algorithm={"_target_": forward})
    assert len(compare_table([older, run("ff", 0, 0.6, algorithm={"_target_": forward, "normalise": "rms"})])) == 1
    assert len(compare_table([older, run("ff", 0, 0.6, algorithm={"_target_": forward, "normalise": None})])) == 2


def _defaults() -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Group, class and settings that ``conf/`` has of it; of a class with several files those that all of them agree about."""
    found: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for group in ("algorithm", "dataset", "net", "task", "trainer"):
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            values = yaml.safe_load(path.read_text())
            values.pop("defaults", None)
            found.setdefault((group, values.get("_target_")), []).append(values)
    for (group, target), files in found.items():
        shared = {key: value for key, value in files[0].items() if all(key in f and f[key] == value for f in files)}
        yield group, target, shared


def test_settings_that_older_committed_records_lack_set_them_apart_from_no_new_run() -> None:
    """A record without a setting is the experiment that a run with its default is today."""
    configs = [json.loads(path.read_text())["config"] for path in sorted(ROOT.glob("docs/records/*/*/record.json"))]
    assert configs
    top = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())
    del top["defaults"]
    known: list[tuple[str | None, str, list[dict[str, Any]], dict[str, Any]]] = [(None, "config.yaml", configs, top)]
    for group, target, defaults in _defaults():
        olds = [config[group] for config in configs if (config.get(group) or {}).get("_target_") == target]
        known.append((group, target or group, olds, defaults))
    forgotten = set()
    for group, owner, olds, defaults in known:
        for key, value in defaults.items():
            for old in (old for old in olds if key not in old):
                both = [part if group is None else {group: part} for part in (old, {**old, key: value})]
                if differing([settings(record("rule", 0, config=config)) for config in both]):
                    forgotten.add(f"{owner}: {key}={value}")
    assert forgotten == set()


def test_settings_of_other_commands_set_no_run_apart() -> None:
    older = run("mono", 0, 0.5)
    newer = run("mono", 1, 0.6, analyze={"tau": 1.0}, distill={"seed": 0}, keep_model=False, task={"views": 1})
    (row,) = compare_table([older, newer])
    assert row.notes == ()


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


# -- what did not arrive ----------------------------------------------------------------------------------------------
def arrival(rule: str, seed: int, seconds: float | None, spent: float = 100.0, **values: Any) -> Record:
    """A run in mode target, which reached it after ``seconds`` or not at all."""
    reached = {} if seconds is None else {"seconds": seconds, "samples": 10 * seconds, "joules": {"m": 5 * seconds}}
    cost = {"train_s": spent, "samples": 10 * spent, "energy_j": {"m": 5 * spent}, "update_flops": 7.0}
    target = {"accuracy": values.pop("target", 0.9), **reached}
    return record(rule, seed, mode="target", target=target, cost=cost, **values)


def test_a_rule_that_seldom_arrives_does_not_win() -> None:
    """It arrives once, early; everywhere else it spends all that the others need, twice."""
    records = [arrival("backprop", seed, 50.0, 50.0) for seed in range(5)]
    records += [arrival("x", seed, 10.0 if seed == 0 else None, 10.0 if seed == 0 else 100.0) for seed in range(5)]
    base, row = compare_table(records)
    for name, factor in (("seconds", 1), ("samples", 10), ("joules/m", 5)):
        figure = row.figures[f"target/{name}"]
        assert str(figure.arrivals) == "1 of 5 reached"
        assert figure.summary == Summary(5, pytest.approx(factor * 82.0), None)  # type: ignore[arg-type]
        assert (figure.interval, figure.paired) == (None, None)
        assert str(base.figures[f"target/{name}"].arrivals) == "5 of 5 reached"
    # Nor does what the trainings cost say anything: one ended early for having arrived, and four at the cap.
    assert row.figures["train_s"].paired is None
    assert row.figures["energy_j/m"].paired is None
    assert row.figures["train_s"].reason == "1 of 5 reached: no ratio"
    assert row.figures["update_flops"].paired is not None  # of a single step
    assert not row.complete
    assert any("1 of 5 reached" in note for note in row.notes)


def test_there_is_no_ratio_to_a_baseline_that_did_not_arrive() -> None:
    records = [arrival("x", seed, 10.0) for seed in range(3)]
    records += [arrival("backprop", seed, None if seed else 10.0) for seed in range(3)]
    _, row = compare_table(records)
    assert str(row.figures["target/seconds"].arrivals) == "3 of 3 reached"
    assert row.figures["target/seconds"].paired is None
    assert row.figures["target/seconds"].reason == "of the baseline 1 of 3 reached: no ratio"
    together = compare_table(
        [
            arrival(rule, seed, seconds + seed)
            for rule, seconds in (("x", 10.0), ("backprop", 20.0))
            for seed in range(3)
        ]
    )[1].figures["target/joules/m"]
    assert together.paired is not None
    assert together.paired.ratio == pytest.approx((10 / 20 * 11 / 21 * 12 / 22) ** (1 / 3))


def test_a_failed_run_has_not_arrived() -> None:
    config = {"compare": {"target": 0.9}}
    failed = record("x", 2, None, mode="target", target=None, status="failed", error="It diverged.", config=config)
    rows = compare_table([arrival("x", 0, 10.0), arrival("x", 1, 20.0), failed])
    (row,) = rows
    assert str(row.figures["target/seconds"].arrivals) == "2 of 3 reached"
    assert (row.seeds, row.target) == ("2 of 3", 0.9)
    assert "Seed 2: failed: It diverged." in row.notes
    assert row.figures["target/seconds"].summary.mean == 15.0
    assert row.notes[-1] == (
        "The target: 2 of 3 reached. Means of costs to it (who did not finish is left out) are too low, and there is no ratio."
    )
    (row,) = compare_table([arrival("x", 0, 10.0), arrival("x", 1, None), failed])
    assert "(who finished without it counts with all that it spent; who did not finish is left out)" in row.notes[-1]
    (row,) = compare_table([arrival("x", 0, 10.0), arrival("x", 1, None)])
    assert "(who finished without it counts with all that it spent)" in row.notes[-1]


def test_failures_stand_in_the_row_and_a_run_that_went_on_is_no_second_one() -> None:
    records = [record("x", seed) for seed in range(3)]
    records += [record("x", 3, status="failed", error="out of memory"), record("x", 4, status="interrupted")]
    (row,) = compare_table(records)
    assert (row.seeds, len(row.records), [r.seed for r in row.missing]) == ("3 of 5", 3, [3, 4])
    assert row.notes == (
        "Seed 3: failed: out of memory.",
        "Seed 4: interrupted: no reason was recorded.",
    )
    assert not row.complete
    again = record("x", 4, finished="2027", resumed_from="x-4-")
    (row,) = compare_table([*records, again])
    assert (row.seeds, row.notes) == ("4 of 5", ("Seed 3: failed: out of memory.",))
    (row,) = compare_table([*records, record("x", 3, finished="2027")])
    assert row.notes[0] == "Seed 3 was run 2 times (1 failed); only the newest finished run is counted."
    (row,) = compare_table([records[3]])
    assert (row.seeds, dict(row.figures)) == ("0 of 1", {})


def test_a_failed_run_with_settings_of_its_own_is_told() -> None:
    """Its seed looks like a missing one of a row that it has never belonged to."""
    finished = [run("backprop", seed, 0.9, optimizer={"lr": "0.1"}) for seed in range(2)]
    failed = [
        Record(one.path, {**one.data, "status": "failed"})
        for one in (run("backprop", 2, 0.1, optimizer={"lr": "9.0"}), run("backprop", 3, 0.1, optimizer={"lr": "0.1"}))
    ]
    (row,) = compare_table([*finished, *failed])
    told = [note for note in row.notes if "no missing seed" in note]
    told_of = "Seed 2, which did not finish, had other settings than those that did (optimizer.lr)"
    assert told == [f"{told_of}: it is no missing seed of theirs."]


def test_targets_do_not_mix() -> None:
    records = [arrival(rule, seed, 10.0, target=t) for rule in ("backprop", "x") for seed in (0, 1) for t in (0.8, 0.9)]
    rows = compare_table(records)
    assert [(row.algorithm, row.target, row.terms, row.seeds) for row in rows] == [
        ("backprop", 0.8, "target 0.8", "2"),
        ("x", 0.8, "target 0.8", "2"),
        ("backprop", 0.9, "target 0.9", "2"),
        ("x", 0.9, "target 0.9", "2"),
    ]
    assert all(row.notes == () for row in rows)


# -- what changes the experiment --------------------------------------------------------------------------------------
HERE = {"cpu": "a chip", "gpus": [], "threads": 1}


def test_the_newest_is_told_by_the_count_of_starts_and_not_by_the_clock() -> None:
    first = record("x", 0, 0.1, serial=7, started="2027-01-01", finished="2027-01-02")
    second = record("x", 0, 0.9, serial=8, started="2026-01-01", finished="2026-01-02")
    for order in ([first, second], [second, first]):
        (row,) = compare_table(order)
        assert row.figures["test/accuracy"].summary.mean == 0.9
    # Of another folder the count says nothing.
    elsewhere = Record(Path("other") / "run", {**second.data, "serial": 99})
    (row,) = compare_table([first, elsewhere])
    assert row.figures["test/accuracy"].summary.mean == 0.1


def test_seconds_and_joules_are_never_paired_across_machines() -> None:
    def timed(rule: str, seed: int, hardware: dict[str, Any], **values: Any) -> Record:
        cost = {"train_s": 10.0 + seed, "energy_j": {"m": 5.0}, "update_flops": 3.0}
        return record(rule, seed, cost=cost, hardware=hardware, **values)

    there = {**HERE, "cpu": "another"}
    base = [timed("backprop", seed, HERE) for seed in range(4)]
    rows = by_label(compare_table([*base, *(timed("x", seed, there if seed == 3 else HERE) for seed in range(4))]))
    figures = rows["x"].figures
    for name in ("train_s", "energy_j/m"):
        pair = figures[name].paired
        assert pair is not None
        assert pair.n == 3
        assert figures[name].reason == "not compared for seed 3: another machine"
    for name in ("test/accuracy", "update_flops"):
        pair = figures[name].paired
        assert pair is not None
        assert pair.n == 4
    assert any("cpu a chip (seeds 0, 1, 2) / another (seed 3)" in note for note in rows["x"].notes)
    assert any("cpu (a chip / another against a chip)" in note for note in rows["x"].notes)
    none = by_label(compare_table([*base, *(timed("x", seed, there) for seed in range(4))]))["x"]
    assert none.figures["train_s"].paired is None
    # A card beside the processor is another machine, and a run of two parts is of none.
    card = {**HERE, "gpus": ["a card"]}
    for changed in ({"config": {"trainer": {"accelerator": "cpu"}}}, {"parts": [{"hardware": there}]}):
        same = [timed("backprop", seed, card) for seed in range(3)]
        row = by_label(compare_table([*same, *(timed("x", seed, card, **changed) for seed in range(3))]))["x"]
        assert row.figures["train_s"].paired is None
        assert row.figures["test/accuracy"].paired is not None
    assert any("Seed 0 was resumed on another machine" in note for note in row.notes)


def test_versions_commits_and_arithmetic_are_named_where_they_differ() -> None:
    plain: dict[str, Any] = {
        "versions": {"torch": "2.6", "plotly": "6"},
        "source": {"commit": "a" * 40, "dirty": False},
    }
    other = {"versions": {"torch": "2.7", "plotly": "7"}, "source": {"commit": "a" * 40, "dirty": True}}
    base = [record("backprop", seed, **plain) for seed in (0, 1)]
    (_, same) = compare_table([*base, *(record("x", seed, **plain) for seed in (0, 1))])
    assert same.notes == ()
    (_, row) = compare_table(
        [*base, record("x", 0, **plain), record("x", 1, **other, precision={"trainer": "bf16-mixed"})]
    )
    within, against = row.notes
    for text in (
        "torch 2.6 (seed 0) / 2.7 (seed 1)",
        "commit aaaaaaaaaa (seed 0) / aaaaaaaaaa with uncommitted changes (seed 1)",
        "precision (trainer) bf16-mixed (seed 1) / not recorded (seed 0)",
    ):
        assert text in within
    assert "torch (2.6 / 2.7 against 2.6)" in against
    assert "plotly" not in within + against


def test_settings_beside_the_rule_in_which_a_baseline_differs_are_named() -> None:
    records = [
        run("backprop", 0, 0.5, optimizer={"lr": 0.1}, algorithm={"_target_": "a.B"}),
        run("x", 0, 0.5, optimizer={"lr": 0.3}, algorithm={"_target_": "a.X"}),
    ]
    (_, row) = compare_table(records)
    assert row.notes == ("Beside the rule it differs from its baseline in optimizer.lr (0.3 against 0.1).",)


def test_a_variant_is_the_same_in_whatever_order_and_digits_it_was_typed() -> None:
    typed = ["keep=0.5, optimizer.lr=3e-3", "optimizer.lr=0.003, keep=0.5", "keep=.5, optimizer.lr=0.003"]
    (row,) = compare_table([record("x", seed, 0.5, variant=text) for seed, text in enumerate(typed)])
    assert (row.label, row.seeds) == ("x · keep=0.5, optimizer.lr=3e-3", "3")
    assert len(compare_table([record("x", 0, 0.5, variant=text) for text in ("keep=0.5", "keep=0.25", "hebbian")])) == 3


def test_a_baseline_is_compared_in_settings_at_a_seed_of_both() -> None:
    """A setting may follow the seed, and not every row has every seed."""
    beside = "Beside the rule it differs from its baseline in "

    def one(rule: str, seed: int, lr: float = 0.1, **values: Any) -> Record:
        config = {"dataset": {"split_seed": seed}, "optimizer": {"lr": lr}}
        return record(rule, seed, 0.5, config={"seed": seed, **config}, **values)

    base = [one("backprop", seed) for seed in (0, 1, 2)]
    (_, row) = compare_table([*base, one("x", 0), one("x", 1)])
    assert not any(note.startswith(beside) for note in row.notes)
    # A seed that finished in both comes before a later one.
    (_, row) = compare_table([*base, one("x", 0), one("x", 1), one("x", 2, 0.3, status="failed", error="Stopped.")])
    assert not any(note.startswith(beside) for note in row.notes)
    (_, row) = compare_table([*base, one("x", 0, 0.3)])
    assert f"{beside}optimizer.lr (0.3 against 0.1)." in row.notes
    (_, row) = compare_table([base[0], one("x", 1)])  # none in common
    assert f"{beside}dataset.split_seed (1 against 0)." in row.notes


@pytest.mark.parametrize(
    ("rule", "bases", "against"),
    [
        ("mono · hard, sequential", ["sequential"], "backprop · sequential"),
        ("mono · hard, sequential", [None, "sequential"], "backprop · sequential"),  # it says more
        ("mono · optimizer.lr=0.003", [None, "optimizer.lr=3e-3"], "backprop · optimizer.lr=3e-3"),
        (
            "mono · device=scatterer",
            ["device=scatterer, differentiable"],
            "backprop · device=scatterer, differentiable",
        ),
        ("mono", ["sequential"], None),
        ("mono · hard", ["sequential", "hard, soft"], None),
        ("backprop · accumulate=4, optimizer.lr=0.1", [None, "checkpoint=auto"], "backprop"),
        ("backprop · checkpoint=auto", ["optimizer.lr=0.1"], None),
        ("mono · optimizer.lr=0.01", ["optimizer.lr=0.1"], "backprop · optimizer.lr=0.1"),  # each with its own rate
        ("mono · optimizer.lr=0.01", [None, "optimizer.lr=0.1"], "backprop"),
        ("mono · hard", ["hard, optimizer.lr=0.1", None], "backprop · hard, optimizer.lr=0.1"),
    ],
)
def test_a_baseline_has_nothing_that_the_row_has_not(rule: str, bases: list[str | None], against: str | None) -> None:
    name, _, variant = rule.partition(" · ")
    records = [record("backprop", 0, 0.5, variant=base) for base in bases]
    rows = compare_table([*records, record(name, 0, 0.6, variant=variant or None)])
    (row,) = [row for row in rows if (row.algorithm, row.variant or "") == (name, variant)]
    assert row.against == against
    assert (row.figures["test/accuracy"].paired is None) == (against is None)
    assert any(note.startswith("It is compared with no backprop: it lacks settings of") for note in row.notes) == (
        against is None
    )


def test_controls_without_what_they_are_controls_of_are_told_of_no_baseline() -> None:
    rows = compare_table([record("backprop", 0, variant=variant) for variant in ("accumulate=4", "checkpoint=auto")])
    assert [(row.against, row.notes) for row in rows] == [(None, ()), (None, ())]


def test_of_baselines_that_say_as_much_the_nearest_is_named() -> None:
    base = [run("backprop", 0, 0.5, optimizer={"lr": lr}) for lr in (0.1, 0.2)]
    for one, variant in zip(base, ("hard", "sequential"), strict=True):
        one.data["variant"] = variant
    mono = run("mono", 0, 0.6, optimizer={"lr": 0.2})
    mono.data["variant"] = "hard, sequential"
    row = compare_table([*base, mono])[-1]
    assert row.notes == ("Its baseline is backprop with sequential.",)


def test_a_baseline_of_other_seeds_is_told() -> None:
    _, row = compare_table([record("backprop", 0), record("mono", 1)])
    told = "It has no finished seed in common with its baseline, so nothing of it is compared."
    assert row.notes == (told,)
    lost = record("backprop", 0, variant="hard", status="failed")
    row = compare_table([lost, record("mono", 0, variant="hard")])[-1]
    assert row.notes == (told,)
    row = compare_table([lost, record("backprop", 0), record("mono", 0, variant="hard")])[-1]
    assert (row.against, row.notes) == ("backprop", ())  # one that did not finish is no baseline where another did


def test_of_baselines_the_plain_one_is_named_so() -> None:
    bases = [record("backprop", 0, 0.5, variant=variant) for variant in (None, "optimizer.lr=0.1")]
    row = compare_table([*bases, record("mono", 0, 0.6)])[-1]
    assert (row.against, row.notes) == ("backprop", ("Its baseline is backprop without settings of its own.",))


@pytest.mark.parametrize(
    ("group", "name", "values", "labels"),
    [
        ("optimizer", "_target_", ("mine.AdamW", "torch.AdamW"), ["optimizer=mine.AdamW", "optimizer=torch.AdamW"]),
        ("net", "kind", ("true", True), ["net.kind='true'", "net.kind=True"]),
        ("net", "kind", ("a", "b"), ["net.kind=a", "net.kind=b"]),
    ],
)
def test_experiments_whose_short_names_are_equal_stay_apart(
    group: str, name: str, values: tuple[Any, Any], labels: list[str]
) -> None:
    rows = compare_table([run("x", 0, 0.5, **{group: {name: value}}) for value in values])
    assert [row.variant for row in rows] == labels
    assert [row.notes for row in rows] == [(), ()]


def test_one_and_one_point_zero_are_one_setting() -> None:
    (row,) = compare_table([run("x", 0, 0.5, optimizer={"lr": 1}), run("x", 1, 0.5, optimizer={"lr": 1.0})])
    assert row.notes == ()


@pytest.mark.parametrize(
    ("group", "name", "values"),
    [
        ("trainer", "limit_train_batches", (1, 1.0)),  # one batch, and all of them
        ("net", "device", ({"seed": 0}, {"seed": 1})),  # of another device
        ("dataset", "graph", ({"seed": 0}, {"seed": 1})),
    ],
)
def test_what_only_looks_alike_is_two_settings(group: str, name: str, values: tuple[Any, Any]) -> None:
    rows = by_label(compare_table([run("x", seed, 0.5, **{group: {name: v}}) for v in values for seed in (0, 1)]))
    assert [row.figures["test/accuracy"].summary.n for row in rows.values()] == [2, 2]


def test_p_values_are_corrected_over_the_rules_of_a_section() -> None:
    values = {
        "backprop": [0.5, 0.5, 0.5, 0.5, 0.5],
        "x": [0.6, 0.61, 0.62, 0.63, 0.64],
        "y": [0.4, 0.6, 0.5, 0.55, 0.52],
    }
    records = [record(rule, seed, value) for rule, of in values.items() for seed, value in enumerate(of)]
    records += [record(rule, seed, 0.1 * seed, net="cnn") for rule in ("backprop", "x") for seed in range(5)]
    pairs = {(row.net, row.label): row.figures["test/accuracy"].paired for row in compare_table(records)}
    x, y, alone = pairs["mlp", "x"], pairs["mlp", "y"], pairs["cnn", "x"]
    assert x is not None
    assert y is not None
    assert alone is not None
    assert (x.p, x.p_least) == (0.0625, 0.0625)
    assert (x.p_holm, y.p_holm) == (0.125, y.p)
    assert alone.p_holm == alone.p == 1.0


def test_incomplete_counts_are_not_compared() -> None:
    def counted(rule: str, **cost: Any) -> Record:
        return record(rule, 0, cost={"update_flops": 3.0, "train_s": 1.0, **cost})

    (_, row) = compare_table([counted("backprop"), counted("x", uncounted=["aten::lstm"])])
    assert row.figures["update_flops"].paired is None
    assert row.figures["train_s"].paired is not None
    assert any("aten::lstm" in note for note in row.notes)


def test_a_cost_of_nothing_has_no_interval_and_says_so() -> None:
    records = [record("x", seed, cost={"co2_g": co2, "cost": 0}) for seed, co2 in enumerate((0.0, 1.0, 2.0))]
    (row,) = compare_table(records)
    figure = row.figures["co2_g"]
    assert (figure.interval, figure.summary.mean) == (None, 1.0)
    assert figure.reason is not None
    assert "not above 0" in figure.reason
    # Nor is it forgotten where there is another reason for having no ratio.
    other = [record("backprop", 0, cost={"co2_g": 1.0}, hardware={"cpu": "another"})]
    figure = compare_table([*other, *records])[1].figures["co2_g"]
    assert figure.reason is not None
    assert figure.reason.endswith("a value is not above 0; not compared for seed 0: another machine")


def test_trainings_that_were_cut_short_say_so() -> None:
    def run(seed: int, epochs: list[int], patience: int | None = 10, mode: str = "own", limit: Any = 1000) -> Record:
        config = {
            "trainer": {"max_epochs": 8},
            "schedule": {"patience": patience},
            "dataset": {"limit_train": limit},
        }
        return record("x", seed, mode=mode, epochs=epochs, config=config)

    (row,) = compare_table([run(0, [8]), run(1, [5]), run(2, [3, 8])])
    assert row.notes == (
        "It learned from 1,000 training samples alone (dataset.limit_train).",
        "2 of 3 runs went on to the cap (trainer.max_epochs=8), not stopped by patience before: longer trainings may give "
        "other figures.",
    )
    for told in (
        run(0, [5], limit=None),  # patience ended it
        run(0, [8], patience=None, limit=None),  # so many epochs are the recipe
        run(0, [8], mode="matched", limit="many"),
    ):
        assert compare_table([told])[0].notes == ()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("limit_train_batches", 1, True),  # one batch
        ("limit_train_batches", 1.0, False),  # all of them
        ("limit_train_batches", 0.5, True),
        ("limit_train_batches", None, False),
        ("max_steps", 100, True),
        ("max_steps", -1, False),
        ("max_time", "00:00:10:00", True),
        ("max_time", None, False),
    ],
)
def test_limits_of_the_trainer_are_told(name: str, value: Any, told: bool) -> None:
    (row,) = compare_table([record("x", 0, config={"trainer": {name: value}})])
    assert row.notes == ((f"Its training had a limit, trainer.{name}={value}.",) if told else ())


def test_a_rule_that_trains_what_its_baseline_does_is_told() -> None:
    """Equal losses tell; equal accuracies alone do not, nor does one seed of two, nor a loss that nobody knows."""

    def run(algorithm: str, seed: int, loss: float, **values: Any) -> Record:
        return record(algorithm, seed, test={"accuracy": 0.5, "loss": loss}, **values)

    def told(*records: Record) -> bool:
        rows = compare_table([run("backprop", 0, 0.25), run("backprop", 1, 0.75), *records])
        assert not any("same weights" in note for note in rows[0].notes)
        # The records do not say why: the rule may be none that is local, and the network one of several blocks.
        said = (
            "It has the baseline's test loss and metric to the last digit at every seed of both, as it would have with the "
            "same weights."
        )
        assert all(note == said for note in rows[1].notes if "weights" in note)
        return said in rows[1].notes

    assert told(run("mono", 0, 0.25), run("mono", 1, 0.75))
    assert told(run("mono", 1, 0.75), run("mono", 2, 0.1))  # seeds that both have
    assert not told(run("mono", 0, 0.25), run("mono", 1, 0.75000001))
    assert not told(run("mono", 2, 0.25))
    assert not told(record("mono", 0, 0.5))
    assert not told(run("backprop", 0, 0.25, variant="checkpoint=auto"))
    for figures in ({"accuracy": 0.5, "loss": None}, {"accuracy": None, "loss": 0.25}):
        _, row = compare_table([record(rule, 0, test=figures) for rule in ("backprop", "mono")])
        assert not any("weights" in note for note in row.notes)
