"""One run: the same start for every rule, exact repetition and resumption, and what a run that stops leaves behind."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import signal
import time
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from locallearn.algorithms.base import Update
from locallearn.batch import Batch
from locallearn.energy import PowerReplayMeter, ReplayMeter
from locallearn.records import COST_COLUMNS, Metric, Record, load_record
from locallearn.strategies import Diverged, Schedule
from locallearn.study._callbacks import _Keeper
from locallearn.study.compare import compare
from locallearn.study.train import CHECKPOINT, MODEL, Interrupted, Plan, check, run
from tests.study.conftest import MakePlan

_LAYER_LOCAL = ("mono_forward", "forward_forward", "forward_forward_hard")


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return found


def _weights(plan: Plan) -> dict[str, Tensor]:
    return {n: v for n, v in plan.algorithm.state_dict().items() if isinstance(v, Tensor)}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _watch(plan: Plan, seen: list[Tensor], stop_at: int | None = None) -> None:
    """Note the inputs of every batch; press Ctrl-C during batch ``stop_at``, counted from 1."""
    updates = plan.algorithm.updates

    def watched(batch: Batch) -> Iterator[Update]:
        seen.append(batch.inputs.clone())
        if len(seen) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return updates(batch)

    plan.algorithm.updates = watched  # type: ignore[method-assign]


def _plain_accuracy(plan: Plan) -> float:
    """Accuracy on the test set by a loop of our own."""
    right = total = 0
    with torch.no_grad():
        for batch in plan.data.test_dataloader():
            predicted = plan.algorithm.eval().predict(batch.inputs).argmax(1)
            right += int((predicted == batch.targets).sum())
            total += len(batch.targets)
    return right / total


def test_every_rule_starts_from_the_same_network_and_sees_the_same_data(make_plan: MakePlan) -> None:
    starts: dict[str, dict[str, Tensor]] = {}
    orders: dict[str, list[Tensor]] = {}
    for name in ("backprop", "deep_supervision", "mono_forward", "forward_forward"):
        plan = make_plan(name, seed=3, max_epochs=1)
        seen: list[Tensor] = []
        _watch(plan, seen)
        make_net = plan.make_net

        def watched(make_net: Any = make_net, name: str = name) -> Any:
            net = make_net()
            starts[name] = copy.deepcopy(net.state_dict())
            return net

        plan.make_net = watched
        run(plan)
        orders[name] = seen[: math.ceil(1293 / 64)]
    for name in starts:
        assert _equal(starts["backprop"], starts[name]), name
        assert len(orders[name]) == 21
        assert all(map(torch.equal, orders["backprop"], orders[name])), name


def test_another_seed_is_another_network_and_another_order(make_plan: MakePlan) -> None:
    orders: list[list[Tensor]] = []
    nets = []
    for seed in (0, 1):
        plan = make_plan("mono_forward", seed=seed, max_epochs=1)
        orders.append([])
        _watch(plan, orders[-1])
        run(plan)
        torch.manual_seed(seed)
        nets.append(plan.make_net().state_dict())
    assert not torch.equal(orders[0][0], orders[1][0])
    assert not _equal(*nets)


def test_the_same_seed_gives_the_same_run_bit_by_bit(algorithm: str, make_plan: MakePlan) -> None:
    plans = [make_plan(algorithm, seed=5) for _ in range(2)]
    first, second = (_record(run(plan)) for plan in plans)
    assert _equal(_weights(plans[0]), _weights(plans[1]))
    assert first["test"] == second["test"]
    assert first["validation"] == second["validation"]
    assert first["id"] != second["id"]


def test_the_recorded_accuracy_is_that_of_a_plain_loop(algorithm: str, make_plan: MakePlan) -> None:
    plan = make_plan(algorithm)
    record = _record(run(plan))
    assert record["test"]["accuracy"] == pytest.approx(_plain_accuracy(plan), abs=1e-6)


def test_the_network_learns(make_plan: MakePlan) -> None:
    plan = make_plan("mono_forward", max_epochs=8, optimizer=partial(torch.optim.Adam, lr=1e-2))
    assert _record(run(plan))["test"]["accuracy"] > 0.8


def test_the_cost_columns_are_those_of_the_protocol(make_plan: MakePlan) -> None:
    cost = _record(run(make_plan("mono_forward")))["cost"]
    assert set(cost) == {*COST_COLUMNS, "energy_j", "stages", "uncounted"}
    assert cost["params"] == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10
    assert cost["extra_params"] == 16 * 10  # the readout is the last block's projection
    assert cost["samples"] == 2 * 1293
    assert cost["train_s"] > 0
    assert cost["validation_s"] > 0
    assert cost["co2_g"] is None  # nobody measured it
    assert cost["update_flops"] > 0
    assert cost["activation_peak_bytes"] > 0


# -- interruption and resumption ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [9, 21, 22, 62], ids=["first epoch", "its last batch", "the next", "the end"])
def test_a_joint_run_goes_on_bit_by_bit(algorithm: str, stop_at: int, make_plan: MakePlan) -> None:
    # A scheduler, and few samples to choose the best epoch by: both show an epoch's end that is missed or done twice.
    falling = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    whole = make_plan(algorithm, max_epochs=3, scheduler=falling)
    expected = _record(run(whole))

    stopped = make_plan(algorithm, max_epochs=3, scheduler=falling)
    _watch(stopped, [], stop_at)
    with pytest.raises(Interrupted) as caught:
        run(stopped)
    left: Path = caught.value.run_folder  # type: ignore[attr-defined]
    assert _record(left)["status"] == "interrupted"
    assert (left / CHECKPOINT).is_file()

    resumed = make_plan(algorithm, max_epochs=3, scheduler=falling, resume=left)
    record = _record(run(resumed))
    assert record["status"] == "done"
    assert record["resumed_from"] == left.name
    assert _equal(_weights(whole), _weights(resumed))
    assert record["test"] == expected["test"]
    assert record["validation"] == expected["validation"]
    assert record["cost"]["samples"] == expected["cost"]["samples"]
    assert record["epochs"] == expected["epochs"]


@pytest.mark.parametrize("cache", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("stop_at", [9, 42, 55], ids=["first stage", "its last batch", "second stage"])
def test_a_sequential_run_goes_on_bit_by_bit(stop_at: int, cache: bool, make_plan: MakePlan) -> None:
    def schedule() -> Schedule:
        return Schedule(sequential=True, patience=None, cache=cache)

    whole = make_plan("mono_forward", schedule=schedule())
    expected = _record(run(whole))
    stopped = make_plan("mono_forward", schedule=schedule())
    _watch(stopped, [], stop_at)
    with pytest.raises(Interrupted) as caught:
        run(stopped)
    resumed = make_plan("mono_forward", schedule=schedule(), resume=caught.value.run_folder)  # type: ignore[attr-defined]
    record = _record(run(resumed))
    assert _equal(_weights(whole), _weights(resumed))
    assert record["test"] == expected["test"]
    assert record["epochs"] == expected["epochs"] == [2, 2]


def test_the_second_ctrl_c_stops_at_once(make_plan: MakePlan) -> None:
    plan = make_plan("mono_forward")
    before = signal.getsignal(signal.SIGINT)

    def twice(batch: Batch) -> Iterator[Update]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    plan.algorithm.updates = twice  # type: ignore[method-assign]
    with pytest.raises(Interrupted) as caught:
        run(plan)
    folder: Path = caught.value.run_folder  # type: ignore[attr-defined]
    assert _record(folder)["status"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_outside_of_training_is_an_interruption_too(make_plan: MakePlan) -> None:
    plan = make_plan("mono_forward")
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    plan.data.test_dataloader = lambda: signal.raise_signal(signal.SIGINT)  # type: ignore[method-assign]
    try:
        with pytest.raises(Interrupted) as caught:
            run(plan)
        assert _record(caught.value.run_folder)["status"] == "interrupted"  # type: ignore[attr-defined]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_last_look_at_the_idle_machine_costs_the_run_nothing(
    number: signal.Signals, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the look, and whoever runs several begins with no other."""
    looks: list[float] = []
    wait = _Keeper.wait

    def pressed(keeper: _Keeper, seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:  # the one before training
            return time.sleep(seconds)
        signal.raise_signal(number)
        return wait(keeper, 3600.0)

    monkeypatch.setattr(_Keeper, "wait", pressed)
    before = signal.getsignal(number)
    plans = [make_plan("backprop", meters=[ReplayMeter([(0, 0), (1e6, 5e7)])], idle_s=0.01) for _ in range(2)]
    with pytest.raises(Interrupted) as caught:
        compare([("first", lambda: plans[0]), ("second", lambda: plans[1])])
    assert signal.getsignal(number) is before
    assert looks == [0.01, 0.01]  # nothing of a second run
    folder = caught.value.ended
    assert folder is not None
    record = _record(folder)
    assert (record["status"], len(record["test"])) == ("done", 2)
    assert (folder / MODEL).is_file()
    (reading,) = record["energy"]
    assert reading["detail"]["idle_before_w"] > 0
    assert "idle power was watched before the window only, the other look was cut short" in reading["flags"]


def test_a_termination_between_training_and_test_is_an_interruption(make_plan: MakePlan) -> None:
    """Lightning notes it, and nobody asks afterwards."""
    plan = make_plan("mono_forward")
    test = plan.data.test_dataloader

    def terminated() -> Any:
        signal.raise_signal(signal.SIGTERM)
        return test()

    plan.data.test_dataloader = terminated  # type: ignore[method-assign]
    with pytest.raises(Interrupted) as caught:
        run(plan)
    assert caught.value.run_folder is not None
    assert _record(caught.value.run_folder)["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_finished_run_has_nothing_to_resume_from(make_plan: MakePlan) -> None:
    folder = run(make_plan("mono_forward", checkpoint_s=1e-9))
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "model.pt", "record.json"]
    with pytest.raises(ValueError, match=CHECKPOINT):
        run(make_plan("mono_forward", resume=folder))


# -- failure -----------------------------------------------------------------------------------------------------------


def test_divergence_names_unit_and_step_and_leaves_a_failed_record(make_plan: MakePlan) -> None:
    plan = make_plan("mono_forward", optimizer=partial(torch.optim.SGD, lr=1e30))
    with pytest.raises(Diverged, match=r"unit 'layer\d' diverged.* at step \d+") as caught:
        run(plan)
    record = _record(caught.value.run_folder)  # type: ignore[attr-defined]
    assert record["status"] == "failed"
    assert record["error"] == str(caught.value)
    assert record["test"] == {}
    assert record["cost"]["train_s"] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": partial(torch.optim.Adam, lr=-1.0)}, "-1"),
        ({"trainer": {"accelerator": "cpu", "devices": 2}}, "one device"),
        ({"schedule": Schedule(sequential=True), "algorithm": None}, "sequential"),
        ({"idle_s": -1.0}, "idle_s"),
    ],
    ids=["optimizer", "devices", "schedule", "meter"],
)
def test_wrong_settings_are_told_before_a_folder_is_made(
    wrong: dict[str, Any], message: str, make_plan: MakePlan, tmp_path: Path
) -> None:
    name = "backprop" if "algorithm" in wrong else "mono_forward"
    settings = {key: value for key, value in wrong.items() if key != "algorithm"}
    with pytest.raises(ValueError, match=message):
        run(make_plan(name, **settings))
    assert not (tmp_path / "runs").exists()
    if "idle_s" not in wrong:
        with pytest.raises(ValueError, match=message):
            check(make_plan(name, **settings))


