"""The rows of results.md that want a CUDA device, as one queue with a time limit.

    LOCALLEARN_DATA=data python docs/gpu.py --list                 what there is, in order, with estimated seconds
    LOCALLEARN_DATA=data python docs/gpu.py --limit 570            as much of it as ten minutes hold, most valuable first
    LOCALLEARN_DATA=data python docs/gpu.py --only joules_mnist    these entries
    python docs/gpu.py --tiny --data digits --accelerator cpu      a rehearsal: two steps of everything

Entries that measure seconds or joules run alone, one after another; then come those that ask for accuracies only, several at a
time, on one device. An entry that takes twice its estimate is stopped as by Ctrl-C, and so is everything at the limit: the
same command again takes over what is finished and goes on with the rest. Records are in OUT/records, one folder per entry,
outputs in OUT/logs, and OUT/records.tar.gz holds them all without weights: copy them to docs/records/.
Needs locallearn importable: installed, or its unpacked wheel on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Words = tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One command of the queue.

    Attributes:
        name: of its folder.
        seconds: how long it takes on one H100, by itself; estimated where it never ran.
        words: of ``locallearn``; places and device are added.
        alone: measures seconds or joules, so nothing may run beside it.
    """

    name: str
    seconds: int
    words: Words
    alone: bool = False


def compared(experiment: str, rules: Sequence[str], *settings: str, seeds: str = "0") -> Words:
    """A comparison of rules, each written as in ``compare.algorithms``."""
    quoted = ",".join(f'"{rule}"' for rule in rules)
    return (
        "compare",
        f"experiment={experiment}",
        f"compare.algorithms=[{quoted}]",
        f"compare.seeds=[{seeds}]",
        *settings,
    )


def accuracy(experiment: str, rules: Sequence[str], *settings: str, seeds: str = "0") -> Words:
    """A comparison whose seconds and joules nobody reads, because others run beside it."""
    quiet = ("meter=none", "meter.warmup_steps=0", "trainer.probe_samples=0", "keep_model=false")
    return compared(experiment, rules, *quiet, *settings, seeds=seeds)


LIGHT = "head=conv1,loss=predsim,similarity_side=8"
# Fast recipe for ResNet-18, the same for every rule: Muon on convolutions, smoothed labels, mirrored crops.
FAST = (
    *(
        "optimizer=muon",
        "~optimizer.nesterov",
        "optimizer.lr=0.02",
        "optimizer.momentum=0.95",
        "optimizer.weight_decay=0.01",
    ),
    *("optimizer.sgd_weight_decay=5e-4", "task.label_smoothing=0.2", "task.views=2", "dataset.batch_size=512"),
    *("dataset.augment.padding_mode=reflect", "trainer.check_val_every_n_epoch=5", "trainer.channels_last=true"),
)
METERED = ("meter=measured", "meter.idle_s=3", "trainer.probe_samples=0", "keep_model=false")
THREE = "0,1,2"
CELLS = [(target, guess) for target in ("global", "local", "next") for guess in ("random", "local", "ntk")]
# An estimate along a random direction of the activities is far longer than the gradient: a rate of its own.
RATES = {("activities", "random"): 1e-4}


def guesses(space: str) -> Words:
    """The table of targets and guesses in one space."""
    rules = [
        f"forward_gradient(perturb={space},target={target},guess={guess},optimizer.lr={RATES.get((space, guess), 1e-2)})"
        for target, guess in CELLS
    ]
    return accuracy("forward_gradient_cifar10_guesses", rules)


def moonshot(rule: str) -> Words:
    """One arm of ResNet-18 with the fast recipe, thirty epochs."""
    return accuracy("backprop_cifar10_resnet18", [rule], *FAST, "trainer.max_epochs=30")


def _study() -> list[tuple[str, int, Words]]:
    """Rules and backpropagation on the rules' own networks, with joules: to a target first, then to their own end."""
    # Rates by `locallearn tune`, six trials each (docs/study.md); those of CIFAR-10 and of CaFo are the experiments'.
    tuned = 'compare.overrides={backprop:["optimizer.lr=0.0013385"],mono_forward:["optimizer.lr=0.0088399"]}'
    adam = (
        'compare.overrides={backprop:["optimizer=adam","~optimizer.momentum","optimizer.weight_decay=0",'
        '"optimizer.lr=0.0013385"]}'
    )
    mono, forward = ["backprop", "mono_forward"], ["backprop", "forward_forward"]
    target, own = "compare.mode=target", ("compare.mode=own", "scheduler=null", "schedule.patience=5")
    every = "trainer.check_val_every_n_epoch=1"
    grey = ("dataset.name=fashion_mnist", "trainer.max_epochs=30", every)

    def pair(experiment: str, rules: Sequence[str], *settings: str) -> Words:
        return compared(experiment, rules, *METERED, *settings, seeds=THREE)

    return [
        ("cifar10_target", 80, pair("mono_forward_cifar10", mono, target, "compare.target=0.58")),
        ("mnist_target", 140, pair("mono_forward_mnist", mono, tuned, target, "compare.target=0.98")),
        ("ff_target", 200, pair("forward_forward_mnist", forward, adam, target, "compare.target=0.95")),
        ("cafo_target", 200, pair("cafo_cifar10_ce", ["backprop", "cafo"], *grey, target, "compare.target=0.87")),
        ("mnist_own", 300, pair("mono_forward_mnist", mono, tuned, *own)),
        ("cifar10_own", 300, pair("mono_forward_cifar10", mono, *own)),
    ]


