"""Every block of code in the documents runs, and does what the text around it says."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from locallearn import cli
from locallearn.algorithms import Locality
from locallearn.cli.arms import arms_of
from locallearn.cli.plans import make_plan
from locallearn.cli.settings import compose_settings

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
COMMANDS = (
    "train",
    "compare",
    "tune",
    "predict",
    "analyze",
    "distill",
    "replay",
    "report",
    "audit",
    "bench",
    "data",
    "meters",
)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line it starts on."""

    language: str
    text: str
    line: int


def _blocks(page: str, *languages: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    found = [
        Block(match[1], match[2], text.count("\n", 0, match.start(2)))
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    return [block for block in found if not languages or block.language in languages]


# -- Python ------------------------------------------------------------------------------------------------------------


def _flops_are_those_of_the_formula(names: dict[str, Any]) -> bool:
    return bool(names["flops"] == names["expected_flops"])


def _control(names: dict[str, Any]) -> bool:
    return all((names["losses"][-1] < 0.1 * names["losses"][0], _flops_are_those_of_the_formula(names)))


def _mono_forward(names: dict[str, Any]) -> bool:
    return all((names["accuracy"] > 0.95, names["result"].confirmed, _flops_are_those_of_the_formula(names)))


def _forward_forward(names: dict[str, Any]) -> bool:
    claims = (names["result"].verdict, names["coupled"].verdict)
    return all(
        (
            names["accuracy"] > 0.95,
            claims == ("layer-local", "gradient-isolated, parameter-coupled"),
            names["coupled"].confirmed,
            _flops_are_those_of_the_formula(names),
        )
    )


def _man(names: dict[str, Any]) -> bool:
    verdicts = (names["result"].verdict, names["control"].verdict)
    confirmed = names["result"].confirmed and names["control"].confirmed
    return bool(confirmed and verdicts == (Locality.COUPLED, Locality.LAYER_LOCAL))


def _add_an_algorithm(names: dict[str, Any]) -> bool:
    return all((names["accuracy"] > 0.85, names["result"].confirmed, not names["refuted"].confirmed))


def _own_network(names: dict[str, Any]) -> bool:
    trained = ("accuracy", "local_accuracy", "baseline_accuracy", "own_accuracy", "transformer_accuracy")
    learned = (names[key] > 0.85 for key in trained)
    cut = names["blocks"].names == ["embed", "layers_1"]
    return all((*learned, names["same"], cut, names["message"].startswith("Hidden cannot be cut")))


def _architecture(names: dict[str, Any]) -> bool:
    return all(
        (
            names["order"] == ["layer1", "layer2", "layer3"],
            names["losses"][-1] < names["losses"][0] - 0.1,
            names["result"].verdict == "forward-only",
            names["result"].confirmed,
        )
    )


# What a page's snippets must have shown in the end.
def _learns_at_the_stated_cost(names: dict[str, Any]) -> bool:
    """It tells classes apart, its updates cost what the page's formula says, and its claim holds."""
    learned, as_stated = names["accuracy"] > 0.8, names["flops"] == names["expected_flops"]
    return bool(learned and as_stated and names["result"].confirmed)


SHOWN: dict[str, Callable[[dict[str, Any]], bool]] = {
    "README.md": lambda names: bool(names["accuracy"] > 0.9),
    "docs/add-an-algorithm.md": _add_an_algorithm,
    "docs/algorithms/backprop.md": _control,
    "docs/algorithms/cafo.md": lambda names: _learns_at_the_stated_cost(names) and bool(names["residual"] < 1e-6),
    "docs/algorithms/backprop_l1.md": lambda names: bool(names["found"][1] > names["found"][0] + 0.1),
    "docs/algorithms/bp_ff.md": lambda names: names["accuracy"] > 0.9 and _flops_are_those_of_the_formula(names),
    "docs/algorithms/counter_current.md": lambda names: (
        _learns_at_the_stated_cost(names)
        and names["coupled"].confirmed
        and names["coupled"].verdict is Locality.COUPLED
    ),
    "docs/algorithms/deep_supervision.md": _control,
    "docs/algorithms/feedback_alignment.md": lambda names: (
        _learns_at_the_stated_cost(names) and bool(names["after"] < names["before"] - 20)
    ),
    "docs/algorithms/forward_forward.md": _forward_forward,
    "docs/algorithms/forward_gnn.md": lambda names: (
        _learns_at_the_stated_cost(names)
        and names["coupled"].confirmed
        and names["coupled"].verdict is Locality.COUPLED
    ),
    "docs/algorithms/forward_gradient.md": lambda names: bool(
        abs(names["error"] - (1 - 32 / len(names["true"]))) < 0.2
        and names["features"].grad[:, 0, :3].any()
        and not names["features"].grad[:, 1:].any()
        and names["means"]["local"] > names["means"]["random"] + 0.05
    ),
    "docs/algorithms/forward_projection.md": _learns_at_the_stated_cost,
    "docs/algorithms/layer_collaboration.md": _forward_forward,
    "docs/algorithms/local_heads.md": _learns_at_the_stated_cost,
    "docs/algorithms/man.md": _man,
    "docs/algorithms/mono_forward.md": _mono_forward,
    "docs/algorithms/pepita.md": lambda names: (
        _learns_at_the_stated_cost(names) and bool(names["after"] < names["before"])
    ),
    "docs/algorithms/physical_ff.md": lambda names: names["accuracy"] > 0.9 and names["calls"] == [40, 40],
    "docs/algorithms/product_feedback_alignment.md": lambda names: (
        _learns_at_the_stated_cost(names) and bool(names["angle"] < 30)
    ),
    "docs/algorithms/ridge.md": lambda names: bool(names["accuracy"] > 0.8 and names["result"].confirmed),
    "docs/algorithms/scalable_ff.md": _learns_at_the_stated_cost,
    "docs/analysis.md": lambda names: bool(0.1 < names["alike"] <= 1 and names["members"].any()),
    "docs/architecture.md": _architecture,
    "docs/audit.md": lambda names: bool(names["result"].confirmed and names["result"].verdict is Locality.LAYER_LOCAL),
    "docs/distill.md": lambda names: bool(
        (names["estimate"](names["x"]) - (0.3 + 0.5 * names["z"] + 0.2 * names["z"] ** 2)).abs().mean() < 0.02
        and max(names["errors"][method] for method in ("eugen", "snnk")) < names["errors"]["svd"]
    ),
    "docs/graphs.md": lambda names: bool(names["accuracy"] > 0.5 and names["auc"] > 0.7),
    "docs/energy.md": lambda names: [reading.quality for reading in names["window"].readings] == ["measured"] * 2,
    "docs/own-network.md": _own_network,
    "docs/records.md": lambda names: bool(names["same"]),
    "docs/algorithms/zeroth_order.md": lambda names: bool(names["losses"][-1] < names["losses"][0] - 0.2),
}


def test_no_page_with_code_is_left_out() -> None:
    assert {page for page in PAGES if _blocks(page, "python")} == set(SHOWN)


def test_blocks_are_of_a_kind_that_is_checked() -> None:
    assert {block.language for page in PAGES for block in _blocks(page)} <= {"python", "bash", "yaml", "diff", "text"}
    assert {page for page in PAGES if _blocks(page, "yaml")} == {"docs/add-an-algorithm.md", "docs/own-network.md"}
    assert {page for page in PAGES if _blocks(page, "diff")} <= {"docs/add-an-algorithm.md"}
    for page, path in PAGES.items():
        fences = re.findall(r"^\s*```", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(_blocks(page)), f"{page}: a fence that is not closed, or indented"


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:GPU available but not used")
@pytest.mark.parametrize("page", SHOWN)
def test_python(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "snippets"}
    for block in _blocks(page, "python"):
        # Empty lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * block.line + block.text, str(PAGES[page]), "exec", dont_inherit=True), names)
    assert SHOWN[page](names)
    assert not list(tmp_path.iterdir()), "a snippet left files behind"


# -- the command line --------------------------------------------------------------------------------------------------


def _lines(page: str) -> list[str]:
    joined = "\n".join(block.text for block in _blocks(page, "bash")).replace("\\\n", " ")
    parts = [part.strip() for line in joined.splitlines() for part in line.split("&&")]
    return [part for part in parts if part and not part.startswith("#")]


def _sweep(words: list[str]) -> Iterator[list[str]]:
    """The words of every run that these words stand for."""
    if "-m" not in words:
        yield words
        return
    choices = []
    for word in words:
        key, _, values = word.partition("=")
        chosen = [] if not values else [values] if values.startswith("[") else values.split(",")
        choices.append([f"{key}={value}" for value in (chosen[:1] if key == "seed" else chosen)])  # seeds are all alike
    yield from (list(run) for run in itertools.product(*filter(None, choices)))


def _check_command(command: str, words: list[str], extra: list[str]) -> None:
    if command in ("predict", "distill", "replay"):  # their first word is a run, whose settings they have
        compose_settings(words[1:])
        return
    words = [word for word in words if word != "trainer.accelerator=cuda"]  # there may be none here
    if command in ("analyze", "report"):  # several runs, before settings
        compose_settings([word for word in words if "=" in word])
        return
    if command == "meters":
        words = [word for word in words if word != "--json"]
    assert command in COMMANDS
    for run in _sweep(words):
        runs = [run]
        if command in ("compare", "tune", "bench"):
            _, _, arms, shared = arms_of(command, [*run, *extra])
            runs = [[*shared, *arm.overrides] for arm in arms]
        for one in runs:
            composed = compose_settings([*one, *extra, "meter=none"])
            if not extra:  # what is the page's own has no class here
                make_plan(*composed, "")


def _write_settings(page: str, folder: Path) -> list[str]:
    """Write the YAML blocks of a page as a folder of the user's; settings that make Hydra find them."""
    blocks = _blocks(page, "yaml")
    for block in blocks:
        first, _, text = block.text.partition("\n")
        path = folder / "my_conf" / Path(first.removeprefix("# ")).relative_to("conf")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return ["hydra.searchpath=[file://my_conf]"] if blocks else []


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "bash")])
def test_bash(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    extra = _write_settings(page, tmp_path)
    for line in _lines(page):
        words = shlex.split(line, comments=True)
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        words = words[2:] if words[:2] == ["uv", "run"] else words
        if words[0] == "locallearn":
            rest = [word for word in words[2:] if not word.startswith("hydra.searchpath")]
            _check_command(words[1], rest, extra)
        elif words[0] == "python" and (words[1].endswith(".py") or words[2].startswith("tests.")):
            script = words[1] if words[1] != "-m" else f"{words[2].replace('.', '/')}.py"
            assert (ROOT / script).exists(), line
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:2] if not word.startswith("-")), line
        else:
            assert line == "python -m pip install -q uv", f"{page} has a command that nothing here checks: {line}"


