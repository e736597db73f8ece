"""Settings that cannot learn are refused, and a run that learns nothing says so."""

from pathlib import Path

import pytest
import torch

from simclr_dali.model.ntxent import nt_xent
from simclr_dali.model.process import Process
from simclr_dali.shards.errors import UserError
from simclr_dali.train.collapse import STEPS, CollapseWatch
from simclr_dali.train.config_file import load_config
from simclr_dali.train.metrics import Reporter
from simclr_dali.train.step import StepResult
from tests.conftest import assert_sentence, run_command
from tests.runs import pretrain, tiny_config

FINE, SAME, OPPOSITE = ({"positive": 0.9, "hardest_negative": 0.8}, {"positive": 1.0, "hardest_negative": 0.9999},
                        {"positive": -0.9999, "hardest_negative": 0.3})  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("simclr.temperature=0.001", "simclr.temperature is 0.001"),
        ("simclr.temperature=50", "simclr.temperature is 50"),
        ("simclr.temperature=Infinity", "simclr.temperature is inf"),
        ("simclr.encoder.projector=[32,1]", r"json: simclr\.encoder\.projector is \[32, 1\]; a layer of one number"),
        ("simclr.encoder.width=0", "width"),
        ("simclr.encoder.width=1000", "width"),
        ("simclr.image_size=15", "simclr.image_size is 15"),
        ("simclr.epochs=0", "simclr.epochs is 0"),
        ("simclr.warmup_epochs=3", "longer than the 2 epochs"),
        ("optimizer.params.lr=0", "lr is 0"),
        ("train_batch_size=1", "NT-Xent compares an image with others"),
    ],
)
def test_settings_that_cannot_learn_are_one_sentence(setting: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(str(tiny_config(tmp_path)), [setting], "data", "run")


@pytest.mark.parametrize(("micro_batch", "world", "sound"), [(1, 1, False), (1, 2, True), (2, 1, True), (1, 4, True)])
def test_batchnorm_sees_two_images_at_least(micro_batch: int, world: int, sound: bool, tmp_path: Path) -> None:
    path = str(tiny_config(tmp_path))
    config = load_config(path, [f"train_micro_batch_size_per_gpu={micro_batch}"], "data", "run")
    if sound:
        assert config.micro_batch(world) == micro_batch
    else:
        with pytest.raises(UserError, match="opposites of the two views"):
            config.micro_batch(world)


def test_few_images_in_batchnorm_are_warned_of(packed: Path, tmp_path: Path) -> None:
    words = ["--set", "train_micro_batch_size_per_gpu=2", "--stop-after-steps", 1]
    done = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", *words)
    assert done.returncode == 0 and "warning: BatchNorm sees 2 images at a time" in done.stdout, done.stderr


@pytest.mark.parametrize(("row", "word"), [(SAME, "the same embedding"), (OPPOSITE, "opposites")])
def test_a_collapse_is_told_once_and_loudly(row: dict[str, float], word: str) -> None:
    watch = CollapseWatch()
    assert watch.warning([row] * (STEPS - 1)) is None
    assert watch.warning([FINE, *[row] * (STEPS - 1)]) is None
    told = watch.warning([row])
    assert told and told.startswith("WARNING") and word in told
    assert watch.warning([row] * 3 * STEPS) is None


def test_a_collapsed_run_is_told_while_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        reporter = Reporter(
            tmp_path, Process(0, 1, 1, torch.device("cpu"), 1), batch=4, steps_per_epoch=10, total_steps=300,
            first_step=0, keep_batch=lambda *_: [],
        )  # fmt: skip
        for step in range(3 * STEPS):
            numbers = {name: torch.tensor(value) for name, value in SAME.items()}
            reporter.add(step, 0.1, StepResult(torch.tensor(5.0), numbers, torch.tensor(1.0)))
            if step % 10 == 9:
                reporter.drain(lambda: "none yet")
    finally:
        torch.distributed.destroy_process_group()
    assert capsys.readouterr().err.count("WARNING: for 100 steps all images have had the same embedding") == 1


def test_other_losses_and_sound_runs_are_left_alone() -> None:
    watch = CollapseWatch()
    assert watch.warning([{"invariance": 1.0}] * 200) is None and watch.warning([FINE] * 200) is None
    assert watch.warning([{"positive": 1.0, "hardest_negative": 0.5}] * 200) is None


def test_small_views_and_batches_of_one_are_refused_by_evaluations(trained: Path) -> None:
    done = run_command("knn", "--ckpt", trained, "--image-size", 8)
    assert done.returncode == 2 and "8 is not at least 16" in done.stderr
    done = run_command("finetune", "--ckpt", trained, "--fraction", 1, "--batch", 1)
    assert_sentence(done, "--batch 1", "let BatchNorm see one image at a time")


def test_a_row_of_zeros_gets_no_gradient() -> None:
    z = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    z[3] = 0
    z.requires_grad_()
    nt_xent(z, 0.1).loss.backward()
    assert z.grad is not None and bool((z.grad[3] == 0).all()) and 0 < z.grad.abs().max() < 100