def queue() -> list[Entry]:
    """Everything, the most valuable first."""
    resnet = ("net=resnet18", "dataset=cifar10", "dataset.drop_last=true", "trainer.precision=bf16-mixed")
    arms = (f'"local_heads({LIGHT},net.cuts=B)"', '"backprop(checkpoint=auto,net.cuts=units)"')
    step = (f"bench.algorithms=[backprop,{','.join(arms)}]", "bench.steps=20", "bench.rounds=5")
    mono, forward, last = ["backprop", "mono_forward"], ["forward_forward"], "trainer.channels_last=true"
    heads = ["local_heads(head=conv1,loss=predsim)", "local_heads(head=mirror,width=0.25)"]
    supervised = ["mono_forward", "scalable_ff", "deep_supervision"]
    ten = "trainer.max_epochs=10"
    return [
        # -- seconds, bytes, joules: alone ---------------------------------------------------------------------------------
        Entry("resnet18_step", 30, ("bench", *resnet, "dataset.batch_size=512", last, *step), alone=True),
        Entry(
            "joules_mnist",
            145,
            compared("mono_forward_mnist", mono, *METERED, "trainer.max_epochs=12", seeds=THREE),
            alone=True,
        ),
        Entry("joules_cifar10", 145, compared("mono_forward_cifar10", mono, *METERED, seeds=THREE), alone=True),
        *(Entry(f"study_{name}", seconds, words, alone=True) for name, seconds, words in _study()),
        # -- small grey images: the longest first --------------------------------------------------------------------------
        Entry("ff_4x2000", 300, accuracy("forward_forward_mnist_4x2000", forward)),
        Entry("ff_4x2000_unsupervised", 300, accuracy("forward_forward_mnist_unsupervised", forward)),
        *(Entry(f"ff_3x1000_s{s}", 280, accuracy("forward_forward_mnist", forward, seeds=str(s))) for s in range(5)),
        Entry("mono_forward_mnist_cnn", 120, accuracy("mono_forward_mnist_cnn", ["mono_forward"], seeds=THREE)),
        Entry(
            "cafo_dfa_fashion", 150, accuracy("cafo_fashion_mnist_dfa", ["cafo"], "trainer.max_epochs=9", seeds=THREE)
        ),
        *(
            Entry(f"collaboration_{name}", 200, accuracy("layer_collaboration_mnist", [rule], ten, seeds=THREE))
            for name, rule in (
                ("all", "layer_collaboration(gamma=all)"),
                ("previous", "layer_collaboration(gamma=previous)"),
                ("none", "forward_forward(skip_first=false)"),
            )
        ),
        # -- CIFAR-10 ------------------------------------------------------------------------------------------------------
        Entry("resnet18_sgd", 200, accuracy("backprop_cifar10_resnet18", ["backprop", *heads], last)),
        Entry("resnet18_adam", 200, accuracy("mono_forward_cifar10_resnet18", supervised, last)),
        Entry("moonshot_light_b", 150, moonshot(f"local_heads({LIGHT},net.cuts=B)")),
        Entry("moonshot_backprop", 150, moonshot("backprop")),
        Entry("moonshot_mirror_a", 150, moonshot("local_heads(head=mirror,width=0.5,net.cuts=A)")),
        Entry("guesses_weights", 200, guesses("weights")),
        Entry("mono_forward_cifar10_cnn", 150, accuracy("mono_forward_cifar10_cnn", ["mono_forward"])),
        Entry("backprop_cifar10_cnn", 150, accuracy("mono_forward_cifar10_cnn", ["backprop"])),
        Entry("cafo_ce", 100, accuracy("cafo_cifar10_ce", ["cafo"], "trainer.max_epochs=25", seeds=THREE)),
        Entry("cafo_dfa_cifar10", 250, accuracy("cafo_cifar10_dfa", ["cafo"], "trainer.max_epochs=50")),
        Entry("guesses_activities", 250, guesses("activities")),
        Entry("lg_fg_a_cifar10", 250, accuracy("lg_fg_a_cifar10", ["forward_gradient"], "trainer.max_epochs=60")),
        Entry("moonshot_light_a", 150, moonshot(f"local_heads({LIGHT},net.cuts=A)")),
        Entry("moonshot_supervised_b", 150, moonshot(f"deep_supervision({LIGHT},net.cuts=B)")),
        Entry("moonshot_mirror_b", 150, moonshot("local_heads(head=mirror,width=0.25,net.cuts=B)")),
        Entry("moonshot_half_a", 150, moonshot(f"local_heads({LIGHT},keep=0.5,net.cuts=A)")),
        Entry("moonshot_half_random_a", 150, moonshot(f"local_heads({LIGHT},keep=0.5,keep_by=random,net.cuts=A)")),
        *(
            Entry(f"ladder_{name}", 200, moonshot(f"local_heads({head},net.cuts=A)"))
            for name, head in (
                ("conv1", "head=conv1"),
                ("mirror_quarter", "head=mirror,width=0.25"),
                ("mirror", "head=mirror"),
                ("dgl", "head=dgl"),
                ("auglocal", "head=auglocal,depth=2"),
                ("movement", "head=conv1,movement=0.01"),
            )
        ),
        *_long(),
    ]


