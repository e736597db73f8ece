"""How processes that are started together find out about each other, whoever starts them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from torch.distributed.run import get_args_parser

from simclr_dali.__main__ import COMMANDS
from simclr_dali.shards.launch import Launch, LaunchError, check_port, read_launch
from tests.conftest import ROOT, TIMEOUT, assert_sentence, run_command, run_python
from tests.runs import (
    environment,
    family,
    free_port,
    launcher,
    metrics,
    reached,
    running,
    tiny_config,
    trainer,
    wait_until,
)

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "4711", "PMIX_RANK": "1",
}  # fmt: skip
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "4"}
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
POD = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, Launch("")),
        (TORCHRUN, Launch("torchrun", 3, 4, 1, 2)),
        (POD, Launch("a launcher", 3, 4, 0, 1)),
        (SLURM, Launch("srun", 3, 5, 1, 2)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, Launch("")),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Launch("")),  # the batch script itself
        ({**SLURM, **TORCHRUN}, Launch("torchrun", 3, 4, 1, 2)),  # torchrun as the task of each node
        (OPEN_MPI, Launch("mpirun", 1, 2, 1, 2)),
        (HYDRA, Launch("mpirun", 0, 4, 0, 4)),
        ({**SLURM, **OPEN_MPI}, Launch("mpirun", 1, 2, 1, 2)),  # mpirun's own step of Slurm starts its daemons
        ({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "5", "PMIX_RANK": "3"}, Launch("srun", 3, 5, 1, 2)),  # srun --mpi
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Launch("")),
        ({**HYDRA, "PMI_SIZE": "1"}, Launch("")),
    ],
)
def test_launchers_are_read(said: dict[str, str], expected: Launch) -> None:
    environment = dict(said)
    assert read_launch(environment) == expected
    if expected.world > 1:
        told = [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        assert told == [
            str(number) for number in (expected.rank, expected.world, expected.local_rank, expected.local_world)
        ]


def test_tasks_of_a_step_agree_on_where_to_meet() -> None:
    tasks = []
    for rank, node, local in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (4, 2, 0)):
        said = {**SLURM, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
        read_launch(said)
        tasks.append((said["MASTER_ADDR"], said["MASTER_PORT"]))
    assert set(tasks) == {("gpu07", tasks[0][1])}
    other = {**SLURM, "SLURM_JOB_ID": "78"}
    read_launch(other)
    assert other["MASTER_PORT"] != tasks[0][1]
    given = {**SLURM, "MASTER_ADDR": "there", "MASTER_PORT": "5"}
    read_launch(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("there", "5")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not.*unset RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({**TORCHRUN, "RANK": "4"}, "torchrun says rank 4 of 4"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "LOCAL_RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({**SLURM, "SLURM_LOCALID": ""}, "SLURM_LOCALID is not set"),
        ({**SLURM, "SLURM_NODEID": "9"}, "srun says node 9"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "many"}, r"as in 2\(x3\),1"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "set MASTER_ADDR"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}, "does not say where rank 0 is; give all of them"),
        ({**HYDRA, "MPI_LOCALRANKID": ""}, "MPI_LOCALRANKID is not set"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK is 0, and how many processes there are is not said"),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"}, "SLURM_PROCID is 3, and how many"),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "1"}, "RANK is 0 of 1, but srun started 5 processes.*unset RANK"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "RANK is 0 of 1, but mpirun started 2 processes"),
        ({**TORCHRUN, "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', not a number"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is '70000', not 1 to 65535"),
        ({**TORCHRUN, "LOCAL_RANK": "5"}, "5 of 2 on this machine"),
        ({**SLURM, "SLURM_PROCID": "7"}, "srun says rank 7 of 5"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "3"}, "mpirun says rank 3 of 2"),
    ],
)
def test_what_cannot_be_is_one_sentence(said: dict[str, str], sentence: str) -> None:
    with pytest.raises(LaunchError, match=sentence):
        read_launch(dict(said))


def test_a_taken_port_is_named_at_once() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(LaunchError, match=f"port {port}.*--master_port"):
            check_port({"MASTER_PORT": port})
        check_port({"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    check_port({"MASTER_PORT": port})


@pytest.mark.parametrize(
    "words", [["knn", "--ckpt", "RUN"], ["pack", "IN", "OUT"], ["predict", "--ckpt", "X", "a.jpg"]]
)
def test_a_stale_rank_is_one_sentence(words: list[str], trained: Path) -> None:
    given = [str(trained) if word == "RUN" else word for word in words]
    assert_sentence(run_command(*given, env={"RANK": "1"}), "RANK is set and WORLD_SIZE is not", "unset RANK")


@pytest.mark.parametrize(
    "words",
    [
        ["pack", "IN", "OUT"],
        ["predict", "--ckpt", "X", "a.jpg"],
        ["export", "--ckpt", "X", "--format", "hub", "--out", "Y"],
        ["nearest", "a.jpg", "--ckpt", "X", "--out", "a.png"],
    ],
)
def test_commands_of_one_process_refuse_more(words: list[str]) -> None:
    two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run_command(*words, env=two)
    assert_sentence(done, "2 processes were started", "without a launcher")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_launchers_local_rank(name: str) -> None:
    done = run_command(name, "--local_rank=0", "--no-such-option")
    assert done.returncode == 2 and "local_rank" not in done.stderr.rpartition("error:")[2], done.stderr


def test_options_go_through_torchrun() -> None:
    """torchrun takes every option before and behind the script that begins as one of its own."""
    parser = get_args_parser()
    options: set[str] = set()
    for name in ("pretrain", "linear", "knn", "finetune", "extract"):
        options |= set(re.findall(r"--[a-z][a-z-]+", run_command(name, "--help").stdout.partition("options:")[2]))
    options = {option for option in options if option not in ("--help", "--run", "--num")}
    assert {"--out", "--set", "--layer", "--mean", "--cache-gb"} <= options
    for option in options:
        assert parser.parse_args(["script.py", option, "1"]).training_script_args == [option, "1"]


def start_all(tasks: list[dict[str, str]], *words: Any) -> list[subprocess.CompletedProcess[str]]:
    """One process for each environment, side by side, as srun and mpirun start them."""
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, words)], env={**environment(), **task}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for task in tasks
    ]  # fmt: skip
    done = []
    for process in started:
        out, err = process.communicate(timeout=TIMEOUT)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def test_tasks_of_srun_become_ranks_of_one_run(packed: Path, tmp_path: Path) -> None:
    job = str(free_port())  # a number that other tests hardly have
    step = {
        **SLURM,
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
    }
    tasks = [{**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    words = ["--config", tiny_config(tmp_path), "--data", packed, "--out", tmp_path / "run", "--stop-after-steps", 2]
    done = start_all(tasks, ROOT / "train/pretrain.py", *words)
    assert [one.returncode for one in done] == [0, 0], done
    assert "(2 x 1 x 8)" in done[0].stdout and len(metrics(tmp_path / "run")) == 2


def test_features_written_by_two_processes_are_those_of_one(trained: Path, pictures: Path, tmp_path: Path) -> None:
    tasks = [{**OPEN_MPI, "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank} for rank in "01"]
    tasks = [{**task, "PMIX_NAMESPACE": str(tmp_path)} for task in tasks]
    script = ROOT / "eval/extract.py"
    (tmp_path / "pictures").mkdir()
    for number, path in enumerate(sorted((pictures / "val").rglob("*.jpg"))[:9]):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(path.read_bytes() if number != 5 else b"no picture")
    for source, code in ((["--split", "val", "--map"], 0), ([tmp_path / "pictures"], 2)):
        alone, together = tmp_path / f"alone{code}.npy", tmp_path / f"together{code}.npy"
        one = run_python(script, "--ckpt", trained, *source, "--out", alone)
        both = start_all(tasks, script, "--ckpt", trained, *source, "--out", together)
        assert [one.returncode, *(done.returncode for done in both)] == [code, code, code], (one, both)
        np.testing.assert_allclose(np.load(together), np.load(alone), rtol=1e-5, atol=1e-6)
        described = [json.loads(path.with_suffix(".ids.json").read_text()) for path in (alone, together)]
        assert described[0] == described[1]
    assert np.load(tmp_path / "together0-map.npy").shape == np.load(tmp_path / "alone0-map.npy").shape
    assert "5.jpg" in both[0].stderr and not list(tmp_path.glob(".*tmp"))


def test_processes_that_do_not_see_each_other_are_not_watched(packed: Path, trained: Path, tmp_path: Path) -> None:
    """Containers on one machine may have one name, and numbers of processes that mean nothing to each other."""
    alone = ["unshare", "-rpf", "--mount-proc"]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no permission for a namespace of processes")
    tasks = [{**OPEN_MPI, "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank} for rank in "01"]
    script = [ROOT / "eval/knn.py", "--ckpt", trained, "--data", packed, "--k", 5, "--out", tmp_path]
    started = []
    for rank, task in enumerate(tasks):
        before = "for i in 1 2 3; do /bin/true; done; " if rank else ""
        words = " ".join(map(str, [sys.executable, *script]))
        started.append(subprocess.Popen(
            [*alone, "sh", "-c", f"{before}{words}; exit $?"], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**environment(), **task, "PMIX_NAMESPACE": str(tmp_path)},
        ))  # fmt: skip
    ends = [process.communicate(timeout=TIMEOUT) for process in started]
    assert [process.returncode for process in started] == [0, 0], ends


def test_an_error_that_one_rank_tells_is_no_traceback_of_others(trained: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "out/knn.json").mkdir(parents=True)
    tasks = [{**OPEN_MPI, "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank} for rank in "01"]
    tasks = [{**task, "PMIX_NAMESPACE": str(tmp_path)} for task in tasks]
    script = ROOT / "eval/knn.py"
    done = start_all(tasks, script, "--ckpt", trained, "--data", packed, "--k", 5, "--out", tmp_path / "out")
    assert [one.returncode for one in done] == [2, 2] and "knn.json" in done[0].stderr
    assert all("Traceback" not in one.stderr for one in done), done
    assert '"top1"' in done[0].stdout  # what could not be written is printed


def test_a_rank_that_is_killed_is_named_by_the_others(packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(trainer(2, tiny_config(tmp_path), packed, run, "--set", "simclr.epochs=2000")) as process:
        wait_until(reached(run, 3), process)
        ranks = [child for child in family(process.pid) if _environment(child).get("RANK") == "1"]
        victim = next(child for child in ranks if "pretrain.py" in " ".join(child.cmdline()))
        victim.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"rank 1 (process {victim.pid}) is gone without a word" in err and "Out of memory" in err, out + err
    assert "Traceback" not in err


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def test_a_port_that_is_taken_ends_a_run_in_one_sentence(packed: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        command = launcher(2, ROOT / "train/pretrain.py", "--config", tiny_config(tmp_path), "--data", packed)
        command[command.index("--master_port") + 1] = other.getsockname()[1]
        done = subprocess.run(
            [str(word) for word in [*command, "--run", tmp_path / "run"]],
            capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, **environment()}, check=False,
        )  # fmt: skip
    assert done.returncode == 2 and "--master_port" in done.stderr and "Traceback" not in done.stderr, done.stderr
