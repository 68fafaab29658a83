"""Settings of zeroth order: what they are where they are left out, and which do not go together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from locallearn.functional.zeroth_order import Noise, Shaping

Variant = Literal["spsa", "mezo", "fzoo", "eggroll", "qes"]
Decay = Literal["matrices", "all"]
Normalise = Literal["scalar_ema"]
Losses = Literal["global", "local"]

# eps, antithetic, shaping, noise and n where they are left out; the spread of fzoo's losses needs several
DEFAULTS: dict[str, tuple[float, bool, Shaping, Noise, int]] = {
    "spsa": (1e-3, True, "none", "gaussian", 1),
    "mezo": (1e-3, True, "none", "gaussian", 1),
    "fzoo": (1e-3, False, "zscore", "rademacher", 8),
    "eggroll": (1e-2, True, "zscore", "gaussian", 1),
    "qes": (0.5, True, "zscore", "gaussian", 1),
}
BETA2 = 0.999


def check(given: Mapping[str, Any]) -> None:
    """Refuse settings that do not exist, by themselves.

    Raises:
        ValueError: names the setting.
    """
    for name, kind, may_lack in (
        ("variant", Variant, False),
        ("decay", Decay, False),
        ("losses", Losses, False),
        ("shaping", Shaping, True),
        ("noise", Noise, True),
        ("normalise", Normalise, True),
    ):
        value = given[name]
        if value not in get_args(kind) and not (may_lack and value is None):
            raise ValueError(f"{name} is {value!r}, expected {', '.join(get_args(kind))}")
    for name, may_lack in (("n", True), ("rank", False), ("chunk", True), ("head_limit", True)):
        number = given[name]
        if not (type(number) is int and number >= 1) and not (may_lack and number is None):
            raise ValueError(f"{name} is {number!r}, expected a whole number of at least 1")
    eps, bits, trajectory = given["eps"], given["bits"], given["trajectory"]
    if eps is not None and not (_is_number(eps) and 0 < eps < math.inf):
        raise ValueError(f"eps is {eps!r}, expected a number above 0: how far weights are moved")
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}, expected a whole number from 2 to 8")
    for name, may_lack in (("antithetic", True), ("exact", False)):
        flag = given[name]
        if not (type(flag) is bool or (may_lack and flag is None)):
            raise ValueError(f"{name} is {flag!r}, expected true or false")
    if trajectory is not None and not (isinstance(trajectory, str) and trajectory):
        raise ValueError(f"trajectory is {trajectory!r}, expected the name of a file, run, or null")
    share, beta2, exponent = given["residual_decay"], given["beta2"], given["curvature_exponent"]
    if not (_is_number(share) and 0 <= share <= 1):
        raise ValueError(f"residual_decay is {share!r}, expected a share from 0 to 1")
    if not (_is_number(beta2) and 0 <= beta2 < 1):
        raise ValueError(f"beta2 is {beta2!r}, expected a share from 0 to below 1: what is kept of the running mean")
    if exponent is not None and not (_is_number(exponent) and 0 < exponent <= 1):
        raise ValueError(f"curvature_exponent is {exponent!r}, expected a number above 0, at most 1, or null")


def check_together(given: Mapping[str, Any]) -> None:
    """Refuse settings that do not go together, once those that were left out are filled in.

    Raises:
        ValueError: names them.
    """
    variant, n, antithetic, shaping = given["variant"], given["n"], given["antithetic"], given["shaping"]
    if variant == "fzoo" and (antithetic or shaping != "zscore"):
        raise ValueError(
            "variant=fzoo looks at one side and divides by the spread of the losses: leave antithetic and shaping out, or "
            "use variant=mezo"
        )
    if variant == "qes" and not antithetic:
        raise ValueError("variant=qes is written for both sides of a direction: leave antithetic out")
    if variant == "qes" and given["losses"] == "local":
        raise ValueError(
            "variant=qes moves codes of the network's matrices, and heads of losses=local have none: use losses=global, or "
            "another variant"
        )
    if shaping == "zscore" and (2 * n if antithetic else n) < 2:
        raise ValueError(
            f"n is {n} on one side, and shaping=zscore needs the spread of at least two losses: set n=2 or more"
        )
    if shaping == "sign" and not antithetic and n < 2:
        raise ValueError("n is 1 on one side: shaping=sign compares with the mean of all sides: set n=2 or more")
    if given["curvature_exponent"] is not None:
        _check_curvature(variant, antithetic, shaping)
    for name, default, idle, owner in (
        ("rank", 1, variant != "eggroll", "variant=eggroll"),
        ("chunk", None, variant != "eggroll" or given["losses"] == "local", "variant=eggroll with losses=global"),
        ("bits", 4, variant != "qes", "variant=qes"),
        ("residual_decay", 0.9, variant != "qes", "variant=qes"),
        ("beta2", BETA2, given["normalise"] is None, "normalise=scalar_ema"),
        ("head_limit", None, given["losses"] == "global", "losses=local"),
    ):
        if given[name] != default and idle:
            raise ValueError(f"{name} is {given[name]}, and only {owner} has a use for it: leave it out")


def _check_curvature(variant: str, antithetic: bool, shaping: str) -> None:
    why = None
    if not antithetic:
        why = f"variant={variant} looks at one side here"
    elif variant == "qes":
        why = "variant=qes leaves out moves at the border of its codes, so its two sides give none"
    elif shaping == "sign":
        why = "shaping=sign sends signs alone"
    if why is not None:
        raise ValueError(
            f"curvature_exponent weighs numbers by the second difference over both sides of a direction, and {why}: leave it "
            "out, or use variant=mezo"
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
