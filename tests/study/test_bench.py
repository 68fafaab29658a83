"""Benchmarks: what is counted, in which order, against what, and what is left behind."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from locallearn.batch import Batch
from locallearn.cli import main
from locallearn.records import load_record, scan
from locallearn.report import write_report
from locallearn.strategies import LocalStrategy
from locallearn.study.bench import KINDS, _alternate, _Contender, _strategy, bench
from locallearn.study.train import Plan, attached_task, run
from locallearn.tasks.images import ImageData
from tests.energy.conftest import FakeClock
from tests.study.conftest import MakePlan

SMALL = ("net.hidden=[8,8]", "trainer.accelerator=cpu", "bench.rounds=2", "bench.steps=2")
TWO = "bench.algorithms=[mono_forward,backprop]"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``locallearn bench`` in an empty folder: its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["locallearn"])
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["bench", *SMALL, *words])
        return code, *capsys.readouterr()

    return run


def _benched(out: str) -> dict[str, Any]:
    record = json.loads((Path(out.splitlines()[-1]) / "record.json").read_text(encoding="utf-8"))
    assert record["task"] == "bench"
    assert record["status"] == "done"
    found: dict[str, Any] = record["bench"]
    return found


# -- rounds -----------------------------------------------------------------------------------------------------------


def _fakes(seconds: dict[str, Iterator[float]], calls: list[str], baseline: str) -> list[_Contender]:
    def one(name: str) -> Callable[[], float]:
        def taken() -> float:
            calls.append(name)
            return next(seconds[name])

        return taken

    return [_Contender(name, baseline, one(name)) for name in seconds]


def test_everyone_runs_once_a_round_in_turning_order_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    # The machine gets slower by half with every round: ratios within a round do not see it.
    seconds = {
        "a": iter([1000.0, 2.0, 3.0, 4.5]),
        "b": iter([1.0, 1.0, 1.5, 2.25]),
        "c": iter([9.0, 4.0, 6.0, 9.0]),
    }
    timings = _alternate(_fakes(seconds, calls, "a"), rounds=3)
    assert calls == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]
    assert [timing.name for timing in timings] == ["a", "b", "c"]
    assert timings[0].seconds == [2.0, 3.0, 4.5]
    assert [timing.ratios for timing in timings] == [[1.0] * 3, [0.5] * 3, [2.0] * 3]
    assert all(next(left, None) is None for left in seconds.values())


def test_ratios_are_those_of_the_rounds_and_not_of_the_medians() -> None:
    seconds = {"a": iter([0.0, 1.0, 10.0, 4.0]), "b": iter([0.0, 3.0, 20.0, 2.0])}
    told = _alternate(_fakes(seconds, [], "a"), rounds=3)[1].to_dict()
    assert told == {
        "name": "b",
        "baseline": "a",
        "seconds": [3.0, 20.0, 2.0],
        "ratio": 2.0,  # of 3, 2 and 1/2; the medians of seconds would give 3/4
        "ratio_min": 0.5,
        "ratio_max": 3.0,
    }


# -- what is timed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """What ``bench`` times by, for no machine keeps to a bound."""
    clock = FakeClock()
    monkeypatch.setattr("locallearn.study.bench._now", lambda device: clock())
    return clock


def _watched(plan: Plan, calls: list[Plan], during: Callable[[], None] = lambda: None) -> Plan:
    """Note every update of the plan's algorithm, and have something happen in it."""
    updates = plan.algorithm.updates

    def watched(batch: Batch) -> Iterator[Any]:
        calls.append(plan)
        during()
        return updates(batch)

    plan.algorithm.updates = watched  # type: ignore[method-assign]
    return plan


def _figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_record(folder).data["bench"]
    return found


def test_step_times_as_many_updates_for_all(make_plan: MakePlan, clock: FakeClock) -> None:
    calls: list[Plan] = []
    takes_s = {"backprop": 0.25, "mono_forward": 1.0}

    def make(name: str, *settings: str) -> Plan:
        return _watched(make_plan(name), calls, lambda: clock.pass_by(takes_s[name]))

    _, folder = bench("step", ["mono_forward", "backprop"], make, rounds=2, steps=3, depths=[])
    names = [plan.names["algorithm"] for plan in calls]
    block = {name: [name] * 3 for name in takes_s}  # three batches a round, the order turning
    first, second = block["mono_forward"] + block["backprop"], block["backprop"] + block["mono_forward"]
    assert names == first + second + first
    figures = {row["name"]: row for row in _figures(folder)["contenders"]}
    assert {name: row["seconds"] for name, row in figures.items()} == {
        "mono_forward": [3.0, 3.0],
        "backprop": [0.75, 0.75],
    }
    assert {name: row["ratio"] for name, row in figures.items()} == {"mono_forward": 4.0, "backprop": 1.0}


