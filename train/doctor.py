"""Check what a machine or a cluster gets wrong before a training is started on it.

    simclr-dali doctor                                              # this machine
    simclr-dali doctor --data /data/imagenet-shards
    srun simclr-dali doctor --data /data/imagenet-shards            # all machines of a job; deepspeed and torchrun too
    torchrun --nproc_per_node 8 train/doctor.py

Started as a training would be, by the same launcher, it compares all machines with each other: whether they meet, by
which interface and how fast, their clocks, versions, code and data, and the limits that a training runs into. A line
each says what is well ("ok"), what to look at ("look") and what will fail ("WRONG"), with what to do; the exit code is
1 where anything is wrong.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.shards.command_line import parser_of
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--data", help="Compare this folder of shards, or address, on all machines.")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import hashlib
import importlib.metadata
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

import simclr_dali
from simclr_dali.model.process import Process, from_all_ranks, init_distributed, leave, print_rank_0
from simclr_dali.pipeline.cache import Cache
from simclr_dali.pipeline.remote import open_split
from simclr_dali.shards.launch import read_launch
from simclr_dali.shards.wording import counted, listed, size_text
from simclr_dali.train import announce
from simclr_dali.train.plan import SHARED_MEMORY

OK, LOOK, WRONG = "ok", "look", "WRONG"
_OPEN_FILES, _OTHER_FILES = 4096, 48  # NCCL opens sockets per pair of ranks; at least open beside shards
_NAMED = 4  # machines or ranks of a line
_HIDDEN = 0.05  # seconds; the backward pass of 256 images takes about as long on an H200
_LOCKED_MEMORY = 64 << 20  # bytes that InfiniBand registers at least
_DIGITS = 12  # of a digest
_CLOCKS = 5.0  # seconds apart
_LARGE, _SMALL = 25_000_000, 1  # float32 numbers: about a ResNet-50's gradients, and one
_REPEATS = 5


@dataclass(frozen=True)
class Facts:
    """What a process knows of itself and its machine."""

    host: str
    machine: str
    """What is its machine's alone; hosts may have equal names."""
    launcher: str
    device: str
    gpus: int
    cores: int
    interface: str
    clock: float
    """Seconds since 1970, all taken together."""
    versions: dict[str, str]
    code: str
    """Digest of the package's files."""
    data: str
    """Digest of the manifest; empty where no data is asked about, or it cannot be opened."""
    trouble: str
    """Why it cannot be opened."""
    open_files: int
    """That a process may have at most."""
    files_needed: int
    """Shards, each of which a local set has open."""
    locked_memory: int
    """Bytes; -1 is no limit."""
    shared_memory: int
    """Bytes free in /dev/shm."""


@dataclass(frozen=True)
class Finding:
    """A line of the screen."""

    state: str
    about: str
    text: str


def main(arguments: argparse.Namespace) -> None:
    launcher = read_launch().launcher  # before what it says is completed
    process = init_distributed(timedelta(minutes=5))
    everywhere: list[Facts] = from_all_ranks(facts(process, launcher, arguments.data))
    network = links(process)
    found = [*checks(everywhere, process), *network]
    for one in found:
        print_rank_0(process, f"{one.state:6}{one.about:12} {one.text}")
    leave(process)
    if any(one.state == WRONG for one in found):
        sys.exit(1)


def facts(process: Process, launcher: str, data: str | None) -> Facts:
    """Of this process; data: what is to be compared. All ranks call it."""
    digest, trouble, shards = look_at_data(data) if data else ("", "", 0)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # to which the trainer raises its own
    found = Facts(
        host=socket.gethostname(),
        machine=process.peers.machines[process.rank] if process.peers else "",
        launcher=launcher,
        device=process.device_name,
        gpus=torch.cuda.device_count(),
        cores=process.cores,
        interface=os.environ.get("GLOO_SOCKET_IFNAME", "unknown"),  # init_distributed says it where it is known
        clock=0.0,
        versions=versions(),
        code=digest_of_code(),
        data=digest,
        trouble=trouble,
        open_files=sys.maxsize if hard == resource.RLIM_INFINITY else hard,
        files_needed=shards,
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        shared_memory=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
    )
    if process.world > 1:
        dist.barrier()  # so that clocks are read together
    return replace(found, clock=time.time())


