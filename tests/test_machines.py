"""Two machines: a run on both is the run on one, whoever starts it, and a machine that is lost does not hold it up."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import nodes as machines
from tests.conftest import ROOT
from tests.nodes import Node, ended, two_nodes
from tests.runs import TOOLS, TORCHRUN, metrics, reached, tiny_config, wait_until

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(bool(machines.why_not()), reason=machines.why_not() or "two machines can be had"),
]
SCRIPT = ROOT / "train/pretrain.py"
PORT = "29500"
Start = Callable[[list[Node], list[Any]], list[subprocess.Popen[str]]]


@pytest.fixture
def pair(packed: Path, tmp_path: Path) -> Iterator[list[Node]]:
    with two_nodes(tmp_path, packed) as found:
        yield found


def of_node(node: Node, words: list[Any]) -> list[Any]:
    """The words of a training on a machine: its own shards, cache and run folder."""
    own = ["--data", node.folder / "shards", "--out", node.folder / "run", "--set"]
    return [SCRIPT, "--config", tiny_config(node.folder), *own, f"simclr.cache={node.folder / 'cache'}", *words]


def by_deepspeed(pair: list[Node], words: list[Any]) -> list[subprocess.Popen[str]]:
    started = []
    for rank, node in enumerate(pair):
        hosts = node.folder / "hostfile"
        hosts.write_text("".join(f"{other.name} slots=1\n" for other in pair))
        start = [TOOLS / "deepspeed", "--hostfile", hosts, "--no_ssh", "--node_rank", rank]
        start += ["--master_addr", pair[0].address, "--master_port", PORT]
        started.append(node.start(*start, *of_node(node, words)))
    return started


def by_torchrun(pair: list[Node], words: list[Any]) -> list[subprocess.Popen[str]]:
    for node in pair:
        node.resolves_to = node.address  # by its own name torchrun knows whether it is to hold the store
    start = [*TORCHRUN, "--nnodes", 2, "--nproc_per_node", 1]
    start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{pair[0].address}:{PORT}", "--local_addr"]
    return [node.start(*start, node.address, *of_node(node, words)) for node in pair]


def by_srun(pair: list[Node], words: list[Any]) -> list[subprocess.Popen[str]]:
    """What Slurm sets for the tasks of a step."""
    return [
        node.start(
            machines.PYTHON, *of_node(node, words),
            SLURM_JOB_ID="7", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)",
            SLURM_STEP_NODELIST="10.99.0.[1-2]", SLURM_NODEID=str(rank), SLURM_PROCID=str(rank), SLURM_LOCALID="0",
        )
        for rank, node in enumerate(pair)
    ]  # fmt: skip


@pytest.mark.parametrize("start", [by_deepspeed, by_torchrun, by_srun])
def test_two_machines_train_as_one_does(start: Start, pair: list[Node], trained: Path) -> None:
    for code, output in ended(start(pair, ["--stop-after-steps", 5])):
        assert code == 0, output
    losses = [line["loss"] for line in metrics(pair[0].folder / "run")]
    assert losses == pytest.approx([line["loss"] for line in metrics(trained)[:5]], rel=1e-5)
    # The second one keeps nothing of it but what concerns itself.
    assert not list((pair[1].folder / "run").rglob("step-*"))


@pytest.mark.skipif(bool(machines.why_no_cable()), reason=machines.why_no_cable() or "a slow cable can be had")
def test_a_slow_and_lossy_network_changes_no_number(packed: Path, tmp_path: Path, trained: Path) -> None:
    with two_nodes(tmp_path, packed, delay=0.025, loss=0.01) as pair:
        for code, output in ended(by_srun(pair, ["--stop-after-steps", 3])):
            assert code == 0, output
        losses = [line["loss"] for line in metrics(pair[0].folder / "run")]
    assert losses == pytest.approx([line["loss"] for line in metrics(trained)[:3]], rel=1e-5)


def test_a_run_is_never_begun_anew_where_another_machine_knows_better(pair: list[Node]) -> None:
    for code, output in ended(by_srun(pair, ["--stop-after-steps", 3])):
        assert code == 0, output
    other = pair[1].folder / "run"
    shutil.rmtree(other, ignore_errors=True)
    (pair[0].folder / "run").rename(other)  # as if the machines had changed places
    for words in ([], ["--plan"]):
        (_, first), (code, second) = ended(by_srun(pair, words))
        assert code == 2 and "Traceback" not in first + second
        for word in ("rank 1 on node-b has a checkpoint of step 3", "rank 0 on node-a has no checkpoint", "--run"):
            assert word in first, first
    assert not list((pair[0].folder / "run").glob("checkpoints/step-*")) and len(metrics(other)) == 3
    # On one disk that both see it goes on, as it does with rank 0 where the run is.
    shutil.rmtree(pair[0].folder / "run")
    other.rename(pair[0].folder / "run")
    other.symlink_to(pair[0].folder / "run")
    (code, first), (other_code, second) = ended(by_srun(pair, ["--stop-after-steps", 2]))
    assert (code, other_code) == (0, 0) and "is at step 5" in first, first + second


def test_a_machine_that_is_lost_and_comes_back(pair: list[Node], trained: Path) -> None:
    """By torchrun.sh with restarts: the run goes on where one is lost, on one, and on two when it is there again."""
    shared = pair[0].folder / "run"
    often = ["--set", "simclr.checkpoint_every=2", "--set", "simclr.log_every=1", "--set", "simclr.epochs=80"]

    def start(node: Node) -> subprocess.Popen[str]:
        node.resolves_to = node.address
        words = [*of_node(node, often)[1:], "--out", shared]
        asked = {"HEAD": pair[0].address, "NODES": "1:2", "GPUS": "1", "RESTARTS": "3", "ADDRESS": node.address}
        return node.start(ROOT / "scripts/launch/torchrun.sh", *words, **asked, PET_RDZV_CONF="last_call_timeout=3")

    def started_by(processes: int, starts: int) -> Callable[[], bool]:
        def is_so() -> bool:
            lines = (shared / "starts.jsonl").read_text().splitlines()
            return len(lines) == starts and json.loads(lines[-1])["processes"] == processes

        return is_so

    first, _ = [start(node) for node in pair]
    wait_until(reached(shared, 4), first)
    assert started_by(2, 1)()
    pair[1].send(signal.SIGKILL)
    wait_until(started_by(1, 2), first)
    wait_until(reached(shared, len(metrics(shared)) + 5), first)
    start(pair[1])
    wait_until(started_by(2, 3), first)
    wait_until(reached(shared, len(metrics(shared)) + 5), first)
    for node in pair:
        node.send(signal.SIGKILL)
    errors = first.communicate()[1]
    assert "error: rank 0: a process on node-b is gone (" in errors, errors
    lines, expected = metrics(shared), [line["loss"] for line in metrics(trained)]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert [line["loss"] for line in lines][: len(expected)] == pytest.approx(expected, rel=1e-4)


def cut(pair: list[Node]) -> None:
    pair[1].unplug()


def freeze(pair: list[Node]) -> None:
    pair[1].send(signal.SIGSTOP)


@pytest.mark.parametrize(
    ("lose", "told"),
    [
        (cut, {0: "rank 1 on node-b has not been heard of", 1: "rank 0 on node-a has not"}),
        (freeze, {0: "rank 1 on node-b has not been heard of"}),
    ],
)
def test_a_machine_that_is_lost_ends_the_run_and_one_goes_on(
    lose: Callable[[list[Node]], None], told: dict[int, str], pair: list[Node], trained: Path
) -> None:
    slow = ["--set", "simclr.checkpoint_every=2", "--set", "simclr.log_every=1", "--hang-timeout", "20"]
    started = by_srun(pair, slow)
    wait_until(reached(pair[0].folder / "run", 4), started[0])
    lose(pair)
    lost = time.monotonic()
    for rank, words in told.items():
        code, output = ended([started[rank]])[0]
        assert code not in (0, None) and words in output and "goes on from the last checkpoint" in output, output
    assert time.monotonic() - lost < 60
    for node in pair:
        node.send(signal.SIGKILL)
    if lose is not freeze:
        return
    # What is left goes on alone, and computes what an undisturbed run would have.
    alone = pair[0].start(machines.PYTHON, *of_node(pair[0], ["--stop-after-steps", 5]))
    code, output = ended([alone])[0]
    assert code == 0 and "going on from step" in output, output
    lines, expected = metrics(pair[0].folder / "run"), [line["loss"] for line in metrics(trained)]
    assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) >= 9
    assert [line["loss"] for line in lines][: len(expected)] == pytest.approx(expected, rel=1e-4)
    assert json.loads((pair[0].folder / "run/starts.jsonl").read_text().splitlines()[-1])["processes"] == 1
