"""What starts a training on a cluster (scripts/launch), and what looks whether it can be started (doctor)."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepspeed.launcher.runner import fetch_hostfile

from simclr_dali.model.process import Process
from simclr_dali.train.doctor import LOOK, OK, WRONG, Facts, checks, digest_of_code
from tests import nodes as machines
from tests.conftest import ROOT, TIMEOUT, assert_sentence, run_command
from tests.nodes import ended, two_nodes
from tests.runs import TOOLS, environment, free_port, metrics, reached, tiny_config, torchrun, wait_until

LAUNCH = ROOT / "scripts/launch"
CPU = Process(0, 2, 1, torch.device("cpu"), 2)
FACTS = Facts(
    host="a", machine="1", launcher="srun", device="NVIDIA H200", gpus=1, cores=16, interface="eth0",
    clock=100.0, versions={"torch": "2.13"}, code="c0de", data="", trouble="", open_files=65536, files_needed=0,
    locked_memory=-1, shared_memory=8 << 30,
)  # fmt: skip


OTHER = replace(FACTS, host="b", machine="2")


def states(*everywhere: Facts, process: Process = CPU) -> dict[str, tuple[str, str]]:
    return {one.about: (one.state, one.text) for one in checks(list(everywhere), process)}


def test_two_equal_machines_are_well() -> None:
    found = states(FACTS, OTHER)
    assert {state for state, _ in found.values()} == {OK}
    assert found["processes"][1] == "2 by srun: a 1, b 1" and found["versions"][1].endswith("everywhere")


@pytest.mark.parametrize(
    ("other", "about", "state", "words"),
    [
        (
            {"versions": {"torch": "2.12"}},
            "versions",
            WRONG,
            ["a (rank 0): torch 2.13", "b (rank 1): torch 2.12"],
        ),
        ({"code": "0ther"}, "code", WRONG, ["b (rank 1): 0ther", "commit"]),
        ({"clock": 130.0}, "clocks", LOOK, ["30.0 s apart", "NTP"]),
        ({"data": "", "trouble": "no packed split"}, "data", WRONG, ["no packed split"]),
        ({"device": "CPU"}, "device", LOOK, ["no GPU"]),
        ({"gpus": 8}, "device", LOOK, ["8 GPUs and 1 process"]),
        ({"cores": 2}, "device", LOOK, ["more cores"]),
        ({"open_files": 1024}, "limits", LOOK, ["b: up to 1,024 open files", "ulimit -Hn"]),
        ({"files_needed": 100_000}, "limits", WRONG, ["100,000 shards", "larger shards"]),
    ],
)
def test_each_difference_is_named_with_what_to_do(
    other: dict[str, Any], about: str, state: str, words: list[str]
) -> None:
    found = states(FACTS, replace(OTHER, **other))
    assert found[about][0] == state and all(word in found[about][1] for word in words), found[about]


def test_what_nccl_runs_into_is_named() -> None:
    on_gpu = replace(CPU, device=torch.device("cuda"))
    small = replace(FACTS, shared_memory=64 << 20)
    assert states(small, small, process=on_gpu)["memory"][0] == WRONG
    assert states(small, process=on_gpu)["memory"][0] == OK  # one process shares nothing
    low = replace(OTHER, locked_memory=8 << 20)
    assert "b: 8.39 MB may be locked" in states(FACTS, low, process=on_gpu)["memory"][1]


def test_ranks_of_a_machine_and_machines_of_a_name_are_compared_too() -> None:
    found = states(FACTS, replace(FACTS, code="0ther", open_files=256, cores=1))
    assert found["code"][0] == WRONG and "a (rank 1): 0ther" in found["code"][1]
    assert found["limits"][0] == LOOK and found["device"][0] == LOOK and "clocks" not in found
    found = states(FACTS, replace(FACTS, machine="2", clock=999.0))
    assert found["clocks"][0] == LOOK and "a 1, a 1" in found["processes"][1]


def test_a_large_cluster_fits_a_screen() -> None:
    everywhere = [replace(FACTS, host=f"node-{n}", machine=str(n)) for n in range(256) for _ in range(8)]
    lines = list(checks(everywhere, replace(CPU, device=torch.device("cuda"))))
    assert len(lines) < 12 and all(len(one.text) < 120 for one in lines)
    assert "node-0, node-1, node-2, node-3 and 252 more: NVIDIA H200" in lines[1].text


def test_the_digest_of_the_code_sees_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import simclr_dali

    for folder in ("shards/sources", "pipeline", "model", "train", "eval"):
        shutil.copytree(ROOT / folder, tmp_path / "real" / folder.split("/")[0], dirs_exist_ok=True)
    (tmp_path / "package").mkdir()
    for folder in ("shards", "pipeline", "model", "train", "eval"):
        (tmp_path / "package" / folder).symlink_to(tmp_path / "real" / folder)  # as .package has them
    monkeypatch.setattr(simclr_dali, "__file__", str(tmp_path / "package/__init__.py"))
    seen = {digest_of_code()}
    for folder in ("shards", "pipeline", "model", "train", "eval"):
        path = next(iter(sorted((tmp_path / "real" / folder).glob("*.py"))))
        path.write_text(path.read_text() + "\n")
        seen.add(digest_of_code())
    assert len(seen) == 6


def test_one_machine_is_looked_at(packed: Path, tmp_path: Path) -> None:
    done = run_command("doctor", "--data", packed)
    assert done.returncode == 0 and "without a launcher" in done.stdout and "ok    data" in done.stdout, done.stderr
    missing = run_command("doctor", "--data", tmp_path)
    assert missing.returncode == 1 and "WRONG data" in missing.stdout and str(tmp_path) in missing.stdout


def test_an_interface_that_is_not_there_is_named() -> None:
    own = {**environment(), "GLOO_SOCKET_IFNAME": "eth77"}
    done = subprocess.run(
        [sys.executable, ROOT / "train/doctor.py"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=own,
        check=False,
    )
    assert_sentence(done, "GLOO_SOCKET_IFNAME is eth77", "is not there (there are lo", "it is found without")


@pytest.mark.launch
def test_two_processes_are_timed() -> None:
    done = torchrun(2, ROOT / "train/doctor.py")
    assert done.returncode == 0 and "2 by torchrun" in done.stdout, done.stderr
    assert "ms for one number" in done.stdout and "of gradients" in done.stdout


@pytest.mark.launch
@pytest.mark.skipif(bool(machines.why_not()), reason=machines.why_not() or "two machines can be had")
def test_two_machines_with_other_data_are_told(packed: Path, tmp_path: Path) -> None:
    with two_nodes(tmp_path, packed) as pair:
        shutil.rmtree(pair[1].folder / "shards")
        slurm = {
            "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_STEP_NODELIST": "10.99.0.[1-2]", "SLURM_LOCALID": "0",
        }  # fmt: skip
        started = [
            node.start(
                sys.executable, ROOT / "train/doctor.py", "--data", node.folder / "shards",
                **slurm, SLURM_NODEID=str(rank), SLURM_PROCID=str(rank),
            )
            for rank, node in enumerate(pair)
        ]  # fmt: skip
        (code, text), (other_code, _) = ended(started)
    assert (code, other_code) == (1, 1), text
    assert "2 by srun: node-a 1, node-b 1" in text and "interface    node-a, node-b: eth0" in text
    assert "WRONG data" in text and "node-b (rank 1): no packed split" in text and "network" in text


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A clone with an environment, and Slurm's commands, which run one task and write down what they are asked."""
    for folder in ("train", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(f"PATH={TOOLS}:$PATH\n")
    commands = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; "$@" & echo $! > task; wait $!',
        "scontrol": 'echo "$@" >> scontrol.log',
    }
    for name, script in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return tmp_path


