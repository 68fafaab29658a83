from typing import Any

import pytest

from locallearn.energy import CodeCarbonMeter, PowerReplayMeter, RaplMeter, ReplayMeter, _survey, survey


@pytest.fixture
def quick(stopped: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fake clock, which a look moves on by a hundredth of a second."""
    monkeypatch.setattr(_survey.time, "sleep", lambda seconds: stopped.pass_by(0.01))
    return stopped


def _stairs(every_s: float, step_j: float) -> list[tuple[float, float]]:
    """A counter that is renewed only so often, ten seconds long."""
    points = [(0.0, 0.0)]
    for number in range(1, round(10 / every_s) + 1):
        points += [(number * every_s - 1e-6, points[-1][1]), (number * every_s, number * step_j)]
    return points


def test_interval_step_and_power_of_a_counter(quick: Any) -> None:
    meter = ReplayMeter(_stairs(0.2537, 5.0), clock=quick)
    (row,) = survey([meter], 4.0)
    assert (row.source, row.quality, row.by, row.reason) == ("replay", "measured", "energy counter", None)
    assert row.update_s == pytest.approx(0.2537, rel=0.05)
    assert row.step_j == pytest.approx(5.0)
    assert row.power_w == pytest.approx(20.0, rel=0.1)
    assert row.window_s == pytest.approx(25.0, rel=0.05)
    assert not meter.in_use


def test_a_meter_s_own_tick_counts_where_it_is_longer(quick: Any) -> None:
    meter = ReplayMeter([(0, 0), (100, 1000)], clock=quick)
    meter.tick_s = 0.5
    (row,) = survey([meter], 1.0)
    assert row.update_s == pytest.approx(0.01, rel=0.1)
    assert row.window_s == 50.0


def test_a_counter_that_stands_still_has_no_interval(quick: Any) -> None:
    (row,) = survey([ReplayMeter([(0, 0), (100, 0)], clock=quick)], 1.0)
    assert (row.update_s, row.step_j, row.power_w) == (None, None, 0.0)


def test_what_cannot_be_read_has_its_reason_and_costs_the_others_nothing(quick: Any, tmp_path: Any) -> None:
    class Broken(ReplayMeter):
        def open(self) -> None:
            raise OSError("no such device")

    rows = survey([Broken([(0, 0), (1, 1)]), RaplMeter(tmp_path), ReplayMeter([(0, 0), (9, 9)], clock=quick)], 1.0)
    broken, rapl, replay = rows
    assert "no such device" in str(broken.reason)
    assert "no RAPL domains" in str(rapl.reason)
    assert replay.power_w == pytest.approx(1.0)


def test_a_model_has_no_interval(quick: Any, tracker: Any) -> None:
    rows = {row.source: row for row in survey([CodeCarbonMeter()], 2.0)}
    ram = rows["codecarbon:ram"]
    assert (ram.quality, ram.update_s, ram.step_j) == ("modelled", None, None)
    assert ram.power_w == pytest.approx(20.0, rel=0.05)
    assert ram.window_s == 100.0
    assert "constant power" in ram.by


def test_how_often_a_sampled_power_is_renewed() -> None:
    """A ramp, so that every sample differs; with the real clock and the real process."""
    (row,) = survey([PowerReplayMeter([(0, 0), (1e3, 1e5)], every_s=0.005)], 0.2)
    assert row.by == "power integrated over samples 0.005 s apart"
    assert row.update_s is not None
    assert row.step_j is None


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_seconds_must_be_positive(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds="):
        survey([], seconds)
