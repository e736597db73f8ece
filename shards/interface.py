"""Which network interface leads to another machine: a host's name often resolves to its own loopback."""

import fcntl
import os
import socket
import struct
from pathlib import Path

_ADDRESS_OF = 0x8915  # SIOCGIFADDR of linux/sockios.h
_ROUTES = Path("/proc/net/route")


def interface_towards(address: str) -> str | None:
    """The name of the interface that leads to ``address`` (a name or an IPv4 address), or that has it.

    Where it is this machine's own loopback, it is the interface of the default route; None where nothing is known.
    """
    own = _address_towards(address)
    if own is None or not own.startswith("127."):
        # An address that is not the first of its interface is not known here.
        return next((name for name, found in _addresses().items() if found == own), None)
    return _of_default_route()


def own_address() -> str:
    """The IPv4 address by which the others, rank 0 at MASTER_ADDR among them, reach this machine; empty: unknown."""
    own = _address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    if own and own.startswith("127."):
        own = _addresses().get(_of_default_route() or "")
    return own or ""


def _address_towards(address: str) -> str | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _addresses() -> dict[str, str]:
    """The first IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _ADDRESS_OF, struct.pack("256s", name.encode()))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _of_default_route() -> str | None:
    try:
        lines = [line.split() for line in _ROUTES.read_text().splitlines()[1:]]
    except OSError:
        return None
    return next((words[0] for words in lines if words[1] == "00000000"), None)