def _long() -> list[Entry]:
    """What takes more than ten minutes, or was never asked for first."""
    five, many = "0,1,2,3,4", 2000
    pfa, fa, cc = "product_feedback_alignment", "feedback_alignment", "counter_current"
    mixers = [
        "forward_gradient",
        "forward_gradient(losses=global,mask=true)",
        "backprop",
        "forward_gradient(perturb=weights)",
    ]
    spaces = [f"forward_gradient(perturb={space})" for space in ("weights", "activities")]
    rows: list[tuple[str, Words]] = [
        ("mono_forward_cifar10", accuracy("mono_forward_cifar10", ["backprop", "mono_forward"], seeds=five)),
        ("predsim_mnist", accuracy("local_heads_mnist_vgg8b", ["local_heads", "backprop(net.activation=relu)"])),
        ("predsim_cifar10", accuracy("local_heads_cifar10_vgg8b", ["local_heads", "backprop(net.activation=relu)"])),
        ("cafo_dfa_cifar10_long", accuracy("cafo_cifar10_dfa", ["cafo"], seeds=THREE)),
        ("lg_fg_a_cifar10_long", accuracy("lg_fg_a_cifar10", mixers)),
        ("guesses_resnet18", accuracy("forward_gradient_cifar10_resnet18", [*spaces, "backprop"])),
        ("resnet20_pfa", accuracy(f"{pfa}_cifar10", [pfa, f"{pfa}(orthogonal=true)"])),
        ("resnet20_fa", accuracy(f"{fa}_cifar10", [f"{fa}(mode=fa)", f"{fa}(mode=usf)", "backprop"])),
        *((f"{cc}_{data}_cnn", accuracy(f"{cc}_{data}_cnn", [cc])) for data in ("cifar10", "cifar100")),
        *((f"pepita_{data}_cnn", accuracy(f"pepita_{data}_cnn", ["pepita"])) for data in ("cifar10", "cifar100")),
        (f"{cc}_autoencoder", accuracy(f"{cc}_cifar10_autoencoder", [cc])),
        *(
            (f"{rule}_{data}", accuracy(f"{rule}_{data}", [rule], seeds=five))
            for rule in (cc, "pepita")
            for data in ("mnist", "cifar10", "cifar100")
        ),
        (f"{cc}_fashion_mnist", accuracy(f"{cc}_fashion_mnist", [cc], seeds=five)),
    ]
    return [Entry(name, many, words) for name, words in rows]


