"""Stopping a run: signals, the launcher's end, ranks that die or hang. What it had is kept, and it goes on."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from simclr_dali.model import checkpoint
from tests.conftest import ROOT, assert_sentence
from tests.runs import (
    TORCHRUN,
    environment,
    family,
    launch,
    launch_script,
    left,
    metrics,
    pretrain,
    reached,
    running,
    tiny_config,
    trainer,
    wait_until,
)

pytestmark = pytest.mark.launch

# More steps than a test waits for, each reported, so that a test can act in the midst of them.
LONG = ["--set", "simclr.epochs=1000", "--set", "simclr.log_every=1"]
SECONDS_TO_LEAVE = 60  # for two steps and a checkpoint, here mostly the interpreter's end, on a machine that is slow


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, of a launched run."""
    return [child for child in family(launcher.pid) if "deepspeed.launcher.launch" not in child.cmdline()]


def starter_of(launcher: subprocess.Popen[str]) -> psutil.Process:
    """The launcher's second process, which starts the ranks."""
    (starter,) = [child for child in family(launcher.pid) if "deepspeed.launcher.launch" in child.cmdline()]
    return starter


def kept_step(run: Path) -> int:
    """Step of the newest checkpoint; every step before it has its one line of metrics, and none is after it."""
    found = checkpoint.newest(run)
    assert found is not None and not found.skipped
    assert [line["step"] for line in metrics(run)] == list(range(found.state["step"]))
    return int(found.state["step"])


