import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from locallearn.records import COST_COLUMNS, Record
from locallearn.report import _library, write_report
from locallearn.statistics import compare_table

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


def unpacked(page: Page) -> str:
    """Plotly's script as the page's own script unpacks it, which the policy allows."""
    script = gzip.decompress(base64.b64decode(page.scripts[1])).decode()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert f"'sha256-{digest}'" in str(policy)
    return script


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


def test_flops_that_lack_something_are_marked_and_what_is_zero_is_shown(make: Make, show: Callable[..., Page]) -> None:
    cost = {"train_s": 1.0, "train_flops": 4e9, "update_flops": 2e6, "once_flops": 0.0, "cache_bytes": 0}
    lacking = cost | {"uncounted": ["aten._fft_c2c"]}
    page = show(
        [make(a, seed, cost=c) for a, c in (("mono_forward", lacking), ("backprop", cost)) for seed in (0, 1, 2)]
    )
    line = page.line(0, "mono_forward")
    assert line["Training FLOPs | GFLOP"].startswith("\N{GREATER-THAN OR EQUAL TO} 4.00")
    assert line["FLOPs done once | FLOP"].startswith("\N{GREATER-THAN OR EQUAL TO} 0")
    assert "aten._fft_c2c" in page.text


def test_every_chart_has_a_place_a_name_and_its_numbers(make: Make, show: Callable[..., Page]) -> None:
    page = show([make(a, seed) for a in ("mono_forward", "backprop") for seed in (0, 1, 2)])
    places = [attrs for tag, attrs in page.tags if "data-chart" in attrs]
    assert [int(str(place["data-chart"])) for place in places] == list(range(len(page.charts)))
    assert all(place["role"] == "img" and place["aria-label"] for place in places)
    # 3 cost, 5 paired, 1 memory, 1 energy, 1 accuracy, 2 charts of blocks for 2 rules and for each of their 3 runs; and as many
    # tables, one headline, one of runs
    assert len(page.charts) == 11 + 2 * 2 * (1 + 3)
    assert len(page.tables) == len(page.charts) + 2
    for chart in page.charts:
        assert any(trace["x"] for trace in chart["data"])


def test_points_and_intervals_are_those_of_the_statistics(make: Make, show: Callable[..., Page]) -> None:
    page = show([make(a, seed) for a in ("mono_forward", "backprop") for seed in (0, 1, 2, 3)])
    energy = page.charts[0]
    assert energy["layout"]["xaxis"]["title"]["text"] == "Energy, nvml, measured (kJ)"  # not the modelled source
    (mean,) = [t for t in energy["data"] if t["name"] == "mono_forward" and "text" in t]
    joules = [2300 * (1 + seed / 50) for seed in range(4)]
    logs = [math.log(value / 1000) for value in joules]
    ends = scipy.stats.t.interval(0.95, 3, loc=sum(logs) / 4, scale=scipy.stats.sem(logs))
    interval = [1000 * math.exp(end) for end in ends]
    x = math.exp(sum(logs) / 4)
    assert mean["x"] == pytest.approx([x])
    assert mean["error_x"]["array"] == pytest.approx([interval[1] / 1000 - x])
    assert mean["error_x"]["arrayminus"] == pytest.approx([x - interval[0] / 1000])
    (front,) = [t for t in energy["data"] if t["name"] == "Pareto front"]
    assert front["x"] == pytest.approx([x])  # the cheaper rule is as good, so backprop is not on the front
    difference = page.charts[3]
    assert [t["y"] for t in difference["data"]] == [["mono_forward"]]
    assert difference["data"][0]["x"] == pytest.approx([0.0])


def test_blocks_are_drawn_in_the_networks_order_and_epochs_are_means(make: Make, show: Callable[..., Page]) -> None:
    page = show([make("mono_forward", seed, logged=3 + seed, blocks=["b", "a"]) for seed in (0, 1)])
    loss, probe = page.charts[-6:-4]  # behind them those of either run
    assert [trace["name"] for trace in loss["data"]] == ["b", "a"]
    assert loss["data"][0]["x"] == [0, 1, 2]  # that both seeds reached
    assert loss["data"][0]["y"] == [1.0, 0.5, pytest.approx(1 / 3, rel=1e-4)]
    assert probe["data"][0]["y"][0] == pytest.approx(63.212)