def test_a_network_and_data_of_the_users_own_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "docs/own-network.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    _write_settings(page, tmp_path)
    (own,) = [block.text for block in _blocks(page, "python") if block.text.startswith("# my_parts.py")]
    (tmp_path / "my_parts.py").write_text(own, encoding="utf-8")
    (line,) = [line for line in _lines(page) if line.startswith("PYTHONPATH")]
    _, _, *words = shlex.split(line)
    assert cli.main([*words, "compare.seeds=[0]", "trainer.max_epochs=1", "meter=none"]) == 0
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 2


def test_a_wrong_setting_would_be_seen() -> None:
    with pytest.raises(Exception, match="mono_backward"):
        _check_command("train", ["algorithm=mono_backward"], [])
    with pytest.raises(Exception, match="negatives"):
        _check_command("train", ["-m", "algorithm=forward_forward", "algorithm.negatives=hard,soft"], [])


def test_help_names_the_commands_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    listed = re.findall(r"^  locallearn (\w+)(?: RUN)? {3,}", told, re.MULTILINE)
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    assert listed == sorted(listed, key=listed.index)
    assert set(listed) == set(COMMANDS) == set(re.findall(r"^\| `locallearn (\w+)`", readme, re.MULTILINE))


# -- a rule from an empty file to conformance --------------------------------------------------------------------------


