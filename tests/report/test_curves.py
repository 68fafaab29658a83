"""Loss against what it cost, and figures against a setting."""

from __future__ import annotations

import pytest

from locallearn.report._columns import columns
from locallearn.report._curves import (
    LOSS,
    PASSES,
    SECONDS,
    block_charts,
    layer_charts,
    loss_charts,
    passes_by,
    spent_charts,
)
from locallearn.report._files import limit_blocks, read_curves
from locallearn.report._styles import styles
from locallearn.report._sweeps import estimate_charts, sweep_charts
from locallearn.statistics import compare_table

_STAGES = [{"steps": 10, "train_flops": 600.0, "samples": 25}, {"steps": 30, "train_flops": 300.0, "samples": 75}]


def _cost(**more):
    return {
        "cost": {"train_s": 8.0, "inference_flops": 2.0, "samples": 50, "stages": _STAGES, **more},
        "epochs": [1, 3],
    }


def _charts(records):
    rows = compare_table(records, "backprop")
    curves, _, problems = read_curves(rows)
    assert not problems
    return loss_charts(rows, curves, styles(rows, "backprop"), 50)


def test_forward_passes_are_the_stages_operations_over_those_of_inference(make) -> None:
    # 25 samples an epoch of two operations each: a pass over the training set is 50 operations.
    record = make("forward_gradient", **_cost())
    assert passes_by(record, 0) == 0
    assert passes_by(record, 5) == pytest.approx(300 / 50)
    assert passes_by(record, 20) == pytest.approx((600 + 100) / 50)
    assert passes_by(record, 40) == passes_by(record, 99) == pytest.approx(900 / 50)
    for missing in ({"inference_flops": None}, {"inference_flops": 0.0}, {"stages": None}, {"stages": [{}]}):
        assert passes_by(make("forward_gradient", **_cost(**missing)), 5) is None


def test_a_forward_pass_is_of_all_samples_whatever_the_schedule_and_what_a_rule_passes_on(make) -> None:
    # Three stages of ten epochs over 1000 samples, every one of which learns from half of them.
    stage = {"steps": 10, "train_flops": 20_000.0, "samples": 10_000, "samples_by_unit": {"a": 5_000}}
    cost = {"inference_flops": 2.0, "samples": 5_000, "stages": [stage] * 3}
    assert passes_by(make("backprop", cost=cost, epochs=[10] * 3), 99) == pytest.approx(30)


def test_loss_is_drawn_against_seconds_and_passes_where_a_rule_never_goes_backward(make) -> None:
    def run(algorithm, seed, locality, losses, seconds):
        curves = {LOSS: losses, SECONDS: seconds, "validation/accuracy": [0.5] * len(losses)}
        return make(algorithm, seed, curves=curves, locality=locality, **_cost())

    fast = [run("backprop", seed, "global", [2.0, 1.0], [1.0, 3.0]) for seed in (0, 1)]
    assert _charts(fast) == []
    slow = [run("forward_gradient", 0, "forward-only", [2.5, 2.0, 2.2], [2.0, 4.0, 6.0])]
    slow += [run("forward_gradient", 1, "forward-only", [2.7, 2.2, 2.4], [4.0, 6.0, 8.0])]
    seconds, passes = _charts(fast + slow)
    drawn = {trace["name"]: trace for trace in seconds.figure["data"]}
    assert drawn["forward_gradient"]["x"] == [3.0, 5.0, 7.0]
    assert drawn["forward_gradient"]["y"] == [2.6, 2.1, 2.3]
    assert drawn["backprop"]["y"] == [2.0, 1.0]
    [line] = [line for line in seconds.table if line[0] == "forward_gradient"]
    assert line[1:] == ("2", "2.1", "5", "2.3", "7")
    drawn = {trace["name"]: trace for trace in passes.figure["data"]}
    assert drawn["backprop"]["x"] == [0.0, 12.0]  # logged at steps 0 and 10
    assert PASSES not in drawn


