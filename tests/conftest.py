"""What all tests share: options, marks, one thread, and where real data lie."""

from __future__ import annotations

import gc
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# Networks here are tiny: more threads are slower, and share two cores with the other test processes.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: give --run-slow to run it"))
        for mark, server in (("postgres", "PostgreSQL"), ("mariadb", "MariaDB")):
            if mark in item.keywords and mark not in config.getoption("-m"):
                item.add_marker(pytest.mark.skip(reason=f"starts a {server} server: give -m {mark} to run it"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def _pass_over() -> int:
    """Let garbage collections pass over what there is by now, which is packages almost alone; how many modules that are.

    Every run begins with a collection, which would look at their half a million objects again: that took half of the time
    of tests that train.
    """
    gc.collect()
    gc.freeze()
    return len(sys.modules)


passed_over = 0


def pytest_collection_finish() -> None:
    global passed_over
    passed_over = _pass_over()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    global passed_over
    if len(sys.modules) > passed_over + 200:  # a package that is imported where it is needed
        passed_over = _pass_over()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # packages look for what was left behind when Python ends


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Before every fixture: what a test draws from the global generators is the same whatever ran before it.
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Path:
    """The folder with real data sets, or a skip that says what is missing."""
    folder = os.environ.get("LOCALLEARN_DATA")
    if folder is None:
        pytest.skip("needs real data: set LOCALLEARN_DATA to a folder with images/ and graphs/")
    if not Path(folder).is_dir():
        pytest.skip(f"needs real data: LOCALLEARN_DATA is {folder}, which is no folder")
    return Path(folder)
