"""Every mistake of the user's gets one sentence that names the right words, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from locallearn.cli.mistakes import explain
from locallearn.cli.plans import check_folder
from locallearn.cli.settings import UsageError
from tests.cli.conftest import Cli, Outcome

_ALGORITHMS = ("backprop", "deep_supervision", "forward_forward", "mono_forward")


def _is_one_sentence(outcome: Outcome, *wanted: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("locallearn: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    for word in wanted:
        assert word in outcome.err


_TRAIN: list[tuple[list[str], tuple[str, ...]]] = [
    # names
    (["algorithm=foo"], ("'foo'", *_ALGORITHMS)),
    (["dataset=foo"], ("'foo'", "digits", "mnist", "fashion_mnist", "cifar10", "cifar100")),
    (["net=foo"], ("'foo'", "mlp", "cnn")),
    (["optimizer=foo"], ("'foo'", "adam", "sgd")),
    (["schedule=foo"], ("'foo'", "joint", "sequential")),
    (["meter=foo"], ("'foo'", "all", "none")),
    (["logger=foo"], ("'foo'", "csv", "tensorboard", "wandb")),
    (["experiment=foo"], ("'foo'", "forward_forward_mnist")),
    (["algorithm=?"], _ALGORITHMS),
    (["dataset=null"], ("digits", "mnist")),
    (["algorithm._target_=nowhere.Foo"], ("algorithm", "nowhere.Foo")),
    (["scheduler={_target_:torch.optim.lr_scheduler.StepLR,step_size:10}"], ("scheduler", "_partial_:true")),
    (["algorithm=[backprop]"], ("algorithm=[backprop]", "compare.algorithms")),
    (["task=node_classification"], ("node_classification", "graph")),
    (
        ["schedule=sequential", "schedule.cache=true", "algorithm=forward_forward"],
        ("draws anew for every batch", "schedule.cache=false"),
    ),
    (["scheduler=foo"], ("scheduler", "'foo'", "_target_")),
    # settings that do not exist
    (["optimizer.lrr=1"], ("'optimizer.lrr'", "mean optimizer.lr?")),
    (["net=gcn", "net.conv_options.a.b=4"], ("'+net.conv_options.a.b=4'", "'net.conv_options={a:{b:4}}'")),
    (["dataset.limit_train.x=4"], ("there is no setting 'dataset.limit_train.x'",)),  # null, but no mapping
    (["sede=1"], ("'sede'", "mean seed?")),
    (["limit_train=100"], ("'limit_train'", "mean dataset.limit_train?")),  # the group left out, or another one
    (["epochs=3"], ("'epochs'", "mean trainer.max_epochs?")),
    (["trainer.lr=1"], ("'trainer.lr'", "mean optimizer.lr?")),
    (["trainer.limit_train_batches=3"], ("'trainer.limit_train_batches'", "mean dataset.limit_train?")),
    (["algorithm.predictionn=bp"], ("mean algorithm.prediction?",)),
    (["algorithm.negatives=foo"], ("'algorithm.negatives'", "there are algorithm.prediction")),
    (["algorithm=forward_forward", "algorithm.prediction=ff"], ("'algorithm.prediction'", "algorithm.negatives")),
    (["+trainer.foo=1"], ("'trainer.foo'", "gradient_clip_val")),
    (["+dataset.foo=1"], ("'dataset.foo'", "batch_size")),
    # overrides that cannot be read
    (["seed=[1"], ("'seed=[1'", "KEY=VALUE")),
    (["foo"], ("'foo'", "KEY=VALUE")),
    (["=3"], ("'=3'", "KEY=VALUE")),
    (["--bogus"], ("--bogus", "--help")),
    # numbers and ranges
    (["optimizer.lr=-1"], ("the optimizer cannot be made", "learning rate: -1")),
    (["trainer.max_epochs=0"], ("trainer.max_epochs is 0", "at least 1")),
    (["trainer.max_epochs=abc"], ("trainer.max_epochs is abc", "whole number")),
    (["trainer.max_epochs=1.5"], ("trainer.max_epochs is 1.5", "whole number")),
    (["trainer.max_epochs=true"], ("trainer.max_epochs is True", "whole number")),
    (["trainer.probe_samples=-1"], ("trainer.probe_samples is -1",)),
    (["trainer.checkpoint_s=0"], ("trainer.checkpoint_s is 0", "above 0")),
    (["trainer.gradient_clip_val=-1"], ("trainer.gradient_clip_val is -1", "above 0")),
    (["seed=-1"], ("seed is -1", "from 0")),
    (["seed=abc"], ("seed is abc", "whole number")),
    (["seed=true"], ("seed is True", "whole number")),
    (["net.hidden=[]"], ("hidden is []", "at least one")),
    (["net.hidden=[0]"], ("hidden is [0]", "positive")),
    (["net.hidden=[1.5]"], ("net.hidden is [1.5]", "whole number")),
    (["net.hidden=16"], ("net.hidden is 16", "list")),
    (["net.init=foo"], ("'foo'", "kaiming_uniform", "lecun_normal")),
    (["dataset.batch_size=0"], ("batch_size=0", "at least 1")),
    (["dataset.batch_size=abc"], ("dataset.batch_size is 'abc'", "whole number")),
    (["dataset.validation=1.5"], ("validation=1.5", "fraction")),
    (["algorithm=forward_forward", "algorithm.negatives=foo"], ("'foo'", "uniform", "hard")),
    (["algorithm=forward_forward", "algorithm.temperature=abc"], ("algorithm.temperature is 'abc'", "number")),
    (["optimizer.lr=-1"], ("-1",)),
    (["optimizer.lr=abc"], ("optimizer.lr is 'abc'", "number")),
    (["schedule.patience=0"], ("patience is 0", "null")),
    (["schedule.patience=1.5"], ("schedule.patience is 1.5", "whole number")),
    (["schedule.monitor=foo"], ("'foo'", "validation/loss")),
    (["meter.idle_s=abc"], ("meter.idle_s is abc", "seconds")),
    (["meter.cooldown_s=-1"], ("meter.cooldown_s is -1", "seconds")),
    (["meter=measured", "meter.sources.nvml.devices=[GPU-]"], ("meter.sources.nvml", "UUIDs")),
    # what does not go together
    (["schedule.cache=true"], ("cache", "joint")),
    (["algorithm=backprop", "schedule=sequential"], ("Backprop", "schedule=joint")),
    (["algorithm=deep_supervision", "schedule=sequential"], ("DeepSupervision", "schedule=joint")),
    (["compare.mode=foo"], ("'foo'", "own", "matched", "target")),
    (["compare.mode=target"], ("compare.target",)),
    (["task=link_prediction"], ("dataset.split", "do not go together")),
    # devices
    (["trainer.accelerator=foo"], ("foo", "cpu", "auto")),
    (["trainer.devices=2"], ("trainer.devices is 2", "1")),
    (["trainer.precision=16-mixed"], ("16-mixed", "32-true", "bf16-mixed")),
    (["trainer.matmul_precision=tf32"], ("tf32", "highest", "high", "medium")),
    (["trainer.matmul_precision=null"], ("None", "highest", "high", "medium")),
    (["trainer.precision=foo"], ("foo", "32-true")),
    (["trainer.compile=all"], ("trainer.compile is 'all'", "'blocks'")),
    (["trainer.compile_backend=foo"], ("trainer.compile_backend is 'foo'", "compile=blocks")),
    (["trainer.channels_last=1"], ("trainer.channels_last is 1", "true or false")),
    (["trainer.channels_last=true"], ("convolutions", "has none")),
    (
        ["algorithm=pepita", "trainer.compile=blocks", "trainer.compile_backend=eager"],
        ("Pepita never runs block 'layer1'",),
    ),
    (["+trainer.accumulate_grad_batches=2"], ("trainer.accumulate_grad_batches is 2", "batch_size")),
    (["+trainer.num_nodes=2"], ("trainer.num_nodes is 2", "one device")),
    (["+trainer.fast_dev_run=true"], ("trainer.fast_dev_run is True", "dataset.limit_train")),
    (["+trainer.overfit_batches=2"], ("trainer.overfit_batches is 2", "dataset.limit_train")),
    (["+trainer.barebones=true"], ("trainer.barebones is True",)),
    (["+trainer.strategy=ddp"], ("trainer.strategy is ddp", "LocalStrategy")),
    (["+trainer.callbacks=[]"], ("trainer.callbacks is []",)),
    (["+trainer.plugins=[]"], ("trainer.plugins is []", "trainer.precision")),
    (["+trainer.num_sanity_val_steps=2"], ("trainer.num_sanity_val_steps is 2",)),
    (["+trainer.limit_test_batches=0.1"], ("trainer.limit_test_batches is 0.1", "whole")),
    (["+trainer.limit_val_batches=0"], ("trainer.limit_val_batches is 0", "none of")),
    (["+trainer.reload_dataloaders_every_n_epochs=1"], ("trainer.reload_dataloaders_every_n_epochs is 1",)),
    (["trainer.check_val_every_n_epoch=0"], ("trainer.check_val_every_n_epoch is 0", "at least 1")),
    (["+trainer.max_steps=0"], ("trainer.max_steps is 0", "at least 1")),
    # schedulers
    (["scheduler_interval=batch"], ("scheduler_interval is batch", "epoch or step")),
    (["scheduler={_target_:torch.optim.lr_scheduler.StepLR,_partial_:true}"], ("StepLR lacks step_size",)),
    (
        ["scheduler={_target_:torch.optim.lr_scheduler.LambdaLR,_partial_:true}"],
        ("LambdaLR lacks lr_lambda", "hydra.utils.get_method"),
    ),
    (
        [
            "scheduler={_target_:torch.optim.lr_scheduler.OneCycleLR,_partial_:true,max_lr:0.1,total_steps:3}",
            "scheduler_interval=step",
        ],
        ("OneCycleLR ends after 3 steps", "total_steps to 21"),
    ),
    # what the first batch tells
    (["net=autoencoder", "net.hidden=[8]"], ()),
    # places
    (["resume=nowhere"], ("nowhere", "record.json")),
    (["runs_dir="], ("runs_dir", "folder")),
]


@pytest.mark.parametrize(("words", "wanted"), _TRAIN, ids=[" ".join(words) for words, _ in _TRAIN])
def test_train(words: list[str], wanted: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    _is_one_sentence(cli("train", *words), *wanted)
    assert list(tmp_path.iterdir()) == []  # no record of a run that never was


_COMPARE: list[tuple[list[str], tuple[str, ...]]] = [
    (["compare.seeds=[0,0]"], ("[0, 0]", "different")),
    (["compare.seeds=3"], ("compare.seeds is 3", "different whole numbers")),
    (["compare.seeds=[0,-1]"], ("compare.seeds is -1",)),
    (["seed=5"], ("seed=5", "compare.seeds")),
    (["algorithm=pepita", "compare.algorithms=[backprop]"], ("algorithm=pepita", "compare.algorithms")),
    (['compare.algorithms=[backprop,"pepita(seed=1)"]'], ("pepita(seed=1)", "compare.seeds")),
    (['compare.algorithms=[pepita,"pepita(algorithm.seed=1)"]'], ("pepita(algorithm.seed=1)", "compare.seeds")),
    (["compare.algorithms=[backprop,pepita]", "algorithm.sign=plus"], ("'algorithm.sign' of backprop",)),
    (["algorithm=pepita", "algorithm.sing=plus"], ("'algorithm.sing'", "algorithm.sign")),
    (["compare.target=0.8"], ("compare.target", "compare.mode=target")),
    (["compare.mode=target", "compare.target=97"], ("97", "0.97")),
    (["compare.algorithms=[backprop,nope]"], ("'nope'", *_ALGORITHMS)),
    (
        ["compare.algorithms=[backprop,local_heads(head=conv1,loss=predsim)]"],
        ("single ones", """'compare.algorithms=[backprop,"local_heads(head=conv1,loss=predsim)"]'"""),
    ),
    (['compare.algorithms=[backprop,"pepita(lr=1)"]'], ("'algorithm.lr'", "algorithm.variant, algorithm.sign")),
    # one experiment in two spellings
    (['compare.algorithms=[backprop,"backprop()"]'], ("'backprop' and 'backprop()' have the same settings",)),
    (['compare.algorithms=["backprop(accumulate=1)",backprop]'], ("'backprop(accumulate=1)' and 'backprop'",)),
    (
        ['compare.algorithms=[backprop,"backprop(dataset.split_seed=1)"]', "dataset.split_seed=${seed}"],
        ("have the same settings with seed 1: take one",),
    ),
    (
        ['compare.algorithms=["mono_forward(optimizer.lr=1e-2)","mono_forward(optimizer.lr=0.01)"]'],
        ("'mono_forward(optimizer.lr=1e-2)' and 'mono_forward(optimizer.lr=0.01)'",),
    ),
    (
        [
            'compare.algorithms=[pepita,"pepita(optimizer.lr=1)"]',
            'compare.overrides={pepita:["optimizer.lr=1.0"]}',
        ],
        ("'pepita' and 'pepita(optimizer.lr=1)'",),
    ),
    (
        [
            "compare.mode=matched",
            'compare.algorithms=[pepita,"pepita(schedule.patience=3)"]',
        ],  # nobody has patience there
        ("'pepita' and 'pepita(schedule.patience=3)'",),
    ),
    (["compare.algorithms=[]"], ("[]", "list")),
    (["compare.algorithms=backprop"], ("backprop", "list")),
    (["compare.mode=foo"], ("'foo'", "matched")),
    (["compare.mode=target"], ("compare.target",)),
    (["task=link_prediction"], ("dataset.split", "do not go together")),
    (["compare.overrides={nope:[seed=1]}"], ()),
    (['compare.overrides={nope:["optimizer.lr=1"]}'], ("'nope'", "compare.algorithms")),
    (['compare.overrides={mono_forward:["optimizer.lrr=1"]}'], ("'optimizer.lrr'",)),
    (["resume=nowhere"], ("resume", "train")),
    (["compare.resume=runs/x"], ("compare.resume is runs/x", "true or false")),
    # the second algorithm's mistake is told before the first one trains
    (["compare.algorithms=[mono_forward,backprop]", "schedule=sequential"], ("Backprop", "schedule=joint")),
]


@pytest.mark.parametrize(("words", "wanted"), _COMPARE, ids=[" ".join(words) for words, _ in _COMPARE])
def test_compare(words: list[str], wanted: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    _is_one_sentence(cli("compare", *words), *wanted)
    assert list(tmp_path.iterdir()) == []


_OTHERS: list[tuple[list[str], tuple[str, ...]]] = [
    (["foo"], ("'foo'", "train", "compare", "report", "audit", "bench", "data")),
    (["report", "nowhere"], ("nowhere",)),
    (["report", "--bogus"], ("--bogus",)),
    (["report", "."], ("no records",)),
    (["audit", "algorithm=foo"], ("'foo'", *_ALGORITHMS)),
    (["data", "foo"], ("'foo'", "KEY=VALUE")),
    (["bench", "bench.algorithms=[nope]"], ("'nope'", *_ALGORITHMS)),
    (["bench", 'bench.algorithms=[backprop,"backprop(accumulate=1)"]'], ("'backprop' and 'backprop(accumulate=1)'",)),
    (["tune", 'tune.algorithms=[backprop,"backprop()"]'], ("'backprop' and 'backprop()' have the same settings",)),
    # settings of another command
    (["train", "compare.seeds=[0,1]"], ("compare.seeds", "locallearn compare", "which train does not read")),
    (["train", "-m", "seed=0,1", "+tune.trials=3"], ("tune.trials", "locallearn tune", "which train does not read")),
    (["train", "resume=runs/x", "bench.steps=3"], ("bench.steps", "locallearn bench")),
    (["compare", "tune.trials=3"], ("tune.trials", "locallearn tune", "which compare does not read")),
    (["tune", "bench.algorithms=[backprop]"], ("bench.algorithms", "locallearn bench")),
    (["audit", "compare.mode=matched"], ("compare.mode", "which audit does not read")),
    (["report", "--cfg", "predict.part=test"], ("predict.part", "which report does not read")),
    (["report", "~compare.seeds"], ("compare.seeds", "which report does not read")),
    (["train", "compare.table=x.csv"], ("compare.table", "which train does not read but with -m: take it out")),
    # but not what is called like one
    (["report", "compare.old"], ("there is no folder compare.old",)),
    # sweeps are composed by Hydra itself, and speak the same way
    (["train", "-m", "algorithm=backprop,foo"], ("'foo'", *_ALGORITHMS)),
    (["train", "-m", "optimizer.lrr=1,2"], ("'optimizer.lrr'", "mean optimizer.lr?")),
    (["train", "-m", "seed=[1"], ("'seed=[1'", "KEY=VALUE")),
    (["train", "-m", "--bogus"], ("--bogus", "--help")),
    (["train", "-m", "seed=abc"], ("seed is abc",)),
]


@pytest.mark.parametrize(("words", "wanted"), _OTHERS, ids=[" ".join(words) for words, _ in _OTHERS])
def test_other_commands(words: list[str], wanted: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    _is_one_sentence(cli(*words), *wanted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(cli: Cli) -> None:
    _is_one_sentence(cli("train", "trainer.accelerator=cuda"), "trainer.accelerator=cuda", "cpu")


def test_missing_data_are_named_at_once(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", no_network)
    (tmp_path / "data").mkdir()
    outcome = cli("train", "dataset=mnist", "data_dir=data")
    _is_one_sentence(outcome, "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "data/images/MNIST/raw", "data_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_too_many_poolings(cli: Cli) -> None:
    from locallearn.cli import main

    assert main(["train", "net=cnn", "net.channels=[4,4,4,4]", "meter=none", "trainer.accelerator=cpu"]) == 2
    _is_one_sentence(cli("audit", "net=cnn", "net.channels=[4,4,4,4]"), "8x8", "at most 3")


def test_a_setting_of_another_net_is_answered_with_this_nets_settings(cli: Cli) -> None:
    _is_one_sentence(cli("audit", "net=cnn", "net.hidden=[16]"), "'net.hidden'", "net.channels")


def test_a_logger_that_is_not_installed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import lightning.pytorch.loggers.wandb as module

    class Missing:
        """What Lightning's availability flag is when a package is missing."""

        def __bool__(self) -> bool:
            return False

        def __str__(self) -> str:
            return "Requirement 'wandb>=0.12.10' not met."

    monkeypatch.setattr(module, "_WANDB_AVAILABLE", Missing())
    monkeypatch.setitem(sys.modules, "wandb", None)
    _is_one_sentence(cli("train", "logger=wandb"), "wandb is not installed", "pip install", "locallearn[")


