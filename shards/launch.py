"""How a command was started: by deepspeed, torchrun or a PyTorchJob, by srun, by mpirun, or alone.

The one place that reads what launchers say. What another launcher than torch's says is written into the environment
as torch's launcher would say it, where DeepSpeed and torch read it. Every mistake is found before torch is imported.
"""

import errno
import os
import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

from simclr_dali.shards.errors import UserError

Environment = MutableMapping[str, str]

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
UNSET_HINT = f"where they are left from an earlier run: unset {' '.join(_TORCH)}"
NOBODY_HINT = (
    f"where no others were started, leave the launcher out (with srun: -n 1), or unset {' '.join(_TORCH)}, which may "
    f"be left from an earlier run"
)
# Rank, size, rank on the machine and size there, as Open MPI, MVAPICH and the Hydra of MPICH and Intel MPI say them.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
_HYDRA = (("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),)  # srun may say the first two as well
_MARKS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed"}
_MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
_PORTS = range(20_000, 32_000)  # below those that systems give to whoever connects


class LaunchError(UserError):
    """The processes that were started do not fit together, or not the machine. The message says what to do."""


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    launcher: str
    """For messages; empty where there is none."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def alone(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a process that is started by one of several and is none of them."""
    told = ("TORCHELASTIC_", "OMPI_", "MV2_", "PMI_", "PMIX_", "MPI_LOCAL", "SLURM_", "CROSS_", "LOCAL_SIZE")
    return {name: value for name, value in environment.items() if name not in _TORCH and not name.startswith(told)}


def read_launch(environment: Environment = os.environ) -> Launch:
    """What the environment says of how this process was started; completes it for torch and DeepSpeed.

    Raises LaunchError where that contradicts itself or something is missing.
    """
    _refuse_unknown_size(environment)
    outer, address = (
        _by_mpi(environment, _MPI) or _by_slurm(environment) or _by_mpi(environment, _HYDRA) or (Launch(""), "")
    )
    if "RANK" in environment or "WORLD_SIZE" in environment:
        launch = _by_torch(environment)
        if launch.world == 1 and outer.world > 1 and not _MARKS.keys() & environment.keys():
            raise LaunchError(
                f"RANK is 0 of 1, but {outer.launcher} started {outer.world} processes; RANK and WORLD_SIZE are left "
                f"from an earlier run: unset {' '.join(_TORCH)}"
            )
        if (launch.rank, launch.world) == (outer.rank, outer.world) and not _MARKS.keys() & environment.keys():
            launch = replace(launch, launcher=outer.launcher or launch.launcher)  # completed below, before
        return _checked(launch)
    launch = _checked(outer)
    if launch.world > 1:
        environment.update(
            RANK=str(launch.rank),
            WORLD_SIZE=str(launch.world),
            LOCAL_RANK=str(launch.local_rank),
            LOCAL_WORLD_SIZE=str(launch.local_world),
        )
        environment.setdefault("MASTER_ADDR", address)
        environment.setdefault("MASTER_PORT", str(_port_of(environment)))
    return launch


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.world or not 0 <= launch.local_rank < launch.local_world:
        raise LaunchError(
            f"{launch.launcher} says rank {launch.rank} of {launch.world}, and {launch.local_rank} of "
            f"{launch.local_world} on this machine; ranks count from 0: start all processes anew, or, {UNSET_HINT}"
        )
    return launch


def _refuse_unknown_size(environment: Environment) -> None:
    """Raise LaunchError for a task of which nobody says how many there are."""
    sizes = {names[1] for names in (*_MPI, *_HYDRA)} | {"SLURM_STEP_NUM_TASKS", "WORLD_SIZE"}
    if sizes & environment.keys():
        return
    if (number := _number(environment, "PMIX_RANK")) is not None and "SLURM_PROCID" not in environment:
        said = f"PMIX_RANK is {number}"
    elif number := _number(environment, "SLURM_PROCID"):  # 0 is a batch script as well
        said = f"SLURM_PROCID is {number}"
    else:
        return
    raise LaunchError(
        f"{said}, and how many processes there are is not said; set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
        f"MASTER_PORT, or start with deepspeed or torchrun"
    )


def _by_torch(environment: Environment) -> Launch:
    """As deepspeed, torchrun and PyTorchJobs say it."""
    rank, world = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
    if rank is None or world is None:
        given, missing = ("RANK", "WORLD_SIZE") if world is None else ("WORLD_SIZE", "RANK")
        raise LaunchError(f"{given} is set and {missing} is not; start with deepspeed or torchrun, or, {UNSET_HINT}")
    local_rank = _number(environment, "LOCAL_RANK")
    local_world = _number(environment, "LOCAL_WORLD_SIZE") or _number(environment, "LOCAL_SIZE")
    if local_rank is None and (world == 1 or "KUBERNETES_SERVICE_HOST" in environment):
        local_rank, local_world = 0, 1  # a pod of a PyTorchJob is a machine with one process
        environment.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    if local_rank is None:
        raise LaunchError(
            f"RANK is {rank} of {world} and LOCAL_RANK is not set; start with deepspeed or torchrun, which set it, or "
            f"set it to this process's number on its machine, or, {UNSET_HINT}"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and name not in environment:
            raise LaunchError(
                f"RANK is {rank} of {world} and {name} is not set; start with deepspeed or torchrun, or, {UNSET_HINT}"
            )
    port = _number(environment, "MASTER_PORT")
    if world > 1 and not 0 < (port or 0) < 2**16:
        raise LaunchError(f"MASTER_PORT is {environment['MASTER_PORT']!r}, not 1 to 65535; give a free port")
    launcher = next((name for mark, name in _MARKS.items() if mark in environment), "a launcher")
    return Launch(launcher, rank, world, local_rank, local_world or local_rank + 1)


def _by_slurm(environment: Environment) -> tuple[Launch, str] | None:
    """The tasks of a step that srun started; a batch script or an allocation alone is no step."""
    world = _number(environment, "SLURM_STEP_NUM_TASKS")
    if world is None or world == 1 or "SLURM_PROCID" not in environment:
        return None
    rank, local_rank, node = (_needed(environment, f"SLURM_{name}", "srun") for name in ("PROCID", "LOCALID", "NODEID"))
    per_node = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if node >= len(per_node):
        raise LaunchError(f"srun says node {node} and tasks {per_node} per node; start the step anew")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if len(per_node) > 1 and not nodes and "MASTER_ADDR" not in environment:
        raise LaunchError("srun started several nodes and does not say which; set MASTER_ADDR to the first one's name")
    address = _first_host(nodes) if len(per_node) > 1 else "127.0.0.1"
    return Launch("srun", rank, world, local_rank, per_node[node]), address


def _by_mpi(environment: Environment, kinds: tuple[tuple[str, ...], ...]) -> tuple[Launch, str] | None:
    """The processes that an mpirun started; asked before Slurm, whose step mpirun may have made for itself."""
    for names in kinds:
        world = _number(environment, names[1])
        if world is None or world == 1:
            continue
        rank, _, local_rank, local_world = (_needed(environment, name, "mpirun") for name in names)
        if local_world < world and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            raise LaunchError(
                f"mpirun started {world} processes, {local_world} of them on this machine, and does not say where rank "
                "0 is; give all of them its address and a free port: mpirun -x MASTER_ADDR=... -x MASTER_PORT=..."
            )
        return Launch("mpirun", rank, world, local_rank, local_world), "127.0.0.1"
    return None


def _number(environment: Environment, name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"-?\d+", text):
        raise LaunchError(f"{name} is {text!r}, not a number; start with deepspeed or torchrun, or, {UNSET_HINT}")
    return int(text)


def _needed(environment: Environment, name: str, launcher: str) -> int:
    value = _number(environment, name)
    if value is None:
        raise LaunchError(
            f"{launcher} started several processes and {name} is not set; start with deepspeed or torchrun"
        )
    return value


def _tasks_per_node(text: str) -> list[int]:
    """``2(x3),1`` means 2, 2, 2 and 1 tasks."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, not as in 2(x3),1; start the step anew")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _first_host(nodes: str) -> str:
    """The first of Slurm's ``gpu[07-09,12],cpu1``: gpu07."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _port_of(environment: Environment) -> int:
    """A port on which all processes of a job agree without talking, and which other jobs hardly have."""
    job = "/".join(environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", *_MPI_JOBS)).strip("/")
    return _PORTS[zlib.crc32((job or str(os.getppid())).encode()) % len(_PORTS)]


def check_port(environment: Environment = os.environ) -> None:
    """On rank 0: raise LaunchError where something else listens on the port at which it is to receive the others."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return  # torchrun itself listens there
    port = int(environment["MASTER_PORT"])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            why = "is taken, by another run perhaps" if error.errno == errno.EADDRINUSE else "cannot be used"
            raise LaunchError(
                f"port {port}, at which the processes are to meet, {why} ({error.strerror}); give a free one with "
                f"--master_port before the script's name, or MASTER_PORT"
            ) from error