def test_nothing_a_record_holds_becomes_markup(make: Make, show: Callable[..., Page]) -> None:
    wild = [make(NASTY, 0, dataset=NASTY, net=NASTY, mode=NASTY, variant=NASTY, locality=NASTY, command=NASTY)]
    energy = [{"source": NASTY, "quality": NASTY, "joules": 1.0, "reason": NASTY, "flags": [NASTY]}]
    extra = {"config": {NASTY: NASTY}, "versions": {NASTY: NASTY}, "hardware": {NASTY: [NASTY]}, "notes": [NASTY]}
    wild += [make("backprop", 0, energy=energy, blocks=[NASTY], **extra), make(NASTY, 1, status="failed", error=NASTY)]
    page = show(wild, title=NASTY, problems=[NASTY])
    plain = show([make("mono_forward", 0), make("backprop", 0)])
    known = {tag for tag, _ in plain.tags} | {"nav", "ul", "li", "a", "b"}
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
    links = {str(attrs["href"]) for tag, attrs in page.tags if tag == "a"}
    (folder,) = {
        link for link in links if not link.startswith("#")
    }  # nothing but the way to the run, which needs a click
    assert (tmp_path / folder / "record.json").is_file()
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "plotly.js v" not in text
    assert unpacked(page).count("plotly.js v") == 1


def test_the_page_holds_no_address_and_names_its_buttons(make: Make, tmp_path: Path) -> None:
    """Nothing can be sent anywhere or asked for, by whichever button: Plotly's script knows of no place."""
    text = write_report(
        [make(a, s) for a in ("mono_forward", "backprop") for s in (0, 1, 2)], tmp_path / "r.html"
    ).read_text()
    text += unpacked(Page(text))
    assert not re.findall(r"\b(?:https?|wss?|ftp):(?://|\\/\\/).{0,40}", text)
    assert not re.findall(r"""["'`(=]\s*//[a-z0-9-]+\.[a-z]{2,}""", text)
    assert text.count("http:\\u002f\\u002fwww.w3.org/2000/svg") > 1  # names of namespaces are no addresses, and needed
    (settings,) = re.findall(r"modeBarButtons: (.*)\}\);", text)
    buttons = {name for group in json.loads(settings) for name in group}
    assert buttons == {"toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"}
    assert 'plotlyServerURL: ""' in text


def test_an_address_in_plotly_of_any_kind_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """a="https://x.org/a";b='http://www.w3.org/2000/svg';c="wss://y";d="https:\\/\\/z";e="https:"""
    monkeypatch.setattr(_library, "get_plotlyjs", lambda: script)
    _library.plotly.cache_clear()
    wanted = """a="about:blank#x.org/a";b='http:\\u002f\\u002fwww.w3.org/2000/svg';"""
    wanted += """c="about:blank#y";d="about:blank#z";e="https:"""
    assert _library.plotly() == wanted
    _library.plotly.cache_clear()


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
    # Rules of which nothing finished have a row that says so.
    assert [line[:2] for line in page.tables[0]] == [
        ["Rule", "Seeds"],
        ["backprop", "0 of 1"],
        ["b", "0 of 1"],
        ["mono_forward", "1"],
        ["new_rule", "1"],
    ]
    assert not any("Energy" in name for name in page.tables[0][0])


def test_a_very_large_page_stays_small_and_says_what_it_leaves_out(make: Make, show: Callable[..., Page]) -> None:
    blocks = [f"block {i}" for i in range(200)]
    page = show([make("mono_forward", 0, dataset=f"d{i}", blocks=blocks, logged=1) for i in range(5)])
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


def test_a_machine_is_what_costs_are_paired_on(make: Make, show: Callable[..., Page]) -> None:
    """A new kernel makes no other one of it, and its processor is another one than its card."""
    here: dict[str, Any] = {"cpu": "a", "gpus": ["a card"], "os": "Linux 6.1"}
    assert "machines" not in show([make(hardware=here), make(seed=1, hardware=here | {"os": "Linux 6.2"})]).text
    page = show([make(hardware=here), make(seed=1, hardware=here, config={"trainer": {"accelerator": "cpu"}})])
    assert "The runs come from 2 machines, or uses of one (device, cores, threads, workers)" in page.text


