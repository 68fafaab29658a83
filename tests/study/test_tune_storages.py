"""Where trials are kept: the same search on SQLite, Optuna's journal and PostgreSQL, and processes that are killed on each."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from locallearn.study._storages import masked, shared
from locallearn.study.tune import Options
from tests.study.servers import mariadb, postgresql
from tests.study.tuning import FakeRuns, asked_for, ended, search, until, worker

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
Place = Callable[[str], str]
SOON = Options(heartbeat_s=1)


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[], str]]:
    """A PostgreSQL server of our own, which makes databases."""
    with postgresql() as database:
        yield database


@pytest.fixture(scope="module")
def other_server() -> Iterator[Callable[[], str]]:
    """A MariaDB server of our own, which makes databases."""
    with mariadb() as database:
        yield database


@pytest.fixture(
    params=[
        *("sqlite", "journal"),
        pytest.param("postgresql", marks=pytest.mark.postgres),
        pytest.param("mysql", marks=pytest.mark.mariadb),
    ]
)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage of every kind, as ``tune.storage`` names it, with nothing in it."""
    if request.param in ("postgresql", "mysql"):
        database: Callable[[], str] = request.getfixturevalue(
            "server" if request.param == "postgresql" else "other_server"
        )
        return database()
    return f"{request.param}:///{tmp_path / 'trials'}"


def _trials(storage: str, study: str) -> list[optuna.trial.FrozenTrial]:
    with shared(storage) as place:
        return optuna.load_study(study_name=study, storage=place.base).trials


# -- on every storage ---------------------------------------------------------------------------------------------------


def test_a_search_goes_on_and_is_the_same_everywhere(runs: FakeRuns, storage: str, tmp_path: Path) -> None:
    search(runs, tmp_path / "reference.sqlite", 3)
    rates = runs.values()
    runs.asked.clear()
    search(runs, storage, 1)
    found = search(runs, storage, 3)
    assert runs.values() == rates
    assert runs.order == ["a", "b"] * 3
    assert [best.trials for best in found] == [3, 3]
    assert [trial.number for trial in _trials(storage, "a-study")] == [0, 1, 2]


def test_a_killed_trial_is_run_again_with_its_settings(runs: FakeRuns, storage: str, tmp_path: Path) -> None:
    """By a process that shares the search meanwhile."""

    def killed(algorithm: str, settings: dict[str, float]) -> float:
        if not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            time.sleep(600)
        return 0.5

    first = worker(runs, tmp_path, storage, 2, killed, options=SOON)
    until((tmp_path / "killed").exists)
    second = worker(runs, tmp_path, storage, 2, killed, options=SOON)
    until(lambda: len(asked_for(tmp_path)) == 4)
    os.kill(first, signal.SIGKILL)
    assert [ended(first), ended(second)] == [-signal.SIGKILL, 0]
    asked = asked_for(tmp_path)
    assert (len(asked), len(set(asked))) == (5, 4)
    for name in ("a-study", "b-study"):
        assert [trial.state.name for trial in _trials(storage, name)] == ["COMPLETE"] * 2


def test_only_one_process_at_a_time_takes_a_trial(storage: str) -> None:
    inside, order = threading.Event(), list[str]()
    with shared(storage) as first, shared(storage) as second:

        def wait() -> None:
            inside.wait()
            with second.alone():
                order.append("second")

        waiting = threading.Thread(target=wait)
        waiting.start()
        with first.alone():
            inside.set()
            time.sleep(0.5)
            order.append("first")
        waiting.join()
    assert order == ["first", "second"]


def _killed_often(runs: FakeRuns, storage: str, folder: Path, trials: int, kills: int) -> None:
    """Kill the older of two processes and start another one, until so many are dead: most in the middle of a trial."""
    draw = random.Random(0)
    with shared(storage):  # what is imported here, not every process has to
        pass

    def answer(algorithm: str, settings: dict[str, float]) -> float:
        time.sleep(0.2)
        return settings["optimizer.lr"]

    at_work = [worker(runs, folder, storage, trials, answer, options=SOON) for _ in range(2)]
    for number in range(kills):
        victim = at_work.pop(0)
        if number % 4:  # else wherever it is: it begins, or takes a trial
            until((folder / f"asked-{victim}").exists)
        time.sleep(draw.uniform(0.0, 0.2))
        os.kill(victim, signal.SIGKILL)
        assert ended(victim) == -signal.SIGKILL, "the search was over before, or its budget was not right"
        at_work.append(worker(runs, folder, storage, trials, answer, options=SOON))
    assert [ended(process) for process in at_work] == [0, 0]


