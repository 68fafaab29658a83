import ast
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

from locallearn import records
from locallearn.records import (
    TEMPLATE,
    Metric,
    RunFolder,
    find_records,
    hardware,
    load_record,
    read_index,
    rebuild_index,
    recover,
    scan,
    versions,
)

START: dict[str, Any] = {"algorithm": "mono_forward", "dataset": "digits", "seed": 3}


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
    monkeypatch.setattr("locallearn.records.datetime", Frozen)
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


def test_a_killed_run_is_adopted_and_a_living_one_is_not(tmp_path: Path) -> None:
    script = (
        "import runpy, sys, time; from pathlib import Path;"
        "f = runpy.run_path(sys.argv[2])['RunFolder'].create("
        "Path(sys.argv[1]), {'algorithm': 'a', 'dataset': 'd', 'seed': 0});"
        "f.log(0, 1, {'loss': 1.0}); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), records.__file__], stdout=subprocess.PIPE, text=True
    )
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


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"host": "another-machine", "birth": "another boot:1"}, False),
        ({"birth": "another boot:1"}, True),  # the number is in use again, by another process
        ({"birth": None}, False),
    ],
)
def test_who_is_taken_for_dead(tmp_path: Path, change: dict[str, Any], taken: bool) -> None:
    folder = RunFolder.create(tmp_path, START)
    folder.update({"process": change})
    assert len(recover(tmp_path)) == taken


def test_recover_leaves_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / ".empty.part").mkdir()
    assert recover(tmp_path) == []


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
    tree = ast.parse(Path(records.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
