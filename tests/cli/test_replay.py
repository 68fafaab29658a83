"""``locallearn replay``: the weights of a run from its trajectory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from locallearn.cli import main

_WORDS = (
    "train",
    "algorithm=zeroth_order",
    "algorithm.variant=mezo",
    "algorithm.exact=true",
    "dataset=digits",
    "dataset.limit_train=130",
    "net.hidden=[8]",
    "optimizer=sgd",
    "optimizer.lr=0.01",
    "trainer.probe_samples=0",
    "trainer.max_epochs=2",
    "meter=none",
)


def _train(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Path:
    assert main([*_WORDS, f"runs_dir={folder}", *words]) == 0
    return Path(capsys.readouterr().out.strip().splitlines()[-1])


def test_a_run_is_rebuilt_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _train(tmp_path, capsys, "algorithm.trajectory=run")
    out = tmp_path / "again.pt"
    assert main(["replay", str(run), f"replay.out={out}", "data_dir=/nowhere"]) == 0
    said = capsys.readouterr().out
    assert "steps replayed" in said
    assert "after 2 of 2 epochs the weights are bit-equal" in said
    assert "model.pt: bit-equal" in said
    trained = torch.load(run / "model.pt", weights_only=True)["state_dict"]
    for name, weight in torch.load(out, weights_only=True).items():
        assert torch.equal(weight, trained[f"net.{name}"])
    file = run / "trajectory.bin"
    content = bytearray(file.read_bytes())
    content[-30] ^= 1  # a number of the last steps
    file.write_bytes(content)
    assert main(["replay", str(file)]) == 2
    assert "do not agree with their checksum" in capsys.readouterr().err


def test_what_replay_says_of_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.bin"
    run = _train(tmp_path / "runs", capsys, f"algorithm.trajectory={file}")
    for words, sentence in (
        ([], "takes one run or trajectory, and got 0"),
        ([str(run)], "has no trajectory.bin"),
        ([str(file)], "name that with replay.run=FOLDER"),
        ([str(file), f"replay.run={run}", "replay.out=x.npz"], "ends in .pt"),
        ([str(file), "seed=3"], "cannot be changed for replay"),
        ([str(tmp_path / "none")], "there is no folder"),
    ):
        assert main(["replay", *words]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["replay", str(file), f"replay.run={run}"]) == 0
    assert "model.pt: bit-equal" in capsys.readouterr().out
    assert main([*_WORDS, f"algorithm.trajectory={file}", f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert main([*_WORDS, "trainer.gradient_clip_val=1.0", f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert "the norm of all is never known" in capsys.readouterr().err
    clipped = ["algorithm.variant=spsa", "algorithm.trajectory=run", "trainer.gradient_clip_val=1"]
    assert main([*_WORDS, *clipped, f"runs_dir={tmp_path}"]) == 2
    assert "could not be replayed" in capsys.readouterr().err
    assert main([*_WORDS, "algorithm.trajectory=/nowhere/at/all.bin", f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert "there is no folder /nowhere/at" in capsys.readouterr().err
