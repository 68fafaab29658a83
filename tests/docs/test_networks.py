"""docs/networks.md says which rule trains which network; here that is tried."""

from __future__ import annotations

import re
import warnings

import pytest

from tests.docs.networks import NETWORKS, PAGE, RULES, column, page

pytestmark = pytest.mark.once

_FEW = ["backprop", "forward_forward", "local_heads", "pepita", "scalable_ff"]


def _told() -> tuple[dict[str, list[str]], list[str]]:
    """Cells of the page by rule, and its sentences."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\([^)]+\) \| (.+) \|$", text, re.MULTILINE)
    listed = re.findall(r"^\d+\. (.+)$", text, re.MULTILINE)
    return {rule: cells.split(" | ") for rule, cells in rows}, listed


@pytest.mark.parametrize("name", ["VGG", "ViT", "GCN", "ResNet-T", "BERT", "DistilBERT", "GPT-2"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_some_columns_of_the_page(name: str) -> None:
    pytest.importorskip(NETWORKS[name].needs, reason="timm and transformers are needed by tests alone")
    cells, sentences = _told()
    assert list(cells) == RULES
    place = list(NETWORKS).index(name)
    for rule, said in column(name, _FEW).items():
        cell = cells[rule][place]
        assert ("" if cell == "yes" else sentences[int(cell) - 1]) == said, rule


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_page() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for network in NETWORKS.values():
            pytest.importorskip(network.needs)
        assert page({name: column(name) for name in NETWORKS}) == PAGE.read_text(encoding="utf-8")