def test_sections_for_every_data_set_net_and_mode(make: Make, show: Callable[..., Page]) -> None:
    page = show(
        [make(), make(dataset="mnist"), make(net="cnn"), make(mode="target", target={"accuracy": 0.9, "seconds": 5})]
    )
    anchors = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert len(anchors) == 4
    linked = [str(attrs["href"]) for tag, attrs in page.tags if tag == "a"]
    assert [link[1:] for link in linked if re.fullmatch(r"#s\d", link)] == anchors
    # Each of them has its line at first glance.
    assert [line[0].split(" | ")[0] for line in page.tables[0][1:]] == [
        *("digits · cnn", "digits · mlp", "digits · mlp", "mnist · mlp")
    ]
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


# -- what the numbers rest on -----------------------------------------------------------------------------------------
def test_intervals_and_tests_stand_below_the_paired_charts(make: Make, show: Callable[..., Page]) -> None:
    accuracies = {"backprop": (0.90, 0.91, 0.92, 0.93, 0.94), "x": (0.95, 0.965, 0.97, 0.98, 0.99)}
    accuracies["y"] = (0.89, 0.92, 0.92, 0.92, 0.95)
    page = show([make(a, s, test={"accuracy": v}) for a, of in accuracies.items() for s, v in enumerate(of)])
    (table,) = [t for t in page.tables if t[0][2].startswith("Difference to backprop")]
    assert table[0] == [
        *("Rule", "Pairs", "Difference to backprop (percentage points)", "95 % interval"),
        *("Sign-flip p", "Smallest possible p", "p after Holm"),
    ]
    differences = [100 * (a - b) for a, b in zip(accuracies["x"], accuracies["backprop"], strict=True)]
    lo, hi = scipy.stats.t.interval(0.95, 4, loc=sum(differences) / 5, scale=scipy.stats.sem(differences))
    assert table[1] == ["x", "5", "+5.10", f"[{lo:+.2f}, {hi:+.2f}]", "0.063", "0.063", "0.13"]
    assert table[2][4:] == ["1", "0.063", "1"]
    (flops,) = [
        t for t in page.tables if t[0][:3] == ["Rule", "Pairs", "Ratio to backprop"] and t[1][2] == f"0.691{X}"
    ][:1]
    assert flops[1][3:] == [f"[0.691{X}, 0.691{X}]", *3 * ["\N{EN DASH}"]]  # a count: no sample of anything
    two = show([make(a, s) for a in ("x", "backprop") for s in (0, 1)])
    assert "Two seeds only, so no interval: backprop, x." in two.text
    assert "none, n = 2" in {cell for table in two.tables for line in table for cell in line}


def test_the_front_declares_nobody_beaten_within_the_intervals(make: Make, show: Callable[..., Page]) -> None:
    """b is dearer and worse than a beyond any doubt, c within it, d has too few seeds, e lost one."""
    spread = (-0.01, 0.0, 0.01)

    def runs(name: str, seconds: float, accuracy: float, width: float) -> list[Record]:
        return [
            make(
                name,
                seed,
                energy=[],
                cost={"train_s": seconds * (1 + width * d)},
                test={"accuracy": accuracy + width * d},
            )
            for seed, d in enumerate(spread)
        ]

    records = [*runs("a", 10.0, 0.9, 0.1), *runs("b", 20.0, 0.8, 0.1), *runs("c", 10.01, 0.899, 2.0)]
    records += [*runs("d", 30.0, 0.7, 0.1)[:2], *runs("e", 5.0, 0.95, 0.1)]
    page = show([*records, make("e", 3, status="failed")])
    (table,) = [table for table in page.tables if table[0][-1] == "Pareto front"]
    assert {line[0]: line[-1] for line in table[1:]} == {
        "a": "on it",
        "b": "beaten beyond the intervals",
        "c": "not beaten beyond the intervals",
        "d": "cannot be told: no interval",
        "e": "not placed: not every seed finished",
    }
    (time,) = [c for c in page.charts if "Training time" in c["layout"]["xaxis"].get("title", {}).get("text", "")]
    assert [t["x"] for t in time["data"] if t["name"] == "Pareto front"] == [pytest.approx([10.0], rel=1e-3)]
    open_ones = {t["name"] for t in time["data"] if "text" in t and t["marker"]["symbol"].endswith("-open")}
    assert open_ones == {"d", "e"}


