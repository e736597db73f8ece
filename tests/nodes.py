"""Two machines in one: network namespaces with a cable between them, each with a name, an address and files of its own.

Traffic stays between the two. It needs root, iproute2 and a kernel that permits it; ``why_not`` says what is missing.
"""

import ctypes
import fcntl
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.conftest import TIMEOUT
from tests.runs import environment, family

NAMES = ("node-a", "node-b")
_PREFIX = "simclr-test"
_NEW_NET, _TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000  # sched.h, linux/if_tun.h


@dataclass
class Node:
    """A machine."""

    name: str
    namespace: str
    address: str
    interface: str
    folder: Path
    """Its own disk."""
    resolves_to: str = "127.0.1.1"
    """Its own name does there, as on Debian."""
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *words: Any, **more: str) -> subprocess.Popen[str]:
        """Start a command there; more: of the environment."""
        hosts = self.folder / "hosts"
        lines = [f"10.99.0.{number} {name}" for number, name in enumerate(NAMES, 1) if name != self.name]
        hosts.write_text("\n".join(["127.0.0.1 localhost", f"{self.resolves_to} {self.name}", *lines, ""]))
        inside = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount", "sh", "-c"]
        become = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        command = [*inside, become, self.name, str(hosts), *(str(word) for word in words)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**environment(), "OMP_NUM_THREADS": "1", **more},
        )  # fmt: skip
        self.started.append(process)
        return process

    def send(self, number: signal.Signals) -> None:
        """A signal to all that was started there and still runs."""
        for process in self.started:
            for one in family(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(one.pid, number)
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def unplug(self) -> None:
        _ip("-n", self.namespace, "link", "set", self.interface, "down")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@cache
def why_not() -> str:
    """Why two namespaces cannot be had here; empty where they can."""
    if not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        return "iproute2 or util-linux is not installed"
    try:
        with _wired(f"{_PREFIX}-try-{os.getpid()}"):
            return ""
    except OSError as error:
        return f"network namespaces are not permitted here ({error})"


@cache
def why_no_cable() -> str:
    """Why there can be no cable with a delay here; empty where there can."""
    if why_not():
        return why_not()
    try:
        with _wired(f"{_PREFIX}-try-{os.getpid()}", delay=0.001):
            return ""
    except OSError as error:
        return f"TUN devices are not permitted here ({error})"


@contextmanager
def _wired(prefix: str, delay: float = 0.0, loss: float = 0.0) -> Iterator[list[str]]:
    """Two namespaces whose interfaces, eth0, are the ends of one cable; see two_nodes."""
    names = [f"{prefix}-{letter}" for letter in "ab"]
    made = []
    stack = ExitStack()
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        if delay or loss:
            stack.enter_context(Cable(names, delay, loss))
        else:
            _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            _ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        stack.close()
        for name in made:
            with suppress(OSError):
                _ip("netns", "delete", name)


@contextmanager
def two_nodes(folder: Path, data: Path, *, delay: float = 0.0, loss: float = 0.0) -> Iterator[list[Node]]:
    """Two machines, each with its own copy of the shards (``node.folder / "shards"``); what is started there ends.

    delay: seconds that a packet is on its way. loss: share of the packets that do not arrive.
    """
    with _wired(f"{_PREFIX}-{os.getpid()}", delay, loss) as names:
        nodes = [
            Node(NAMES[number], name, f"10.99.0.{number + 1}", "eth0", folder / NAMES[number])
            for number, name in enumerate(names)
        ]
        try:
            for node in nodes:
                node.folder.mkdir(parents=True)
                shutil.copytree(data, node.folder / "shards")
            yield nodes
        finally:
            for node in nodes:
                node.send(signal.SIGKILL)


class Cable:
    """Two TUN devices, eth0 of each namespace, and this process between them, which takes its time and loses packets.

    The kernel's own netem does the same, where it has it.
    """

    def __init__(self, namespaces: list[str], delay: float, loss: float) -> None:
        self._delay, self._loss, self._random = delay, loss, random.Random(0)
        self._ends = [_tun_in(name) for name in namespaces]
        self._unplugged = threading.Event()
        self._threads = [
            threading.Thread(target=self._carry, args=ends, daemon=True) for ends in (self._ends, self._ends[::-1])
        ]

    def __enter__(self) -> "Cable":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._unplugged.set()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            os.close(end)

    def _carry(self, source: int, target: int) -> None:
        on_the_way: deque[tuple[float, bytes]] = deque()
        while not self._unplugged.is_set():
            due = on_the_way[0][0] - time.monotonic() if on_the_way else 0.1
            if due > 0 and select.select([source], [], [], min(due, 0.1))[0]:
                packet = os.read(source, 1 << 16)
                if self._random.random() >= self._loss:
                    on_the_way.append((time.monotonic() + self._delay, packet))
            elif due <= 0:
                with suppress(OSError):  # the interface is not up yet, or not any more
                    os.write(target, on_the_way.popleft()[1])


def _tun_in(namespace: str) -> int:
    """A descriptor of a new TUN device, eth0, in a namespace. Raises OSError where the kernel has none."""
    found: list[int | OSError] = []

    def make() -> None:  # a thread of its own: it stays in the namespace
        try:
            with Path(f"/run/netns/{namespace}").open() as inside:
                if ctypes.CDLL(None, use_errno=True).setns(inside.fileno(), _NEW_NET):
                    raise OSError(ctypes.get_errno(), "setns")
            descriptor = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TUN | _IFF_NO_PI))
            found.append(descriptor)
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    (one,) = found
    if isinstance(one, OSError):
        raise one
    return one


def ended(processes: list[subprocess.Popen[str]], seconds: float = TIMEOUT) -> list[tuple[int, str]]:
    """Exit code and output of each, once all have ended."""
    found = [process.communicate(timeout=seconds) for process in processes]
    return [(process.returncode, out + err) for process, (out, err) in zip(processes, found, strict=True)]


PYTHON = sys.executable
