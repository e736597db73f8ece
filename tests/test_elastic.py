"""A run goes on with more or fewer processes, by hand or by a launcher that starts what is left of them."""

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TIMEOUT
from tests.runs import launch, metrics, running, tiny_config

pytestmark = pytest.mark.launch
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def test_losses_are_those_of_an_undisturbed_run_after_each_change_of_processes(
    packed: Path, trained: Path, tmp_path: Path
) -> None:
    """4, 2, 1 and 4 processes, two steps each: as many images pass BatchNorm together, and steps differ by rounding."""
    config, run = tiny_config(tmp_path), tmp_path / "run"
    for processes in (4, 2, 1, 4):
        done = launch(processes, config, packed, run, "--stop-after-steps", 2)
        assert done.returncode == 0, done.stderr
    expected = [line["loss"] for line in metrics(trained)]
    found = [line["loss"] for line in metrics(run)]
    assert found == pytest.approx(expected[: len(found)], rel=1e-5) and len(found) == 8


def words(packed: Path, tmp_path: Path) -> list[object]:
    return [ROOT / "train/pretrain.py", "--config", tiny_config(tmp_path), "--data", packed, "--out", tmp_path / "run"]


def test_processes_that_cannot_share_the_work_leave_where_restarts_are_allowed(packed: Path, tmp_path: Path) -> None:
    start = [*TORCHRUN, "--nproc_per_node", 3, "--max_restarts"]
    with running([*start, 1, *words(packed, tmp_path), "--stop-after-steps", 3]) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0 and "rank 2 of 3 leaves: 2 processes share the 4 lanes" in err, err
    assert "2 x cpu" in out and len(metrics(tmp_path / "run")) == 3
    with running([*start, 0, *words(packed, tmp_path)]) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode and "3 processes do not divide the 4 lanes" in err
