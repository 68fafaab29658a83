"""What a learning rule must pass, ours or a user's: the conformance suite and the plain loop it is measured against.

This package needs pytest, which is a development tool; ``import locallearn`` does not import it.
"""

import pytest

pytest.register_assert_rewrite("locallearn.testing.conformance")

from locallearn.testing.conformance import AlgorithmConformance  # noqa: E402 - asserts are rewritten on import
from locallearn.testing.loop import plain_loop  # noqa: E402

__all__ = ["AlgorithmConformance", "plain_loop"]
