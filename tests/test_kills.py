"""Killed and gone on with: as if it had not been, on the same number of processes to the bit."""

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from simclr_dali.model import checkpoint
from simclr_dali.model.process import Process
from simclr_dali.train.metrics import Reporter
from simclr_dali.train.saver import Saver
from simclr_dali.train.step import StepResult
from tests.conftest import assert_sentence, fork_server, run_command
from tests.runs import launch, metrics, pretrain, reached, running, tiny_config, trainer, wait_until

EVERY_STEP = ["--set", "simclr.checkpoint_every=1", "--set", "simclr.log_every=1"]


@pytest.mark.launch
def test_a_run_killed_at_random_steps_ends_like_an_undisturbed_one(packed: Path, tmp_path: Path) -> None:
    config, killed, undisturbed = tiny_config(tmp_path), tmp_path / "killed", tmp_path / "undisturbed"
    assert pretrain(config, packed, undisturbed).returncode == 0
    random = np.random.default_rng(0)
    for step in sorted(random.choice(np.arange(1, 28), 3, replace=False)):
        with running(trainer(0, config, packed, killed, *EVERY_STEP)) as process:
            wait_until(reached(killed, int(step)), process)
            time.sleep(float(random.uniform(0, 0.05)))
            process.kill()
    assert pretrain(config, packed, killed).returncode == 0
    assert (killed / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()
    ours, theirs = (checkpoint.load(run).state for run in (killed, undisturbed))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])


@pytest.mark.launch
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before: int, after: int, packed: Path, tmp_path: Path) -> None:
    """Fifty steps of a warm-up: later, these tiny networks amplify a rounding too fast to compare."""
    config = tiny_config(tmp_path)
    length = ["--set", "simclr.epochs=400", "--set", "simclr.warmup_epochs=400.0"]
    assert launch(before, config, packed, tmp_path / "changed", *length, "--stop-after-steps", 10).returncode == 0
    assert launch(after, config, packed, tmp_path / "changed", *length, "--stop-after-steps", 50).returncode == 0
    assert pretrain(config, packed, tmp_path / "same", *length, "--stop-after-steps", 60).returncode == 0
    changed, same = metrics(tmp_path / "changed"), metrics(tmp_path / "same")
    assert [line["step"] for line in changed] == list(range(60))
    for one, other in zip(changed, same, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5), one["step"]


def save_every_step(run: str, ready: Any) -> None:
    """What a run does around its steps, with weights that follow from the step, and no picture in sight."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    folder = Path(run)
    found = checkpoint.newest(folder)
    step = found.state["step"] if found else 0
    if found:
        assert torch.equal(found.state["model"]["w"], weights(step))
    process = Process(0, 1, 1, torch.device("cpu"), 1)
    reporter = Reporter(
        folder, process, batch=2, steps_per_epoch=10, total_steps=10**6, first_step=step, keep_batch=lambda *_: []
    )
    saver = Saver(folder, keep=2)
    for saved in itertools.count():
        reporter.add(step, 0.1, StepResult(torch.tensor(float(step)), {}, torch.tensor(1.0)))
        step += 1
        saver.wait()
        if saved == 1:  # and that is on disk
            ready.set()
        reporter.drain(lambda: "some step", durably=True)
        saver.save({"step": step, "model": {"w": weights(step)}, "architecture": {}, "image_size": 1})


def weights(step: int) -> torch.Tensor:
    return torch.full((50_000,), float(step))


def test_two_hundred_kills_lose_at_most_one_interval(tmp_path: Path) -> None:
    """Each kill comes at a random instant while every step is saved."""
    context = fork_server()
    random, before = np.random.default_rng(1), 0
    tmp_path.joinpath("run").mkdir()
    for kill in range(200):
        ready = context.Event()
        process = context.Process(target=save_every_step, args=(str(tmp_path / "run"), ready))
        process.start()
        assert ready.wait(60), f"the run did not go on after {kill} kills"
        time.sleep(float(random.uniform(0, 0.03)))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = checkpoint.newest(tmp_path / "run")
        kept = found.state["step"] if found else 0
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
        steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        assert steps == list(range(len(steps))), "a step is missing or doubled"
        assert kept >= before and len(steps) - 1 <= kept <= len(steps)
        assert not found or not found.skipped
        before = kept
    assert before >= 200


@pytest.mark.launch
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_wins(packed: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    every = ["--set", "simclr.checkpoint_every=2", "--set", "simclr.keep_every_epochs=1"]
    assert pretrain(config, packed, run, *every, "--stop-after-steps", 20).returncode == 0
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == ["step-00000015", "step-00000018", "step-00000020"]  # two of the newest, and the epoch's end
    state = run / "checkpoints/step-00000020/state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 3] ^= 8
    state.write_bytes(data)
    done = pretrain(config, packed, run, *every)
    assert done.returncode == 0 and "going on from step 18" in done.stdout
    assert "step-00000020" in done.stdout and "damaged" in done.stdout
    assert (run / "checkpoints/damaged-step-00000020/state.pt").read_bytes() == data
    assert [line["step"] for line in metrics(run)] == list(range(30))

    # The same again, in a finished run: it is not finished any more, until it is.
    (run / "checkpoints/damaged-step-00000030").mkdir()
    (run / "checkpoints/damaged-step-00000030/old").touch()
    (run / "checkpoints/step-00000030/state.pt").write_bytes(b"cut")
    done = pretrain(config, packed, run, *every, "--stop-after-steps", 1)
    assert done.returncode == 0 and "going on from step 28" in done.stdout
    assert not (run / "finished.json").exists() and (run / "checkpoints/damaged-step-00000030+/state.pt").exists()
    assert pretrain(config, packed, run, *every).returncode == 0
    (run / "finished.json").unlink()  # as a kill at the very end leaves it
    assert pretrain(config, packed, run, *every).returncode == 0
    assert json.loads((run / "finished.json").read_text())["steps"] == 30


@pytest.mark.launch
def test_numbers_that_are_not_finite_stop_the_run_with_what_is_needed_to_look_at_them(
    packed: Path, tmp_path: Path
) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    blow_up = ["optimizer.params.lr=1e30", "simclr.lr_rule=none", "simclr.warmup_epochs=0.0", *EVERY_STEP[1::2]]
    done = pretrain(config, packed, run, *(word for key in blow_up for word in ("--set", key)))
    assert_sentence(done, "step ", "rank 0 of 1", "samples ", "simclr-dali views --replay", "last good checkpoint")
    (file,) = run.glob("bad-step-*-rank-0.json")
    step = int(file.name.split("-")[2])
    found = checkpoint.newest(run)
    assert found is not None and found.state["step"] == step
    assert all(value.isfinite().all() for value in found.state["model"].values())
    assert [line["step"] for line in metrics(run)] == list(range(step))

    sheet = tmp_path / "batch.png"
    shown = run_command("views", "--replay", file, "--out", sheet, "--count", 3)
    assert shown.returncode == 0, shown.stderr
    assert f"step {step}, rank 0" in shown.stdout and sheet.stat().st_size > 1000
    kept = json.loads(file.read_text())
    assert len(kept["samples"]) == 16
    first = kept["samples"][0]["id"]
    assert f"sample {first} " in shown.stdout

    kept["samples"][0]["views"][0]["box"][0] += 1
    file.write_text(json.dumps(kept))
    assert_sentence(run_command("views", "--replay", file, "--out", sheet), "other draws")
    assert_sentence(run_command("views", "--replay", tmp_path / "no", "--out", sheet), "cannot read")
    assert_sentence(run_command("views", "--out", sheet), "neither SHARDS nor --replay")
