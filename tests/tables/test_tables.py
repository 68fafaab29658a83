"""Tables as text, read back by parsers that are not ours."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from locallearn.tables import (
    FORMATS,
    Cell,
    Column,
    Line,
    Table,
    escaped,
    kind_of,
    plus_minus,
    range_text,
    render,
    write,
)

ODD = r"a|b & 50% of $x_1$ #3 {y} ~z^2 \cmd <i>*b*</i> `c` [d] ±≥ β₂² é 漢 \" 'q' "  # signs that one format or another reads
COLUMNS = [Column("rule", "Rule"), Column("acc", "Accuracy", "%", numeric=True), Column("s", "Seconds", numeric=True)]


def _table() -> Table:
    lines = [
        Line([ODD, Cell(0.9723456, "97.2 ± 1.1"), 3], group="own", notes=("Seed 3 failed: 5 % of a_b.", "Shared.")),
        Line(["[1] plain", None, math.nan], group="own", notes=("Shared.",)),
        Line(["=1+1", Cell(-0.5, "-0.5\n-1.0 [-2, 3]"), 2.5], group="target 0.9"),
    ]
    return Table("One & only", COLUMNS, lines, ["Mean ± deviation."])


def test_csv_is_read_back_by_the_standard_library_with_unrounded_values() -> None:
    rows = list(csv.DictReader(io.StringIO(render(_table(), "csv"), newline="")))
    assert [row["rule"] for row in rows] == [ODD, "[1] plain", "'=1+1"]  # a spreadsheet must not work it out
    assert float(rows[0]["acc"]) == 0.9723456
    assert float(rows[2]["acc"]) == -0.5
    assert rows[1]["acc"] == rows[1]["s"] == ""
    assert [row["group"] for row in rows] == ["own", "own", "target 0.9"]
    assert rows[0]["notes"] == "Seed 3 failed: 5 % of a_b. Shared."


def test_json_is_strict_and_holds_the_same() -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(render(_table(), "json"), parse_constant=refuse)
    assert found["rows"][0] == {
        **{"group": "own", "rule": ODD, "acc": 0.9723456, "s": 3},
        "notes": ["Seed 3 failed: 5 % of a_b.", "Shared."],
    }
    assert found["rows"][1]["acc"] is None
    assert found["rows"][1]["s"] is None
    assert [column["unit"] for column in found["columns"]] == ["", "%", ""]


def test_a_table_without_lines_keeps_its_headings() -> None:
    empty = Table("", COLUMNS, [])
    assert render(empty, "csv") == "rule,acc,s,notes\n"
    assert json.loads(render(empty, "json"))["rows"] == []
    assert "footnotesize" not in render(empty, "tex")
    assert render(Table("", COLUMNS, [Line(["a", 1, 2])]), "csv") == "rule,acc,s,notes\na,1,2,\n"


def _markdown_cells(line: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_has_as_many_cells_in_every_row_and_marks_every_note_once() -> None:
    text = render(_table(), "md")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(_markdown_cells(row)) for row in rows} == {3}
    assert _markdown_cells(rows[0]) == ["Rule", "Accuracy (%)", "Seconds"]
    assert _markdown_cells(rows[1]) == ["---", "---:", "---:"]
    assert text.count("<sup>b</sup> Shared.") == 1
    assert _markdown_cells(rows[-1])[1] == r"-0.5<br>-1.0 \[-2, 3\]"
    assert rows[3].count("<sup>a,b</sup>") == rows[4].count("<sup>b</sup>") == 1
    for sign in "*_<[`":  # none is left bare
        assert not re.search(rf"(?<!\\)\{sign}(?!/?sup>)", _markdown_cells(rows[3])[0].partition(" <sup>")[0]), sign


# What may stand in our LaTeX: commands by name, and environments that have to be closed in turn.
_WORDS = """
caption centering small begin end toprule midrule bottomrule multicolumn emph textsuperscript par smallskip linewidth
footnotesize raggedright setlength tabcolsep tabular addlinespace
textbackslash textasciitilde textasciicircum textasciigrave textless textgreater textbar pm times
cdot geq leq dots infty rightarrow surd nabla circ cong approx neq alpha beta gamma delta epsilon zeta eta theta iota kappa
lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"""
_KNOWN = set(_WORDS.split())


def _strict(text: str) -> list[list[str]]:
    """Cells of the rows between the rules; fails where braces, environments or mathematics are not balanced."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\[&%$#_{}\\]", "", body)
    assert set(re.findall(r"\\([A-Za-z]+)", bare)) <= _KNOWN
    assert not re.search(r"[%#]", bare)
    assert bare.count("$") % 2 == 0
    assert not re.search(r"[_^]", re.sub(r"\$[^$]*\$", "", bare))  # outside of mathematics they are mistakes
    depth = 0
    for sign in bare:
        depth += (sign == "{") - (sign == "}")
        assert depth >= 0
    assert depth == 0
    open_ones: list[str] = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        if what == "begin":
            open_ones.append(name)
        else:
            assert open_ones.pop() == name
    assert not open_ones
    inside = body.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    inside = re.sub(
        r"\\begin\{tabular\}\[b\]\{@\{\}[lr]@\{\}\}(.*?)\\end\{tabular\}",
        lambda found: found[1].replace(r"\\", ""),
        inside,
    )
    lines = [line.removesuffix(r"\\") for line in inside.splitlines() if line.endswith(r"\\")]
    return [re.split(r"(?<!\\)&", line) for line in lines if "multicolumn" not in line]


