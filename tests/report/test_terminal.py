import io
from collections.abc import Callable, Sequence

from rich.console import Console

from locallearn.records import Record
from locallearn.report import terminal_table

Make = Callable[..., Record]


def printed(records: Sequence[Record], width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(terminal_table(records))
    return out.getvalue()


def cells(text: str, name: str) -> tuple[list[str], list[str]]:
    """The line of a rule and the line below it, cell by cell."""
    lines = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")
    ]
    at = next(i for i, line in enumerate(lines) if line[0] == name)
    return lines[at], lines[at + 1] if at + 1 < len(lines) else []


def test_the_table_holds_the_pages_figures(make: Make) -> None:
    text = printed([make(a, seed) for a in ("mono_forward", "backprop") for seed in (0, 1, 2)])
    line, below = cells(text, "mono_forward")
    assert line == ["mono_forward", "3", "98.10 ± 0.10", "45.9 ± 0.9", "2.30", "2.35 ± 0.05", "5.60", "4.67"]
    assert below == [
        "",
        "",
        *(ratio + "\N{MULTIPLICATION SIGN}" for ratio in ("1.000", "0.750", "0.767", "0.767", "0.691", "0.345")),
    ]
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
    assert line[4:6] == ["\N{EN DASH}", "\N{EN DASH}"]


def test_no_finished_run(make: Make) -> None:
    assert "no finished run" in printed([make(status="failed")])
