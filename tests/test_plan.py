"""The plan of a run: what it says is so, and what a run would refuse is refused before anything is written."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simclr_dali.model import checkpoint
from simclr_dali.model.process import Process
from simclr_dali.shards.errors import UserError
from simclr_dali.train.config_file import load_config
from simclr_dali.train.plan import checkpoint_bytes, estimate_on, goes_on_from, refuse_other_count
from simclr_dali.train.plan_measures import InputRate, Steps
from tests.conftest import assert_sentence, run_command, tree
from tests.runs import launch, metrics, pretrain, tiny_config

pytestmark = pytest.mark.launch


def test_a_plan_says_what_a_run_takes_and_writes_nothing(packed: Path, trained: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    words = ["--config", config, "--data", packed, "--run", run, "--plan", "--gpus", 2]
    done = run_command("pretrain", *words, "--set", "simclr.knn_every_epochs=1", "--set", "simclr.knn_images=100")
    assert done.returncode == 0, done.stderr
    assert not run.exists()
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)
    assert lines["speed"].count("images/s") == 2 and "steps with real input" in lines["speed"]
    assert lines["time"].startswith("30 steps: 0:0") and "for kNN checks" in lines["time"]
    assert (
        "are there" in lines["memory"] and "are free" in lines["checkpoints"] and "read from the disk" in lines["data"]
    )
    assert "8 images each in 1 x 8" in done.stdout and "cannot be told from a CPU" in done.stdout
    # The loss with which such a run begins.
    first = metrics(trained)[0]["loss"]
    assert float(lines["loss"].split()[0]) == pytest.approx(first, abs=1e-3)
    assert f"chance is {math.log(31):.3f}" in lines["loss"]


def test_a_plan_of_a_run_that_is_there_is_of_what_is_left(packed: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    assert pretrain(config, packed, run, "--stop-after-steps", 17).returncode == 0
    before = tree(run)
    done = launch(2, config, packed, run, "--plan")
    assert done.returncode == 0, done.stderr
    assert "going on from step 17" in done.stdout and re.search(r"^time +13 steps", done.stdout, re.MULTILINE)
    assert tree(run) == before
    assert pretrain(config, packed, run).returncode == 0
    assert "is finished (30 steps)" in pretrain(config, packed, run, "--plan").stdout


def test_a_run_of_two_steps_is_planned_too(packed: Path, tmp_path: Path) -> None:
    words = ["--set", "train_batch_size=120", "--set", "simclr.epochs=1", "--set", "optimizer.params.lr=auto"]
    done = pretrain(
        tiny_config(tmp_path), packed, tmp_path / "run", "--plan", *words, "--set", "simclr.warmup_epochs=0"
    )
    assert done.returncode == 0 and re.search(r"^time +2 steps", done.stdout, re.MULTILINE), done.stderr


def test_a_checkpoint_is_as_large_as_planned(trained: Path, tmp_path: Path) -> None:
    config = load_config(str(tiny_config(tmp_path)), [], data="unused")
    found = checkpoint.newest(trained)
    assert found is not None
    written = (found.path if found.path.is_file() else found.path / checkpoint.STATE).stat().st_size
    # Names, settings and padding come on top, which a real network does not notice.
    assert 0 < written - checkpoint_bytes(config) < 150_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", 3], ["3 processes do not divide the 4 lanes"]),
        (["--set", "simclr.knn_every_epochs=1", "--set", "simclr.knn_images=20"], ["set simclr.knn_images"]),
        (["--set", "simclr.init_from=nowhere"], ["nowhere"]),
        (["--set", 'simclr.track=["tensorboard", "nothing"]'], ["simclr.track"]),
    ],
    ids=["gpus", "knn", "init", "track"],
)
def test_what_a_run_would_refuse_is_refused(words: list[str], said: list[str], packed: Path, tmp_path: Path) -> None:
    done = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", "--plan", *words)
    assert_sentence(done, *said)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_run_is_refused(packed: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    assert pretrain(config, packed, run, "--stop-after-steps", 2).returncode == 0
    assert_sentence(
        pretrain(config, packed, run, "--plan", "--set", "simclr.seed=5"), "simclr.seed = 0", "another --run"
    )
    (tmp_path / "file").touch()
    assert_sentence(pretrain(config, packed, tmp_path / "file" / "run", "--plan"), "cannot be written")


def test_gpus_without_a_plan_are_a_mistake(packed: Path, tmp_path: Path) -> None:
    done = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", "--gpus", 2)
    assert done.returncode == 2 and "--gpus is for --plan" in done.stderr


def test_a_folder_that_is_not_there_begins_at_0(tmp_path: Path, train_split: object) -> None:
    config = load_config(str(tiny_config(tmp_path)), [], data="unused")
    assert goes_on_from(tmp_path / "a" / "b", config, train_split) == 0  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


def test_other_numbers_of_gpus_are_told_on_paper() -> None:
    """From what one GPU was seen to take: on 8 an eighth of it and a little more, on 64 more by Ethernet than else."""
    config = load_config("ds_lars.json", [], data="d")
    job: Any = SimpleNamespace(config=config, process=Process(0, 1, 1, torch.device("cuda"), 16))
    rate = InputRate(images_per_s=5_000.0, disk=0.0, room=140 << 30)
    steps = Steps([1.5], "timed", 23 << 30, "measured", 9.0, uncompiled=False)
    alone, eight, many = (estimate_on(job, 1000, rate, steps, gpus) for gpus in (1, 8, 64))
    assert "4096 images each in 16 x 256" in alone and "512 images each in 2 x 256" in eight

    def seconds(text: str, network: str) -> int:
        hours, minutes, rest = re.findall(rf"(\d+):(\d+):(\d+) by {network}", text)[0]
        return 3600 * int(hours) + 60 * int(minutes) + int(rest)

    assert seconds(alone, "InfiniBand") == pytest.approx(1500, rel=0.02)
    assert 1500 / 8 < seconds(eight, "InfiniBand") < 1.3 * 1500 / 8
    assert seconds(many, "InfiniBand") < seconds(many, "Ethernet") and seconds(many, "InfiniBand") < 1500 / 16
    # A step that was timed uncompiled will be compiled, and statistics of a node need no messages between nodes.
    slow = estimate_on(job, 1000, rate, replace(steps, uncompiled=True), 64)
    assert seconds(slow, "InfiniBand") < 0.8 * seconds(many, "InfiniBand")
    job.config = config.model_copy(update={"simclr": config.simclr.model_copy(update={"batchnorm_group": "node"})})
    grouped = estimate_on(job, 1000, rate, steps, 64)
    assert seconds(grouped, "Ethernet") < seconds(many, "Ethernet")
    job.config = config.model_copy(update={"simclr": config.simclr.model_copy(update={"batchnorm_group": 3})})
    with pytest.raises(UserError, match="groups of 3 processes do not divide the 64"):
        refuse_other_count(job.config, 64)
