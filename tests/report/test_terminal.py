import io
import re
from collections.abc import Callable, Sequence

from rich.console import Console

from locallearn.records import Record
from locallearn.report import comparison_table, figures_table, terminal_table
from locallearn.tables import render

Make = Callable[..., Record]


def printed(records: Sequence[Record], width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(terminal_table(records, width))
    return out.getvalue()


def cells(text: str, name: str) -> tuple[list[str], list[str]]:
    """The figures on the line of a rule, and those on the line below it."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    at = next(i for i, line in enumerate(lines) if line[0] == name)
    return lines[at][1:], lines[at + 1]


def test_the_table_holds_the_pages_figures(make: Make) -> None:
    text = printed([make(a, seed) for a in ("mono_forward", "backprop") for seed in (0, 1, 2)])
    line, below = cells(text, "mono_forward")
    assert line == ["3", "98.10 ±0.10", "45.9 ±0.9", "2.30", "2.35 ±0.05", "5.60", "4.67"]
    ratios = ("1.000", "0.750", "0.767", "0.767", "0.691", "0.345")
    assert below == [ratio + "\N{MULTIPLICATION SIGN}" for ratio in ratios]
    assert "measured" in text
    assert "modelled" in text
    assert "digits · mlp · mode own" in text


def test_names_are_text_not_markup(make: Make) -> None:
    text = printed([make("[bold]x[/bold]", 0, dataset="[/nope]")])
    assert "[bold]x[/bold]" in text
    assert "[/nope]" in text


def test_several_data_sets_and_unknown_figures(make: Make) -> None:
    text = printed(
        [make("backprop", 0), make("mono_forward", 0, dataset="mnist", energy=[], cost={"energy_j": None})], 240
    )
    assert "mnist · mlp · mode own" in text
    line, _ = cells(text, "mono_forward")
    assert line[3:5] == ["\N{EN DASH}", "\N{EN DASH}"]


def test_no_finished_run(make: Make) -> None:
    assert "no finished run" in printed([make(status="failed")])


def test_a_terminal_of_eighty_columns_loses_no_figure(make: Make) -> None:
    text = printed([make(a, seed) for a in ("deep_supervision", "backprop") for seed in (0, 1, 2)], 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for figure in ("deep_supervision", "98.10", "±0.10", "45.9", "2.35", "5.60", "4.67", "0.345"):
        assert figure in text
    assert "codecarbon" not in text  # the page has it
    headings = set(" ".join(text.splitlines()[1:6]).split())
    assert {"accuracy", "measured", "modelled", "update", "activ."} <= headings  # no word is broken


def test_sources_that_differ_by_the_program_alone_keep_its_name(make: Make) -> None:
    window = {"joules": 2.0, "quality": "modelled", "by": "load", "source": "a:cpu"}
    text = printed([make("backprop", 0, energy=[window, window | {"source": "b:cpu"}])], 200)
    assert "a: cpu modelled" in text
    assert "b: cpu modelled" in text


def test_every_metric_has_a_column_of_its_own(make: Make) -> None:
    error = {"task": "reconstruction", "net": "autoencoder", "metric": {"name": "mse", "maximise": False}}
    records = [make("x", 0)]
    records += [make(a, 0, test={"mse": e, "loss": e}, **error) for a, e in (("y", 0.00086), ("backprop", 0.00043))]
    text = printed(records, 300)
    place = [line[:32].strip() for line in text.splitlines()]
    assert "digits · autoencoder · reconstruction · mode own" in " ".join(place)
    assert "test mse (lower is better)" in text
    assert "test accuracy (%)" in text
    assert "loss" not in text
    assert cells(text, "x")[0][:3] == ["1", "98.00", "\N{EN DASH}"]
    line, below = cells(text, "y")
    assert line[:3] == ["1", "\N{EN DASH}", "0.0008600"]
    assert below[0] == "2.000\N{MULTIPLICATION SIGN}"


def test_what_is_to_be_said_of_several_rules_is_said_once(make: Make) -> None:
    small = {"dataset": {"limit_train": 500}}
    names = ("a", "b", "c", "backprop")
    some = printed([make(name, 0, config=small if name < "b" or name == "backprop" else {}) for name in names], 300)
    assert "backprop, a: It learned from 500 training samples alone" in " ".join(some.split())
    every = printed([make(name, 0, config=small) for name in names], 300)
    assert every.count("500 training samples") == 1
    assert "all rules: It learned from 500" in every


def test_flops_that_lack_something_are_marked_in_every_table(make: Make) -> None:
    lacking = [make("x", seed, cost={"train_flops": 4e9, "uncounted": ["aten::lstm"] * (seed == 0)}) for seed in (0, 1)]
    records = [*lacking, make("backprop", 0)]
    assert "\N{GREATER-THAN OR EQUAL TO}4.00" in printed(records)
    assert "| \N{GREATER-THAN OR EQUAL TO} 4 |" in render(comparison_table(records), "md")
    assert "\N{GREATER-THAN OR EQUAL TO} 4 GFLOP" in render(figures_table(records), "csv")
