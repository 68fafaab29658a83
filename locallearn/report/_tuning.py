"""Searches of ``locallearn tune``: how the best value came about, trial by trial, and which settings mattered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locallearn.records import SHARES, Record, plain_file
from locallearn.report._charts import Chart, clipped, figure_of, plain_text, ramp, rounded, wrapped
from locallearn.report._columns import UNKNOWN, known_number, metric_title, significant
from locallearn.report._curves import thin
from locallearn.report._sweeps import parallel_chart

_FOLDER = "tune"
# What keeps a page small, of every study: trials that are drawn, lines of a table of trials, lines of the table of the best
# settings, and settings whose importance is shown.
_TRIALS, _SHOWN, _CHOSEN, _SHARES = 2000, 40, 12, 15
_STEPS = 4000  # validations of all trials of a search that are drawn
_MARKERS = {"PRUNED": "x", "FAIL": "triangle-down-open", "COMPLETE": "circle"}


@dataclass(frozen=True)
class Search:
    """One search as the page shows it.

    Attributes:
        name: its heading.
        sentence: what it found, with how many trials.
        charts: history, validations of every trial, importances, settings of its trials.
        command: what was typed, empty where the file does not say.
        records: names of the runs of its trials.
        best: heading and lines of the table of the best settings.
    """

    name: str
    sentence: str
    charts: Sequence[Chart]
    command: str
    records: frozenset[str]
    best: tuple[tuple[str, ...], list[tuple[str, ...]]]


def read_searches(records: Sequence[Record]) -> tuple[list[Search], list[str]]:
    """The searches beside runs, and a sentence for each file that cannot be used."""
    paths: dict[Path, None] = {}
    for parent in {record.path.parent for record in records}:
        for place in (parent / _FOLDER, *([parent] if parent.name == _FOLDER else [])):
            paths.update(dict.fromkeys(sorted(place.glob("*/tune.json"))))
    return _read(list(paths))


def _read(paths: Sequence[Path]) -> tuple[list[Search], list[str]]:
    found: list[Search] = []
    problems: list[str] = []
    for path in sorted(paths):
        try:
            data = json.loads(plain_file(path).decode("utf-8"))
            if not isinstance(data, dict) or data.get("schema") != 1:
                raise ValueError("it is no search that this version of locallearn has written")
            found.append(_search(data))
        except FileNotFoundError:
            continue
        except (ValueError, RecursionError, OverflowError) as error:
            problems.append(f"{path} is left out ({str(error)[:200]}); locallearn tune writes it anew.")
    return found, problems


def _search(data: Mapping[str, Any]) -> Search:
    objectives = [one for one in _list(data.get("objectives")) if isinstance(one, Mapping)] or [{}]
    studies = [one for one in _list(data.get("studies")) if isinstance(one, Mapping)]
    if not studies:
        raise ValueError("it has no studies")
    name = _text(objectives[0].get("name")) or "value"
    share = 100.0 if name in SHARES else 1.0
    lower = objectives[0].get("direction") == "minimize"
    unit = " (%)" if share == 100.0 else ""
    title = f"{metric_title(name)}{unit}"
    charts = [_history(studies, title, share, lower), *_intermediates(studies, title, share, lower)]
    if len(objectives) > 1:
        charts.append(_objectives(studies, objectives, lower))
    charts += [*_importances(studies), *_parallels(studies, title, share, lower)]
    place = " · ".join(filter(None, (_text(data.get(key)) for key in ("dataset", "net"))))
    best: list[tuple[str, ...]] = []
    said = []
    most = 0
    for study in studies:
        trials = list(_trials(study))
        chosen = [one for one in trials if one["number"] in _list(study.get("best"))]
        most = max(most, len(chosen))
        for one in chosen[:_CHOSEN]:
            numbers = [known_number(v) for v in _list(one.get("values"))]
            told = [_shown(v, share) if v is not None and i == 0 else significant(v) for i, v in enumerate(numbers)]
            values = ", ".join(told)
            settings = _settings(one)
            best.append((_rule(study), str(one["number"]), values, settings, _text(study.get("experiment")) or UNKNOWN))
        counts = {state: sum(one.get("state") == state for one in trials) for state in ("COMPLETE", "PRUNED", "FAIL")}
        value = _value(chosen[0]) if len(objectives) == 1 and chosen else None
        ended = f"{sum(counts.values())} trials, {counts['PRUNED']} pruned, {counts['FAIL']} failed"
        top = "" if value is None else f" best {metric_title(name)} {_shown(value, share)}"
        said.append(f"{_rule(study)}:{top} ({ended}, {_hours(known_number(study.get('seconds')))})")
    budget = data.get("budget")
    trials_each = known_number(budget.get("trials")) if isinstance(budget, Mapping) else None
    sentence = f"{'; '.join(said)}. " + (
        f"Every rule has a budget of {trials_each:.0f} trials"
        if trials_each is not None
        else "The budget is not recorded"
    )
    sentence += f", sampler {_text(data.get('sampler')) or 'unknown'}, pruner {_text(data.get('pruner')) or 'unknown'}."
    if data.get("finished") is not True:
        sentence += " The search has not ended: its budget is not used up."
    sentence += " Values are of the validation part; the best of many is flattered by luck."
    if most > _CHOSEN:
        sentence += f" Of more than {_CHOSEN} best trials of a rule the first {_CHOSEN} are in the table."
    records = frozenset(
        name
        for study in studies
        for one in _trials(study)
        for name in _list(one.get("records"))
        if isinstance(name, str)
    )
    header = ("Rule", "Trial", "Value" if len(objectives) == 1 else "Values", "Settings", "Experiment file")
    return Search(
        f"Tuning: {place or _text(data.get('search'))}",
        sentence,
        charts,
        _text(data.get("command")),
        records,
        (header, best),
    )


def _history(studies: Sequence[Mapping[str, Any]], title: str, share: float, lower: bool) -> Chart:
    """Every trial's value in the order of the trials, and the best so far as a line."""
    data: list[dict[str, Any]] = []
    table: list[tuple[str, ...]] = []
    for i, study in enumerate(studies):
        colour, rule = ramp(i, len(studies)), plain_text(_rule(study))
        trials = list(_trials(study))
        drawn = _best_of(trials, study, _TRIALS, lower)
        for state, symbol in _MARKERS.items():
            points = [
                (one["number"], v) for one in drawn if one.get("state") == state and (v := _value(one)) is not None
            ]
            if points:
                word = {"PRUNED": ", pruned", "FAIL": ", failed"}.get(state, "")
                data.append(
                    {
                        "type": "scatter",
                        "mode": "markers",
                        "name": f"{rule}{word}",
                        "x": [number for number, _ in points],
                        "y": [share * value for _, value in points],
                        "marker": {"color": colour, "symbol": symbol, "size": 6, "opacity": 0.6},
                        "hovertemplate": "%{fullData.name}<br>trial %{x}: %{y:.4g}<extra></extra>",
                    }
                )
        best: float | None = None
        line: list[tuple[int, float]] = []
        for one in trials:
            value = _value(one)
            if (
                value is not None
                and one.get("state") == "COMPLETE"
                and (best is None or (value < best if lower else value > best))
            ):
                best = value
                line.append((one["number"], share * best))
        if line:
            line.append((trials[-1]["number"], line[-1][1]))
        for one in _best_of(trials, study, _SHOWN, lower):
            value = _value(one)
            table.append(
                (
                    *(f"{_rule(study)}, {one['number']}", (_text(one.get("state")) or UNKNOWN).lower()),
                    *(
                        UNKNOWN if value is None else _shown(value, share),
                        significant(known_number(one.get("seconds")), 3),
                    ),
                    _settings(one),
                    _text(one.get("error")) or "",
                )
            )
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{rule}, best so far",
                "x": [number for number, _ in line],
                "y": [value for _, value in line],
                "line": {"color": colour, "width": 2, "shape": "hv"},
                "hoverinfo": "skip",
            }
        )
    layout = {"xaxis": {"title": {"text": "trial"}}, "yaxis": {"title": {"text": plain_text(f"validation {title}")}}}
    header = ("Trial", "State", f"Validation {title}", "Seconds", "Settings", "Error")
    note = "A mark per trial, a cross where it was pruned (its last value before), the line the best so far."
    note += _kept(sum(1 for _ in _trials(study)) for study in studies)
    return Chart("History of the search", note, figure_of(data, layout, "end"), header, table, 400)


