"""What ranks do as one, and checkpoints that are written beside training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from simclr_dali.model import checkpoint
from simclr_dali.model.process import Process, on_rank_0
from simclr_dali.shards.errors import UserError
from simclr_dali.train.metrics import Reporter
from simclr_dali.train.saver import Saver, all_finite, refuse_drift
from simclr_dali.train.step import StepResult
from simclr_dali.train.stopping import StopVote
from tests.conftest import run_ranks


def process_of(rank: int) -> Process:
    return Process(rank, dist.get_world_size(), 1, torch.device("cpu"), 1)


def what_was_raised(action: Any, *arguments: Any) -> str:
    try:
        action(*arguments)
    except UserError as error:
        return str(error)
    return ""


def hear(rank: int) -> dict[str, Any]:
    process, vote = process_of(rank), StopVote(process_of(rank))
    heard = [vote.cast(rank == 1 and call == 3) for call in range(6)]
    vote.finish()

    def refuse() -> None:
        raise UserError("the folder is taken")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    (*_, bias) = model.parameters()
    same = what_was_raised(refuse_drift, model, process, 7)
    if rank == 1:
        bias.data.view(torch.int32)[1] ^= 1  # the smallest change there is
    drifted = what_was_raised(refuse_drift, model, process, 7)
    finite = all_finite(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if rank == 1:
        bias.data[0] = torch.inf
    return {
        "finite": (finite, all_finite(model, torch.optim.SGD(model.parameters(), lr=0.1))),
        "heard": heard,
        "given": on_rank_0(process, lambda: f"from {rank}"),
        "refused": what_was_raised(on_rank_0, process, refuse),
        "same": same,
        "drifted": drifted,
    }


def test_ranks_stop_at_the_same_step_hear_rank_0_and_notice_a_single_bit(tmp_path: Path) -> None:
    for rank in run_ranks(hear, 2, tmp_path):
        assert rank["finite"] == (True, False)
        assert rank["heard"] == [False, False, False, False, True, False]
        assert rank["given"] == "from 0" and rank["refused"] == "the folder is taken"
        assert rank["same"] == "" and "step 7 (first: 1.bias)" in rank["drifted"]


def report(rank: int, folder: str, losses: list[list[float]], gradient: float) -> dict[str, Any]:
    kept: list[tuple[int, str]] = []

    def keep_batch(step: int, reason: str) -> list[int]:
        kept.append((step, reason))
        return [100 * rank + number for number in range(12)]

    reporter = Reporter(
        Path(folder), process_of(rank), batch=4, steps_per_epoch=10, total_steps=100, first_step=20,
        keep_batch=keep_batch,
    )  # fmt: skip
    for step, loss in enumerate(losses[rank], start=20):
        last = step == 19 + len(losses[rank])
        norm = torch.tensor(gradient if last else 1.0)
        reporter.add(step, 0.1, StepResult(torch.tensor(loss), {"any name": torch.tensor(0.1)}, norm))
    return {"sentence": what_was_raised(reporter.drain, lambda: "that of step 18"), "kept": kept}


@pytest.mark.parametrize(
    ("losses", "gradient", "words", "kept"),
    [
        ([[1.0, 2.0, 3.0], [1.0, 2.0, float("nan")]], 1.0, ["is nan at step 22", "rank 1 of 2", "100"], [[], [22]]),
        ([[1.0, float("inf")], [1.0, 1.0]], 1.0, ["loss is inf at step 21", "rank 0 of 2"], [[21], []]),
        ([[1.0, 2.0], [1.0, 2.0]], float("inf"), ["gradient is inf at step 21", "rank 0, 1 of 2"], [[21], [21]]),
    ],
)  # fmt: skip
def test_the_rank_with_the_bad_number_is_named_by_all_and_keeps_its_batch(
    losses: list[list[float]], gradient: float, words: list[str], kept: list[list[int]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    ranks = run_ranks(report, 2, tmp_path, str(folder), losses, gradient)
    for number, rank in enumerate(ranks):
        for word in (*words, "that of step 18", "and 4 more", "bad-step-"):
            assert word in rank["sentence"]
        assert [step for step, _ in rank["kept"]] == kept[number]
    # What was sound before it is in the metrics.
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(losses[0]) - 1 and all('"any name": 0.1' in line for line in lines)


def state(step: int, weights: torch.Tensor) -> dict[str, Any]:
    return {"step": step, "model": {"w": weights}, "architecture": {}, "image_size": 1}


def test_a_checkpoint_holds_the_weights_of_its_moment(tmp_path: Path) -> None:
    weights = torch.zeros(1_000_000).view(10, 10, 100, 100).to(memory_format=torch.channels_last)
    with Saver(tmp_path, keep=10) as saver:
        for step in range(1, 6):
            saver.save(state(step, weights))
            weights += 1  # at once, while it is being written
    for step in range(1, 6):
        found = checkpoint.load(tmp_path / f"checkpoints/step-{step:08d}")
        assert torch.equal(found.state["model"]["w"], torch.full((10, 10, 100, 100), step - 1.0))
        assert found.state["model"]["w"].stride() == weights.stride()


def test_a_failing_run_leaves_its_last_checkpoint_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nan"), Saver(tmp_path, keep=1) as saver:
        saver.save(state(1, torch.ones(3_000_000)))
        raise UserError("the loss is nan")
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state["step"] == 1


def test_a_refusing_disk_is_told_at_the_next_occasion(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder must be")
    with pytest.raises(UserError, match=r"cannot write .*checkpoints"), Saver(tmp_path, keep=1) as saver:
        saver.save(state(1, torch.ones(3)))
    # An error of the training itself is what is told where there are both.
    with pytest.raises(UserError, match="nan"), Saver(tmp_path, keep=1) as saver:
        saver.save(state(1, torch.ones(3)))
        raise UserError("the loss is nan")