def test_kills_at_any_moment_lose_no_trial_and_double_none(runs: FakeRuns, storage: str, tmp_path: Path) -> None:
    kills = 20 if storage.startswith(("postgresql", "mysql")) else 3
    trials = 2 * kills
    _killed_often(runs, storage, tmp_path, trials, kills)
    asked = asked_for(tmp_path)
    lost = double = 0
    for algorithm in ("a", "b"):
        told = _trials(storage, f"{algorithm}-study")
        numbers = [trial.number for trial in told if trial.state is optuna.trial.TrialState.COMPLETE]
        lost += trials - len(set(numbers))
        double += len(told) - trials  # another row for one that was there
        rates = [trial.params["optimizer.lr"] for trial in told]
        assert {line.split()[1] for line in asked if line.startswith(algorithm)} == {repr(rate) for rate in rates}
        assert len(set(rates)) == trials
    again = len(asked) - 2 * trials
    print(f"{kills} kills, {again} of them in a trial: {lost} lost, {double} double of twice {trials} trials")
    assert (lost, double) == (0, 0)
    assert 0 < again <= kills  # nothing but what was cut off was run again


@pytest.mark.postgres
def test_who_was_taken_for_dead_counts_nothing(runs: FakeRuns, server: Callable[[], str], tmp_path: Path) -> None:
    """A process that stood still for longer than its heartbeats may be late comes back, and its trial is another's."""

    def slow(algorithm: str, settings: dict[str, float]) -> float:
        time.sleep(0.5)
        return 0.5

    storage = server()
    first = worker(runs, tmp_path, storage, 2, slow, options=SOON)
    until(lambda: len(asked_for(tmp_path)) == 1)
    os.kill(first, signal.SIGSTOP)
    second = worker(runs, tmp_path, storage, 2, slow, options=SOON)
    assert ended(second) == 0
    os.kill(first, signal.SIGCONT)
    assert ended(first) == 0
    assert len(asked_for(tmp_path)) == 5
    for name in ("a-study", "b-study"):
        assert [trial.state.name for trial in _trials(storage, name)] == ["COMPLETE"] * 2


# -- one kind each ------------------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_short_does_not_spoil_the_journal(runs: FakeRuns, tmp_path: Path) -> None:
    journal = tmp_path / "trials.log"  # by its ending
    search(runs, str(journal), 1)
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "worker')
    assert [best.trials for best in search(runs, str(journal), 2)] == [2, 2]
    assert [trial.state.name for trial in _trials(str(journal), "a-study")] == ["COMPLETE"] * 2


@pytest.mark.postgres
@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_heartbeat_that_is_old_frees_a_trial(server: Callable[[], str]) -> None:
    """By the database's clock; one that was being taken when its process died has no name in it, and is free at once."""
    storage = server()
    with shared(storage, heartbeat_s=1) as place:
        study = optuna.create_study(storage=place.base, study_name="s")
        trials = [study.ask() for _ in range(3)]
        for trial in trials[:2]:
            place.beat(trial)
            trial.set_user_attr("worker", "somebody")

        def left() -> set[int]:
            return place.left(study, study.get_trials(states=(optuna.trial.TrialState.RUNNING,)))

        assert left() == {2}
        with place.alive(trials[0]):
            until(lambda: 1 in left(), 10)
            assert left() == {1, 2}
        until(lambda: 0 in left(), 10)
        assert left() == {0, 1, 2}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("sqlite://", "expected a file that keeps the trials"),
        ("sqlite:///:memory:", "expected a file that keeps the trials"),
        ("journal:///", "expected a file that keeps the trials"),
        ("oracle://me:secret@here/db", r"oracle://me:\*\*\*@here/db: expected postgresql://"),
        ("what://", "expected postgresql://"),
        ("postgresql://me:secret@127.0.0.1:1/db", r"postgresql://me:\*\*\*@127.0.0.1:1/db cannot be used: "),
    ],
)
def test_storages_that_cannot_be_used(given: str, said: str, runs: FakeRuns) -> None:
    if given.startswith("postgresql"):
        pytest.importorskip("psycopg")
    with pytest.raises(ValueError, match=said) as caught:
        search(runs, given, 1)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["trials", "trials.log"])
def test_a_file_of_something_else_is_no_storage(name: str, runs: FakeRuns, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a note of mine\nand another one\n")
    with pytest.raises(ValueError, match="of Optuna"):
        search(runs, str(tmp_path / name), 1)
    assert (tmp_path / name).read_text() == "a note of mine\nand another one\n"


def test_a_password_is_not_written_down() -> None:
    assert masked("postgresql://me:secret@here/db?host=x") == "postgresql://me:***@here/db?host=x"
    assert masked("runs/tune.sqlite") == "runs/tune.sqlite"
    assert "secret" not in masked("postgresql://me:secret@here:port/db")