def test_means_and_ratios_over_other_seeds_say_so(make: Make, show: Callable[..., Page]) -> None:
    page = show([*(make("x", s) for s in range(5)), *(make("backprop", s) for s in range(1, 4))])
    assert page.line(0, "x")["Training time | s"] == f"46.8 ± 1.4 | 0.750{X} (of 3 pairs)"
    assert "x: paired with backprop over 3 of its 5 seeds; means are over all" in page.text
    other = [make("backprop", seed, hardware={"cpu": "a"}) for seed in range(3)]
    other += [make("x", seed, hardware={"cpu": "b" if seed else "a"}) for seed in range(3)]
    told = "(Training time, Energy, model, modelled, Energy, nvml, measured); means are over all"
    assert f"x: paired with backprop over 1 of its 3 seeds {told}" in show(other).text  # in accuracy over all of them


def test_a_little_is_not_told_as_nothing(make: Make, show: Callable[..., Page]) -> None:
    """Beside 400 MiB, a third of one would round to none."""
    page = show(
        [
            make("backprop", cost={"activation_peak_bytes": 400 << 20}),
            make("x", cost={"activation_peak_bytes": 1 << 18}),
        ]
    )
    assert page.line(0, "x")["Peak activations | MiB"].startswith("0.2 |")
    assert page.line(0, "backprop")["Peak activations | MiB"] == "400"


def test_who_did_not_arrive_and_what_failed_stand_in_the_row(make: Make, show: Callable[..., Page]) -> None:
    def run(name: str, seed: int, seconds: float | None, **values: Any) -> Record:
        reached = {} if seconds is None else {"seconds": seconds, "joules": {"nvml": 5 * seconds}}
        return make(name, seed, mode="target", target={"accuracy": 0.97, **reached}, **values)

    records = [run("backprop", seed, 50.0 + seed) for seed in range(3)]
    records += [run("x", 0, 10.0), run("x", 1, None), run("x", 2, None)]
    config = {"compare": {"target": 0.97}}
    records += [run("y", 0, 9.0), run("y", 1, 9.0), make("y", 2, mode="target", status="failed", config=config)]
    page = show(records)
    assert "mode: target 0.97" in page.text
    base, x, y = (page.line(0, name) for name in ("backprop", "x", "y"))
    assert base["Time to target | s"] == "51.0 ± 1.0 | 3 of 3 reached"
    assert x["Time to target | s"] == "≥ 34.2 | 1 of 3 reached"  # (10 + 45.9 + 46.8) / 3
    assert x["Training time | s"] == "45.9 ± 0.9"  # no ratio
    assert (y["Seeds"], y["Time to target | s"]) == ("2 of 3", "≥ 9.0 | 2 of 3 reached")
    assert "3 of 3 reached" in base["Energy to target, nvml, measured | J"]
    assert "y: Seed 2: failed: Block a diverged at step 7." in page.text


def test_incomplete_counts_are_marked(make: Make, show: Callable[..., Page]) -> None:
    page = show([make("x", 0, cost={"update_flops": 5e9, "uncounted": ["aten::lstm"]}), make("backprop", 0)])
    assert page.line(0, "x")["Update FLOPs | GFLOP"] == "≥ 5.00"
    assert "x: FLOPs are incomplete, for want of a formula for aten::lstm." in page.text


def test_every_cost_column_has_a_heading_of_its_own(make: Make, show: Callable[..., Page]) -> None:
    (record,) = [make("x", 0, energy=[])]
    headings = [
        show([Record(record.path, {**record.data, "test": {}, "cost": {name: 3.0}})]).tables[0][0][2:]
        for name in COST_COLUMNS
    ]
    assert [len(heading) for heading in headings] == [1] * len(COST_COLUMNS)
    assert len({heading for (heading,) in headings}) == len(COST_COLUMNS)


