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
    "train": ("compare.mode", "compare.target"),
    "compare": ("tune.seeds",),  # which are never compared on
    "tune": ("compare",),  # it writes experiments and prints the command that compares them
}
_OF_SWEEPS = ("compare.table", "compare.report")  # train -m ends as a comparison does


def check_sections(command: str, words: Sequence[str]) -> None:
    """Refuse settings that another command reads and this one does not: they would change nothing.

    Raises:
        UsageError: names the setting.
    """
    sections = {known.__name__ for known in COMMANDS}
    read = set(_ALSO_READ.get(command, ()))
    if command == "train" and not {"-m", "--multirun"}.isdisjoint(words):
        read |= set(_OF_SWEEPS)
    for word in words:
        key, equals, _ = word.lstrip("+~").partition("=")
        section, dot, _ = key.partition(".")
        setting = dot and (equals or word.startswith("~"))  # a folder may be called compare.old
        if not setting or section not in sections or section == command or {key, section} & read:
            continue
        also = " but with -m" if command == "train" and key in _OF_SWEEPS else ""
        raise UsageError(
            f"{key} is a setting of locallearn {section}, which {command} does not read{also}: take it out"
        )
