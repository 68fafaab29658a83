"""The report's section on representations: what analyses hold is shown, what is damaged is left out and said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from locallearn.records import Record
from locallearn.report import write_report
from locallearn.report._analysis import read_analyses
from tests.report.browser import BROWSER
from tests.report.test_browser import NASTY, dom, drawn, placed
from tests.report.test_page import Page

Make = Callable[..., Record]
CLASSES, COLUMNS = 3, 4


def _layer(name: str, hoyer: float | None = 0.8, undefined: int = 0) -> dict[str, Any]:
    return {
        "name": name,
        "units": 8,
        "signed": False,
        "hoyer": hoyer,
        "undefined": undefined,
        "hoyer_by_class": [hoyer, None, 0.5],
        "undefined_by_class": [undefined, 0, 0],
        "maximum": 3.25,
        "never_active": 0.25,
        "sizes": [3, 2, 0],
        "overlap": [[3, 1, 0], [1, 2, 0], [0, 0, 0]],
        "unique": [2, 1, 0],
        "shared": 1,
        "unassigned": 4,
        "columns": [0, 2, 4, 6],
        "profile": [[100, 0, 5, 7], [0, 90, 3, 3], [1, 1, 1, 1]],
        "profile_top": 2.5,
        "members": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
        "map": {"labels": [0, 0, 1, 2], "values": [[100, 0, 0, 0], [80, 1, 0, 0], [0, 70, 0, 0], [1, 1, 1, 1]]},
    }


def _content(record: Record, labels: tuple[str, ...] = ("plain",), **changes: Any) -> dict[str, Any]:
    shown = {
        label: {"counts": [5, 4, 3], "layers": [_layer("one", 0.8 - i / 10), _layer("two", None, 12)]}
        for i, label in enumerate(labels)
    }
    return {
        "format": 1,
        "run": record.id,
        "part": "test",
        "accuracy": 0.875,
        "samples": 16,
        "tau": 1.0,
        "only_right": True,
        "unseen": [],
        "passes": shown,
        **changes,
    }


def _likeness(*records: Record, **changes: Any) -> dict[str, Any]:
    rows = [[record.id, layer] for record in records for layer in ("one", "two")]
    matrix = [[1.0 if i == j else None if i + j == 1 else 0.25 for j in range(len(rows))] for i in range(len(rows))]
    return {
        "format": 1,
        "part": "test",
        "rows": rows,
        "cka": matrix,
        "rsa": matrix,
        "samples": 12,
        "pairs_of": 9,
        "only_right": True,
        **changes,
    }


def _put(record: Record, content: Any, name: str | None = None) -> Path:
    folder = record.path.parent / "analysis"
    folder.mkdir(exist_ok=True)
    path = folder / (name or f"{record.path.name}.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_every_figure_has_its_chart_and_its_table(make: Make, tmp_path: Path) -> None:
    records = [make("backprop"), make("forward_forward")]
    _put(records[0], _content(records[0]))
    _put(records[1], _content(records[1], ("true", "neutral"), accuracy=0.5))
    _put(records[0], _likeness(*records), "similarity-1.json")
    page = Page(write_report(records, tmp_path / "r.html").read_text(encoding="utf-8"))
    tables = {table[0][0] + table[0][1]: table for table in page.tables}
    lines = tables["RunAccuracy"][1:]
    assert lines[0] == ["backprop, seed 0", "test: 87.50 %", "as they are", "12", "0.800", "\N{EN DASH} (12 silent)"]
    assert [line[2] for line in lines[1:]] == [
        "with the true label in the input",
        "with the neutral label in the input",
    ]
    assert [line[4] for line in lines] == ["0.800", "0.800", "0.700"]
    assert tables["RunAccuracy (%)"][2] == ["forward_forward, seed 0", "50.00", "0.800, \N{EN DASH}"]
    assert ["0", "3", "2", "3, 1, 0"] in [line for table in page.tables for line in table]
    assert ["1", "2"] in [
        line for table in page.tables for line in table
    ]  # members of class 1's ensemble that are drawn
    heat = [chart["data"][0] for chart in page.charts if chart["data"] and chart["data"][0]["type"] == "heatmap"]
    assert [1.0, None, 0.25, 0.25] in [h["z"][0] for h in heat]
    assert [[100, 0, 0, 0], [80, 1, 0, 0], [0, 70, 0, 0], [1, 1, 1, 1]] in [h["z"] for h in heat]
    for said in (
        "more than 1 times (tau)",
        "the pass with the neutral label is the control",
        "backprop, seed 0, samples as they are: samples that are all zero and in no mean: 12 on two.",
        "Ensembles: forward_forward, seed 0, test accuracy 50.00 %",
        "25.0 % of the units are never active",
        "over 12 samples of test, that all of them classify rightly",
    ):
        assert said in page.text


def test_a_category_that_training_never_saw_is_named(make: Make, tmp_path: Path) -> None:
    record = make()
    content = _content(record, ("true", "neutral"), unseen=[2])
    for layer in content["passes"]["neutral"]["layers"]:
        layer |= {"probe": 0.75, "probe_unseen": 0.5}
    _put(record, content)
    text = Page(write_report([record], tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "never saw class 2" in text
    assert "50.0 % on one (75.0 % of all classes), 50.0 % on two" in text


def test_without_analyses_there_is_no_section(make: Make, tmp_path: Path) -> None:
    page = write_report([make()], tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'id="representations"' not in page


def test_likeness_is_shown_where_all_of_its_runs_are(make: Make, tmp_path: Path) -> None:
    one, two = make("backprop"), make("mono_forward")
    _put(one, _likeness(one, two), "similarity-1.json")
    text = write_report([one, two], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Centred kernel alignment" in text
    assert "Centred kernel alignment" not in write_report([one], tmp_path / "r.html").read_text(encoding="utf-8")


_LAYERS: dict[str, Any] = {
    "a matrix of another size": {"overlap": [[1]]},
    "no matrix": {"overlap": 3},
    "a number that is none": {"hoyer": "0.8"},
    "a truth for a number": {"hoyer": True},
    "a negative count": {"sizes": [-1, 0, 0]},
    "half a unit": {"sizes": [0.5, 0, 0]},
    "an endless number": {"sizes": [10**400, 0, 0]},
    "a share above one": {"never_active": 1.5},
    "another number of classes": {"hoyer_by_class": [0.1]},
    "no name": {"name": ""},
    "no map": {"map": None},
    "a map of another width": {"map": {"labels": [0], "values": [[1]]}},
    "too many columns": {"columns": [0] * 10_000},
}


@pytest.mark.parametrize("change", _LAYERS.values(), ids=_LAYERS)
def test_a_layer_that_cannot_be_is_left_out_and_said(change: dict[str, Any], make: Make, tmp_path: Path) -> None:
    record = make()
    passes = {"plain": {"counts": [5, 4, 3], "layers": [{**_layer("one"), **change}]}}
    _put(record, _content(record, passes=passes))
    text = write_report([record], tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'id="representations"' not in text
    assert f"{record.path.name}.json is left out" in text


_FILES: dict[str, Any] = {
    "no JSON": "{",
    "a list": [],
    "another format": {"format": 2},
    "not a number": '{"format": 1, "accuracy": NaN}',
    "deep": "[" * 100_000,
    "unknown pass": {"passes": {"other": {}}},
    "no pass": {"passes": {}},
    "another run": {"run": "somebody"},
    "no accuracy": {"accuracy": None},
    "no layers": {"passes": {"plain": {"counts": [1], "layers": []}}},
    "no counts": {"passes": {"plain": {"counts": [], "layers": [3]}}},
    "odd classes": {"unseen": [-1]},
    "endless classes": {"passes": {"plain": {"counts": [1] * 5000, "layers": []}}},
}


@pytest.mark.parametrize("given", _FILES.values(), ids=_FILES)
def test_a_file_that_is_no_analysis_is_left_out_and_said(given: Any, make: Make, tmp_path: Path) -> None:
    record = make()
    path = _put(record, _content(record, **given) if isinstance(given, dict) else given)
    for page in (write_report([record], tmp_path / "r.html"),):
        text = page.read_text(encoding="utf-8")
        assert 'id="representations"' not in text
        assert f"{path.name} is left out" in text
    _put(
        record,
        given if isinstance(given, str) else {"format": 1, "rows": [[record.id, "one"]], "cka": [[2, 3]]},
        path.name,
    )
    (path.parent / "similarity-x.json").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    path.unlink()
    assert "similarity-x.json is left out" in write_report([record], tmp_path / "r.html").read_text(encoding="utf-8")


def test_links_are_not_followed(make: Make, tmp_path: Path) -> None:
    record = make()
    path = _put(record, _content(record))
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    found = read_analyses([], {})
    assert found == ([], [], [])
    assert "is left out" in write_report([record], tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_large_page_stays_small(make: Make, tmp_path: Path) -> None:
    records = [make("mono_forward", seed) for seed in range(6)]
    wide = {
        **_layer("wide"),
        "units": 400,
        "columns": list(range(0, 400, 2)),
        "members": [[1] * 200] * 3,
        "profile": [[33] * 200] * 3,
    }
    wide["map"] = {"labels": sorted(list(range(3)) * 67)[:200], "values": [[12] * 200] * 200}
    for record in records:
        _put(record, _content(record, passes={"plain": {"counts": [5, 4, 3], "layers": [wide] * 40}}))
    page = write_report(records, tmp_path / "r.html")
    assert page.stat().st_size < 12_000_000
    text = page.read_text(encoding="utf-8")
    assert "Maps and matrices are not shown, to keep the page small: mono_forward, seed" in text
    assert "Of many layers 12 have charts of their own, evenly spread: mono_forward, seed 0 (40)" in text


@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH")
def test_a_browser_draws_all_of_it_and_runs_nothing_that_a_file_holds(make: Make, tmp_path: Path) -> None:
    records = [make("backprop"), make("forward_forward")]
    for record in records:
        content = _content(record, ("true", "neutral"), part=NASTY)
        for shown in content["passes"].values():
            shown["layers"][0]["name"] = NASTY
        _put(record, content)
    likeness = _likeness(*records)
    likeness["rows"][0][1] = NASTY
    _put(records[0], likeness, "similarity-1.json")
    page = write_report(records, tmp_path / "r.html", title="Safe")
    text = dom(page)
    assert "<title>Safe</title>" in text
    assert drawn(text) == placed(page)
    assert (
        text.count('class="hm"') >= 2 * (2 + 6) + 2
    )  # per run: two passes by class, three pictures of two layers; two matrices
