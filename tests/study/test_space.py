"""What a search may draw: what is refused, what is drawn, and how it is written."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from locallearn.cli.settings import UsageError, check_types, compose_settings
from locallearn.cli.spaces import read_space, space_of, written
from locallearn.study.space import Choices, Range, corners, text, words

NOBODY: Any = ()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"low": 1, "high": 2, "step": 0}, "steps of 0 do not lead"),
        ({"low": 1, "high": 2, "step": -1}, "steps of -1 do not lead"),
        ({"low": 0.0, "high": 1.0, "step": 0.3}, "steps of 0.3 do not lead from 0.0 to 1.0"),
        ({"low": 1, "high": 2, "step": 2}, "steps of 2 do not lead"),
        ({"low": 1, "high": 5, "step": 3}, "steps of 3 do not lead"),  # though 1 + 5 is two of them
        ({"low": 1.0, "high": 2.0, "log": True, "step": 0.5}, "has no step"),
        ({"low": 1.5, "high": 2, "whole": True}, "have to be whole"),
        ({"low": 1, "high": 2.5, "whole": True}, "have to be whole"),
        ({"low": 1, "high": 2, "step": 0.5, "whole": True}, "have to be whole"),
        ({"low": 0, "high": 8, "log": True, "whole": True}, "low above 0 for log"),
    ],
)
def test_ranges_that_cannot_be_searched(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Range(**settings)


@pytest.mark.parametrize("values", [(), ("a",), ("a", "b", "a")])
def test_choices_that_are_none(values: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="at least two, each of them once"):
        Choices(values)
    assert Choices(("a", "b")).values == ("a", "b")


@pytest.mark.parametrize(
    ("part", "values"),
    [
        (Range(0.0, 0.3, step=0.1), [0.0, 0.1, 0.2, 0.3]),
        (Range(2, 4, whole=True), [2, 3, 4]),
        (Range(16, 64, step=16, whole=True), [16, 32, 48, 64]),
        (Range(1, 3, log=True, whole=True), [1, 2, 3]),
        (Choices(("adam", "[8,8]", "null")), ["adam", "[8,8]", "null"]),
    ],
)
def test_both_ends_are_drawn_and_nothing_else(part: Range | Choices, values: list[Any]) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [study.ask({"x": part.distribution}).params["x"] for _ in range(60)]
    assert (
        sorted(set(drawn)) == pytest.approx(sorted(values))
        if isinstance(values[0], float)
        else set(drawn) == set(values)
    )
    assert {type(value) for value in drawn} == {type(values[0])}
    assert {text(value) for value in (values[0], values[-1])} <= set(part.extremes)


def test_corners_reach_every_end_and_every_choice() -> None:
    space = {"a": Range(1, 2), "b": Choices(("x", "y", "z")), "c": Range(3, 4, whole=True)}
    assert corners(space) == [["a=1.0", "b=x", "c=3"], ["a=2.0", "b=z", "c=4"], ["a=1.0", "b=y", "c=3"]]


def test_words() -> None:
    assert words({"a": 1e-05, "b": 3, "c": "[8,8]"}) == ["a=1e-05", "b=3", "c=[8,8]"]


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            True,
            False,
            3,
            -2,
            1e-5,
            0.1,
            "adam",
            "a b",
            "null",
            "True",
            "inf",
            "",
            "3",
            "1e3",
            "it's",
            'say "so"',
        ),
        *(
            "a,b",
            "back\\slash",
            "${x}",
            "a=b",
            [8, 8],
            [],
            ["a b", None, [1.5]],
            {"_target_": "torch.optim.SGD", "lr": 0.1},
        ),
    ],
)
def test_a_choice_is_read_as_it_was_written(value: Any) -> None:
    override = OverridesParser.create().parse_override(f"key={written(value)}")
    found = override.value()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_what_is_nothing_to_choose(value: Any) -> None:
    with pytest.raises(UsageError, match=r"tune\.space\.x: "):
        read_space({"x": {"choices": [1, value]}}, NOBODY)


def test_a_setting_says_whether_it_takes_whole_numbers() -> None:
    """By its signature, else by its present value, else by how the ends are written."""
    config, _ = compose_settings(["scheduler={_target_:torch.optim.lr_scheduler.StepLR,_partial_:true,step_size:10}"])
    ends = {"low": 1, "high": 4}
    wanted = {
        "dataset.batch_size": True,
        "optimizer.lr": False,
        "optimizer.weight_decay": False,
        "trainer.max_epochs": True,
        "trainer.gradient_clip_val": True,  # null: written as whole numbers
        "trainer.checkpoint_s": True,
        "dataset.split_seed": True,
        "scheduler.step_size": True,
    }
    found = read_space(dict.fromkeys(wanted, ends), [config])
    assert {key: part.whole for key, part in found.items()} == wanted
    real = read_space({"trainer.gradient_clip_val": {"low": 0.5, "high": 4}}, [config])["trainer.gradient_clip_val"]
    assert not real.whole
    said = read_space({"optimizer.lr": {**ends, "type": "int"}, "nothing.here": {**ends, "type": "float"}}, [config])
    assert [part.whole for part in said.values()] == [True, False]
    assert read_space(None, [config]) == {"optimizer.lr": Range(1e-4, 1e-2, log=True)}
    # 1e2 is a float in YAML, and as good as 100.
    assert read_space({"dataset.batch_size": {"low": 1e1, "high": 1e2}}, [config]) == {
        "dataset.batch_size": Range(10, 100, whole=True)
    }


# -- spaces by algorithm ------------------------------------------------------------------------------------------------

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "tune").glob("*.yaml") if path.stem != "default")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_searched_of_an_algorithm_are_its_settings(name: str) -> None:
    """Under the settings that each entry's conditions ask for, both ends are taken."""
    spaces = yaml.safe_load((CONF / "tune" / f"{name}.yaml").read_text(encoding="utf-8"))
    for key, parts in spaces.items():
        for part in parts if isinstance(parts, list) else [parts]:
            if part is None:
                continue
            when = [f"{k}={v[0] if isinstance(v, list) else v}" for k, v in part.get("when", {}).items()]
            config, choices = compose_settings([f"algorithm={name}", *when])
            space = space_of(name, None, [], [config], choices)
            assert key in space
            for end in space[key].extremes:
                made = compose_settings([f"algorithm={name}", *when, f"{key}={end}"])[0]
                check_types(OmegaConf.to_container(made, resolve=True))
                if key.startswith("algorithm."):
                    instantiate(made.algorithm, _convert_="all")