def test_epochs_that_only_some_seeds_reached_are_left_out(make) -> None:
    """The quicker of two seeds goes on: a mean over both and then of it alone would run back in time."""

    def run(seed, losses, seconds):
        curves = {LOSS: losses, SECONDS: seconds, "validation/accuracy": [1 - loss for loss in losses]}
        curves |= dict.fromkeys(("block/a/loss", "unit/u/loss", "layer/l/angle"), losses)
        return make("forward_gradient", seed, curves=curves, locality="forward-only", **_cost())

    rows = compare_table([run(0, [0.8, 0.6, 0.1, 0.2], [1.0, 2.0, 3.0, 4.0]), run(1, [0.8, 0.4], [5.0, 9.0])])
    [curves], _, _ = read_curves(rows)
    look = styles(rows, "backprop")
    for chart in (*loss_charts(rows, [curves], look, 50), *spent_charts(rows, [curves], look, 50, None)):
        (trace,) = chart.figure["data"]
        assert len(trace["x"]) == 2
        assert trace["x"] == sorted(trace["x"])
        assert chart.table[0][:2] == ("forward_gradient", "2")
        assert "as far as all of them came" in chart.note
    [seconds, _] = loss_charts(rows, [curves], look, 50)
    assert seconds.table[0][2:] == ("0.5", "5.5", "0.5", "5.5")
    details = [*block_charts(rows[0], curves, 50), *layer_charts(rows[0], curves, 50)]
    assert len(details) == 2
    for chart in details:
        assert all(trace["x"] == [0, 1] and trace["y"] == [0.8, 0.5] for trace in chart.figure["data"])
    assert details[1].table == [("l", "1", "0.5")]


def _sweep(make, noise, accuracy, seed=0, **more):
    algorithm = {"device": {"noise": noise, "kind": "scatterer"}, "seed": seed, **more}
    return make(
        "physical_ff", seed, config={"algorithm": algorithm, "seed": seed}, test={"accuracy": accuracy}, curves={}
    )


def _swept(records):
    rows = compare_table(records, "backprop")
    return sweep_charts(rows, columns(rows), styles(rows, "backprop"))


def test_accuracy_is_drawn_against_a_setting_with_three_values(make) -> None:
    two = [_sweep(make, noise, 0.9 - noise, seed) for noise in (0.0, 0.1) for seed in (0, 1, 2)]
    assert _swept(two) == []
    [chart] = _swept([*two, *(_sweep(make, 0.4, 0.5, seed) for seed in (0, 1, 2))])
    [line] = chart.figure["data"]
    assert line["x"] == [0.0, 0.1, 0.4]
    assert line["y"] == pytest.approx([90.0, 80.0, 50.0])
    assert chart.title == "Test accuracy against device.noise"
    assert [row[:3] for row in chart.table] == [("physical_ff", value, "3") for value in ("0", "0.1", "0.4")]


def test_what_else_differs_makes_lines_of_its_own(make) -> None:
    runs = [_sweep(make, noise, 0.9 - noise * skip, skip=skip) for noise in (0.0, 0.1, 0.2) for skip in (1, 2)]
    chart, _ = _swept(runs)
    assert {line["name"]: line["y"][-1] for line in chart.figure["data"]} == {
        "physical_ff · skip=1": pytest.approx(70.0),
        "physical_ff · skip=2": pytest.approx(50.0),
    }


def _configured(make, value, **config):
    config = {"optimizer": {"lr": value}, **config}
    return make("backprop", 0, config=config, test={"accuracy": 0.9 - value}, curves={})


def test_a_line_joins_runs_that_are_alike_in_every_setting_that_makes_an_experiment(make) -> None:
    plans = (None, {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 5}, None)
    runs = [_configured(make, value, scheduler=plan) for value, plan in zip((0.1, 0.2, 0.3), plans, strict=True)]
    assert _swept(runs) == []
    weights = ("a", "b", "a")
    assert _swept([_configured(make, v, init_from=w) for v, w in zip((0.1, 0.2, 0.3), weights, strict=True)]) == []