def test_products_are_timed_in_the_precision_asked_for(make_plan: MakePlan) -> None:
    seen = []

    def make(name: str, *settings: str) -> Plan:
        plan = make_plan(name, matmul_precision="medium")
        updates = plan.algorithm.updates

        def watched(batch: Batch) -> Iterator[Any]:
            seen.append(torch.get_float32_matmul_precision())
            return updates(batch)

        plan.algorithm.updates = watched  # type: ignore[method-assign]
        return plan

    before = torch.get_float32_matmul_precision()
    bench("step", ["backprop"], make, rounds=1, steps=1, depths=[])
    assert seen == ["medium"] * 2
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize(
    ("precision", "inputs", "weights"),
    [
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("64-true", torch.float64, torch.float64),
        ("bf16-mixed", torch.float32, torch.float32),
    ],
)
def test_what_is_measured_computes_in_the_precision_of_the_trainer(
    what: str,
    precision: str,
    inputs: torch.dtype,
    weights: torch.dtype,
    make_plan: MakePlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = set()
    forward = torch.nn.Linear.forward

    def spy(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.add((x.dtype, layer.weight.dtype, torch.is_autocast_enabled("cpu")))
        return forward(layer, x)

    def attached(plan: Plan) -> Any:
        task = attached_task(plan)
        seen.clear()  # a network is tried out when a rule is attached, before the precision is there
        return task

    monkeypatch.setattr(torch.nn.Linear, "forward", spy)
    monkeypatch.setattr("locallearn.study.bench.attached_task", attached)
    trainer = {"accelerator": "cpu", "devices": 1, "precision": precision}

    def make(name: str, *settings: str) -> Plan:
        return make_plan(name, trainer=trainer, config={"net": {"hidden": [16]}})

    rule = "forward_gradient" if what == "estimates" else "backprop"
    table, folder = bench(what, [rule], make, rounds=1, steps=2, depths=[1])
    mixed = precision == "bf16-mixed"
    first = {entry for entry in seen if entry[0] == inputs}
    assert first == {(inputs, weights, mixed)}
    assert {entry[1:] for entry in seen} == {(weights, mixed)}
    assert precision in str(table.title)
    assert load_record(folder).data["precision"]["trainer"] == precision


def test_strategy_runs_the_same_batches_in_the_loop_and_in_the_trainer(make_plan: MakePlan) -> None:
    calls: list[Plan] = []
    _, folder = bench(
        "strategy", ["backprop"], lambda name, *more: _watched(make_plan(name), calls), rounds=2, steps=5, depths=[]
    )
    # one plan for the loop, a new one for the Trainer in every round, with three batches that are not counted
    assert list(Counter(map(id, calls)).values()) == [15, 8, 8, 8]
    loop, trainer = _figures(folder)["contenders"]
    assert trainer["baseline"] == loop["baseline"] == loop["name"]
    assert trainer["ratio"] == pytest.approx(
        statistics.median(b / a for a, b in zip(loop["seconds"], trainer["seconds"], strict=True))
    )


def test_strategy_counts_no_more_batches_than_an_epoch_has(make_plan: MakePlan) -> None:
    """Else milliseconds per batch would be those of batches that never ran."""
    calls: list[Plan] = []
    table, folder = bench(
        "strategy", ["backprop"], lambda name, *more: _watched(make_plan(name), calls), rounds=1, steps=500, depths=[]
    )
    assert _figures(folder)["steps"] == 18  # 1293 samples, 64 in a batch, and three batches that are not counted
    assert len(calls) == 2 * (18 + 21)
    assert "of 18 batches" in str(table.title)


def test_strategy_does_not_count_what_a_new_trainer_does_first(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """By a clock that ticks with every step of the strategy."""
    step = LocalStrategy.training_step

    def ticking(strategy: LocalStrategy, *args: Any, **kwargs: Any) -> torch.Tensor:
        clock.pass_by(1)
        return step(strategy, *args, **kwargs)

    monkeypatch.setattr(LocalStrategy, "training_step", ticking)
    made, began_s = _strategy(["backprop"], lambda name, *more: make_plan(name), 4), clock()
    assert made[1].round() == 4
    assert clock() - began_s == 7


def test_strategy_refuses_an_epoch_that_is_over_before_it_counts(make_plan: MakePlan) -> None:
    plan = make_plan("backprop", data=ImageData("digits", batch_size=1000))
    with pytest.raises(ValueError, match="has 2 batches, of which the first 3 are not counted: use smaller batches"):
        bench("strategy", ["backprop"], lambda *_: plan, rounds=1, steps=5, depths=[])


class _SlowLoader:
    """Eight batches that take their time."""

    def __init__(self, loader: Any, during: Callable[[], None]) -> None:
        self._loader = loader
        self._during = during

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.islice(self._loader, 8):
            self._during()
            yield batch


def test_data_is_the_share_of_time_spent_waiting(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    def make(name: str, *settings: str) -> Plan:
        plan = _watched(make_plan(name), [], lambda: clock.pass_by(3.0))
        whole = plan.data.train_dataloader
        monkeypatch.setattr(plan.data, "train_dataloader", lambda: _SlowLoader(whole(), lambda: clock.pass_by(1.0)))
        return plan

    _, folder = bench("data", ["backprop"], make, rounds=2, steps=1, depths=[])
    [row] = _figures(folder)["contenders"]
    assert row["epoch_s"] == [32.0, 32.0]
    assert row["share"] == [0.25, 0.25]


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", KINDS)
def test_every_kind_prints_a_table_and_leaves_a_record_that_the_report_lists(
    what: str, command: Any, tmp_path: Path
) -> None:
    rules = (
        ["forward_gradient(noise=sphere)", "forward_gradient"] if what == "estimates" else ["mono_forward", "backprop"]
    )
    arms = ",".join(f'"{rule}"' for rule in rules)
    code, out, err = command(
        f"bench.what={what}", f"bench.algorithms=[{arms}]", "bench.depths=[1,2]", "bench.counts=[1]"
    )
    assert (code, err) == (0, "")
    figures = _benched(out)
    assert figures["what"] == what
    assert figures["title"] in " ".join(out.split())  # a long one is broken at the table's width
    assert f"bench {what}" in figures["title"]
    lines = out.splitlines()
    for row in figures["rows"]:
        assert any(all(cell in line for cell in row) for line in lines)
    assert list(dict.fromkeys(row[0].partition(",")[0] for row in figures["rows"])) == rules
    found = scan([tmp_path / "runs"]).records
    page = write_report(found, tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<h2>{figures['title']}</h2>" in page
    assert all(f"<td>{cell}</td>" in page for row in figures["rows"] for cell in row)
    assert "0 finished runs, 0 rules" in page or "No records were found" in page  # a benchmark is no run to compare


def test_a_benchmark_does_not_show_among_the_compared_runs(command: Any, make_plan: MakePlan, tmp_path: Path) -> None:
    run(make_plan("backprop", max_epochs=1))
    assert command("bench.what=memory", TWO, "bench.depths=[1,2]")[0] == 0
    page = write_report(scan([tmp_path / "runs"]).records, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 finished run, 1 rule" in page


def test_memory_of_a_layer_local_rule_does_not_grow_with_depth(command: Any) -> None:
    code, out, _ = command("bench.what=memory", TWO, "bench.depths=[2,16]", "net.hidden=[8,64]")
    assert code == 0
    figures = _benched(out)
    assert figures["depths"] == [2, 16]
    ratios = {row["name"]: row["ratio"] for row in figures["contenders"]}
    assert ratios["mono_forward"] == 1.0
    assert ratios["backprop"] > 3
    peaks = figures["contenders"][1]["activation_peak_bytes"]
    # 14 more blocks of 64 units: for each of 64 samples a float32 output, which is also the next block's input.
    assert peaks[1] - peaks[0] == 14 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["bench.what=nothing"], ("'nothing'", *KINDS)),
        (["bench.rounds=0"], ("bench.rounds is 0",)),
        (["bench.steps=0"], ("bench.steps is 0",)),
        (["bench.rounds=abc"], ("bench.rounds is abc", "whole numbers")),
        (["bench.algorithms=[mono_forward]"], ("['mono_forward']", "ratios are to backprop")),
        (["bench.algorithms=[]"], ("bench", "list")),
        (["bench.algorithms=[nope]"], ("'nope'", "mono_forward")),
        (["bench.what=memory", "bench.depths=[]"], ("bench.depths is []",)),
        (["bench.what=memory", "bench.depths=[0,2]"], ("bench.depths is [0, 2]", "at least 1")),
        (["bench.what=memory", "bench.depths=[a]"], ("bench.depths is ['a']", "whole numbers")),
        (["bench.what=memory", "bench.depths=4"], ("bench.depths is 4", "[4,32]")),
    ],
)
def test_a_mistake_gets_one_sentence(words: list[str], wanted: tuple[str, ...], command: Any, tmp_path: Path) -> None:
    code, out, err = command(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("locallearn: ")
    assert err.count("\n") == 1
    assert all(word in err for word in wanted if word != "bench")
    assert list(tmp_path.iterdir()) == []


def test_memory_of_any_other_network_is_that_of_the_network(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """A narrow ResNet: one block's graph at a time, against keeping all, computing again, and smaller batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    arms = ["backprop", "mono_forward", "backprop(checkpoint=auto)", "backprop(accumulate=8)"]
    words = ["net=resnet20", "net.widths=[2,2,2]", "dataset.batch_size=16", "trainer.accelerator=cpu"]
    quoted = ",".join(f'"{arm}"' for arm in arms)
    assert main(["bench", "bench.what=memory", f"bench.algorithms=[{quoted}]", *words]) == 0
    figures = _benched(capsys.readouterr().out)
    rows = {row["name"]: row for row in figures["contenders"]}
    assert list(rows) == arms
    assert (figures["net"], figures["samples"], figures["baseline"]) == ("resnet20", 16, "backprop")
    border = 16 * 2 * 8 * 8 * 4  # bytes of one activation map of the first stage
    # a unit keeps its input, two convolutions' and one ReLU's outputs, and its own one, which is also the head's input
    assert 5 * border <= rows["mono_forward"]["activation_peak_bytes"][0] < 6 * border
    assert rows["backprop"]["ratio"] == 1.0 > rows["backprop(accumulate=8)"]["ratio"]
    assert rows["mono_forward"]["ratio"] < rows["backprop(checkpoint=auto)"]["ratio"] < 0.5
    assert rows["backprop(checkpoint=auto)"]["flops_ratio"] == pytest.approx(4 / 3, rel=0.1)
    assert rows["backprop(accumulate=8)"]["flops_ratio"] == pytest.approx(1)
    assert rows["backprop"]["over_inference"] > rows["mono_forward"]["over_inference"] > 1


def test_a_step_is_shown_beside_its_operations(command: Any) -> None:
    code, out, _ = command("bench.what=step", "bench.algorithms=[backprop,mono_forward]")
    assert code == 0
    backprop, local = _benched(out)["contenders"]
    assert backprop["flops_ratio"] == backprop["time_over_flops"] == 1.0
    q, first = 64 * 8 + 8 * 8, 64 * 8  # widths 64-8-8, ten classes: 2Q + 3R over 3Q - d0 d1 + 3 C dL
    assert local["flops_ratio"] == pytest.approx((2 * q + 3 * 160) / (3 * q - first + 240))
    assert local["time_over_flops"] == pytest.approx(local["ratio"] / local["flops_ratio"])


# -- estimates of a gradient ------------------------------------------------------------------------------------------


def test_estimates_are_measured_against_autograd_and_lie_at_what_theory_says(command: Any) -> None:
    arms = ["forward_gradient(noise=rademacher)", "forward_gradient(combine=projection)"]
    words = ["bench.what=estimates", "bench.counts=[1,8]", f'bench.algorithms=["{arms[0]}","{arms[1]}"]']
    code, out, _ = command("dataset=digits", *words, "bench.rounds=8", "bench.steps=10")
    assert code == 0
    found = {(one["name"], one["count"]): one for one in _benched(out)["estimates"]}
    size = 64 * 8 + 8 + 8 * 8 + 8 + 8 * 10
    assert {one["size"] for one in found.values()} == {size}
    for count in (1, 8):
        signs, projected = (found[arm, count] for arm in arms)
        assert signs["theory"] == pytest.approx((size - 1) / count)
        assert projected["theory"] == pytest.approx(1 - count / size)
        for one in (signs, projected):
            assert one["draws"] == 80
            assert abs(one["error"] - one["theory"]) < 4 * one["standard_error"]
            assert one["cosine"] > 0


def test_rules_that_estimate_nothing_have_no_estimates(command: Any) -> None:
    code, _, err = command("bench.what=estimates", "dataset=digits", "bench.algorithms=[backprop]")
    assert code == 2
    assert "backprop does not estimate a gradient along random directions" in err
    code, _, err = command(
        "bench.what=estimates", "dataset=digits", "bench.algorithms=[forward_gradient]", "bench.counts=[0]"
    )
    assert code == 2
    assert "bench.counts is [0]" in err
