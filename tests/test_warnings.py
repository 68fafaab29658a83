"""Whose warnings end a test: ours do, other people's do not."""

from __future__ import annotations

import pytest


def _warn_in(module: str) -> None:
    exec("import warnings; warnings.warn('old', DeprecationWarning, stacklevel=1)", {"__name__": module})


@pytest.mark.parametrize("module", ["locallearn.algorithms.base", "locallearn", "tests.test_warnings"])
def test_a_warning_in_our_own_modules_is_an_error(module: str) -> None:
    with pytest.raises(DeprecationWarning):
        _warn_in(module)


@pytest.mark.parametrize("module", ["torch_geometric.inspector", "lightning.pytorch.trainer", "__main__"])
def test_a_warning_in_somebody_elses_module_is_not(module: str) -> None:
    _warn_in(module)
