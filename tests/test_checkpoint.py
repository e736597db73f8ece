"""Checkpoints: whole or absent, hashed, and read without running code."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simclr_dali import load
from simclr_dali.model import checkpoint
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.pretrained import fingerprint, open_pretrained
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture, build_model
from tests.conftest import ROOT

SMALL = Architecture(ResNet("resnet18", 0.25, "7x7"), (16, 8))


def state(step: int, seed: int = 0) -> dict[str, Any]:
    model = build_model(SMALL, seed)
    return {
        "step": step,
        "model": model.state_dict(),
        "architecture": SMALL.plain(),
        "image_size": 32,
        "seed": seed,
    }


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(3, seed=5), keep=2)
    for given in (tmp_path, path, path / "state.pt"):
        found = checkpoint.load(given)
        assert found.state["step"] == 3 and found.architecture() == SMALL
        assert torch.equal(found.state["model"]["encoder.conv1.weight"], state(3, 5)["model"]["encoder.conv1.weight"])
    assert (tmp_path / "checkpoints" / "latest").read_text() == path.name


def test_an_old_one_whose_removal_was_interrupted_goes_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as interrupted:
        interrupted.setattr(shutil, "rmtree", lambda path, **options: (path / "checkpoint.json").unlink())
        for step in (1, 2):
            checkpoint.save(tmp_path, state(step), keep=1)
    assert checkpoint.load(tmp_path).state["step"] == 2 and len(list((tmp_path / "checkpoints").iterdir())) == 3
    checkpoint.save(tmp_path, state(3), keep=2)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000003"]


def test_newest_wins_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 20, 3, 100):
        checkpoint.save(tmp_path, state(step), keep=2)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state["step"] == 100
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000020", "step-00000100"]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "no description", "no state"])
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(damage: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), keep=3)
    path = checkpoint.save(tmp_path, state(2), keep=3) / "state.pt"
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no description":
        (path.parent / "checkpoint.json").unlink()
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002.*damaged.*step-00000001"):
        checkpoint.load(tmp_path)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    for name, writer in (("plain", pickle.dump), ("torch", lambda thing, file: torch.save(thing, file))):
        path = tmp_path / f"{name}.pth"
        with path.open("wb") as file:
            writer({"model": Bomb(str(tmp_path / "executed"))}, file)
        with pytest.raises(CheckpointError, match=r"without running code|no checkpoint"):
            checkpoint.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"a", b".", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        checkpoint.load(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path / "y.pt")


def test_a_foreign_state_dict_is_no_checkpoint_of_ours(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint of this trainer.*conv1\.weight"):
        checkpoint.load(tmp_path / "x.pt")


def test_encoder_is_loaded_frozen_and_untrained_is_the_start(tmp_path: Path) -> None:
    trained = state(9, seed=4)
    trained["model"]["encoder.conv1.weight"] += 1
    checkpoint.save(tmp_path, trained, keep=1)
    found = open_pretrained(tmp_path)
    encoder = found.encoder
    start = open_pretrained(tmp_path, untrained=True).encoder
    assert not encoder.training and not start.training and found.step == 9
    assert torch.equal(encoder.state_dict()["conv1.weight"], trained["model"]["encoder.conv1.weight"])
    assert fingerprint(start) == fingerprint(build_model(SMALL, 4).encoder) != fingerprint(encoder)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    wrong = state(1)
    wrong["architecture"]["width"] = 0.5
    checkpoint.save(tmp_path, wrong, keep=1)
    with pytest.raises(CheckpointError, match="resnet18"):
        load(tmp_path)


SAVER = """
import sys, torch
sys.path.insert(0, {root!r})
from pathlib import Path
from simclr_dali.model import checkpoint
step = int(sys.argv[2])
while True:
    step += 1
    weights = {{"w": torch.full((200_000,), float(step))}}
    state = {{"step": step, "model": weights, "architecture": {{}}, "image_size": 1}}
    checkpoint.save(Path(sys.argv[1]), state, keep=2)
    print(step, flush=True)
"""


def test_kill_at_any_instant_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    script = tmp_path / "saver.py"
    script.write_text(SAVER.format(root=str(ROOT)))
    random = np.random.default_rng(0)
    last = 0
    for _ in range(5):
        command = [sys.executable, str(script), str(tmp_path / "run"), str(last)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(random.uniform(0, 0.08)))
        os.kill(process.pid, signal.SIGKILL)
        reported = [int(line) for line in process.stdout.read().split()]
        process.wait()
        found = checkpoint.newest(tmp_path / "run")
        assert found is not None and found.state["step"] >= max([last, *reported])
        last = found.state["step"]
        assert torch.equal(found.state["model"]["w"], torch.full((200_000,), float(last)))
