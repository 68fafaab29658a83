"""The commands; what each one does lies in the module of its name."""

from __future__ import annotations

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
from locallearn.cli.train import train
from locallearn.cli.tune import tune

COMMANDS = (train, predict, analyze, distill, replay, compare, tune, report, audit, bench, data, meters)
"""What the command line knows, in the order of the help."""
