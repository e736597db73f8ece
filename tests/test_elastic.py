"""A run goes on with more or fewer processes, by hand or by a launcher that starts what is left of them."""

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TIMEOUT
from tests.runs import family, launch, metrics, pretrain, reached, running, tiny_config, wait_until

pytestmark = pytest.mark.launch
SCRIPT = ROOT / "train/pretrain.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def test_losses_are_those_of_an_undisturbed_run_after_each_change_of_processes(packed: Path, tmp_path: Path) -> None:
    """4, 2, 1 and 4 processes, five steps each: as many images pass BatchNorm together, and steps differ by rounding.

    The learning rate is a small one: at the usual one these few pictures learn in a way that makes rounding grow.
    """
    config, calm = tiny_config(tmp_path), ["--set", "simclr.lr_rule=none", "--set", "optimizer.params.lr=0.004"]
    undisturbed = pretrain(config, packed, tmp_path / "undisturbed", *calm, "--stop-after-steps", 20)
    assert undisturbed.returncode == 0, undisturbed.stderr
    for processes in (4, 2, 1, 4):
        done = launch(processes, config, packed, tmp_path / "run", *calm, "--stop-after-steps", 5)
        assert done.returncode == 0, done.stderr
    expected, found = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("undisturbed", "run"))
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 20


def words(packed: Path, tmp_path: Path) -> list[object]:
    return [SCRIPT, "--config", tiny_config(tmp_path), "--data", packed, "--out", tmp_path / "run"]


def test_processes_that_cannot_share_the_work_leave_where_restarts_are_allowed(packed: Path, tmp_path: Path) -> None:
    start = [*TORCHRUN, "--nproc_per_node", 3, "--max_restarts"]
    with running([*start, 1, *words(packed, tmp_path), "--stop-after-steps", 3]) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0 and "rank 2 of 3 leaves: 2 processes share the 4 lanes" in err, err
    assert "2 x cpu" in out and len(metrics(tmp_path / "run")) == 3
    with running([*start, 0, *words(packed, tmp_path)]) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode and "3 processes do not divide the 4 lanes" in err


@pytest.mark.parametrize("lost", ["0", "1"])
def test_a_rank_that_is_killed_is_started_again_and_the_run_goes_on(
    lost: str, packed: Path, trained: Path, tmp_path: Path
) -> None:
    often = ["--set", "simclr.checkpoint_every=2", "--set", "simclr.log_every=1", "--set", "simclr.epochs=4"]
    command = [*TORCHRUN, "--nproc_per_node", 2, "--max_restarts", 1, *words(packed, tmp_path), *often]
    run, expected = tmp_path / "run", [line["loss"] for line in metrics(trained)]
    with running(command) as process:
        wait_until(reached(run, 4), process)
        ranks = [one for one in family(process.pid) if one.environ().get("RANK") == lost]
        next(one for one in ranks if str(SCRIPT) in one.cmdline()).kill()
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0 and "going on from step" in out, out + err
    losses = [line["loss"] for line in metrics(run)]
    assert len(losses) == 60 and losses[: len(expected)] == pytest.approx(expected, rel=1e-4)
    assert len((run / "starts.jsonl").read_text().splitlines()) == 2