def test_what_check_lets_pass_can_be_run(algorithm: str, make_plan: MakePlan, tmp_path: Path) -> None:
    check(make_plan(algorithm))
    assert not (tmp_path / "runs").exists()
    assert _record(run(make_plan(algorithm, max_epochs=1)))["status"] == "done"


# -- schedules and modes -----------------------------------------------------------------------------------------------


def test_a_cache_changes_no_number(make_plan: MakePlan) -> None:
    plans = [
        make_plan("mono_forward", schedule=Schedule(sequential=True, patience=None, cache=cache))
        for cache in (False, True)
    ]
    plain, cached = (_record(run(plan)) for plan in plans)
    assert _equal(_weights(plans[0]), _weights(plans[1]))
    assert plain["test"] == cached["test"]
    assert plain["epochs"] == cached["epochs"] == [2, 2]


def test_patience_ends_a_run_and_null_does_not(make_plan: MakePlan) -> None:
    # With a rate of zero nothing improves after the first epoch.
    still = partial(torch.optim.SGD, lr=0.0)
    patient = _record(run(make_plan("mono_forward", max_epochs=9, optimizer=still, schedule=Schedule(patience=3))))
    assert patient["epochs"] == [4]
    endless = _record(run(make_plan("mono_forward", max_epochs=9, optimizer=still, schedule=Schedule(patience=None))))
    assert endless["epochs"] == [9]
    assert endless["cost"]["samples"] == 9 * 1293


