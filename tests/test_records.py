import errno
import functools
import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest

from locallearn.records import (
    TEMPLATE,
    Metric,
    Quality,
    Record,
    RunFolder,
    _place,
    find_records,
    hardware,
    load_record,
    read_index,
    rebuild_index,
    recover,
    scan,
    source,
    versions,
)

START: dict[str, Any] = {"algorithm": "mono_forward", "dataset": "digits", "seed": 3}

PACKAGE = str(Path(_place.__file__).parent.parent)
# For programs that take records alone, without what importing the whole package brings: PACKAGE is their last argument.
_ALONE = """
import sys, types
sys.modules["locallearn"] = types.ModuleType("locallearn")
sys.modules["locallearn"].__path__ = sys.argv[-1:]
"""


def finished(root: Path, **values: Any) -> Path:
    folder = RunFolder.create(root, START)
    folder.update(values)
    return folder.finish("done")


def content(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((path / "record.json").read_text())
    return data


def test_a_run_is_hidden_while_it_runs_and_complete_once_it_has_its_name(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, START)
    running = content(folder.path)
    assert folder.path.name == f".{running['id']}.part"
    assert running["status"] == "running"
    assert running["process"]["pid"] == os.getpid()

    folder.update({"cost": {"train_s": 1.5}, "test": {"accuracy": 0.9}})
    folder.write_text("config.yaml", "a: 1\n")
    final = folder.finish("done")

    record = content(final)
    assert [path.name for path in tmp_path.iterdir()] == [record["id"]] == [final.name]
    assert set(record) == set(TEMPLATE)  # every key is there, and the process and its host are not
    assert record["cost"]["train_s"] == 1.5
    assert record["cost"]["update_flops"] is None  # merged key by key, and unknown stays null
    assert record["status"] == "done"
    assert record["started"] <= record["finished"]
    assert (final / "config.yaml").read_text() == "a: 1\n"


def test_the_id_is_readable_and_safe_as_a_folder(tmp_path: Path) -> None:
    path = RunFolder.create(tmp_path, {**START, "algorithm": "../x y/<b>", "dataset": ""}).finish("done")
    assert path.parent == tmp_path
    stamp, clock, algorithm, dataset, seed, token = path.name.split("-")
    assert (len(stamp), len(clock), len(token)) == (8, 6, 6)
    assert (algorithm, dataset, seed) == ("x_y_b", "unnamed", "s3")
    assert content(path)["algorithm"] == "../x y/<b>"


def test_parallel_runs_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: finished(tmp_path), range(40)))
    assert len(set(paths)) == 40
    assert len(find_records([tmp_path])) == 40


def test_a_taken_token_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Frozen":
            return cls(2026, 1, 1, tzinfo=tz)

    tokens = iter(["aaaaaa", "f0f0f0f0", "aaaaaa", "aaaaaa", "bbbbbb", "0f0f0f0f"])
    monkeypatch.setattr("locallearn.records._folder.datetime", Frozen)
    monkeypatch.setattr("secrets.token_hex", lambda n: next(tokens))
    first, second = RunFolder.create(tmp_path, START), RunFolder.create(tmp_path, START)
    assert first.path.name.endswith("-aaaaaa.part")
    assert second.path.name.endswith("-bbbbbb.part")


def test_finish_never_overwrites_and_takes_only_known_endings(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, START)
    with pytest.raises(ValueError, match="'finished'; use one of done, failed, interrupted"):
        folder.finish("finished")
    taken = tmp_path / content(folder.path)["id"]
    taken.mkdir()
    (taken / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="left as it is"):
        folder.finish("done")
    assert (taken / "mine").read_text() == "keep"


def test_json_is_strict(tmp_path: Path) -> None:
    path = finished(tmp_path, cost={"train_s": math.nan, "co2_g": math.inf}, config={"p": Path("a"), "t": (1, 2.5)})
    text = (path / "record.json").read_text()
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert data["cost"]["train_s"] is None
    assert data["cost"]["co2_g"] is None
    assert data["config"] == {"p": "a", "t": [1, 2.5]}