def _copy_project(to: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("locallearn", "conf", "tasks", "energy"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    (to / "tests/algorithms").mkdir(parents=True)
    for file in ("pyproject.toml", "tests/conftest.py", "tests/algorithms/test_conformance.py"):
        shutil.copy(ROOT / file, to / file)
    for folder in ("conf", "tasks", "energy"):  # what package-dir does for an installed locallearn
        (to / "locallearn" / folder).symlink_to(to / folder)


def _apply(block: Block, project: Path) -> str:
    """Make the change that a block shows; its first line names the file."""
    first, _, text = block.text.partition("\n")
    name = first.removeprefix("# ")
    path = project / name
    if block.language != "diff":
        assert not path.exists(), f"{name} is there already"
        path.write_text(text, encoding="utf-8")
        return name
    lines = text.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    before = path.read_text(encoding="utf-8")
    assert before.count(old) == 1, f"{name} has these lines {before.count(old)} times:\n{old}"
    path.write_text(before.replace(old, new), encoding="utf-8")
    return name


_AUDIT = """\
from pathlib import Path

from locallearn import cli


def test_random_projection_on_the_command_line(capsys):
    assert Path(cli.__file__).is_relative_to(Path(__file__).parents[2]), "this is not the copy"
    assert cli.main(["audit", "algorithm=random_projection", "net.hidden=[8,8]", "meter=none"]) == 0
    assert "claim: layer-local: confirmed" in capsys.readouterr().out
"""


def test_four_changes_make_a_rule(tmp_path: Path) -> None:
    """Made in a copy of the project, they are all that the command line and the conformance suite need."""
    _copy_project(tmp_path)
    blocks = [
        block
        for block in _blocks("docs/add-an-algorithm.md", "python", "yaml", "diff")
        if block.language != "python" or block.text.startswith("# locallearn/")
    ]
    assert {_apply(block, tmp_path) for block in blocks} == {
        "locallearn/algorithms/random_projection.py",
        "locallearn/algorithms/__init__.py",
        "conf/algorithm/random_projection.yaml",
        "tests/algorithms/test_conformance.py",
    }
    (tmp_path / "tests/algorithms/test_audit.py").write_text(_AUDIT, encoding="utf-8")
    # In a process of its own: to load locallearn twice into one leaves PyTorch with operators that nobody knows any more.
    # The class that the change is in, and not all the others of the file, whose cases would only be collected.
    chosen = ["tests/algorithms/test_conformance.py::TestConformance", "tests/algorithms/test_audit.py"]
    words = ["-m", "pytest", "-q", *chosen, "-k", "random_projection", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 15, done.stdout