def test_the_best_weights_are_kept(make_plan: MakePlan) -> None:
    best = make_plan("mono_forward", max_epochs=4, optimizer=partial(torch.optim.Adam, lr=0.3))
    folder = run(best)
    accuracies = [m.value for m in load_record(folder).metrics() if m.name == "validation/accuracy"]
    assert len(accuracies) == 4
    assert _record(folder)["validation"]["accuracy"] == max(value or 0.0 for value in accuracies)


def test_joules_net_of_idle_before_and_after_are_in_the_record(make_plan: MakePlan) -> None:
    """Of a counter, and of a power that a process of its own integrates, both as much as 50 W."""
    meters = [
        ReplayMeter([(0, 0), (1e6, 50e6)], source="counter"),
        PowerReplayMeter([(0, 50), (1e6, 50)], source="power", every_s=0.01),
    ]
    plan = make_plan("backprop", meters=meters, idle_s=0.1, cooldown_s=0.05)
    record = load_record(run(plan)).data
    energy = record["energy"]
    assert [reading["source"] for reading in energy] == ["counter", "power"]
    for reading in energy:
        # How near to 50 W they come is a matter of how busy the machine is between two looks at the clock.
        before_w, after_w = reading["detail"]["idle_before_w"], reading["detail"]["idle_after_w"]
        assert min(before_w, after_w, reading["joules"]) > 0
        idle_j = (before_w + after_w) / 2 * record["cost"]["train_s"]
        assert reading["net_joules"] == pytest.approx(reading["joules"] - idle_j)
    assert energy[1]["by"] == "power integrated over samples 0.01 s apart"
    assert energy[1]["detail"]["sampling_error_j"] >= 0
    assert energy[1]["detail"]["samples"] >= 2