def test_runs_dir_that_is_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("precious", encoding="utf-8")
    _is_one_sentence(cli("train"), "runs")
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "precious"


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A folder that the present user may read only; root becomes nobody for the test."""
    if os.name != "posix":
        pytest.skip("needs POSIX permissions")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(stat.S_IRWXU)


def test_runs_dir_that_cannot_be_written_to(cli: Cli, unwritable: Path) -> None:
    _is_one_sentence(cli("train", f"runs_dir={unwritable}"), str(unwritable), "runs_dir")
    _is_one_sentence(cli("train", f"runs_dir={unwritable / 'runs'}"), str(unwritable / "runs"), "runs_dir")


def test_debug_shows_the_traceback(cli: Cli) -> None:
    from locallearn.cli import UsageError

    with pytest.raises(UsageError, match="seed is -1"):
        cli("train", "--debug", "seed=-1")


def test_a_network_that_cannot_take_a_graph_is_refused_before_training(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("train", "dataset=karate_club", "net=mlp", "algorithm=backprop", f"runs_dir={tmp_path / 'runs'}")
    _is_one_sentence(outcome, "block 'layer1'", "cannot take")
    assert not (tmp_path / "runs").exists()


def test_a_copy_that_does_not_fit_is_named_by_where_it_was_going() -> None:
    """Lightning writes checkpoints to a temporary place first; it is the other one that is full."""
    code, sentence = explain(
        OSError(errno.ENOSPC, "No space left on device", "/tmp/x7", None, "runs/a/resume.ckpt"), []
    )
    assert code == 2
    assert "the disk is full: runs/a/resume.ckpt could not" in sentence
    assert "x7" not in sentence


@pytest.mark.parametrize("named", ["report.records=nowhere", "report.records=[nowhere]", "report.records=7"])
def test_one_folder_of_records_needs_no_brackets(cli: Cli, named: str) -> None:
    """A name is no list of its letters: the folder that is missing is told by its whole name."""
    _is_one_sentence(
        cli("report", named), f"there is no folder {named.partition('=')[2].strip('[]')} to read records from"
    )


def test_a_folder_that_was_mistyped_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One level may be missing, and in ``runs_dir``, which is made, any."""
    monkeypatch.chdir(tmp_path)
    runs = Path("no/runs")
    for file in (
        "t.csv",
        "new/t.csv",
        "../t.csv",
        "no/runs/t.csv",
        "no/runs/more/still/t.csv",
        f"{tmp_path}/new/t.csv",
    ):
        check_folder("compare.table", Path(file), runs)
    for file in ("new/more/t.csv", "no/t/t.csv", f"{tmp_path}/no/runs2/t.csv"):
        with pytest.raises(UsageError, match=rf"^compare.table is {file}, but there is no folder \S*(no|new): make it"):
            check_folder("compare.table", Path(file), runs)
    assert list(tmp_path.iterdir()) == []
