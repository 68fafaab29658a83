"""Where a run ran: versions, source and machine."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGES = (
    "locallearn",
    "torch",
    "torchvision",
    "torch_geometric",
    "lightning",
    "hydra-core",
    "optuna",
    "codecarbon",
    "nvidia-ml-py",
    "scikit-learn",
    "numpy",
    "plotly",
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a run's numbers; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@functools.cache
def _source() -> tuple[str | None, bool | None]:
    package = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        # Settings of another repository, from inside a hook say, and programs that watch this one are left out.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        command = ["git", "-c", "core.fsmonitor=false", "-C", str(package), *words]
        quiet = {**environment, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=quiet)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed into somebody's project, it is not theirs
        commit = git("rev-parse", "HEAD")
        # What is imported as locallearn, whether git knows it yet or not; not what runs leave in a checkout.
        code = [f":(top){name}" for name in ("locallearn", "conf", "energy", "tasks")]
        return commit, bool(git("status", "--porcelain", "--", *code))
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None, None


def source() -> dict[str, Any]:
    """The code that runs: ``commit`` of the checkout of locallearn, and ``dirty``: whether its code was changed since.

    Both are ``None`` where locallearn is not run from a git checkout of its own: then its version says it. Looked up once
    per process.
    """
    commit, dirty = _source()
    return {"commit": commit, "dirty": dirty}


def hardware(gpus: Sequence[str] = ()) -> dict[str, Any]:
    """What the run ran on: ``cpu``, ``cores``, ``usable_cores``, ``memory_gib``, ``os``, ``machine``, ``gpus``.

    Neither the host's nor the user's name is in it.

    Args:
        gpus: model names of the accelerators used; this module asks no driver.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "memory_gib": _memory_gib(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "gpus": list(gpus),
    }


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