def test_target_stops_and_says_what_it_cost(make_plan: MakePlan) -> None:
    plan = make_plan(
        "mono_forward", max_epochs=30, target=0.5, mode="target", optimizer=partial(torch.optim.Adam, lr=1e-2)
    )
    folder = run(plan)
    record = _record(folder)
    accuracies = [m.value or 0.0 for m in load_record(folder).metrics() if m.name == "validation/accuracy"]
    assert accuracies[-1] >= 0.5
    assert max(accuracies[:-1], default=0.0) < 0.5
    assert record["mode"] == "target"
    assert record["target"]["accuracy"] == 0.5
    assert record["target"]["samples"] == len(accuracies) * 1293 == record["cost"]["samples"]
    assert 0 < record["target"]["seconds"] <= record["cost"]["train_s"]


def test_a_target_that_is_not_reached_has_no_cost(make_plan: MakePlan) -> None:
    record = _record(run(make_plan("mono_forward", target=1.0, mode="target")))
    assert record["target"] == {"accuracy": 1.0}


def test_every_epoch_reports_loss_and_probe_of_every_block(make_plan: MakePlan) -> None:
    plan = make_plan("mono_forward", probe_samples=100)
    metrics = load_record(run(plan)).metrics()
    for block in ("layer1", "layer2"):
        losses = [m.value for m in metrics if m.name == f"block/{block}/loss"]
        probes = [m.value for m in metrics if m.name == f"block/{block}/probe_accuracy"]
        assert len(losses) == len(probes) == 2
        assert losses[1] is not None
        assert losses[0] is not None
        assert losses[1] < losses[0]
        assert all(value is not None and 0 <= value <= 1 for value in probes)


def test_probes_and_figures_of_an_epoch_are_of_the_same_weights(make_plan: MakePlan) -> None:
    # Forward-Forward is best after its first epoch here, whose weights come back at the end.
    kept, restored = (
        load_record(
            run(
                make_plan(
                    "forward_forward",
                    max_epochs=3,
                    probe_samples=100,
                    schedule=Schedule(patience=None, restore_best=restore),
                )
            )
        )
        for restore in (False, True)
    )
    assert kept.part("test") != restored.part("test")

    def curve(record: Record) -> list[Metric]:
        return [metric for metric in record.metrics() if not metric.name.startswith("cost/")]

    assert curve(kept) == curve(restored)


