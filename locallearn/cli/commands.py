"""The commands; what each one does lies in the module of its name."""

from __future__ import annotations

from collections.abc import Sequence

from locallearn.cli.analyze import analyze
from locallearn.cli.audit import audit
from locallearn.cli.bench import bench
from locallearn.cli.compare import compare
from locallearn.cli.data import data
from locallearn.cli.distill import distill
from locallearn.cli.meters import meters
from locallearn.cli.predict import predict
from locallearn.cli.replay import replay
from locallearn.cli.report import report
from locallearn.cli.settings import UsageError
from locallearn.cli.train import train
from locallearn.cli.tune import tune

COMMANDS = (train, predict, analyze, distill, replay, compare, tune, report, audit, bench, data, meters)
"""What the command line knows, in the order of the help."""

# Every command reads the section of its own name; these, beside it, what they need of another's.
_ALSO_READ = {
    "train": ("compare.mode", "compare.target", "compare.table", "compare.report"),  # the last two after a sweep
    "compare": ("tune.seeds",),  # which are never compared on
    "tune": ("compare",),  # it writes experiments and prints the command that compares them
}


def check_sections(command: str, words: Sequence[str]) -> None:
    """Refuse settings that another command reads and this one does not: they would change nothing.

    Raises:
        UsageError: names the setting.
    """
    sections = {known.__name__ for known in COMMANDS}
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        section, dot, _ = key.partition(".")
        if not dot or section not in sections or section == command:
            continue
        if not {key, section} & set(_ALSO_READ.get(command, ())):
            raise UsageError(f"{key} is a setting of locallearn {section}, which {command} does not read: take it out")