# -- figures other than accuracy --------------------------------------------------------------------------------------
MSE = {"task": "reconstruction", "net": "autoencoder", "metric": {"name": "mse", "maximise": False}}
AUC = {"task": "link_prediction", "metric": {"name": "auc", "maximise": True}}


def _mse(make: Make, algorithm: str, seed: int, error: float, **values: Any) -> Record:
    curves = {"validation/mse": [4 * error, 2 * error, error], "validation/loss": [4 * error, 2 * error, error]}
    return make(algorithm, seed, curves=curves, test={"mse": error, "loss": error}, **(MSE | values))


def test_a_metric_that_should_be_small_is_the_headline_with_four_digits(make: Make, show: Callable[..., Page]) -> None:
    page = show([_mse(make, a, s, e + s / 1000) for a, e in (("backprop", 0.01), ("x", 0.02)) for s in (0, 1)])
    assert page.tables[0][0][2] == "Test MSE | lower is better"
    assert page.tables[0][0][-1] == "Test loss"
    assert page.line(0, "x")["Test MSE | lower is better"] == f"0.02050 ± 0.00071 | 1.954{X}"  # √(2 · 21/11)
    assert "ccuracy" not in page.text
    assert "digits · autoencoder · reconstruction" in page.text
    assert "MSE against cost" in page.text
    assert "Validation MSE over epochs" in page.text
    assert "Test MSE: difference to backprop" in page.text
    assert "Lower is better: left of the line a rule beats backprop." in page.text
    cost, difference = page.charts[0], page.charts[3]
    assert cost["layout"]["yaxis"]["title"]["text"] == "Test MSE (lower is better)"
    assert difference["data"][0]["x"] == pytest.approx([0.01])
    (line,) = [c for c in page.charts if c["layout"]["yaxis"].get("title", {}).get("text", "").startswith("validation")]
    assert line["layout"]["yaxis"]["title"]["text"] == "validation MSE (lower is better)"
    (mean,) = [trace for trace in line["data"] if trace.get("name") == "x"]
    assert mean["y"] == pytest.approx([0.082, 0.041, 0.0205])
    (table,) = [table for table in page.tables if table[0] == ["Epoch", "backprop", "x"]]
    assert table[1:] == [["0", "0.042", "0.082"], ["1", "0.021", "0.041"], ["2", "0.0105", "0.0205"]]


def test_the_front_follows_the_direction_of_the_metric(make: Make, show: Callable[..., Page]) -> None:
    """Training takes 1, 2, 3, 4 s. Of errors the front has those that fall, of shares those that rise."""

    def front(make_one: Callable[[str, float, float], Record]) -> Any:
        values = ((1.0, 0.3), (2.0, 0.4), (3.0, 0.2), (4.0, 0.6))
        page = show([make_one(f"rule{i}", seconds, value) for i, (seconds, value) in enumerate(values)])
        (time,) = [c for c in page.charts if "Training time" in c["layout"]["xaxis"].get("title", {}).get("text", "")]
        (line,) = [trace for trace in time["data"] if trace["name"] == "Pareto front"]
        return line["x"], line["y"]

    def small(name: str, seconds: float, value: float) -> Record:
        return _mse(make, name, 0, value, cost={"train_s": seconds}, energy=[])

    def large(name: str, seconds: float, value: float) -> Record:
        return make(name, 0, test={"auc": value}, cost={"train_s": seconds}, energy=[], **AUC)

    assert front(small) == ([1.0, 3.0], pytest.approx([0.3, 0.2]))
    assert front(large) == ([1.0, 2.0, 4.0], pytest.approx([30.0, 40.0, 60.0]))