def test_probes_change_no_number(make_plan: MakePlan) -> None:
    plans = [make_plan("forward_forward_hard", probe_samples=samples) for samples in (0, 100)]
    without, with_probes = (_record(run(plan)) for plan in plans)
    assert _equal(_weights(plans[0]), _weights(plans[1]))
    assert without["test"] == with_probes["test"]


# -- several runs ------------------------------------------------------------------------------------------------------


def test_products_have_the_precision_asked_for_during_the_run_and_not_after_it(make_plan: MakePlan) -> None:
    seen = []
    watch = lambda *_: seen.append(torch.get_float32_matmul_precision())  # noqa: E731
    before = torch.get_float32_matmul_precision()
    run(make_plan("backprop", matmul_precision="medium", max_epochs=1, progress=watch))
    run(make_plan("backprop", max_epochs=1, progress=watch))
    assert seen == ["medium", "highest"]
    with pytest.raises(FloatingPointError):
        run(make_plan("backprop", matmul_precision="medium", progress=_diverged))
    assert torch.get_float32_matmul_precision() == before


def test_a_compiled_run_has_the_figures_of_a_plain_one_and_says_how_they_were_got(make_plan: MakePlan) -> None:
    once: dict[str, Any] = {
        "max_epochs": 1,
        "warmup_steps": 1,
        "trainer": {"accelerator": "cpu", "limit_train_batches": 2},
    }
    plain = load_record(run(make_plan("mono_forward", **once))).data
    compiled = load_record(run(make_plan("mono_forward", compile="blocks", compile_backend="eager", **once))).data
    assert compiled["notes"] == ["operations and bytes of an update are those of the same blocks uncompiled"]
    assert plain["notes"] == []
    for figure in ("update_flops", "train_flops", "activation_peak_bytes", "cache_bytes"):
        assert compiled["cost"][figure] == plain["cost"][figure]
    assert compiled["test"] == pytest.approx(plain["test"], rel=1e-4)


def _diverged(*_: object) -> None:
    raise FloatingPointError


def test_compare_keeps_the_order_and_survives_a_failing_run(make_plan: MakePlan) -> None:
    told: list[str] = []

    def show(name: str, epoch: int, epochs: int, metrics: dict[str, float]) -> None:
        if epoch == 1:
            told.append(name)

    plans = [
        ("A 0", partial(make_plan, "backprop", 0)),
        ("B 0", partial(make_plan, "mono_forward", 0, optimizer=partial(torch.optim.SGD, lr=1e30))),
        ("A 1", partial(make_plan, "backprop", 1)),
        ("C 1", partial(make_plan, "mono_forward", 1)),
    ]
    folders, problems = compare(plans, show)
    found = [_record(folder) for folder in folders]
    assert [record["status"] for record in found] == ["done", "failed", "done", "done"]
    assert [record["algorithm"] for record in found] == ["backprop", "mono_forward", "backprop", "mono_forward"]
    assert told == ["A 0", "A 1", "C 1"]
    assert len(problems) == 1
    assert problems[0].startswith("B 0 failed: unit ")


def test_compare_stops_when_the_user_says_so(make_plan: MakePlan, tmp_path: Path) -> None:
    def stopped() -> Plan:
        plan = make_plan("mono_forward")
        _watch(plan, [], 3)
        return plan

    with pytest.raises(Interrupted):
        compare([("A", partial(make_plan, "backprop")), ("B", stopped), ("C", partial(make_plan, "backprop"))])
    statuses = sorted(str(_record(path)["status"]) for path in islice((tmp_path / "runs").iterdir(), 9))
    assert statuses == ["done", "interrupted"]


def test_what_an_earlier_run_held_is_gone_when_the_next_one_trains(make_plan: MakePlan) -> None:
    """Its data and network would stand in the next one's peak of allocated memory."""

    def first() -> list[weakref.ref[object]]:
        plan = make_plan("mono_forward")
        run(plan)
        return [weakref.ref(plan.data), weakref.ref(plan.algorithm)]

    gc.disable()  # what happens to be collected in time is no proof
    try:
        left = first()
        assert any(one() is not None for one in left)  # Lightning's objects hold each other
        seen: list[object] = []
        run(make_plan("backprop", progress=lambda *_: seen.append([one() for one in left])))
    finally:
        gc.enable()
    assert seen == [[None, None]] * 2
