import json
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from locallearn.records import Record
from locallearn.report import write_report
from locallearn.statistics import bootstrap_interval

Make = Callable[..., Record]
X = "\N{MULTIPLICATION SIGN}"
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Page(HTMLParser):
    """The page as a browser's parser sees it: its elements, its visible text, its tables, its charts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._in: str | None = None
        self._cell = False
        self.feed(html)
        self.charts: list[dict[str, Any]] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._in = tag
            if tag == "script":
                self.scripts.append("")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True
        elif tag == "small" and self._cell:
            self.tables[-1][-1][-1] += " | "

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = None
        elif tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in is None:
            self.text += data
            if self._cell:
                self.tables[-1][-1][-1] += data

    def line(self, table: int, name: str) -> dict[str, str]:
        head, *lines = self.tables[table]
        (line,) = (line for line in lines if line[0].split(" | ")[0] == name)
        return dict(zip(head, line, strict=True))


@pytest.fixture
def show(tmp_path: Path) -> Callable[..., Page]:
    def run(records: Sequence[Record], **options: Any) -> Page:
        return Page(write_report(records, tmp_path / "out" / "report.html", **options).read_text(encoding="utf-8"))

    return run


def test_the_headline_holds_means_spreads_and_paired_ratios(make: Make, show: Callable[..., Page]) -> None:
    page = show([make(a, seed) for a in ("mono_forward", "backprop") for seed in (0, 1, 2)])
    assert [line[0] for line in page.tables[0]] == ["Rule", "backprop", "mono_forward"]
    line = page.line(0, "mono_forward")
    assert line["Seeds"] == "3"
    assert line["Test accuracy | %"] == f"98.10 ± 0.10 | 1.000{X}"
    # 45·(1, 1.02, 1.04) and 2300·(1, 1.02, 1.04) against 60 and 3000 with the same factors
    assert line["Training time | s"] == f"45.9 ± 0.9 | 0.750{X}"
    assert line["Energy, nvml, measured | kJ"] == f"2.35 ± 0.05 | 0.767{X}"
    assert line["Energy, model, modelled | kJ"] == f"2.30 | 0.767{X}"
    assert line["Update FLOPs | GFLOP"] == f"5.60 | 0.691{X}"
    assert line["Peak activations | MiB"] == f"{4_900_000 / 2**20:.2f} | 0.345{X}"
    assert page.line(0, "backprop")["Training time | s"] == "61.2 ± 1.2"
    assert "mode: own" in page.text


def test_every_chart_has_a_place_a_name_and_its_numbers(make: Make, show: Callable[..., Page]) -> None:
    page = show([make(a, seed) for a in ("mono_forward", "backprop") for seed in (0, 1, 2)])
    places = [attrs for tag, attrs in page.tags if "data-chart" in attrs]
    assert [int(str(place["data-chart"])) for place in places] == list(range(len(page.charts)))
    assert all(place["role"] == "img" and place["aria-label"] for place in places)
    # 2 cost, 5 paired, 1 memory, 1 accuracy, 2 rules x 2 block charts; and as many tables, one headline, one of runs
    assert len(page.charts) == 13
    assert len(page.tables) == 15
    for chart in page.charts:
        assert any(trace["x"] for trace in chart["data"])


def test_points_and_intervals_are_those_of_the_statistics(make: Make, show: Callable[..., Page]) -> None:
    page = show([make(a, seed) for a in ("mono_forward", "backprop") for seed in (0, 1, 2, 3)])
    energy = page.charts[0]
    assert energy["layout"]["xaxis"]["title"]["text"] == "Energy, nvml, measured (kJ)"  # not the modelled source
    (mean,) = [t for t in energy["data"] if t["name"] == "mono_forward" and "text" in t]
    joules = [2300 * (1 + seed / 50) for seed in range(4)]
    interval = bootstrap_interval(joules)
    assert interval is not None
    x = sum(joules) / 4000
    assert mean["x"] == pytest.approx([x])
    assert mean["error_x"]["array"] == pytest.approx([interval[1] / 1000 - x])
    assert mean["error_x"]["arrayminus"] == pytest.approx([x - interval[0] / 1000])
    (front,) = [t for t in energy["data"] if t["name"] == "Pareto front"]
    assert front["x"] == pytest.approx([x])  # the cheaper rule is as good, so backprop is not on the front
    difference = page.charts[2]
    assert [t["y"] for t in difference["data"]] == [["mono_forward"]]
    assert difference["data"][0]["x"] == pytest.approx([0.0])


def test_blocks_are_drawn_in_the_networks_order_and_epochs_are_means(make: Make, show: Callable[..., Page]) -> None:
    page = show([make("mono_forward", seed, epochs=3 + seed, blocks=["b", "a"]) for seed in (0, 1)])
    loss, probe = page.charts[-2:]
    assert [trace["name"] for trace in loss["data"]] == ["b", "a"]
    assert loss["data"][0]["x"] == [0, 1, 2, 3]
    assert loss["data"][0]["y"] == [1.0, 0.5, pytest.approx(1 / 3, rel=1e-4), 0.25]
    assert probe["data"][0]["y"][0] == pytest.approx(63.212)


def test_nothing_a_record_holds_becomes_markup(make: Make, show: Callable[..., Page]) -> None:
    wild = [make(NASTY, 0, dataset=NASTY, net=NASTY, mode=NASTY, variant=NASTY, locality=NASTY, command=NASTY)]
    energy = [{"source": NASTY, "quality": NASTY, "joules": 1.0, "reason": NASTY, "flags": [NASTY]}]
    extra = {"config": {NASTY: NASTY}, "versions": {NASTY: NASTY}, "hardware": {NASTY: [NASTY]}, "notes": [NASTY]}
    wild += [make("backprop", 0, energy=energy, blocks=[NASTY], **extra), make(NASTY, 1, status="failed", error=NASTY)]
    page = show(wild, title=NASTY, problems=[NASTY])
    plain = show([make("mono_forward", 0), make("backprop", 0)])
    known = {tag for tag, _ in plain.tags} | {"nav", "ul", "li", "a"}
    assert {tag for tag, _ in page.tags} <= known
    assert len(page.scripts) == len(plain.scripts) == 3
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert NASTY in page.text  # shown, as text
    assert "<" not in page.scripts[0]  # not even Plotly's own <b> could end the element
    labels = json.dumps(page.charts)
    assert "<img" not in labels  # Plotly reads markup in labels
    assert "&lt;img" in labels


def test_the_page_fetches_nothing(make: Make, tmp_path: Path) -> None:
    text = write_report([make()], tmp_path / "r.html").read_text()
    page = Page(text)
    assert not [attrs for _, attrs in page.tags if {"src", "srcset", "data"} & set(attrs)]
    assert not [attrs for tag, attrs in page.tags if tag == "link"]
    assert all(str(attrs["href"]).startswith("#") for tag, attrs in page.tags if tag == "a")
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert text.count("plotly.js v") == 1


def test_no_records_is_a_page_that_says_so(show: Callable[..., Page]) -> None:
    page = show([], problems=["runs/x/record.json cannot be read; the record is damaged."])
    assert "No records were found." in page.text
    assert "runs/x/record.json cannot be read" in page.text
    assert page.charts == []


def test_missing_meters_one_seed_failures_and_other_schemas(make: Make, show: Callable[..., Page]) -> None:
    reason = "No NVIDIA driver is loaded."
    silent = [{"source": "nvml", "quality": "measured", "joules": None, "reason": reason}]
    mute = {"energy": silent, "cost": {"train_s": 1, "energy_j": {"nvml": None, "model": None}}}
    future = make("new_rule", 0)
    strange = {**future.data, "schema": 99, "cost": "free", "energy": {"x": 1}, "test": [], "config": 3, "blocks": 1}
    records = [
        make("mono_forward", 0, **mute),
        make("backprop", 4, status="failed"),
        make("b", 1, status="interrupted"),
    ]
    page = show([*records, Record(future.path, strange)])
    assert "No meter gave joules" in page.text
    assert f"No joules from nvml: {reason}" in page.text
    assert "One seed only" in page.text
    assert "There is no backprop run here" in page.text
    assert "Block a diverged at step 7." in page.text
    assert "interrupted" in page.text
    assert "1 record of another schema" in page.text
    assert [line[0] for line in page.tables[0]] == ["Rule", "mono_forward", "new_rule"]
    assert not any("Energy" in name for name in page.tables[0][0])


def test_a_very_large_page_stays_small_and_says_what_it_leaves_out(make: Make, show: Callable[..., Page]) -> None:
    blocks = [f"block {i}" for i in range(200)]
    page = show([make("mono_forward", 0, dataset=f"d{i}", blocks=blocks, epochs=1) for i in range(5)])
    assert "The curves per block of 3 of 5 rules" in page.text
    assert sum(len(chart["data"]) == 200 for chart in page.charts) == 4


def test_damaged_metrics_are_named_and_the_rest_is_shown(make: Make, show: Callable[..., Page]) -> None:
    record = make()
    (record.path / "metrics.csv").write_text("epoch,step,name,value\nx,y,z\n")
    page = show([record])
    assert "line 2 of" in page.text
    assert page.line(0, "mono_forward")["Seeds"] == "1"


def test_a_diverged_curve_has_a_gap_not_a_number(make: Make, show: Callable[..., Page]) -> None:
    record = make()
    (record.path / "metrics.csv").write_text(
        "epoch,step,name,value\n0,1,block/a/loss,1.0\n1,2,block/a/loss,nan\n2,3,block/a/loss,inf\n3,4,block/a/loss,\n"
    )
    assert show([record]).charts[-1]["data"][0]["y"] == [1.0]


def test_flags_of_a_meter_are_counted_not_repeated(make: Make, show: Callable[..., Page]) -> None:
    def run(seed: int) -> Record:
        flag = f"the window of {seed} s is short"
        return make(seed=seed, energy=[{"source": "m", "quality": "modelled", "joules": 1.0, "flags": [flag, "other"]}])

    page = show([run(1), run(2)])
    assert "Joules from m: 2 runs flagged, e.g. the window of 1 s is short" in page.text
    assert "window of 2 s" not in page.text


def test_losses_stand_last(make: Make, show: Callable[..., Page]) -> None:
    page = show([make(test={"loss": 0.1, "accuracy": 0.9})])
    assert page.tables[0][0][2] == "Test accuracy | %"
    assert page.tables[0][0][-1] == "Test loss"


def test_runs_of_different_machines_are_pointed_out(make: Make, show: Callable[..., Page]) -> None:
    page = show([make("mono_forward", 0, hardware={"cpu": "a"}), make("mono_forward", 1, hardware={"cpu": "b"})])
    assert "2 machines" in page.text


def test_sections_for_every_data_set_net_and_mode(make: Make, show: Callable[..., Page]) -> None:
    page = show(
        [make(), make(dataset="mnist"), make(net="cnn"), make(mode="target", target={"accuracy": 0.9, "seconds": 5})]
    )
    anchors = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert len(anchors) == 4
    assert [str(attrs["href"])[1:] for tag, attrs in page.tags if tag == "a"][1:] == anchors
    heads = [table[0] for table in page.tables if "Time to target | s" in table[0]]
    assert len(heads) == 1
    assert "Target accuracy | %" in heads[0]


def test_the_same_records_give_the_same_page_and_an_older_one_is_replaced_whole(make: Make, tmp_path: Path) -> None:
    records, out = [make()], tmp_path / "r.html"
    out.write_text("older")
    first = write_report(records, out).read_text()
    assert first == write_report(records, tmp_path / "again.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"r.html", "again.html", "runs"}
    with pytest.raises(ValueError, match="is a folder"):
        write_report(records, tmp_path)