def test_a_value_json_cannot_hold_is_refused_and_the_record_stays_whole(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, START)
    with pytest.raises(ValueError, match=r"'cost\.train_s' is a object"):
        folder.update({"cost": {"train_s": object()}})
    folder.update({"task": "classification"})
    assert content(folder.finish("done"))["task"] == "classification"


@pytest.mark.parametrize("missing", ["algorithm", "dataset", "seed"])
def test_create_wants_the_pairing_keys(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match=f"needs '{missing}'"):
        RunFolder.create(tmp_path, {key: value for key, value in START.items() if key != missing})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["record.json", "metrics.csv", "../x", "a/b", "", ".."])
def test_other_files_stay_inside_and_leave_the_record_alone(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        RunFolder.create(tmp_path, START).write_text(name, "x")


def test_metrics_come_back_as_logged(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, START)
    folder.log(0, 10, {"block/0/loss": 0.1, 'odd,"name"\n': None})
    # Before the run ends the line is already in the file, for a kill loses nothing that was logged.
    assert "0,10,block/0/loss,0.1\n" in (folder.path / "metrics.csv").read_text()
    folder.log(1, 20, {"block/0/loss": 1 / 3, "diverged": math.nan})
    rows = load_record(folder.finish("done")).metrics()
    assert rows[:3] == [
        Metric(0, 10, "block/0/loss", 0.1),
        Metric(0, 10, 'odd,"name"\n', None),
        Metric(1, 20, "block/0/loss", 1 / 3),
    ]
    assert rows[3].value is not None
    assert math.isnan(rows[3].value)


def test_metrics_cut_by_a_kill_lose_only_the_last_line(tmp_path: Path) -> None:
    path = finished(tmp_path)
    assert load_record(path).metrics() == []
    (path / "metrics.csv").write_text("epoch,step,name,value\n0,1,a,0.5\n1,2,a,0.")
    assert load_record(path).metrics() == [Metric(0, 1, "a", 0.5)]
    (path / "metrics.csv").write_text("epoch,step,name,value\n0,one,a,0.5\n1,2,a,0.5\n")
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        load_record(path).metrics()


def test_lines_of_metrics_end_where_csv_ends_them(tmp_path: Path) -> None:
    names = ["a\u2028b", "c\x0bd", "e\x85f", "g\x1ch"]
    folder = RunFolder.create(tmp_path, START)
    folder.log(0, 1, dict.fromkeys(names, 0.5))
    path = folder.finish("done")
    assert [row.name for row in load_record(path).metrics()] == names
    (path / "metrics.csv").write_text(f"{'x' * 200_000}\n0,1,a,0.5\n")  # the header, longer than csv takes
    with pytest.raises(ValueError, match=r"line 1 of .* is damaged"):
        load_record(path).metrics()
    assert len(scan([tmp_path]).problems) == 1


def test_folders_that_cannot_be_looked_into_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path)
    (tmp_path / "closed").mkdir()
    look = os.scandir

    def refusing(place: Any) -> Any:
        if Path(place).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return look(place)

    monkeypatch.setattr(os, "scandir", refusing)
    found = scan([tmp_path])
    assert len(found.records) == 1
    assert found.left_out == 1
    assert "closed cannot be looked into (Permission denied)" in found.problems[0]


