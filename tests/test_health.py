"""Nearest neighbours during training: a look that leaves no trace in the run, the same after a stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_dali.model.checkpoint import load
from tests.conftest import assert_sentence
from tests.runs import launch, metrics, pretrain, tiny_config

LOOKS = ["--set", "simclr.knn_every_epochs=1", "--set", "simclr.knn_images=100"]


def looks(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "knn.jsonl").read_text().splitlines()]


@pytest.mark.launch
def test_looking_changes_nothing_and_goes_on_after_a_stop(packed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    plain, looked, stopped = (tmp_path / name for name in ("plain", "looked", "stopped"))
    assert pretrain(config, packed, plain).returncode == 0
    done = pretrain(config, packed, looked, *LOOKS)
    assert done.returncode == 0 and "kNN after epoch 2" in done.stdout, done.stderr
    assert metrics(plain) == metrics(looked)
    before, after = (load(run).state["model"] for run in (plain, looked))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not (plain / "knn.jsonl").exists()

    found = looks(looked)
    assert [line["step"] for line in found] == [14, 29] and [line["epoch"] for line in found] == [0, 1]
    # 100 of 240 images, as many of each of 12 classes or one more; every tenth is asked about.
    assert all(line["queries"] == 10 and line["bank"] == 90 and line["k"] == 20 for line in found)
    assert all(0 <= line["top1"] <= 100 and line["top1"] % 10 == pytest.approx(0, abs=1e-9) for line in found)

    # Stopped in the second epoch: the first look is there once, the second comes.
    assert pretrain(config, packed, stopped, *LOOKS, "--stop-after-steps", 17).returncode == 0
    assert [line["step"] for line in looks(stopped)] == [14]
    again = pretrain(config, packed, stopped, *LOOKS)
    assert again.returncode == 0, again.stderr
    assert looks(stopped) == found


@pytest.mark.launch
def test_a_look_that_a_stop_came_before_is_made_when_the_run_goes_on(packed: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    assert pretrain(config, packed, run, *LOOKS, "--stop-after-steps", 15).returncode == 0
    first = looks(run)
    (run / "knn.jsonl").unlink()
    assert pretrain(config, packed, run, *LOOKS, "--stop-after-steps", 2).returncode == 0
    assert looks(run) == first
    # The last look of a run that is finished otherwise.
    assert pretrain(config, packed, run, *LOOKS).returncode == 0
    whole = looks(run)
    (run / "knn.jsonl").write_text(json.dumps(whole[0]) + "\n")
    late = pretrain(config, packed, run, *LOOKS)
    assert late.returncode == 0 and "is finished" in late.stdout and looks(run) == whole
    few = pretrain(config, packed, tmp_path / "few", *LOOKS, "--set", "simclr.knn_images=20")
    assert_sentence(few, "20 images of 12 classes", "simclr.knn_images")


@pytest.mark.launch
def test_two_processes_look_at_the_same_images(packed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    for processes in (1, 2):
        run = tmp_path / str(processes)
        done = launch(processes, config, packed, run, *LOOKS, "--stop-after-steps", 15)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = looks(tmp_path / "1"), looks(tmp_path / "2")
    assert abs(one[0].pop("top1") - two[0].pop("top1")) <= 10 + 1e-9  # rounding may tip one of ten
    assert one == two