def test_a_space_is_found_by_name_and_by_the_settings_as_they_are(tmp_path: Path) -> None:
    rate = {"adam": Range(1e-4, 1e-2, log=True), "sgd": Range(1e-3, 1.0, log=True)}
    for optimizer, wanted in rate.items():
        config, choices = compose_settings([f"optimizer={optimizer}", "algorithm=backprop"])
        assert space_of("backprop", None, [], [config], choices) == {"optimizer.lr": wanted}
    folder = tmp_path / "tune"
    folder.mkdir()
    (folder / "mine.yaml").write_text("optimizer.lr: null\nalgorithm.x: {low: 1, high: 3}\n", encoding="utf-8")
    words = [f"hydra.searchpath=[file://{tmp_path}]"]
    assert space_of("mine", None, words, [config], choices) == {"algorithm.x": Range(1, 3, whole=True)}
    assert space_of("mine", {"y": {"low": 0.5, "high": 3}}, words, [config], choices) == {"y": Range(0.5, 3)}


SAME = (
    *("compare.mode", "tune.trials", "report.title", "bench.steps", "hydra.searchpath", "meter", "meter.idle_s"),
    *("runs_dir", "data_dir", "dataset.data_dir", "resume", "keep_model", "logger"),
)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("seed", "seeds of trials are tune.seeds"),
        ("+seed", "seeds of trials are tune.seeds"),
        ("algorithm", "algorithms to tune are tune.algorithms"),
        *((key, "is the same in all trials; a search draws settings of algorithm, ") for key in SAME),
    ],
)
def test_what_is_the_same_in_all_trials_is_not_searched(key: str, said: str, tmp_path: Path) -> None:
    choices = {"choices": [1, 2], "when": {"optimizer": "sgd"}}  # a mistake though it is not drawn here
    with pytest.raises(UsageError, match=rf"^tune\.space\.{re.escape(key)}:? {said}"):
        read_space({"optimizer.lr": {"low": 1, "high": 2}, key: choices}, NOBODY)
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "mine.yaml").write_text(yaml.safe_dump({key: choices}), encoding="utf-8")
    with pytest.raises(UsageError, match=rf"^tune/mine\.yaml\.{re.escape(key)}:? {said}"):
        space_of("mine", None, [f"hydra.searchpath=[file://{tmp_path}]"], NOBODY, {})


def test_where_trainings_begin_is_searched() -> None:
    """Trials from other weights are other trials."""
    space = {
        "init_from": {"choices": ["runs/a", None]},
        "algorithm.peer": {"choices": [0, 1]},
        "mine": {"choices": [0, 1]},
    }
    assert list(read_space(space, NOBODY)) == list(space)


def test_corners_reach_what_is_drawn_on_conditions_only() -> None:
    space = {
        "momentum": Range(0.1, 0.9, when=(("optimizer", ("sgd", "muon")),)),
        "optimizer": Choices(("adam", "sgd", "muon")),
        "nesterov": Choices(("true", "false"), when=(("optimizer", ("sgd",)),)),
    }
    points = [dict(word.split("=") for word in point) for point in corners(space)]
    for point in points:
        assert ("momentum" in point) == (point["optimizer"] != "adam")
        assert ("nesterov" in point) == (point["optimizer"] == "sgd")
    for key, values in {
        "momentum": {"0.1", "0.9"},
        "optimizer": {"adam", "sgd", "muon"},
        "nesterov": {"true", "false"},
    }.items():
        assert {point[key] for point in points if key in point} == values


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"x": Range(0, 1, when=(("y", ("1",)),)), "y": Range(0, 1)}, "no choices of it are searched"),
        ({"x": Range(0, 1, when=(("y", ("c",)),)), "y": Choices(("a", "b"))}, "which is none of its choices a, b"),
        (
            {"x": Choices(("a", "b"), when=(("y", ("a",)),)), "y": Choices(("a", "b"), when=(("x", ("a",)),))},
            "the conditions of x, y go round in a circle",
        ),
    ],
)
def test_conditions_that_cannot_be_kept(space: dict[str, Range | Choices], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        corners(space)
