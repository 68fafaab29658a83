"""LaTeX that needs the package booktabs and nothing else."""

from __future__ import annotations

import re
import unicodedata
from itertools import zip_longest
from textwrap import wrap

from locallearn.tables._table import Column, Line, Table

_MINUS = re.compile(r"(?<![\w.)-])-(?=\d)")  # a number's, not a hyphen
_HEADING = 16  # characters in a line of a heading
_DASH = "\0"  # stands for two hyphens of ours, while those of the text are kept apart
_SIGNS = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "`": r"\textasciigrave{}"},
    **{"\N{PLUS-MINUS SIGN}": r"$\pm$", "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{MIDDLE DOT}": r"$\cdot$"},
    **{"\N{GREATER-THAN OR EQUAL TO}": r"$\geq$", "\N{LESS-THAN OR EQUAL TO}": r"$\leq$", "\N{MINUS SIGN}": r"$-$"},
    **{"\N{EN DASH}": _DASH, "\N{EM DASH}": _DASH, "\N{HORIZONTAL ELLIPSIS}": r"\dots{}", "\N{INFINITY}": r"$\infty$"},
    **{"\N{RIGHTWARDS ARROW}": r"$\rightarrow$", "\N{SQUARE ROOT}": r"$\surd$", "\N{NABLA}": r"$\nabla$"},
    **{"\N{LEFT SINGLE QUOTATION MARK}": "`", "\N{RIGHT SINGLE QUOTATION MARK}": "'"},
    **{"\N{LEFT DOUBLE QUOTATION MARK}": "``", "\N{RIGHT DOUBLE QUOTATION MARK}": "''"},
    **{"\N{NO-BREAK SPACE}": "~", "\N{DEGREE SIGN}": r"$^{\circ}$", "\N{APPROXIMATELY EQUAL TO}": r"$\cong$"},
    **{"\N{ALMOST EQUAL TO}": r"$\approx$", "\N{NOT EQUAL TO}": r"$\neq$", "\N{MICRO SIGN}": r"$\mu$"},
    **{"[": "{[}", "]": "{]}"},  # at the beginning of a row they would be read as the space before it
}
_LETTERS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega"
_CAPITALS = "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
_GREEK = {
    unicodedata.lookup(f"GREEK {size} LETTER {name.replace('mbda', 'mda')}"): name
    for size, names in (("SMALL", _LETTERS), ("CAPITAL", _CAPITALS))
    for name in names.split()
}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))


def escaped(text: str) -> str:
    """``text`` so that LaTeX prints it; signs that it has no way to print become their nearest kin, or a question mark."""
    text = _MINUS.sub("\N{MINUS SIGN}", " ".join(text.split()))
    return "".join(map(_sign, text)).replace("--", "-{}-").replace(_DASH, "--")


def _sign(sign: str) -> str:
    if sign in _SIGNS:
        return _SIGNS[sign]
    if sign.isascii():
        return sign if sign.isprintable() else "?"
    if sign in _GREEK:
        return f"$\\{_GREEK[sign]}$"
    if sign in _RAISED:
        return f"$^{{{_RAISED[sign]}}}$"
    if sign in _LOWERED:
        return f"$_{{{_LOWERED[sign]}}}$"
    if "À" <= sign <= "ÿ" and sign not in "ÐðÞþ":  # letters that every LaTeX since 2018 reads as UTF-8 and has
        return sign
    nearest = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return "".join(_SIGNS.get(one, one) for one in nearest if one.isprintable()) or "?"


def latex(table: Table) -> str:
    r"""A ``table`` environment, for a paper that says ``\usepackage{booktabs}``."""
    marks = table.footnotes()
    wide = len(table.columns)
    rows, group = [], ""
    for place, line in enumerate(table.lines):
        if line.group != group:
            group = line.group
            rows += [r"\midrule"] if place else []
            rows.append(rf"\multicolumn{{{wide}}}{{l}}{{\emph{{{escaped(group)}}}}} \\")
        rows += _rows(line, marks)
    below = [
        *(rf"\textsuperscript{{{mark}}}~{escaped(note)}" for note, mark in marks.items()),
        *map(escaped, table.notes),
    ]
    note = [
        r"\par\smallskip",
        r"\begin{minipage}{\linewidth}\footnotesize\raggedright",
        *_ended(below),
        r"\end{minipage}",
    ]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            *([rf"\caption{{{escaped(table.title)}}}"] if table.title else []),
            rf"\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in table.columns)}}}",
            r"\toprule",
            f"{' & '.join(map(_heading, table.columns))} \\\\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *(note if below else []),
            r"\end{table}",
            "",
        ]
    )


def _rows(line: Line, marks: dict[str, str]) -> list[str]:
    """A row for every line of the cells that have most of them, and some space below where there are several."""
    cells = [[escaped(text) for text in cell.shown] for cell in line]
    if line.notes:
        cells[0][0] += rf"\textsuperscript{{{line.marks(marks)}}}"
    lines = [f"{' & '.join(row)} \\\\" for row in zip_longest(*cells, fillvalue="")]
    return [*lines, r"\addlinespace"] if len(lines) > 1 else lines


def _heading(column: Column) -> str:
    """A heading, of several lines where it is much wider than what stands below it."""
    lines = wrap(column.heading, _HEADING, break_long_words=False, break_on_hyphens=False) or [""]
    side = "r" if column.numeric else "l"
    if len(lines) == 1:
        return escaped(lines[0])
    text = r" \\ ".join(map(escaped, lines))
    return rf"\begin{{tabular}}[b]{{@{{}}{side}@{{}}}}{text}\end{{tabular}}"


def _ended(sentences: list[str]) -> list[str]:
    """Every sentence as a paragraph of its own but for the last one, which the box ends."""
    return [f"{sentence}\\par" for sentence in sentences[:-1]] + sentences[-1:]
