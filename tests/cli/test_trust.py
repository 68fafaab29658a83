"""A record may come from anybody: what its settings name is not run unless it is a part that runs are made of."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import locallearn
from locallearn.cli import UsageError
from locallearn.cli.trust import check_trusted
from tests.cli.conftest import Cli

ROOT = Path(__file__).parents[2]
_OWN = sorted(
    {
        target
        for path in (ROOT / "conf").rglob("*.yaml")
        for target in re.findall(r"_target_: ([\w.]+)", path.read_text(encoding="utf-8"))
    }
)
_IMPORTS = {"locallearn.local.factory"}  # runs what its argument names
_REMOTE = {
    "lightning.pytorch.loggers.WandbLogger",
    "lightning.pytorch.loggers.MLFlowLogger",
    "aim.pytorch_lightning.AimLogger",
}
_LAYERS = [
    "torch.optim.RMSprop",
    "torch.optim.adam.Adam",
    "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "torch.nn.ReLU",
    "torch.nn.modules.activation.GELU",
    "torch_geometric.nn.GCNConv",
    "torch_geometric.nn.conv.gat_conv.GATConv",
]
_EVIL = [
    *_IMPORTS,
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.Popen",
    "pathlib.Path",
    "pathlib.Path.write_text",
    "torch.load",
    "torch.hub.load",
    "torch.save",
    "torch.utils.data.DataLoader",
    "torch.optim.optimizer.torch.load",
    "torch.optim.lr_scheduler.warnings.warn",
    "torch.nn.modules.module.torch.load",
    "torch.nn.functional.torch.load",
    "torch.nn.parallel.DistributedDataParallel",
    "torch.nn.Module.apply",
    "torch.nn.modules.module.register_module_forward_hook",
    "lightning.pytorch.loggers.WandbLogger",
    "lightning.pytorch.loggers.mlflow.MLFlowLogger",
    "lightning.pytorch.loggers.csv_logs.os.system",
    "lightning.pytorch.Trainer",
    "hydra.utils.get_method",
    "hydra.utils.get_class",
    "hydra.utils.call",
    "hydra.utils.instantiate",
    "hydra._internal.utils._locate",
    "locallearn.load",
    "locallearn.cli.main",
    "locallearn.cli.saved.load",
    "locallearn.cli.train.os.system",
    "locallearn.cli.train.train",
    "locallearn.cli.trust.importlib.import_module",
    "locallearn.records.contextlib.suppress",
    "locallearn.records.write_file",
    "locallearn.records.RunFolder.create",
    "locallearn.records.subprocess.run",
    "locallearn.study.train.run",
    "locallearn.tasks.graphs.torch.load",
    "locallearn.tasks.graphs._load_file",
    "locallearn.tasks.graphs.load_graph",
    "locallearn.tasks.images.load_images",
    "locallearn.tasks.images.Path",
    "locallearn.tasks._image_files.pickle.load",
    "locallearn.nets.initialise",
    "locallearn.nets.blocks.evaluating",
    "locallearn.nets.mlp.__globals__",
    "locallearn.nets.mlp.__call__",
    "locallearn.energy._rapl.Path",
    "locallearn.algorithms",
    "locallearn.algorithms.base.ABC",
    "locallearn.algorithms.Algorithm.attach",
    "locallearn.algorithms.base.nn.Module",
    "locallearn.strategies.local.make_optimizers",
    "locallearn.algorithms..Backprop",
    "locallearn.algorithms.Backprop ",
    "locallearn.algorithms.Backprop\nos.system",
    "locallearnx.algorithms.Backprop",
    "torch_geometric.nn.Sequential",
    "torch_geometric.nn.models.GCN",
    "torch_geometric.datasets.Planetoid",
    "",
    "Backprop",
    ["os.system"],
    {"_target_": "os.system"},
    7,
    None,
]


@pytest.mark.parametrize("target", [target for target in _OWN if target not in _REMOTE | _IMPORTS] + _LAYERS)
def test_what_runs_are_made_of_needs_no_trust(target: str) -> None:
    check_trusted({"part": {"_target_": target, "_partial_": True}}, "RUN", trust=False)


@pytest.mark.parametrize("target", _EVIL, ids=str)
def test_what_a_record_has_no_business_to_name_is_named(target: Any) -> None:
    evil = {"_target_": target, "value": 1}
    for config in (
        {"net": evil},
        {"trainer": {"deep": [[{"er": [1, {"and": evil}]}]]}},
        {"optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "foreach": {"x": evil}}},
    ):
        with pytest.raises(UsageError, match="add --trust") as caught:
            check_trusted(config, "RUN", trust=False)
        assert repr(target) in str(caught.value)
        check_trusted(config, "RUN", trust=True)


def test_nothing_outside_is_imported_to_find_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "innocent.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UsageError, match=r"'innocent\.Net' as net"):
        check_trusted({"net": {"_target_": "innocent.Net"}}, "RUN", trust=False)
    assert not (tmp_path / "ran").exists()
    assert "innocent" not in sys.modules


@pytest.mark.parametrize("key", ["_args_", "_recursive_", "_call_"])
def test_keys_that_change_what_is_called_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match=rf"net\.{key}"):
        check_trusted({"net": {"_target_": "locallearn.nets.mlp", key: [1]}}, "RUN", trust=False)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("config", [{"a": {"b": ["${oc.env:HOME}"]}}, {"a": "x${x}"}, {"${oc.env:A}": 1}])
def test_nothing_is_resolved_out_of_a_record(config: dict[str, Any], trust: bool) -> None:
    with pytest.raises(UsageError, match="not resolved"):
        check_trusted(config, "RUN", trust)


def _with(folder: Path, change: Any, status: str) -> None:
    path = folder / "record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record["config"])
    path.write_text(json.dumps({**record, "status": status}), encoding="utf-8")


def test_neither_resume_nor_predict_nor_load_runs_what_a_record_says(cli: Cli, tmp_path: Path) -> None:
    folder = cli("train", "dataset.limit_train=64").folder
    ran = tmp_path / "ran"

    def evil(config: dict[str, Any]) -> None:
        config["scheduler"] = {
            "_target_": "pathlib.Path.touch",
            "self": {"_target_": "pathlib.Path", "_args_": [str(ran)]},
        }

    _with(folder, evil, "interrupted")
    count = len(list((tmp_path / "runs").iterdir()))
    refused = cli("train", f"resume={folder}")
    assert refused.code == 2
    assert "'pathlib.Path.touch' as scheduler" in refused.err
    assert len(refused.err.splitlines()) == 1
    _with(folder, lambda config: None, "done")
    refused = cli("predict", str(folder))
    assert refused.code == 2
    assert "'pathlib.Path.touch' as scheduler" in refused.err
    with pytest.raises(UsageError, match=r"pathlib\.Path\.touch"):
        locallearn.load(folder)
    assert not ran.exists()
    assert len(list((tmp_path / "runs").iterdir())) == count
    _with(folder, lambda config: config.update(scheduler=None, data_dir="${oc.env:HOME}"), "done")
    assert "data_dir: '${oc.env:HOME}'" in cli("predict", str(folder), "--trust").err
    # A word of the user's own is: this is a rule of records, not of settings.
    _with(
        folder,
        lambda config: config.update(data_dir=None, scheduler={"_target_": "collections.Counter", "_partial_": True}),
        "done",
    )
    assert cli("predict", str(folder)).code == 2
    trusted = cli("predict", str(folder), "--trust")
    assert trusted.code == 0, trusted.err
    assert cli("train", "--trust").code == 2


class _Runs:
    def __reduce__(self) -> Any:
        return (open, ("ran", "w"))


def test_files_that_hold_code_are_not_run_and_nobody_is_told_how_to(cli: Cli, tmp_path: Path) -> None:
    folder = cli("train", "dataset.limit_train=64").folder
    _with(folder, lambda config: None, "interrupted")
    torch.save({"state_dict": _Runs()}, folder / "resume.ckpt")
    torch.save(_Runs(), tmp_path / "inputs.pt")
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(_Runs()))
    torch.save({"format": 1, "state_dict": _Runs()}, folder / "model.pt")
    outcomes = [cli("train", f"resume={folder}")]
    _with(folder, lambda config: None, "done")
    outcomes += [cli("predict", str(folder))]
    outcomes += [cli("predict", str(folder), f"predict.inputs={name}") for name in ("inputs.pt", "pickle.npy")]
    for outcome in outcomes:
        assert outcome.code == 2
        assert len(outcome.err.splitlines()) == 1
        assert not re.search("weights.?only|trust", outcome.err, re.IGNORECASE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["s3://bucket/x", "http://127.0.0.1:9/x", "simplecache::gs://b", "hdfs://h/p"])
def test_no_address_of_a_record_is_asked(place: str) -> None:
    logger = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": place}
    with pytest.raises(UsageError, match=r"have an address, logger\.save_dir: .*add --trust"):
        check_trusted({"logger": logger}, "x", False)
    check_trusted({"logger": logger}, "x", True)
    check_trusted({"logger": {**logger, "save_dir": "a?b#c%20 d: e/f"}}, "x", False)