def _intermediates(studies: Sequence[Mapping[str, Any]], title: str, share: float, lower: bool) -> list[Chart]:
    """What every validation of every trial gave: a thin line each, a cross where the pruner ended it, the best one thick."""
    every = [[one for one in _trials(study) if _steps(one)] for study in studies]
    drawn = [_best_of(trials, study, _TRIALS, lower) for trials, study in zip(every, studies, strict=True)]
    if not any(drawn):
        return []
    points = max(2, _STEPS // sum(map(len, drawn)))
    data: list[dict[str, Any]] = []
    best_lines: list[dict[str, Any]] = []
    table: list[tuple[str, ...]] = []
    for i, (study, trials) in enumerate(zip(studies, drawn, strict=True)):
        colour, rule = ramp(i, len(studies)), plain_text(_rule(study))
        line: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
        crosses: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
        listed = [one["number"] for one in _best_of(trials, study, _SHOWN, lower)]
        for one in trials:
            steps = _steps(one)
            pruned, name = one.get("state") == "PRUNED", f"trial {one['number']}"
            shown = thin(sorted(steps), points)
            values = [rounded(share * steps[step]) for step in shown]
            line["x"] += [*shown, None]
            line["y"] += [*values, None]  # a gap before the next trial
            line["text"] += [*([name] * len(shown)), None]
            if pruned:
                for key, value in (("x", shown[-1]), ("y", values[-1]), ("text", name)):
                    crosses[key].append(value)
            if one["number"] in _list(study.get("best"))[:1]:
                best_lines.append(
                    {
                        **{"type": "scatter", "mode": "lines+markers" if len(shown) == 1 else "lines"},
                        **{
                            "name": f"{rule}, best trial",
                            "x": shown,
                            "y": values,
                            "line": {"color": colour, "width": 3},
                        },
                        "hovertemplate": f"{rule}<br>{name}, the best<br>%{{x}}: %{{y:.4g}}<extra></extra>",
                    }
                )
            if one["number"] in listed:
                pick = min if lower else max
                table.append(
                    (
                        *(
                            f"{_rule(study)}, {one['number']}",
                            (_text(one.get("state")) or UNKNOWN).lower(),
                            str(len(steps)),
                        ),
                        *(_shown(value, share) for value in (pick(steps.values()), steps[max(steps)])),
                    )
                )
        hover = "%{fullData.name}<br>%{text}<br>%{x}: %{y:.4g}<extra></extra>"
        common = {"type": "scatter", "hovertemplate": hover}
        if line["x"]:
            look = {"line": {"color": colour, "width": 1}, "opacity": 0.45}
            if max(len(_steps(one)) for one in trials) == 1:
                look["marker"] = {"color": colour, "size": 5}
            data.append(
                {**common, "mode": "lines+markers" if "marker" in look else "lines", "name": rule, **line, **look}
            )
        if crosses["x"]:
            marker = {"color": colour, "symbol": "x", "size": 7}
            data.append({**common, "mode": "markers", "name": f"{rule}, pruned", **crosses, "marker": marker})
    layout = {
        "xaxis": {"title": {"text": "validation of the trial"}},
        "yaxis": {"title": {"text": plain_text(f"validation {title}")}},
    }
    note = "A line per trial, a cross where the pruner ended it; the best trial is thick."
    if any(len(_list(one.get("records"))) > 1 for study in studies for one in _trials(study)):
        note += " The seeds of a trial follow one another, and a value is the mean over the seeds so far."
    if any(len(_steps(one)) > points for trials in drawn for one in trials):
        note += f" Of long lines {points} points are drawn."
    note += _kept(map(len, every))
    header = ("Trial", "State", "Validations", f"{'Lowest' if lower else 'Highest'} {title}", f"Last {title}")
    figure = figure_of([*data, *best_lines], layout)
    return [Chart("Validations of every trial", note, figure, header, table, 420)]


def _steps(trial: Mapping[str, Any]) -> dict[int, float]:
    """What a trial's validations gave, by their number."""
    found = trial.get("intermediate")
    return {
        int(step): value
        for step, given in (found.items() if isinstance(found, Mapping) else ())
        if isinstance(step, str) and step.isdecimal() and len(step) < 10 and (value := known_number(given)) is not None
    }


def _objectives(studies: Sequence[Mapping[str, Any]], objectives: Sequence[Mapping[str, Any]], lower: bool) -> Chart:
    """Two objectives against each other, the set of those that no other beats filled."""
    names = [metric_title(_text(one.get("name")) or "value") for one in objectives[:2]]
    data, table = [], []
    most = 0
    for i, study in enumerate(studies):
        best, drawn = _list(study.get("best")), _best_of(list(_trials(study)), study, _TRIALS, lower)
        for chosen in (False, True):
            points = []
            for one in drawn:
                values = [known_number(v) for v in _list(one.get("values"))[:2]]
                if len(values) == 2 and None not in values and (one["number"] in best) == chosen:
                    points.append((one["number"], *values))
            if not points:
                continue
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": plain_text(f"{_rule(study)}{', Pareto set' if chosen else ''}"),
                    "x": [point[2] for point in points],
                    "y": [point[1] for point in points],
                    "text": [f"trial {point[0]}" for point in points],
                    "marker": {
                        "color": ramp(i, len(studies)),
                        "symbol": "circle" if chosen else "circle-open",
                        "size": 9,
                    },
                    "hovertemplate": "%{fullData.name}<br>%{text}<extra></extra>",
                }
            )
            if chosen:
                most = max(most, len(points))
                table += [(f"{_rule(study)}, {p[0]}", significant(p[1]), significant(p[2])) for p in points[:_SHOWN]]
    layout = {"xaxis": {"title": {"text": plain_text(names[1])}}, "yaxis": {"title": {"text": plain_text(names[0])}}}
    many = len(objectives) > 2
    note = f"Filled marks are the Pareto set{f' of all {len(objectives)} objectives' if many else ''}."
    if most > _SHOWN:
        note += f" Of more than {_SHOWN} trials of a rule in it the first {_SHOWN} are in the table."
    title = "The first two objectives" if many else "Both objectives"
    return Chart(title, note, figure_of(data, layout), ("Trial", *names), table, 400)