def test_an_area_under_a_curve_is_a_percentage(make: Make, show: Callable[..., Page]) -> None:
    def run(algorithm: str, seed: int, area: float) -> Record:
        return make(algorithm, seed, test={"auc": area, "accuracy": 0.5}, curves={"validation/auc": [0.5, area]}, **AUC)

    page = show([run(a, s, e + s / 100) for a, e in (("backprop", 0.9), ("x", 0.93)) for s in (0, 1)])
    assert page.tables[0][0][2:4] == ["Test AUC | %", "Test accuracy | %"]
    assert page.line(0, "x")["Test AUC | %"].startswith("93.50 ± 0.71")
    assert "Test AUC: difference to backprop (percentage points)" in page.text
    assert "Lower is better" not in page.text
    (line,) = [c for c in page.charts if c["layout"]["yaxis"].get("title", {}).get("text") == "validation AUC (%)"]
    assert [trace["y"] for trace in line["data"] if trace.get("name") == "x"] == [pytest.approx([50.0, 93.5])]


def test_the_target_is_named_after_the_metric(make: Make, show: Callable[..., Page]) -> None:
    page = show([_mse(make, "x", 0, 0.01, mode="target", target={"mse": 0.02, "seconds": 3.0})])
    assert page.line(0, "x")["Target MSE | lower is better"] == "0.02000"
    assert "Cost until validation MSE first reaches the stated target." in page.text


def test_records_without_a_metric_are_judged_by_accuracy(make: Make, show: Callable[..., Page]) -> None:
    old = [make("x", 0), make("backprop", 0)]
    new = [Record(r.path, {**r.data, "metric": {"name": "accuracy", "maximise": True}}) for r in old]
    assert show(old).charts == show(new).charts
    for odd in ("mse", {}, {"name": ""}, {"name": 3}, [1], None):
        assert Record(old[0].path, {**old[0].data, "metric": odd}).metric == ("accuracy", True)
    assert Record(old[0].path, {**old[0].data, "metric": {"name": "f1"}}).metric == ("f1", True)


def test_tasks_on_the_same_data_and_network_do_not_mix(make: Make, show: Callable[..., Page]) -> None:
    same = {"net": "gcn"}
    records = [make("x", s, task="classification", **same) for s in (0, 1)]
    records += [_mse(make, "x", s, 0.02, **same) for s in (0, 1)]
    records += [_mse(make, "backprop", s, 0.01, **same) for s in (0, 1)]
    rows = compare_table(records)
    assert [(row.task, row.algorithm, len(row.records), row.notes) for row in rows] == [
        ("classification", "x", 2, ()),
        ("reconstruction", "backprop", 2, ()),
        ("reconstruction", "x", 2, ()),
    ]
    assert all(figure.paired is None for figure in rows[0].figures.values())  # no baseline of its own task
    assert rows[2].figures["test/mse"].paired is not None
    page = show(records)
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == ["s0", "s1"]
    first, second = (table for table in page.tables if table[0][:2] == ["Rule", "Seeds"] and "Parameters" in str(table))
    assert (first[0][2], second[0][2]) == ("Test accuracy | %", "Test MSE | lower is better")
    assert not any("MSE" in cell for cell in first[0])


# -- figures of every layer -------------------------------------------------------------------------------------------
def test_figures_of_layers_have_a_chart_each_with_the_latest_values_below(
    make: Make, show: Callable[..., Page]
) -> None:
    def run(seed: int) -> Record:
        angles = {f"layer/{name}/weight_angle": [90.0 - seed, 60.0 + i - seed] for i, name in enumerate(("b.0", "a"))}
        return make("x", seed, curves={"validation/accuracy": [0.5, 0.6], **angles, "layer/a/norm_ratio": [0.5]})

    page = show([run(0), run(2)])
    angle, ratio = page.charts[-6:-4]  # behind them those of either run
    assert [(t["name"], t["y"]) for t in page.charts[-2]["data"]] == [("b.0", [88.0, 58.0]), ("a", [88.0, 59.0])]
    assert "Alignment" in page.text
    assert "x: weight angle per layer" in page.text
    assert angle["layout"]["yaxis"]["title"]["text"] == "weight angle (degrees)"
    assert [(t["name"], t["x"], t["y"]) for t in angle["data"]] == [
        ("b.0", [0, 1], [89.0, 59.0]),
        ("a", [0, 1], [89.0, 60.0]),
    ]
    assert ratio["layout"]["yaxis"]["title"]["text"] == "norm ratio"
    tables = [table for table in page.tables if table[0][0] == "Layer"]
    assert tables[0] == [["Layer", "Epoch", "Weight angle (degrees)"], ["b.0", "1", "59"], ["a", "1", "60"]]
    assert tables[1] == [["Layer", "Epoch", "Norm ratio"], ["a", "0", "0.5"]]
    assert "Alignment" not in show([make()]).text


