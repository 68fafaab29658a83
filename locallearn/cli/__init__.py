"""The command line: composes the configuration, makes typed objects of it, and hands them to the library."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from locallearn.cli.commands import COMMANDS, check_sections
from locallearn.cli.mistakes import explain
from locallearn.cli.plans import say
from locallearn.cli.settings import UsageError, compose_settings
from locallearn.cli.terminal import completion, steady_streams

__all__ = ["UsageError", "main"]

_HELP = """\
locallearn: train networks without backpropagation through the whole network, and measure what that costs.

  locallearn compare                 train several algorithms on the same data, print a table, write a report
  locallearn train                   train one algorithm once and leave a record
  locallearn predict RUN             let a finished run predict: the test set, or inputs of your own
  locallearn analyze RUN             sparsity, ensembles and likeness of layers of finished runs
  locallearn distill RUN             smaller layers in place of a finished run's, solved in closed form, to every depth
  locallearn replay RUN              rebuild what a zeroth-order run trained from its trajectory, without data
  locallearn tune                    search settings on equal budgets, on validation data only
  locallearn report                  one HTML page from any records
  locallearn audit                   prove or refute what an algorithm claims about locality
  locallearn bench                   alternated speed and memory measurements
  locallearn data                    which data sets are here, and where files are looked for
  locallearn meters                  what this machine can measure of joules, how well, and why the rest is missing

Settings are GROUP=NAME or KEY=VALUE (Hydra); all but report, predict, analyze, distill and replay take the same ones:
  algorithm= dataset= net= optimizer= schedule= trainer= meter= logger= task= experiment=
  seed=0 data_dir=DIR runs_dir=runs trainer.max_epochs=60 trainer.accelerator=cpu optimizer.lr=1e-3
  compare.algorithms=[backprop,mono_forward] compare.seeds=[0,1,2] resume=FOLDER (train)
  init_from=FOLDER begins with the weights of a finished run's network
An algorithm to compare may carry settings: 'compare.algorithms=[backprop,"pepita(variant=hebbian,optimizer.lr=0.1)"]'
A first look in little time: dataset.limit_train=1000 trainer.max_epochs=2 compare.seeds=[0], and a smaller network

Examples:
  locallearn compare dataset=mnist compare.seeds=[0,1,2,3,4]
  locallearn train algorithm=forward_forward net.hidden=[500,500] seed=1
  locallearn train dataset=cora_ml algorithm=forward_gnn schedule=sequential
  locallearn train -m algorithm=backprop,mono_forward optimizer.lr=1e-3,3e-4

Options: --cfg prints the composed settings; -m sweeps (train); --debug shows tracebacks; --version;
  --figures writes figures as SVG and PDF, tables as CSV and LaTeX, --watch follows runs that go on (report);
  --json prints what meters found as JSON;
  --trust runs whatever a record's settings name (train resume=, predict, analyze, distill, replay)
Completion: eval "$(locallearn -sc install=bash)"   names of a group: locallearn train algorithm=?
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when all went well; 1 when a run failed or an audit refuted a claim; 2 for a user's mistake; 130 after Ctrl-C.
    """
    with steady_streams():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(words: list[str]) -> int:
    if words and words[0] in ("-sc", "--shell-completion", "-sc=install=bash"):
        return completion(words, [command.__name__ for command in COMMANDS])
    say.cache_clear()
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs what it raises, and explain() says it once
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        code, sentence = explain(error, words)
        print(f"locallearn: {sentence}", file=sys.stderr)
        folder = getattr(error, "run_folder", None)
        if folder is not None:
            print(folder)
        return code


def _dispatch(words: list[str]) -> int:
    known = {command.__name__: command for command in COMMANDS}
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if words[0] == "--version":
        from locallearn import __version__

        print(__version__)
        return 0
    name, *rest = words
    if name not in known:
        raise UsageError(f"there is no command {name!r}; the commands are {', '.join(known)}")
    if "-h" in rest or "--help" in rest:
        print(_HELP, end="")
        return 0
    check_sections(name, rest)
    if "--cfg" in rest:
        from omegaconf import OmegaConf

        cfg, _ = compose_settings([word for word in rest if word != "--cfg"])
        print(OmegaConf.to_yaml(cfg), end="")
        return 0
    return known[name](rest)