def _importances(studies: Sequence[Mapping[str, Any]]) -> list[Chart]:
    data, table, settings, most = [], [], 0, 0
    for i, study in enumerate(studies):
        by_objective = study.get("importances")
        for objective, shares in by_objective.items() if isinstance(by_objective, Mapping) else ():
            known = (
                [(clipped(str(k), 80), v) for k, w in shares.items() if (v := known_number(w)) is not None]
                if isinstance(shares, Mapping)
                else []
            )
            most = max(most, len(known))
            known = sorted(known, key=lambda pair: -pair[1])[:_SHARES]
            if not known:
                continue
            settings = max(settings, len(known))
            many = isinstance(by_objective, Mapping) and len(by_objective) > 1
            name = f"{_rule(study)}, {objective}" if many else _rule(study)
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": plain_text(name),
                    "x": [100 * share for _, share in known],
                    "y": [wrapped(key) for key, _ in known],
                    "marker": {"color": ramp(i, len(studies))},
                    "hovertemplate": "%{fullData.name}<br>%{y}: %{x:.1f} %<extra></extra>",
                }
            )
            table += [(key, name, f"{100 * share:.1f} %") for key, share in known]
    if not data:
        return []
    layout = {
        "xaxis": {"title": {"text": "share of the variation (%)"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "barmode": "group",
    }
    note = "How much of the trials' variation each setting explains; of few trials it says little."
    note += f" Of more than {_SHARES} settings the {_SHARES} that explain most are shown." if most > _SHARES else ""
    header = ("Setting", "Search", "Importance")
    return [
        Chart(
            "Importance of settings", note, figure_of(data, layout), header, table, 140 + 34 * settings + 10 * len(data)
        )
    ]


def _parallels(studies: Sequence[Mapping[str, Any]], title: str, share: float, lower: bool) -> Iterator[Chart]:
    for study in studies:
        points = [
            (f"trial {one['number']}", _params(one), share * value)
            for one in _trials(study)
            if one.get("state") == "COMPLETE" and (value := _value(one)) is not None
        ]
        chart = parallel_chart(f"{_rule(study)}: settings of all trials", points, title, lower)
        if chart is not None:
            yield chart


def _trials(study: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for one in _list(study.get("trials")):
        if isinstance(one, Mapping) and type(one.get("number")) is int:
            yield one


def _best_of(
    trials: Sequence[Mapping[str, Any]], study: Mapping[str, Any], most: int, lower: bool
) -> list[Mapping[str, Any]]:
    """At most so many of a study's trials, in their order: the best ones."""
    chosen = _list(study.get("best"))

    def rank(i: int) -> tuple[bool, bool, float]:
        value = _value(trials[i])
        worth = float("inf") if value is None else value if lower else -value
        return trials[i]["number"] not in chosen, trials[i].get("state") != "COMPLETE", worth

    return [trials[i] for i in sorted(sorted(range(len(trials)), key=rank)[:most])]


def _kept(trials: Iterable[int]) -> str:
    """What is to be said where a rule has more trials than are drawn, or stand in the table."""
    most = max(trials, default=0)
    drawn = f" Of more than {_TRIALS} trials of a rule the {_TRIALS} best are drawn." if most > _TRIALS else ""
    return drawn + (
        f" Of more than {_SHOWN} trials of a rule the {_SHOWN} best are in the table." if most > _SHOWN else ""
    )


def _rule(study: Mapping[str, Any]) -> str:
    return _text(study.get("algorithm")) or "unknown rule"


def _value(trial: Mapping[str, Any]) -> float | None:
    values = _list(trial.get("values"))
    return known_number(values[0]) if values else None


def _params(trial: Mapping[str, Any]) -> dict[str, Any]:
    params = trial.get("params")
    return {clipped(str(k), 80): v for k, v in params.items()} if isinstance(params, Mapping) else {}


def _settings(trial: Mapping[str, Any]) -> str:
    """What a trial drew, numbers with four digits: the file has them all."""
    told = (
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in _params(trial).items()
    )
    return clipped(", ".join(told), 500) or UNKNOWN


def _shown(value: float, share: float) -> str:
    return f"{100 * value:.2f} %" if share == 100.0 else significant(value)


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "time unknown"
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return clipped(value, 500).encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else ""
