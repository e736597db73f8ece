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
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

import simclr_dali
from simclr_dali.model.process import Process, from_all_ranks, init_distributed, leave, print_rank_0
from simclr_dali.pipeline.cache import Cache
from simclr_dali.pipeline.remote import open_split
from simclr_dali.shards.interface import interface_towards
from simclr_dali.shards.launch import read_launch
from simclr_dali.shards.wording import counted, size_text
from simclr_dali.train import announce
from simclr_dali.train.plan import SHARED_MEMORY

OK, LOOK, WRONG = "ok", "look", "WRONG"
_OPEN_FILES = 4096  # of a process that reads remote shards through many windows; NCCL opens sockets per pair of ranks
_LOCKED_MEMORY = 64 << 20  # bytes that InfiniBand registers at least
_DIGITS = 12  # of a digest
_CLOCKS = 5.0  # seconds apart
_LARGE, _SMALL = 25_000_000, 1  # float32 numbers: about a ResNet-50's gradients, and one
_REPEATS = 5


@dataclass(frozen=True)
class Facts:
    """What a process knows of itself and its machine."""

    host: str
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
    """Digest of the manifest, or why it cannot be opened; empty where no data is asked about."""
    open_files: int
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
    """Of this process; data: what is to be compared."""
    host = socket.gethostname()
    if process.world > 1:
        dist.barrier()  # so that clocks are read together
    return Facts(
        host=host,
        launcher=launcher,
        device=process.device_name,
        gpus=torch.cuda.device_count(),
        cores=process.cores,
        interface=os.environ.get("GLOO_SOCKET_IFNAME") or interface_towards(host) or "none",
        clock=time.time(),
        versions=versions(),
        code=digest_of_code(),
        data=digest_of_data(data) if data else "",
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        shared_memory=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
    )


def digest_of_data(data: str) -> str:
    """Of the manifest of train, or why it cannot be opened here."""
    try:
        return open_split(data, "train", Cache.at("~/.cache/simclr-dali", 200)).shards.fingerprint[:_DIGITS]
    except UserError as error:
        return str(error)


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
    hosts = dict.fromkeys(one.host for one in everywhere)
    by_host = {host: [one for one in everywhere if one.host == host] for host in hosts}
    launcher = f"by {everywhere[0].launcher}" if everywhere[0].launcher else "without a launcher"
    counts = ", ".join(f"{host} {len(ones)}" for host, ones in by_host.items())
    yield Finding(OK, "processes", f"{len(everywhere)} {launcher}: {counts}")
    yield from _devices(by_host)
    if len(hosts) > 1:
        names = ", ".join(f"{host} {ones[0].interface}" for host, ones in by_host.items())
        yield Finding(WRONG if any(one.interface == "none" for one in everywhere) else OK, "interfaces", names)
        apart = max(one.clock for one in everywhere) - min(one.clock for one in everywhere)
        state = OK if apart < _CLOCKS else LOOK
        yield Finding(
            state, "clocks", f"{apart:.1f} s apart" + ("" if state == OK else "; set them by NTP, for logs and tokens")
        )
    yield _equal("versions", by_host, {one.host: _text(one.versions) for one in everywhere}, "install the same")
    yield _equal("code", by_host, {one.host: one.code for one in everywhere}, "check out the same commit")
    if everywhere[0].data:
        found = _equal("data", by_host, {one.host: one.data for one in everywhere}, "give all the same shards")
        unreadable = len(everywhere[0].data) != _DIGITS
        yield Finding(WRONG, "data", everywhere[0].data) if unreadable and found.state == OK else found
    yield from _limits(by_host, process)


def _text(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _equal(about: str, by_host: dict[str, list[Facts]], found: dict[str, str], advice: str) -> Finding:
    if len(set(found.values())) == 1:
        return Finding(OK, about, next(iter(found.values())) + (", everywhere" if len(by_host) > 1 else ""))
    return Finding(WRONG, about, "; ".join(f"{host}: {value}" for host, value in found.items()) + f"; {advice}")


def _devices(by_host: dict[str, list[Facts]]) -> Iterator[Finding]:
    for host, ones in by_host.items():
        kinds = ", ".join(dict.fromkeys(one.device for one in ones))
        state, text = OK, f"{host}: {kinds}, {counted(ones[0].cores, 'core')} a process"
        if ones[0].device == "CPU":
            state, text = LOOK, f"{text}; no GPU is used"
        elif len(ones) < ones[0].gpus:
            state, text = LOOK, f"{text}; {ones[0].gpus} GPUs and {counted(len(ones), 'process', 'processes')}"
        elif ones[0].cores < announce.CORES_OF_A_GPU // 4:
            state, text = LOOK, f"{text}; the input may be slow, ask for more cores or raise simclr.engine_share"
        yield Finding(state, "device", text)


def _limits(by_host: dict[str, list[Facts]], process: Process) -> Iterator[Finding]:
    for host, ones in by_host.items():
        one = ones[0]
        few = one.open_files < _OPEN_FILES
        text = f"{host}: {one.open_files:,} open files"
        yield Finding(LOOK if few else OK, "limits", text + ("; raise them: ulimit -n 65536" if few else ""))
        if process.device.type != "cuda":
            continue
        short = len(ones) > 1 and one.shared_memory < SHARED_MEMORY
        text = f"{host}: {size_text(one.shared_memory)} free in /dev/shm"
        advice = "; start the container with --shm-size=8g" if short else ""
        yield Finding(WRONG if short else OK, "memory", text + advice)
        if len(by_host) > 1 and 0 <= one.locked_memory < _LOCKED_MEMORY:
            text = f"{host}: {size_text(one.locked_memory)} may be locked; InfiniBand wants ulimit -l unlimited"
            yield Finding(LOOK, "memory", text)


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
    # Of a ring each rank sends and receives about twice the bytes (Patarasu and Yuan 2009).
    rate = 2 * (process.world - 1) / process.world * 4 * _LARGE / times[_LARGE]
    return [
        Finding(
            OK, "network", f"{1000 * times[_SMALL]:.2f} ms for one number, {1000 * times[_LARGE]:.0f} ms for "
            f"{size_text(4 * _LARGE)} of gradients ({size_text(int(rate))}/s each way)",
        )
    ]  # fmt: skip


def _synchronise(process: Process) -> None:
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS), shares_work=True)