def look_at_data(data: str) -> tuple[str, str, int]:
    """Digest of the manifest of train, or why it cannot be opened here, and how many shards of it are local."""
    try:
        shards = open_split(data, "train", Cache.at("~/.cache/simclr-dali", 200)).shards
    except UserError as error:
        return "", str(error), 0
    return shards.fingerprint[:_DIGITS], "", 0 if shards.source else len(shards.shards)


def versions() -> dict[str, str]:
    """Of what computes a run, and of what processes understand each other by."""
    found = {**announce.versions(), "numpy": importlib.metadata.version("numpy")}
    if torch.cuda.is_available():
        nccl = torch.cuda.nccl.version()
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, nccl))}
    return found


def digest_of_code() -> str:
    """sha256 over the package's files."""
    folder, digest = Path(simclr_dali.__file__).parent, hashlib.sha256()
    for path in sorted(folder.glob("*/**/*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:_DIGITS]


def checks(everywhere: list[Facts], process: Process) -> Iterator[Finding]:
    """What the facts of all ranks, in order, say."""
    machines: dict[str, list[Facts]] = {}
    for one in everywhere:
        machines.setdefault(one.machine, []).append(one)
    launcher = f"by {everywhere[0].launcher}" if everywhere[0].launcher else "without a launcher"
    counts = listed([f"{ones[0].host} {len(ones)}" for ones in machines.values()], _NAMED)
    yield Finding(OK, "processes", f"{len(everywhere)} {launcher}: {counts}")
    yield from _by_machine("device", machines, _device)
    if len(machines) > 1:
        yield from _by_machine("interface", machines, lambda ones: (OK, ones[0].interface))
        apart = max(one.clock for one in everywhere) - min(one.clock for one in everywhere)
        state = OK if apart < _CLOCKS else LOOK
        yield Finding(
            state, "clocks", f"{apart:.1f} s apart" + ("" if state == OK else "; set them by NTP, for logs and tokens")
        )
    yield _equal("versions", everywhere, [_text(one.versions) for one in everywhere], "install the same")
    yield _equal("code", everywhere, [one.code for one in everywhere], "check out the same commit")
    if any(one.data or one.trouble for one in everywhere):
        found = _equal("data", everywhere, [one.data or one.trouble for one in everywhere], "give all the same shards")
        yield replace(found, state=WRONG) if any(one.trouble for one in everywhere) else found
    yield from _by_machine("limits", machines, _limits)
    if process.device.type == "cuda":
        yield from _by_machine("memory", machines, _memory)
        if len(machines) > 1:
            yield from _by_machine("memory", machines, _locked_memory)


def _text(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _equal(about: str, everywhere: list[Facts], values: list[str], advice: str) -> Finding:
    """Whether all ranks have the same; each value with who has it, where they have not."""
    if len(set(values)) == 1:
        several = len({one.machine for one in everywhere}) > 1
        return Finding(OK, about, values[0] + (", everywhere" if several else ""))
    ranks: dict[str, list[str]] = {}
    for rank, (one, value) in enumerate(zip(everywhere, values, strict=True)):
        ranks.setdefault(value, []).append(f"{one.host} (rank {rank})")
    return Finding(
        WRONG, about, "; ".join(f"{listed(names, _NAMED)}: {value}" for value, names in ranks.items()) + f"; {advice}"
    )


def _by_machine(
    about: str, machines: dict[str, list[Facts]], look: Callable[[list[Facts]], tuple[str, str]]
) -> Iterator[Finding]:
    """A line for all machines of which there is the same to say."""
    found: dict[tuple[str, str], list[str]] = {}
    for ones in machines.values():
        found.setdefault(look(ones), []).append(ones[0].host)
    for (state, text), hosts in found.items():
        yield Finding(state, about, f"{listed(hosts, _NAMED)}: {text}")


def _device(ones: list[Facts]) -> tuple[str, str]:
    cores, gpus = min(one.cores for one in ones), max(one.gpus for one in ones)
    text = f"{', '.join(dict.fromkeys(one.device for one in ones))}, {counted(cores, 'core')} a process"
    if any(one.device == "CPU" for one in ones):
        return LOOK, f"{text}; no GPU is used"
    if len(ones) < gpus:
        return LOOK, f"{text}; {gpus} GPUs and {counted(len(ones), 'process', 'processes')}"
    if cores < announce.CORES_OF_A_GPU // 4:
        return LOOK, f"{text}; the input may be slow, ask for more cores or raise simclr.engine_share"
    return OK, text


def _limits(ones: list[Facts]) -> tuple[str, str]:
    limit, needed = min(one.open_files for one in ones), max(one.files_needed for one in ones)
    text = "open files without a limit" if limit == sys.maxsize else f"up to {limit:,} open files"
    if limit < needed + _OTHER_FILES:
        return WRONG, f"{text}, and {needed:,} shards are open at a time; raise it (ulimit -Hn), or pack larger shards"
    return (LOOK, f"{text}, which is few; raise it (ulimit -Hn)") if limit < _OPEN_FILES else (OK, text)


def _memory(ones: list[Facts]) -> tuple[str, str]:
    free = min(one.shared_memory for one in ones)
    short = len(ones) > 1 and free < SHARED_MEMORY
    # In steps, so that equal machines share a line.
    text = f"{size_text(free)}" if free < SHARED_MEMORY else f"more than {size_text(SHARED_MEMORY)}"
    advice = "; start the container with --shm-size=8g" if short else ""
    return WRONG if short else OK, f"{text} free in /dev/shm{advice}"


def _locked_memory(ones: list[Facts]) -> tuple[str, str]:
    least = min((one.locked_memory for one in ones if one.locked_memory >= 0), default=-1)
    if 0 <= least < _LOCKED_MEMORY:
        return LOOK, f"{size_text(least)} may be locked; InfiniBand wants ulimit -l unlimited"
    return OK, "enough memory may be locked"


def links(process: Process) -> list[Finding]:
    """How fast ranks reduce what a step reduces. All ranks call it."""
    if process.world == 1:
        return []
    times = {}
    for numbers in (_SMALL, _LARGE):
        values = torch.ones(numbers, device=process.device)
        dist.all_reduce(values)  # connections are made
        best = float("inf")
        for _ in range(_REPEATS if numbers == _SMALL else 2):
            _synchronise(process)
            started = time.perf_counter()
            dist.all_reduce(values)
            _synchronise(process)
            best = min(best, time.perf_counter() - started)
        times[numbers] = best
    # In a ring all-reduce each rank sends and receives 2 (W - 1) / W of the bytes (Patarasuk and Yuan 2009).
    rate = 2 * (process.world - 1) / process.world * 4 * _LARGE / times[_LARGE]
    hidden = process.device.type != "cuda" or times[_LARGE] < _HIDDEN
    advice = "" if hidden else "; that will not hide behind a step, look at the links and at NCCL_DEBUG=INFO"
    small, large = (f"{1000 * times[_SMALL]:.2f} ms", f"{1000 * times[_LARGE]:.0f} ms")
    of_gradients = f"{size_text(4 * _LARGE)} of gradients ({size_text(int(rate))}/s each way)"
    text = f"{small} for one number, {large} for {of_gradients}{advice}"
    return [Finding(OK if hidden else LOOK, "network", text)]


def _synchronise(process: Process) -> None:
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS), shares_work=True)
