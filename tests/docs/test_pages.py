"""Tables, links and dates in the documents agree with what they speak of."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

import locallearn
from locallearn.algorithms import Locality

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
}


def _prose(page: str) -> str:
    """The page without its blocks of code."""
    text = PAGES[page].read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _table(page: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the table that starts with this heading."""
    after = _prose(page).partition(f"| {heading} |")[2]
    rows = after.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", _prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = PAGES[page].parent / name if name else PAGES[page]
        assert path.exists(), f"{page} links to {target}"
        assert not anchor or anchor in _anchors(path), f"{page} links to {target}"


def _settings(page: Path) -> Any:
    return yaml.safe_load((ROOT / "conf" / "algorithm" / f"{page.stem}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [name for name in PAGES if name.startswith("docs/algorithms/")])
def test_settings_are_those_of_the_yaml(page: str) -> None:
    rows = _table(page, "key | default | meaning")
    assert all(len(row) == 3 and row[2] for row in rows)
    told = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows}
    wanted = {key: value for key, value in _settings(PAGES[page]).items() if key != "_target_"}
    assert told == wanted


def test_the_table_of_settings_is_complete() -> None:
    """All of ``config.yaml`` and of the groups that say how runs are made."""
    conf = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text(encoding="utf-8"))
    wanted = {}
    for group, name in (("schedule", "joint"), ("trainer", "default")):
        conf[group] = yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text(encoding="utf-8"))
    for key, value in conf.items():
        if key in (
            "compare",
            "tune",
            "report",
            "predict",
            "analyze",
            "distill",
            "replay",
            "bench",
            "meters",
            "schedule",
            "trainer",
        ):
            wanted |= {f"{key}.{name}": one for name, one in value.items() if not name.startswith("_")}
        elif key not in ("defaults", "hydra"):
            wanted[key] = value
    rows = _table("docs/studies.md", "key | default | meaning")
    assert all(len(row) == 3 and row[2] for row in rows)
    assert {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows} == wanted


def test_the_table_of_algorithms_says_what_they_say() -> None:
    rows = _table("README.md", "`algorithm=` | paper | claim | what is broadcast to all blocks | page")
    assert len(rows) >= 4
    for name, _, claim, broadcast, page in rows:
        path = ROOT / str(re.search(r"\((.+)\)", page)[1])  # type: ignore[index]
        assert name.strip("`") == path.stem
        algorithm = instantiate(OmegaConf.create({"seed": 0, "algorithm": _settings(path)}).algorithm)
        assert claim.strip("`") == algorithm.locality
        assert broadcast == algorithm.broadcast


def test_the_table_of_claims_is_complete() -> None:
    assert {row[0].strip("`") for row in _table("docs/architecture.md", "claim | meaning")} == set(Locality)


def test_the_layers_are_those_of_the_import_test() -> None:
    spec = importlib.util.spec_from_file_location("import_rules", ROOT / "tests" / "test_imports.py")
    assert spec is not None
    assert spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    block = re.search(r"```text\n(cli\n.*?)```", PAGES["docs/architecture.md"].read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    assert [set(line.split(", ")) for line in block[1].splitlines()] == rules.LAYERS


def test_files_named_in_the_text_are_there() -> None:
    pattern = r"`((?:locallearn|conf|tasks|energy|tests|docs)/[\w./-]+)`"
    named = {(page, name) for page in PAGES for name in re.findall(pattern, _prose(page))}
    assert len(named) > 20
    invented = {"docs/algorithms/NAME.md"}
    assert not [(page, name) for page, name in named if not (ROOT / name).exists() and name not in invented]


def test_version_and_date_are_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["type"] == "software"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    latest = re.search(r"^## \[(.+)\] - (\d{4}-\d\d-\d\d)$", PAGES["CHANGELOG.md"].read_text(encoding="utf-8"), re.M)
    assert latest is not None
    assert citation["version"] == project["version"] == locallearn.__version__ == latest[1]
    assert citation["date-released"] == latest[2]
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in text