def main(words: Sequence[str] | None = None) -> int:
    """Runs the queue; 1 if an entry failed."""
    said = _arguments(words)
    entries = [entry for entry in queue() if not said.only or entry.name in said.only]
    unknown = set(said.only) - {entry.name for entry in entries}
    if unknown:
        print(f"gpu.py: there is no entry {sorted(unknown)}; --list shows them", file=sys.stderr)
        return 2
    if said.list:
        for entry in entries:
            print(f"{entry.name:32} {entry.seconds:5} s {'alone' if entry.alone else '':6} {' '.join(entry.words)}")
        return 0
    return _Queue(said).run(entries)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of records and outputs")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="entries at a time")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="names, separated by commas")
    parser.add_argument("--accelerator", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two steps of everything on few samples")
    parser.add_argument("--data", help="in a rehearsal: this data set instead of every other one")
    parser.add_argument("--list", action="store_true", help="show the queue and do nothing")
    return parser.parse_args(words)


def rehearsed(words: Words, data: str | None = None) -> Words:
    """The same command on few samples, of another data set if need be."""
    words = words if data is None else (*words, f"dataset.name={data}")
    if words[0] == "bench":
        return (*words, "bench.steps=1", "bench.rounds=1", "dataset.batch_size=8", "dataset.limit_train=64")
    few = (
        "dataset.limit_train=64",
        "dataset.validation=0.1",
        "dataset.batch_size=16",
        "trainer.max_epochs=1",
        "+trainer.max_steps=2",
    )
    return (*words, *few, "compare.seeds=[0]", "+trainer.limit_val_batches=1", "meter.idle_s=0")


class _Queue:
    """Runs entries as processes until the time is up."""

    def __init__(self, said: argparse.Namespace) -> None:
        self._said = said
        self._out: Path = said.out.absolute()
        self._until = time.monotonic() + said.limit
        self._failed: list[str] = []
        for name in ("records", "logs", "done"):
            (self._out / name).mkdir(parents=True, exist_ok=True)

    def run(self, entries: Sequence[Entry]) -> int:
        waiting = [entry for entry in entries if not (self._out / "done" / entry.name).exists()]
        alone = [entry for entry in waiting if entry.alone and not self._said.tiny]
        for entry in alone:
            self._wait([self._started(entry)])
        running: list[_Running | None] = []
        for entry in [entry for entry in waiting if entry not in alone]:
            while len(running) >= self._said.workers:
                self._wait(running, every=False)
            running.append(self._started(entry))
        self._wait(running)
        self._archive()
        left = [entry.name for entry in waiting if not (self._out / "done" / entry.name).exists()]
        print(
            f"done: {len(waiting) - len(left)}; left: {', '.join(left) or 'nothing'}; failed: {self._failed or 'nothing'}"
        )
        return 1 if self._failed else 0

    def _started(self, entry: Entry) -> _Running | None:
        left = self._until - time.monotonic()
        if left < min(20, entry.seconds / 2):
            return None
        words = rehearsed(entry.words, self._said.data) if self._said.tiny else entry.words
        resumed = ("compare.resume=true",) if words[0] == "compare" else ()
        places = (f"runs_dir={self._out / 'records' / entry.name}", f"trainer.accelerator={self._said.accelerator}")
        command = [sys.executable, "-m", "locallearn.cli", *words, *resumed, *places]
        log = (self._out / "logs" / f"{entry.name}.txt").open("w", encoding="utf-8")
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **one}, start_new_session=True
        )
        return _Running(entry, process, time.monotonic())

    def _wait(self, running: list[_Running | None], every: bool = True) -> None:
        """Until one of them has ended, or all."""
        running[:] = [one for one in running if one is not None]
        while running:
            for one in list(running):
                allowed = min(self._until, one.started + 2 * one.entry.seconds)
                if one.process.poll() is None and time.monotonic() > allowed:
                    one.stop()
                if one.process.poll() is not None:
                    running.remove(one)
                    self._ended(one)
                    if not every:
                        return
            time.sleep(0.2)

    def _ended(self, one: _Running) -> None:
        code = one.process.returncode
        print(
            f"{one.entry.name}: {time.monotonic() - one.started:.0f} s (estimated {one.entry.seconds}), exit code {code}",
            flush=True,
        )
        if code == 0:
            (self._out / "done" / one.entry.name).touch()
        elif code not in (130, -signal.SIGINT, -signal.SIGKILL):
            self._failed.append(one.entry.name)
            print((self._out / "logs" / f"{one.entry.name}.txt").read_text(encoding="utf-8")[-1500:], flush=True)

    def _archive(self) -> None:
        with tarfile.open(self._out / "records.tar.gz", "w:gz") as archive:
            for folder in ("logs", "records"):
                for path in sorted((self._out / folder).rglob("*")):
                    if path.is_file() and path.suffix not in (".pt", ".ckpt", ".html", ".lock"):
                        archive.add(path, path.relative_to(self._out))


@dataclass
class _Running:
    entry: Entry
    process: subprocess.Popen[bytes]
    started: float
    stopped: float | None = None

    def stop(self) -> None:
        """As by Ctrl-C; twenty seconds later for good."""
        if self.stopped is None:
            self.stopped = time.monotonic()
            os.killpg(self.process.pid, signal.SIGINT)
        elif time.monotonic() > self.stopped + 20:
            os.killpg(self.process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
