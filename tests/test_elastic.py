"""A run goes on with more or fewer processes, by hand or by a launcher that starts what is left of them."""

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from simclr_dali.train.config import Config
from simclr_dali.train.elastic import stand_by_where_left_over
from tests.conftest import ROOT, TIMEOUT
from tests.runs import (
    TINY,
    TORCHRUN,
    family,
    free_port,
    launch,
    metrics,
    pretrain,
    reached,
    running,
    tiny_config,
    wait_until,
)

pytestmark = pytest.mark.launch
SCRIPT = ROOT / "train/pretrain.py"


def test_losses_are_those_of_an_undisturbed_run_after_each_change_of_processes(packed: Path, tmp_path: Path) -> None:
    """4, 2, 1 and 4 processes, five steps each: as many images pass BatchNorm together, and steps differ by rounding.

    The learning rate is a small one: at the usual one these few pictures learn in a way that makes rounding grow.
    """
    config, calm = tiny_config(tmp_path), ["--set", "simclr.lr_rule=none", "--set", "optimizer.params.lr=0.004"]
    undisturbed = pretrain(config, packed, tmp_path / "undisturbed", *calm, "--stop-after-steps", 20)
    assert undisturbed.returncode == 0, undisturbed.stderr
    for processes in (4, 2, 1, 4):
        words = [*calm, "--stop-after-steps", 5]
        run = tmp_path / "run"
        alone = processes == 1
        done = pretrain(config, packed, run, *words) if alone else launch(processes, config, packed, run, *words)
        assert done.returncode == 0, done.stderr
    expected, found = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("undisturbed", "run"))
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 20


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """The processes of the trainer that a launcher has started, by rank."""
    return {int(one.environ()["RANK"]): one for one in family(launcher) if str(SCRIPT) in one.cmdline()}


def words(packed: Path, tmp_path: Path) -> list[object]:
    return [SCRIPT, "--config", tiny_config(tmp_path), "--data", packed, "--out", tmp_path / "run"]


def test_processes_that_cannot_share_the_work_stand_by_where_restarts_are_allowed(packed: Path, tmp_path: Path) -> None:
    start = [*TORCHRUN, "--standalone", "--nproc_per_node", 3, "--max_restarts"]
    with running([*start, 1, *words(packed, tmp_path), "--stop-after-steps", 3]) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0 and "rank 2 of 3 stands by: 2 processes share the 4 lanes" in err, err
    assert "2 x cpu" in out and len(metrics(tmp_path / "run")) == 3
    with running([*start, 0, *words(packed, tmp_path)]) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode and "3 processes do not divide the 4 lanes" in err


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_is_started_again_and_the_run_goes_on(
    lost: int, packed: Path, trained: Path, tmp_path: Path
) -> None:
    often = ["--set", "simclr.checkpoint_every=2", "--set", "simclr.log_every=1", "--set", "simclr.epochs=4"]
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", 2, "--max_restarts", 1, *words(packed, tmp_path), *often]
    run, expected = tmp_path / "run", [line["loss"] for line in metrics(trained)]
    with running(command) as process:
        wait_until(reached(run, 4), process)
        ranks_of(process.pid)[lost].kill()
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0 and "going on from step" in out, out + err
    losses = [line["loss"] for line in metrics(run)]
    assert len(losses) == 60 and losses[: len(expected)] == pytest.approx(expected, rel=1e-4)
    assert len((run / "starts.jsonl").read_text().splitlines()) == 2


def test_a_machine_that_stood_by_takes_the_place_of_one_that_is_lost(
    packed: Path, trained: Path, tmp_path: Path
) -> None:
    """Three of torchrun's agents, as of three machines with a process each; four lanes are shared by two of them."""
    run, port = tmp_path / "run", free_port()
    start = [*TORCHRUN, "--nnodes", "1:3", "--nproc_per_node", 1]
    start += ["--max_restarts", 3, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    start += ["--rdzv_conf", "last_call_timeout=4,is_host={}", "--local_addr", "localhost"]
    often = ["--set", "simclr.checkpoint_every=2", "--set", "simclr.log_every=1", "--set", "simclr.epochs=8"]

    def agent(number: int) -> list[Any]:
        return [str(word).format(int(number == 0)) for word in (*start, *words(packed, tmp_path), *often)]

    with ExitStack() as stack:
        agents = [stack.enter_context(running(agent(number))) for number in range(3)]
        wait_until(reached(run, 4), agents[0])
        # The first holds the others together.
        lost = next(agent for agent in agents[1:] if ranks_of(agent.pid).keys() & {0, 1})
        os.killpg(lost.pid, signal.SIGKILL)
        for child in family(lost.pid):
            child.kill()
        said = [agent.communicate(timeout=TIMEOUT) for agent in agents if agent is not lost]
        assert [agent.returncode for agent in agents if agent is not lost] == [0, 0], said
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["processes"] for start in starts] == [2, 2]
    assert any("rank 2 of 3 stands by" in err for _, err in said)
    losses, expected = ([line["loss"] for line in metrics(folder)] for folder in (run, trained))
    assert len(losses) == 120 and losses[: len(expected)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("started", "of_machine", "lanes", "group", "usable"),
    [
        (8, 4, 16, "all", 8),
        (7, 7, 16, "all", 4),
        (18, 6, 16, "node", 4),  # of one machine: groups of six divide no divisor of 16
        (12, 4, 16, "node", 8),
        (6, 3, 4, 2, 4),
        (3, 1, 4, 2, 2),
    ],
)
def test_who_stands_by_is_who_cannot_share_lanes_and_groups(
    started: int, of_machine: int, lanes: int, group: str | int, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate(
        {**TINY, "simclr": {**TINY["simclr"], "data": "unused", "lanes": lanes, "batchnorm_group": group}}
    )
    names = ("TORCHELASTIC_MAX_RESTARTS", "SIMCLR_DALI_STANDING_BY", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    for name, value in zip(names, (1, 0, 0, started, 0), strict=True):
        monkeypatch.setenv(name, str(value))
    more = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for word, text in {**more, "LOCAL_WORLD_SIZE": str(of_machine)}.items():
        monkeypatch.setenv(word, text)
    stand_by_where_left_over(config)
    assert os.environ["WORLD_SIZE"] == str(usable)
    assert os.environ["LOCAL_WORLD_SIZE"] == str(min(of_machine, usable))