def test_layers_and_metrics_with_markup_in_their_names_stay_text(make: Make, show: Callable[..., Page]) -> None:
    nasty = NASTY.replace("/", "|")
    record = make(
        "x",
        curves={f"layer/{nasty}/{nasty}": [1.0], f"validation/{nasty}": [1.0]},
        test={nasty: 1.0},
        metric={"name": nasty, "maximise": False},
        mode="target",
        picture=PNG,
        task=nasty,
    )
    page = show([record])
    assert len(page.scripts) == 3
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert "<" not in page.scripts[0]
    assert "<img" not in json.dumps(page.charts)
    assert "&lt;img" in json.dumps(page.charts)


def test_layers_are_left_out_of_a_very_large_page_with_the_blocks(make: Make, show: Callable[..., Page]) -> None:
    curves = {f"layer/{i}/weight_angle": [45.0] for i in range(600)}
    page = show([make(f"rule{i}", curves=curves) for i in range(3)])
    assert "The curves per block of 2 of 3 rules" in page.text
    assert sum(len(chart["data"]) == 600 for chart in page.charts) == 1


# -- pictures ---------------------------------------------------------------------------------------------------------
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def _images(page: Page) -> list[dict[str, str | None]]:
    return [attrs for tag, attrs in page.tags if tag == "img"]


def test_the_newest_run_of_every_rule_shows_its_reconstructions(make: Make, show: Callable[..., Page]) -> None:
    records = [_mse(make, "x", seed, 0.01, picture=PNG + bytes([seed])) for seed in (2, 0, 1)]  # the last one is newest
    records += [_mse(make, "x", 5, 0.01), _mse(make, "backprop", 0, 0.01, picture=PNG), _mse(make, "y", 0, 0.02)]
    page = show(records)
    assert "Reconstructions" in page.text
    first, second = _images(page)
    for image, label, content in ((first, "backprop, seed 0", PNG), (second, "x, seed 1", PNG + b"\1")):
        assert str(image["alt"]).startswith(f"Reconstructions by {label}: ")
        assert label in page.text
        head, _, data = str(image["src"]).partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == content
    assert not _images(show([make()]))


def test_a_picture_that_is_none_or_too_large_is_left_out_by_name(make: Make, show: Callable[..., Page]) -> None:
    big = PNG + bytes(900_000)
    records = [_mse(make, "a", 0, 0.01, picture=b"<svg/>"), _mse(make, "b", 0, 0.01, picture=big)]
    records += [_mse(make, "c", 0, 0.01, picture=big), _mse(make, "d", 0, 0.01, picture=PNG)]
    page = show(records)
    alts = [str(image["alt"]) for image in _images(page)]
    assert [re.findall("by (.), seed 0", alt) for alt in alts] == [["b"], ["d"]]
    assert "reconstructions.png is not a PNG picture." in page.text
    assert "The reconstructions of 1 of 4 rules, to keep the page small" in page.text


def test_a_page_says_which_weights_a_run_began_with(make: Make, tmp_path: Path) -> None:
    begun = make("backprop", 0, beginning={"run": "the-body", "weights": "0123456789abcdef" * 4, "drawn": None})
    drawn = make("backprop", 1)
    text = write_report([begun, drawn], tmp_path / "r.html").read_text(encoding="utf-8")
    told = text.partition("Weights that training began with")[2].partition("</details>")[0]
    assert f"<li>{begun.id}: the-body (01234567)</li>" in told
    assert drawn.id not in told
    assert "Weights that training began with" not in write_report([drawn], tmp_path / "r.html").read_text(
        encoding="utf-8"
    )