def test_latex_passes_a_strict_reader() -> None:
    rows = _strict(render(_table(), "tex"))
    assert {len(row) for row in rows} == {3}
    assert rows[0][1].strip() == r"Accuracy (\%)"
    assert rows[1][1].strip() == r"97.2 $\pm$ 1.1"
    assert rows[2][0].startswith("{[}1{]} plain")  # else it would be the space before the row
    assert [row[1].strip() for row in rows[3:]] == ["$-$0.5", "$-$1.0 {[}$-$2, 3{]}"]  # two lines of one cell


def test_the_strict_reader_can_fail() -> None:
    for wrong in (r"\newcommand{\x}{}", "{", "$", "a_b", "50%", r"\begin{table}"):
        with pytest.raises(AssertionError):
            _strict(wrong)


def test_latex_of_any_text_passes_the_strict_reader() -> None:
    draw = random.Random(0)
    signs = [chr(code) for code in [*range(256), *range(0x370, 0x400), *range(0x2000, 0x2300), 0x1F600, 0xD800]]
    for _ in range(200):
        word = "".join(draw.choices(signs, k=12))
        rows = _strict(render(Table(word, [Column("a", word, word)], [Line([word], word, (word,))], [word]), "tex"))
        assert [len(row) for row in rows] == [1, 1]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no LaTeX here")
def test_latex_is_set_by_latex(tmp_path: Path) -> None:
    draw = random.Random(1)
    signs = [chr(code) for code in [*range(256), *range(0x370, 0x400), *range(0x2000, 0x2300), 0x1F600]]
    lines = [Line(["".join(draw.choices(signs, k=40)), 1, 2], notes=("".join(signs[i::9]),)) for i in range(9)]
    tables = [
        render(_table(), "tex"),
        render(Table("all", COLUMNS, lines), "tex"),
        render(Table("", COLUMNS, []), "tex"),
    ]
    head = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
    (tmp_path / "paper.tex").write_text(head + "\n".join(tables) + r"\end{document}", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-1500:]
    assert "Missing character" not in done.stdout


@pytest.mark.parametrize("kind", FORMATS)
def test_a_suffix_chooses_the_format(kind: str, tmp_path: Path) -> None:
    path = write(_table(), tmp_path / "new" / f"t.{kind.upper()}")
    assert path.read_text(encoding="utf-8") == render(_table(), kind)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_mistakes_are_told() -> None:
    with pytest.raises(
        ValueError, match=r"results\.xlsx is no name for a table, expected one that ends in \.csv, \.md"
    ):
        kind_of(Path("results.xlsx"))
    with pytest.raises(ValueError, match="no format 'html'"):
        render(_table(), "html")
    with pytest.raises(ValueError, match="line 1 has 2 cells, but there are 3 columns"):
        Table("", COLUMNS, [Line(["a", 1])])
    with pytest.raises(ValueError, match="every one once"):
        Table("", [COLUMNS[0], COLUMNS[0]], [])


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (0.97234, 0.0113, "0.972 ± 0.011"),
        (0.97234, 0.00998, "0.972 ± 0.010"),  # 0.00998 rounds to 0.0100: one digit less
        (1234.0, 210.0, "1230 ± 210"),
        (-3.0, 0.5, "-3.00 ± 0.50"),
        (0.001, 0.2, "0.00 ± 0.20"),
        (-0.001, 0.2, "0.00 ± 0.20"),
        (97.0, None, "97"),
        (97.123456, 0.0, "97.12"),
        (0.00012345678, None, "0.0001235"),
        (1.5e-9, None, "1.5e-09"),
        (123456.789, None, "123457"),
        (0.0, None, "0"),
        (1e300, 1e290, "1e+300 ± 1e+290"),
    ],
)
def test_numbers_have_the_digits_that_are_known(value: float, spread: float | None, text: str) -> None:
    assert plus_minus(value, spread) == text


def test_rounding_to_the_uncertainty_changes_a_value_by_a_twentieth_of_it_at_most() -> None:
    draw = random.Random(2)
    for _ in range(500):
        value, spread = (
            draw.uniform(-1, 1) * 10 ** draw.randint(-5, 6),
            draw.uniform(0.1, 1) * 10 ** draw.randint(-6, 5),
        )
        mean, deviation = map(float, plus_minus(value, spread).split(" ± "))
        assert abs(mean - value) <= spread / 2 / 9.9
        assert abs(deviation - spread) <= spread / 2 / 9.9


def test_intervals_are_rounded_to_half_their_width() -> None:
    assert range_text(-1.23456, -2.6321, 0.1629) == "-1.2 [-2.6, 0.2]"
    assert range_text(0.5, 0.5, 0.5) == "0.5"


@pytest.mark.parametrize(
    ("value", "lo", "hi", "text"),
    [
        (4.08, 0.482, 34.5, "4.1 [0.48, 34]"),
        (0.555, 0.0888, 3.47, "0.56 [0.089, 3.5]"),
        (30.0, 0.0021, 430000.0, "30 [0.0021, 430000]"),
        (1.29, 0.991, 1.67, "1.29 [0.99, 1.67]"),
        (1.00123, 1.00101, 1.00145, "1.00123 [1.00101, 1.00145]"),
        (1.0, 0.0, 9.0, "1.0 [0.0, 9.0]"),
    ],
)
def test_a_ratios_interval_keeps_two_digits_of_its_lower_end(value: float, lo: float, hi: float, text: str) -> None:
    assert range_text(value, lo, hi, ratio=True) == text


def test_escaping_leaves_plain_text_alone() -> None:
    assert escaped("Training time, 12.5") == "Training time, 12.5"
    assert escaped("CO₂ \n  m²") == "CO$_{2}$ m$^{2}$"
