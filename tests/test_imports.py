"""Imports point down the list of folders, never up, and whoever imports the package pays for torch and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top down: a part may import from the parts below its own, and from its own.
LAYERS = [
    {"cli"},
    {"study"},
    {"report"},
    {"records", "statistics", "tables"},
    {"tasks"},
    {"strategies"},
    {"local"},
    {"analysis", "audit", "cost", "distillation", "probe", "testing"},
    {"algorithms"},
    {"losses"},
    {"functional"},
    {"nets"},
    {"batch", "precision", "terminals"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# Free parts: energy knows nothing of networks, conf holds no code. Who may import them stands here.
IMPORTERS = {"energy": {"energy", "study", "cli", "testing"}, "conf": {"conf", "cli"}}


def _modules() -> Iterator[tuple[str, Path]]:
    for folder in ("conf", "energy", "tasks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield folder, path
    for path in sorted((ROOT / "locallearn").rglob("*.py")):
        inside = path.relative_to(ROOT / "locallearn")
        yield inside.parts[0].removesuffix(".py"), path


def _imported(path: Path) -> Iterator[str]:
    """Parts of locallearn that a file imports, inside functions, too; ``__init__`` for the package itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names = [
                f"{node.module}.{alias.name}" if node.module == "locallearn" else node.module for alias in node.names
            ]
        for name in names:
            package, *rest = name.split(".")
            assert package not in ("conf", "energy", "tasks"), f"{path}: {package} is imported as locallearn.{package}"
            if package == "locallearn":
                yield rest[0] if rest and rest[0] in {*LEVEL, *IMPORTERS} else "__init__"


def _allowed(importer: str, imported: str) -> bool:
    if imported in IMPORTERS:
        return importer in IMPORTERS[imported]
    if importer in IMPORTERS:
        return False
    if importer == "__init__":
        return imported in ("batch", "nets", "local")  # the last for type checkers; it is imported when it is asked for
    if imported == "__init__":  # for its version; what it imports itself would go round in a circle
        return importer not in ("batch", "nets")
    return LEVEL[importer] <= LEVEL[imported]


def test_every_part_has_its_place_in_the_list() -> None:
    parts = {part for part, _ in _modules()}
    assert {"algorithms", "strategies", "tasks", "energy", "audit", "nets"} <= parts
    assert parts <= {*LEVEL, *IMPORTERS, "__init__"}


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports locallearn.{imported}"
        for part, path in _modules()
        for imported in _imported(path)
        if not _allowed(part, imported)
    ]
    assert not wrong


def test_the_rule_above_can_fail() -> None:
    assert not _allowed("nets", "algorithms")
    assert not _allowed("algorithms", "strategies")
    assert not _allowed("energy", "batch")
    assert not _allowed("tasks", "conf")
    assert _allowed("strategies", "algorithms")


@pytest.fixture(scope="module")
def loaded() -> tuple[set[str], ...]:
    """Names of the modules behind ``import locallearn``, its rules and the audit, and a mistyped name, in one process."""
    code = (
        "import sys, locallearn; print(*sys.modules)\n"
        "import locallearn.algorithms, locallearn.audit, locallearn.cost; print(*sys.modules)\n"
        "from locallearn.cli import main; assert main(['train', 'dataset=minst']) == 2; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "there is no dataset 'minst'" in done.stderr
    package, rules, mistake = (set(line.split()) for line in done.stdout.splitlines())
    return package, rules, mistake


def test_importing_the_package_brings_torch_and_nothing_heavy(loaded: tuple[set[str], ...]) -> None:
    names = {name.split(".")[0] for name in loaded[0]}
    assert {"torch", "locallearn"} <= names
    heavy = {"lightning", "hydra", "omegaconf", "plotly", "sklearn", "codecarbon", "optuna", "torch_geometric"}
    assert not names & {*heavy, "torchvision", "rich", "pytest"}


def test_algorithms_and_audit_need_no_lightning(loaded: tuple[set[str], ...]) -> None:
    assert "locallearn.audit" in loaded[1]
    assert not {"lightning", "hydra", "torchvision"} & {name.split(".")[0] for name in loaded[1]}


def test_a_mistyped_name_is_told_before_lightning_is_loaded(loaded: tuple[set[str], ...]) -> None:
    """Which takes longer than everything else that the sentence needs."""
    assert not {"lightning", "torchmetrics", "torchvision"} & {name.split(".")[0] for name in loaded[2]}


def test_every_package_goes_into_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "locallearn").rglob("__init__.py")} | {
        f"locallearn.{path.parent.name}"
        for folder in ("conf", "energy", "tasks")
        for path in (ROOT / folder).glob("__init__.py")
    }
    assert sorted(there - set(listed)) == []