def assert_goes_on(run: Path, config: Path, data: Path) -> None:
    before = kept_step(run)
    done = pretrain(config, data, run, *LONG, "--stop-after-steps", 2)
    assert done.returncode == 0, done.stderr
    assert kept_step(run) == before + 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_0(number: signal.Signals, packed: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    with running(trainer(0, config, packed, run, *LONG)) as process:
        wait_until(reached(run, 3), process)
        process.send_signal(number)
        out, err = process.communicate(timeout=SECONDS_TO_LEAVE)
    assert process.returncode == 0 and "Traceback" not in err
    assert f"stopped by {number.name}" in out and not (run / "finished.json").exists()
    assert_goes_on(run, config, packed)


@pytest.mark.parametrize("words", [[], ["--set", "simclr.checkpoint_every=2"]], ids=["stop", "go on"])
def test_output_that_nobody_reads_any_more_ends_no_run(words: list[Any], packed: Path, tmp_path: Path) -> None:
    """As where Ctrl-C ends a ``tee`` too, or a terminal is gone: what is written in between has no reader."""
    config, run = tiny_config(tmp_path), tmp_path / "run"
    reader, writer = os.pipe()
    command = [str(word) for word in [*trainer(0, config, packed, run, *LONG), *words]]
    process = subprocess.Popen(command, stdout=writer, stderr=writer, env=environment(), text=True)
    try:
        os.close(writer)
        wait_until(reached(run, 3), process)
        os.close(reader)
        wait_until(reached(run, 12), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS_TO_LEAVE) == 0
    finally:
        process.kill()
        process.wait()
    assert kept_step(run) > 12


@pytest.mark.parametrize("target", ["launcher", "starter", "one rank", "group"])
def test_sigterm_under_the_launcher_saves_whoever_gets_it(target: str, packed: Path, tmp_path: Path) -> None:
    """The launcher itself passes nothing on: its ranks notice that it is gone."""
    config, run = tiny_config(tmp_path), tmp_path / "run"
    with running(trainer(2, config, packed, run, *LONG)) as process:
        wait_until(reached(run, 3), process)
        ranks, starter = ranks_of(process), starter_of(process)
        assert len(ranks) == 2
        if target == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            pid = {"launcher": process.pid, "starter": starter.pid, "one rank": ranks[1].pid}[target]
            os.kill(pid, signal.SIGTERM)
        assert left(ranks, SECONDS_TO_LEAVE)
        out, err = process.communicate(timeout=SECONDS_TO_LEAVE)
    assert "Traceback" not in err and "goes on" in out
    # The launcher's own exit code is not ours to choose, except where it lived to see the ranks leave.
    assert target != "one rank" or process.returncode == 0
    assert not (run / "finished.json").exists()
    assert_goes_on(run, config, packed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_ranks_do_not_outlive_torchrun(number: signal.Signals, packed: Path, tmp_path: Path) -> None:
    """SIGUSR1 it does not know, and dies of it."""
    config, run = tiny_config(tmp_path), tmp_path / "run"
    start = [*TORCHRUN, "--standalone", "--nproc_per_node", 2]
    words = ["--config", config, "--data", packed, "--out", run, *LONG]
    with running([*start, ROOT / "train/pretrain.py", *words]) as process:
        wait_until(reached(run, 3), process)
        ranks = family(process.pid)
        process.send_signal(number)
        assert left(ranks, SECONDS_TO_LEAVE)
    assert_goes_on(run, config, packed)


def test_ranks_do_not_outlive_a_killed_launcher(packed: Path, tmp_path: Path) -> None:
    """The launcher then ends with 0, as if all were well: finished.json is what says that a run is finished."""
    config, run = tiny_config(tmp_path), tmp_path / "run"
    with running(trainer(2, config, packed, run, *LONG)) as process:
        wait_until(reached(run, 3), process)
        ranks = ranks_of(process)
        starter_of(process).kill()
        assert left(ranks, SECONDS_TO_LEAVE)
    assert not (run / "finished.json").exists()
    assert_goes_on(run, config, packed)


def test_a_rank_that_dies_takes_the_others_down(packed: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    words = [*LONG, "--set", "simclr.checkpoint_every=2"]
    with running(trainer(2, config, packed, run, *words)) as process:
        wait_until(reached(run, 5), process)
        ranks = ranks_of(process)
        ranks[1].kill()
        process.communicate(timeout=60)
        assert process.returncode != 0 and left(ranks, 1)
    found = checkpoint.newest(run)
    assert found is not None and found.state["step"] >= 4


def test_a_mistake_that_one_rank_meets_alone_is_one_sentence(packed: Path, tmp_path: Path) -> None:
    """Rank 0 alone writes. What torch says on the others, of a peer that left, is not what went wrong."""
    config, run = tiny_config(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("a file where a folder must be")
    done = launch(2, config, packed, run, *LONG, "--set", "simclr.checkpoint_every=2")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(errors) == 1 and "cannot write" in errors[0]


def test_ranks_with_other_settings_do_not_train_together(packed: Path, tmp_path: Path) -> None:
    """As two machines of which one was forgotten: each rank reads a file of its own."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    tiny_config(tmp_path / "0")
    text = tiny_config(tmp_path / "1").read_text()
    (tmp_path / "1/tiny.json").write_text(text.replace('"log_every": 4', '"log_every": 5'))
    shim = tmp_path / "shim.py"
    shim.write_text(
        "import os, runpy, sys\n"
        f"sys.argv = ['pretrain.py', '--config', f'{tmp_path}/' + os.environ['RANK'] + '/tiny.json', *sys.argv[1:]]\n"
        f"runpy.run_path('{ROOT / 'train/pretrain.py'}', run_name='__main__')\n"
    )
    done = launch_script(2, shim, "--data", packed, "--run", tmp_path / "run")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1
    assert "rank 1 has simclr.log_every = 5, rank 0 has 4" in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_rank_that_hangs_is_named_and_ends_the_run(packed: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    words = [*LONG, "--set", "simclr.checkpoint_every=2", "--hang-timeout", 15]
    with running(trainer(2, config, packed, run, *words)) as process:
        wait_until(reached(run, 100), process)  # some seconds, so that all ranks have reported
        ranks = ranks_of(process)
        ranks[1].suspend()
        assert left(ranks[:1], 60)
        ranks[1].resume()  # the launcher would kill it, but half a minute later
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0 and left(ranks, 1)
    assert "error: rank 0 has not moved for" in err
    assert "rank 1 is at step" in err and "does not report any more" in err
    # Where rank 0 waits, line by line.
    assert "train/loop.py" in err


def second_run(config: Path, data: Path, run: Path) -> subprocess.CompletedProcess[str]:
    return pretrain(config, data, run, *LONG)


def test_two_runs_do_not_share_a_folder(packed: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    with running(trainer(0, config, packed, run, *LONG)) as process:
        wait_until(reached(run, 1), process)
        assert_sentence(second_run(config, packed, run), "is in use by", f"process {process.pid} on ")
        assert process.poll() is None
        process.kill()
        process.wait()
    # A lock does not outlive its holder, however that ended.
    words: list[Any] = [*LONG, "--stop-after-steps", 1]
    assert pretrain(config, packed, run, *words).returncode == 0