def test_where_data_lie_and_what_is_watched_breaks_no_line(make) -> None:
    values, folders = (0.1, 0.2, 0.3), ("/a", "/b", "/a")
    [chart] = _swept([_configured(make, v, dataset={"data_dir": d}) for v, d in zip(values, folders, strict=True)])
    assert chart.figure["data"][0]["x"] == [0.1, 0.2, 0.3]
    [chart] = _swept([_configured(make, v, trainer={"probe_samples": v > 0.2}) for v in values])
    assert chart.figure["data"][0]["x"] == [0.1, 0.2, 0.3]


def test_a_usual_value_is_a_point_like_any_other(make) -> None:
    runs = [make("backprop", 0, config={"net": {"dropout": d}}, curves={}) for d in (0, 0.1, 0.2)]
    # A record from before the setting existed has its usual value, too.
    for some in (runs, [make("backprop", 0, config={"net": {}}, curves={}), *runs[1:]]):
        [chart] = _swept(some)
        assert chart.figure["data"][0]["x"] == [0.0, 0.1, 0.2]


def test_settings_without_a_chart_are_named(make) -> None:
    runs = [
        make("backprop", 0, config={"algorithm": {f"a{i}": value if i == j else 0 for i in range(10)}}, curves={})
        for j in range(10)
        for value in (1, 2, 3)
    ]
    charts = _swept(runs)
    assert sum(" against " in chart.title for chart in charts) == 8
    assert charts[7].note.endswith("There is no room for charts of algorithm.a8, algorithm.a9.")
    assert charts[8].note.endswith("There is no room for algorithm.a8, algorithm.a9.")


def test_the_best_epoch_of_a_long_curve_is_told_and_that_it_is_drawn_with_few_points(make) -> None:
    losses = [1.0, 0.9, 0.2, 0.8, 0.7, 0.6]
    curves = {LOSS: losses, SECONDS: [1.0 + i for i in range(6)], "validation/accuracy": [1 - x for x in losses]}
    rows = compare_table([make("forward_gradient", curves=curves, locality="forward-only")])
    [known], _, _ = read_curves(rows)
    [chart] = spent_charts(rows, [known], styles(rows, "backprop"), 3, None)
    assert chart.table[0][2:4] == ("80.00", "3")
    assert "Of long curves 3 epochs are drawn." in chart.note


def test_single_runs_of_every_rule_have_their_share_of_a_large_page(make) -> None:
    curves = {f"block/{i}/loss": [1.0] for i in range(20)}
    rows = compare_table([make(f"rule_{r}", seed, curves=curves) for r in range(8) for seed in range(3)])
    _, runs, said = read_curves(rows)
    assert [list(seeds) for seeds in runs] == [[0, 1]] * 7 + [[0]]
    assert said == ["The curves per block of 9 of 24 single runs, to keep the page small; report fewer runs at once."]


def test_a_rule_with_few_blocks_keeps_its_curves_beside_one_with_too_many(make) -> None:
    rows = compare_table([make(name, curves={}) for name in "ab"])
    curves = [{f"block/{i}/loss": {0: [1.0]} for i in range(n)} for n in (1001, 2)]
    assert "1 of 2 rules" in limit_blocks(rows, curves)[0]
    assert list(map(len, curves)) == [0, 2]


def test_errors_of_estimates_are_drawn_beside_theory() -> None:
    def one(name, count, error, theory):
        return {"name": name, "count": count, "error": error, "standard_error": 0.5, "theory": theory}

    found = [one("a", 16, 6.0, 6.25), one("a", 1, 99.0, 100.0), one("b", 1, 3.0, None), {"name": "c", "count": "x"}, 7]
    [chart] = estimate_charts({"estimates": found})
    points, theory, others = chart.figure["data"]
    assert (points["x"], points["y"]) == ([1.0, 16.0], [99.0, 6.0])
    assert (theory["x"], theory["y"]) == ([1.0, 16.0], [100.0, 6.25])
    assert others["name"] == "b"
    assert chart.table[0] == ("a", "1", "99", "0.5", "100")
    for bench in ({}, {"estimates": None}, {"estimates": [{"count": 1}]}):
        assert estimate_charts(bench) == []