@pytest.mark.launch
def test_a_job_of_slurm_is_queued_again_until_the_run_is_finished(cluster: Path, packed: Path) -> None:
    own = {
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "DATA": str(packed),
        "SLURM_CPUS_PER_TASK": "2", "CONFIG": str(tiny_config(cluster)), "RUN": "run",
    }  # fmt: skip
    command = ["bash", "scripts/launch/slurm.sbatch"]
    started = subprocess.Popen(
        command, cwd=cluster, env={**environment(), **own}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_until(reached(cluster / "run", 3), started)
    os.kill(int((cluster / "task").read_text()), signal.SIGUSR1)
    text, _ = started.communicate(timeout=TIMEOUT)
    assert started.returncode == 0 and "job 77 is queued again" in text, text
    assert (cluster / "scontrol.log").read_text() == "requeue 77\n"
    again = subprocess.run(
        command, cwd=cluster, env={**environment(), **own}, text=True, capture_output=True, timeout=TIMEOUT, check=False
    )
    assert again.returncode == 0 and "going on from step" in again.stdout, again.stderr
    assert (cluster / "scontrol.log").read_text() == "requeue 77\n" and (cluster / "run/finished.json").is_file()
    assert [line["step"] for line in metrics(cluster / "run")] == list(range(30))


@pytest.mark.launch
def test_torchrun_starts_what_the_script_says(packed: Path, tmp_path: Path) -> None:
    words = ["--config", tiny_config(tmp_path), "--data", packed, "--out", tmp_path / "run", "--stop-after-steps", 2]
    done = subprocess.run(
        [str(word) for word in (LAUNCH / "torchrun.sh", *words)], capture_output=True, text=True, timeout=TIMEOUT,
        env={**environment(), "HEAD": "127.0.0.1", "NODES": "1", "GPUS": "2", "PORT": str(free_port())}, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "is at step 2" in done.stdout, done.stderr
    missing = subprocess.run([LAUNCH / "torchrun.sh"], capture_output=True, text=True, check=False)
    assert missing.returncode and "the number of machines" in missing.stderr


def test_the_job_of_kubernetes_starts_the_trainer() -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert job["kind"] == "PyTorchJob" and set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        spec = replica["template"]["spec"]
        (container,) = spec["containers"]
        script, *words = container["args"]
        assert (ROOT / script).is_file() and words[::2] == ["--config", "--data", "--out"]
        assert container["name"] == "pytorch"  # by which the operator finds it
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["shared-memory"] == "/dev/shm" and {volume["name"] for volume in spec["volumes"]} == set(mounts)
        assert job["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])


def test_the_hostfile_is_one_that_deepspeed_reads() -> None:
    assert fetch_hostfile(str(LAUNCH / "hostfile")) == {"node-0": 8, "node-1": 8}
