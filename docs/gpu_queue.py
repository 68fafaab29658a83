"""The rows of results.md and study.md that want a CUDA device: what is run, in order. gpu.py runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
BACKPROP_MNIST, MONO_FORWARD_MNIST = 0.00090855, 0.0013385
BACKPROP_FASHION, MONO_FORWARD_FASHION = 0.0013385, 0.00088176
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
    """Rules and backpropagation on the rules' own networks, with joules, in every mode; the most valuable first."""
    # Rates by `locallearn tune`, six trials each, constant as here (docs/study.md); those of CIFAR-10, Forward-Forward and
    # CaFo are their experiments'. A schedule as long as the cap would make the cap part of what a target costs.
    constant = "scheduler=null"
    mnist = _rates(backprop=BACKPROP_MNIST, mono_forward=MONO_FORWARD_MNIST)
    fashion = _rates(backprop=BACKPROP_FASHION, mono_forward=MONO_FORWARD_FASHION)
    adam = (
        'compare.overrides={backprop:["optimizer=adam","~optimizer.momentum","optimizer.weight_decay=0",'
        f'"optimizer.lr={BACKPROP_MNIST}"]}}'
    )
    mono, forward, cafo = ["backprop", "mono_forward"], ["backprop", "forward_forward"], ["backprop", "cafo"]
    target, own, matched = (f"compare.mode={mode}" for mode in ("target", "own", "matched"))
    grey, every = "dataset.name=fashion_mnist", "trainer.check_val_every_n_epoch=1"
    patience = ("schedule.patience=5", "trainer.max_epochs=60", every)

    def pair(experiment: str, rules: Sequence[str], *settings: str) -> Words:
        return compared(experiment, rules, *METERED, *settings, seeds=THREE)

    rows = [
        ("mnist_target", 140, ("mono_forward_mnist", mono, constant, mnist, target, "compare.target=0.98")),
        ("cifar10_target", 80, ("mono_forward_cifar10", mono, constant, target, "compare.target=0.55")),
        ("fashion_target", 140, ("mono_forward_mnist", mono, constant, grey, fashion, target, "compare.target=0.88")),
        ("ff_target", 200, ("forward_forward_mnist", forward, adam, target, "compare.target=0.95")),
        ("cafo_target", 200, ("cafo_cifar10_ce", cafo, "trainer.max_epochs=25", every, target, "compare.target=0.62")),
        ("mnist_own", 300, ("mono_forward_mnist", mono, constant, mnist, own, *patience)),
        ("cifar10_own", 300, ("mono_forward_cifar10", mono, constant, own, *patience)),
        ("fashion_own", 300, ("mono_forward_mnist", mono, constant, grey, fashion, own, *patience)),
        ("ff_own", 400, ("forward_forward_mnist", forward, adam, constant, own, *patience)),
        ("cafo_own", 400, ("cafo_cifar10_ce", cafo, own, *patience)),
        ("ff_matched", 300, ("forward_forward_mnist", forward, adam, matched, "trainer.max_epochs=20")),
        ("cafo_matched", 300, ("cafo_cifar10_ce", cafo, matched, "trainer.max_epochs=10", every)),
        (
            "cafo_fashion_target",
            200,
            ("cafo_cifar10_ce", cafo, grey, "trainer.max_epochs=30", every, target, "compare.target=0.87"),
        ),
    ]
    return [(name, seconds, pair(*words)) for name, seconds, words in rows]


def _rates(**rates: float) -> str:
    """A learning rate for every rule."""
    return "compare.overrides={" + ",".join(f'{rule}:["optimizer.lr={rate}"]' for rule, rate in rates.items()) + "}"


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
            compared(
                "mono_forward_mnist", mono, *METERED, "compare.mode=matched", "trainer.max_epochs=12", seeds=THREE
            ),
            alone=True,
        ),
        Entry(
            "joules_cifar10",
            145,
            compared("mono_forward_cifar10", mono, *METERED, "compare.mode=matched", seeds=THREE),
            alone=True,
        ),
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