def test_a_killed_run_is_adopted_and_a_living_one_is_not(tmp_path: Path) -> None:
    script = (
        _ALONE + "import time; from pathlib import Path; from locallearn.records import RunFolder;"
        "f = RunFolder.create("
        "Path(sys.argv[1]), {'algorithm': 'a', 'dataset': 'd', 'seed': 0});"
        "f.log(0, 1, {'loss': 1.0}); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), PACKAGE], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert recover(tmp_path) == []
        assert scan([tmp_path]).records == []
        assert "not ended yet" in scan([tmp_path]).problems[0]
        child.kill()
    mine = RunFolder.create(tmp_path, START)

    (adopted,) = recover(tmp_path)
    record = load_record(adopted)
    assert record.status == "interrupted"
    assert record.text("error") == "The process was killed before the run ended."
    assert "process" not in record.data
    assert record.metrics() == [Metric(0, 1, "loss", 1.0)]
    assert mine.path.is_dir()
    assert recover(tmp_path) == []


def test_a_run_is_owned_by_its_lock_and_by_nothing_that_a_container_could_repeat(tmp_path: Path) -> None:
    mine = RunFolder.create(tmp_path, START)
    mine.update({"process": {"pid": 1, "host": "another-machine", "birth": "another boot:1"}})
    assert recover(tmp_path) == []
    mine.abandon()  # as a kill does: the lock is gone, the record still says "running"
    told: list[str] = []
    (adopted,) = recover(tmp_path, told.append)
    assert adopted.name == content(adopted)["id"]
    assert told == []


def test_a_forgotten_run_is_nobodys(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, START)
    assert len(recover(tmp_path)) == 1


def test_a_child_that_outlives_its_parent_does_not_keep_the_run(tmp_path: Path) -> None:
    # As a data loader's worker does: forked after the run began, and alive after its parent was killed.
    script = (
        _ALONE + "import os, time; from pathlib import Path; from locallearn.records import RunFolder;"
        "run = RunFolder.create("
        "Path(sys.argv[1]), {'algorithm': 'a', 'dataset': 'd', 'seed': 0});"
        "pid = os.fork();"
        "pid or (print(os.getpid(), flush=True), time.sleep(60));"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path), PACKAGE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        try:
            assert recover(tmp_path) == []
            parent.kill()
            parent.wait()
            os.kill(worker, 0)  # it lives
            assert len(recover(tmp_path)) == 1
        finally:
            os.kill(worker, 9)


def test_of_many_that_recover_at_once_one_adopts(tmp_path: Path) -> None:
    for _ in range(5):
        RunFolder.create(tmp_path, START).abandon()
    with ThreadPoolExecutor(8) as pool:
        adopted = [path for paths in pool.map(lambda _: recover(tmp_path), range(8)) for path in paths]
    assert len(adopted) == len(set(adopted)) == 5
    assert {record.status for record in find_records([tmp_path])} == {"interrupted"}


def test_without_locks_a_run_goes_on_and_recover_says_what_it_cannot_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locallearn.records._lock._flock", None)
    folder = RunFolder.create(tmp_path, START)
    told: list[str] = []
    assert recover(tmp_path, told.append) == []
    assert len(told) == 1
    assert "no file locks" in told[0]
    assert content(folder.finish("done"))["serial"] == 1


# Each step is an event that Python reports before it opens, renames, makes or removes anything.
_KILLED = """
import itertools, os, shutil
from pathlib import Path
from locallearn.records import RunFolder, load_record, recover
create, load = RunFolder.create, load_record
STEPS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")

def killed(root, act, at):
    "Runs act in a process that dies before its step number at; says whether it did, and what act told until then."
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        count = itertools.count()
        def hook(event, args):
            if event in STEPS and str(args[0]).startswith(str(root)) and next(count) == at:
                os._exit(9)
        sys.addaudithook(hook)
        act(lambda word: os.write(tell, word.encode() + b" "))
        os._exit(0)
    os.close(tell)
    with open(told) as pipe:
        words = pipe.read().split()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, words

def life(root):
    def act(tell):
        run = create(root, {"algorithm": "a", "dataset": "d", "seed": 0})
        tell("created")
        run.log(0, 1, {"loss": 1.0})
        tell("logged")
        for text in ("first", "second"):
            run.write_with("resume.ckpt", lambda place: place.write_text(text))
            tell(text)
        run.update({"test": {"accuracy": 0.5}})
        tell("updated")
        run.finish("done")
        tell("done")
    return act

def check(root, words):
    told = []
    recover(root, told.append)
    runs = [path for path in root.iterdir() if not path.name.startswith(".")] if root.exists() else []
    parts = list(root.glob(".*.part"))
    assert len(runs) + len(parts) <= 1
    if not runs:
        assert "created" not in words
        assert len(told) == len(parts), (told, parts)
        assert all("before its first record" in sentence and str(parts[0]) in sentence for sentence in told)
        return
    (run,) = runs
    assert not parts and not told
    record = load(run)
    assert record.status in ("done", "interrupted") and record.id == run.name
    if "logged" in words:
        assert [row.name for row in record.metrics()] == ["loss"]
    if "updated" in words:
        assert record.part("test")["accuracy"] == 0.5
    checkpoint = run / "resume.ckpt"
    if record.status == "done":
        assert "updated" in words and not checkpoint.exists()
    elif "second" in words:
        assert checkpoint.read_text() == "second"
    elif "first" in words:
        assert checkpoint.read_text() in ("first", "second")
    assert not [path for path in run.iterdir() if path.name.startswith(".")], list(run.iterdir())

base = Path(sys.argv[1])
for at in itertools.count():
    root = base / f"run{at}"
    root.mkdir()
    died, words = killed(root, life(root), at)
    # Whoever recovers may be killed as well, at any step (of which each state is tried with a third); the next one ends it.
    for then in itertools.count(at % 3, 3):
        copy = base / f"copy{at}.{then}"
        shutil.copytree(root, copy, symlinks=True)
        again, _ = killed(copy, lambda tell: recover(copy), then)
        check(copy, words)
        if not again:
            break
    check(root, words)
    if not died:
        break
assert "done" in words
print(at)
"""


def test_a_kill_between_any_two_steps_loses_nothing_and_is_found(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ALONE + _KILLED, str(tmp_path), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20  # steps of one run


def test_a_part_folder_that_says_done_is_done(tmp_path: Path) -> None:
    path = finished(tmp_path, test={"accuracy": 0.5})
    (path / "resume.ckpt").write_text("left over")
    ended = content(path)["finished"]
    path.rename(tmp_path / f".{path.name}.part")
    assert recover(tmp_path) == [path]
    record = load_record(path)
    assert (record.status, record.data["finished"], record.data["error"]) == ("done", ended, None)
    assert [entry.name for entry in path.iterdir()] == ["record.json"]


def test_a_folder_without_a_record_is_told(tmp_path: Path) -> None:
    (tmp_path / ".early.part").mkdir()
    told: list[str] = []
    assert recover(tmp_path, told.append) == []
    for sentence in (*told, *scan([tmp_path]).problems):
        assert ".early.part" in sentence
        assert "before its first record" in sentence
    assert len(told) == len(scan([tmp_path]).problems) == 1


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", "..", "a/b", "other", ".hidden.part"])
def test_a_record_does_not_say_where_its_folder_goes(tmp_path: Path, name: str) -> None:
    root = tmp_path / "deep" / "runs"
    folder = RunFolder.create(root, START)
    own = content(folder.path)["id"]
    folder.update({"id": name})
    folder.abandon()
    assert recover(root) == [root / own]
    assert content(root / own)["id"] == own
    assert [path.name for path in root.iterdir()] == [own]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_links_lead_nowhere(tmp_path: Path) -> None:
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    runs.mkdir()
    target = RunFolder.create(elsewhere, START)
    target.abandon()
    before = content(target.path)
    (runs / ".link.part").symlink_to(target.path)
    inner = runs / ".inner.part"
    inner.mkdir()
    (inner / "record.json").symlink_to(target.path / "record.json")
    locked = runs / ".locked.part"
    locked.mkdir()
    (locked / "record.json").write_text(json.dumps({**before, "id": "locked"}))
    (locked / ".lock").symlink_to(elsewhere / "made")
    hard = runs / ".hard.part"
    hard.mkdir()
    os.link(target.path / "record.json", hard / "record.json")
    told: list[str] = []
    assert recover(runs, told.append) == [runs / "hard"]
    assert len(told) == 3
    assert content(target.path) == before  # of two names of one file only the one in the folder was rewritten
    assert sorted(path.name for path in elsewhere.iterdir()) == [target.path.name]


def test_recover_clears_what_killed_processes_left_half_written(tmp_path: Path) -> None:
    path = finished(tmp_path)
    dead = RunFolder.create(tmp_path, START)
    dead.abandon()
    alive = RunFolder.create(tmp_path, START)
    for stale in (path / ".lock", path / ".record.json.0f0f", path / "resume.ckpt", tmp_path / ".index.ab.sqlite"):
        stale.write_text("half")
    for folder in (dead.path, alive.path):
        (folder / ".resume.ckpt").write_text("half")
        (folder / "resume.ckpt").write_text("whole")
    (adopted,) = recover(tmp_path)
    assert [entry.name for entry in path.iterdir()] == ["record.json"]
    assert sorted(entry.name for entry in adopted.iterdir()) == ["record.json", "resume.ckpt"]
    assert (alive.path / ".resume.ckpt").exists()  # somebody is at it
    assert not list(tmp_path.glob(".index*"))


# -- disks that are full, records that are odd -------------------------------------------------------------------------


class _Full:
    """A file on a disk that has room for ``left`` more bytes."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: bytes) -> int:
        if self.left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self.file.write(data[: self.left])
        self.left -= count
        return int(count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "_Full":
        return self

    def __exit__(self, *caught: object) -> None:
        self.file.close()


@pytest.mark.parametrize("left", [0, 7])
def test_a_full_disk_names_the_file_and_spoils_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    opened = Path.open
    folder = RunFolder.create(tmp_path, START)
    folder.log(0, 1, {"loss": 1.0})
    folder.write_with("resume.ckpt", lambda place: place.write_text("first") and None)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    folder.abandon()
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: _Full(opened(path, *a, **k), left))

    def save(place: Path) -> None:
        with place.open("wb") as file:
            while file.write(b"second and longer"):
                pass

    for name, act in (
        ("record.json", lambda: folder.update({"task": "x"})),
        ("metrics.csv", lambda: folder.log(1, 2, {"loss": 0.5})),
        ("resume.ckpt", lambda: folder.write_with("resume.ckpt", save)),
        ("record.json", lambda: folder.finish("done")),
        ("notes.txt", lambda: folder.write_text("notes.txt", "long enough")),
    ):
        with pytest.raises(OSError, match="No space left") as caught:
            act()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(folder.path / name)
    with pytest.raises(OSError, match="No space left"):
        RunFolder.create(tmp_path, START)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.path.name]  # a run that never began leaves no folder
    folder.abandon()
    assert [load_record(path).metrics() for path in recover(tmp_path)] == [[Metric(0, 1, "loss", 1.0)]]


def test_a_full_disk_does_not_break_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path)
    before = rebuild_index(tmp_path).read_bytes()

    def full(path: Path) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(OSError, match="disk is full") as caught:
        rebuild_index(tmp_path)
    assert caught.value.filename == str(tmp_path / "index.sqlite")
    assert (tmp_path / "index.sqlite").read_bytes() == before


_ODD: dict[str, Any] = {
    "surrogate": {"command": "\udcff", "config": {"\udc80": ["\ud800"]}, "algorithm": "\udfff"},
    "large": {"seed": 2**70, "cost": {"train_s": 2**70, "params": 10**400}},
    "not finite": {"test": {"accuracy": math.nan}, "cost": {"train_s": math.inf}},
    "wide": {"test": {"accuracy": 1e308}, "cost": {"train_s": -1e308, "samples": 5e-324}},
    "odd parts": {"test": [1], "cost": "none", "energy": {"source": 3}, "blocks": 7, "config": None, "hardware": []},
    "nested": {"config": functools.reduce(lambda inner, _: [inner], range(90), [])},
}


@pytest.mark.parametrize("odd", _ODD.values(), ids=_ODD)
def test_an_odd_record_stops_neither_recover_nor_the_index(tmp_path: Path, odd: dict[str, Any]) -> None:
    good = finished(tmp_path)
    folder = RunFolder.create(tmp_path, START)
    folder.abandon()
    (folder.path / "record.json").write_text(json.dumps({**content(folder.path), **odd}))
    (adopted,) = recover(tmp_path)
    found = scan([tmp_path])
    kept = {record.path for record in found.records}
    assert good in kept
    assert adopted in kept or any(adopted.name in problem for problem in found.problems)  # there, or told why not
    assert len(read_index(tmp_path)) == len(kept)
    for record in found.records:
        record.figures()
        json.dumps(record.data).encode()
        str(record.data).encode()  # no lone surrogate is left: this can be printed


@pytest.mark.parametrize(
    "text",
    [
        '{"id": ' + "[" * 200 + "]" * 200 + "}",
        '{"id": ' + "[" * 10_000 + "]" * 10_000 + "}",
        '{"seed": ' + "9" * 5000 + "}",
    ],
    ids=["deep", "deeper", "endless number"],
)
def test_a_prank_is_a_damaged_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "prank").mkdir()
    (tmp_path / "prank" / "record.json").write_text(text)
    good = finished(tmp_path)
    found = scan([tmp_path])
    assert [record.path for record in found.records] == [good]
    assert "damaged" in found.problems[0]


def test_a_pipe_in_a_records_place_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "record.json")
    assert "it is no file" in scan([tmp_path]).problems[0]


def test_text_that_is_not_utf8_is_written_as_json_has_it(tmp_path: Path) -> None:
    path = finished(tmp_path, command="caf\u00e9 \udcff", config={"data_dir": Path("\udc80")})
    text = (path / "record.json").read_bytes().decode("utf-8")
    assert "caf\u00e9 \\udcff" in text
    assert json.loads(text)["command"] == "caf\u00e9 \udcff"
    assert load_record(path).text("command") == "caf\u00e9 \ufffd"


# -- what a resumed run takes over, and who ran ------------------------------------------------------------------------


def test_the_curves_of_an_earlier_part_are_taken_over(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path, START)
    first.log(0, 5, {'odd,"name"\n\u2028': 1 / 3, "unknown": None})
    first.log(1, 10, {"loss": 0.25})
    first.log(2, 15, {"loss": 0.125})
    earlier = first.finish("interrupted")
    with (earlier / "metrics.csv").open("a") as file:
        file.write("3,20,lo")  # cut by a kill
    for rows, step, kept in ((3, 0, 3), (None, 10, 3), (0, 99, 0), (None, 99, 4)):
        second = RunFolder.create(tmp_path, START)
        epochs = second.take_over(earlier, rows, step)
        second.log(7, 70, {"loss": 0.0})
        assert second.rows == kept + 1
        path = second.finish("done")
        whole = (earlier / "metrics.csv").read_bytes().split(b"\n")
        # a name of two lines takes two lines
        assert (path / "metrics.csv").read_bytes().split(b"\n")[: kept + 1 + (kept > 0)] == whole[
            : kept + 1 + (kept > 0)
        ]
        assert epochs == list(range(max(0, kept - 1)))


def test_runs_are_numbered_in_the_order_of_their_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = finished(tmp_path), RunFolder.create(tmp_path, {**START, "config": {"serial": 99}})
    monkeypatch.setattr(
        "locallearn.records._folder._stamp", lambda moment: "2001-01-01T00:00:00"
    )  # a clock that is set back
    third = finished(tmp_path)
    assert [content(path)["serial"] for path in (first, second.path, third)] == [1, 2, 3]
    for path in first.iterdir():
        path.unlink()
    assert content(finished(tmp_path))["serial"] == 4
    with ThreadPoolExecutor(8) as pool:
        serials = list(pool.map(lambda _: content(finished(tmp_path))["serial"], range(16)))
    assert sorted(serials) == list(range(5, 21))


def test_the_source_is_that_of_locallearns_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=b"]
        command = ["git", "-C", str(tmp_path), *names, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def found() -> dict[str, Any]:
        _place._source.cache_clear()
        return source()

    package = tmp_path / "locallearn" / "records"
    package.mkdir(parents=True)
    (package / "_place.py").write_text("one\n")
    monkeypatch.setattr(_place, "__file__", str(package / "_place.py"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    try:
        assert found() == {"commit": None, "dirty": None}
        monkeypatch.delenv("GIT_DIR")
        git("init")
        (tmp_path / "theirs").write_text("x")
        git("add", "theirs")
        git("commit", "-m", "theirs")
        assert found() == {"commit": None, "dirty": None}  # inside somebody else's project
        git("add", ".")
        git("commit", "-m", "ours")
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
        commit = found()["commit"]
        assert found()["dirty"] is False
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "record.json").write_text("{}")
        assert found()["dirty"] is False  # what runs leave changes no code
        (package / "new.py").write_text("two\n")
        assert found() == {"commit": commit, "dirty": True}
        monkeypatch.delenv("GIT_DIR")
        assert commit == git("rev-parse", "HEAD")
    finally:
        _place._source.cache_clear()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "holds a list instead of an object"),
        ('{"id": "x"}', "'algorithm' = None, wanted str"),
        ('{"id": "x", "algorithm": "a", "dataset": "d", "status": "done", "seed": "1"}', "'seed' = '1', wanted int"),
        ('{"id": "x", "algorithm": "a", "dataset": "d", "status": "done", "seed": true}', "'seed' = True"),
        ("\udcff", "cannot be read"),
    ],
)
def test_damaged_records_are_named_and_skipped(tmp_path: Path, text: str, message: str) -> None:
    good = finished(tmp_path)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "record.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        load_record(bad)
    found = scan([tmp_path])
    assert [record.path for record in found.records] == [good]
    assert len(found.problems) == 1
    assert "bad" in found.problems[0]


def test_a_missing_record_or_root_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no record\.json"):
        load_record(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        scan([tmp_path / "nowhere"])


def test_scan_goes_deep_and_counts_a_run_once(tmp_path: Path) -> None:
    one = finished(tmp_path / "a" / "deep")
    two = finished(tmp_path / "b")
    found = scan([tmp_path, two, tmp_path / "a"])
    assert [record.path.name for record in found.records] == [one.name, two.name]
    assert found.problems == []
    assert load_record(one / "record.json").id == one.name


def test_figures_survive_anything_json_can_hold(tmp_path: Path) -> None:
    energy = [{"source": "nvml", "joules": 5, "net_joules": None}, {"source": "rapl", "joules": True}, "x", {}]
    cost = {"train_s": "1", "samples": 10, "energy_j": {"nvml": 6}, "params": 10**400}
    path = finished(tmp_path, cost=cost, energy=energy, test={"accuracy": 0.5, "auc": None}, target={"seconds": 3})
    figures = load_record(path).figures()
    assert figures["energy_j/nvml"] == 6.0
    assert figures["energy_net_j/nvml"] is None
    assert figures["energy_j/rapl"] is None
    assert figures["train_s"] is None
    assert figures["params"] is None
    assert figures["samples"] == 10
    assert figures["test/auc"] is None
    assert figures["target/seconds"] == 3
    bare = load_record(finished(tmp_path, cost=[], energy=5, test=None, target="soon", validation=3))
    assert set(bare.figures().values()) == {None}


def test_the_index_says_what_the_folders_say(tmp_path: Path) -> None:
    first = finished(tmp_path, test={"accuracy": 0.9}, net="mlp", cost={"train_s": 2, "energy_j": {"rapl": 7.0}})
    second = finished(tmp_path)
    with sqlite3.connect(rebuild_index(tmp_path)) as base:
        rows = base.execute(
            "SELECT path, net, seed, test_accuracy, train_s, energy_j FROM runs ORDER BY started"
        ).fetchall()
    base.close()
    assert rows == [
        (first.name, "mlp", 3, 0.9, 2.0, '{"rapl": 7.0}'),
        (second.name, None, 3, None, None, "{}"),
    ]


def test_the_index_follows_the_folders(tmp_path: Path) -> None:
    def ids() -> list[str]:
        return [row["id"] for row in read_index(tmp_path)]

    assert ids() == []
    first = finished(tmp_path)
    assert ids() == [first.name]
    second = finished(tmp_path)
    assert ids() == [first.name, second.name]
    stamp = (tmp_path / "index.sqlite").stat().st_mtime_ns
    assert ids() == [first.name, second.name]
    assert (tmp_path / "index.sqlite").stat().st_mtime_ns == stamp  # nothing changed, nothing rebuilt
    (tmp_path / "index.sqlite").write_bytes(b"SQLite format 3\0 and then rubbish")
    assert ids() == [first.name, second.name]
    (second / "record.json").unlink()
    assert ids() == [first.name]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_parallel_rebuilds_and_runs_do_not_collide(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                finished(tmp_path)
                read_index(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(read_index(tmp_path)) == 20


def test_provenance_names_no_person_and_no_machine() -> None:
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"]
    where = hardware(["NVIDIA Test"])
    assert where["gpus"] == ["NVIDIA Test"]
    assert where["cores"] == os.cpu_count()
    text = json.dumps([found, where])
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text


def test_records_need_only_the_standard_library() -> None:
    code = _ALONE + "print(*{name.split('.')[0] for name in sys.modules})"
    before, after = (
        set(
            subprocess.run(
                [sys.executable, "-c", text, "", PACKAGE], capture_output=True, text=True, check=True
            ).stdout.split()
        )
        for text in (code, code.replace("print", "import locallearn.records; print"))
    )
    assert after - before <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("seed", "right"), [(0, True), (2**63 - 1, True), (2**63, False), (-1, False), (-(2**70), False)]
)
def test_a_seed_is_a_whole_number_of_64_bits(tmp_path: Path, seed: int, right: bool) -> None:
    path = finished(tmp_path)
    (path / "record.json").write_text(json.dumps({**content(path), "seed": seed}))
    found = scan([tmp_path])
    assert [record.seed for record in found.records] == [seed]
    assert [f"seed is {seed}" in problem for problem in found.problems] == ([] if right else [True])
    assert read_index(tmp_path)[0]["seed"] == (seed if abs(seed) < 2**63 else None)


def test_folders_that_only_look_like_a_run_that_was_killed_are_none(tmp_path: Path) -> None:
    for name in ("weights.part", ".cache"):
        (tmp_path / name).mkdir()
    within = finished(tmp_path / "weights.part")
    found = scan([tmp_path])
    assert [record.path for record in found.records] == [within]
    assert found.problems == []


def test_the_figure_that_a_run_is_judged_by() -> None:
    def judged(**part: Any) -> Quality:
        return Record(Path("run"), {"metric": part}).metric

    assert judged(name="mean_squared_error", maximise=False) == Quality("mean_squared_error", False)
    assert judged(name="auc", maximise=True) == judged(name="auc") == Quality("auc", True)
    assert judged() == judged(name=3) == judged(name="") == Quality()


@pytest.mark.parametrize(
    ("value", "known"), [(0.0, True), (1.0 + 1e-7, True), (1.01, False), (37, False), (-0.1, False)]
)
def test_a_share_is_a_share_of_one(value: float, known: bool, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    data = {
        "id": "x",
        "algorithm": "a",
        "dataset": "d",
        "status": "done",
        "seed": 1,
        "test": {"accuracy": value, "loss": 37.0},
    }
    (tmp_path / "x" / "record.json").write_text(json.dumps(data), encoding="utf-8")
    found = scan([tmp_path])
    [record] = found.records
    assert record.figures()["test/loss"] == 37.0
    assert record.figures()["test/accuracy"] == (value if known else None)
    assert any("test.accuracy" in problem and "a share of 1" in problem for problem in found.problems) != known
