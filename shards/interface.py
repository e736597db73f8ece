"""Which network interface leads to another machine: a host's name often resolves to its own loopback."""

import fcntl
import socket
import struct
from pathlib import Path

_ADDRESS_OF = 0x8915  # SIOCGIFADDR of linux/sockios.h
_ROUTES = Path("/proc/net/route")


def interface_towards(address: str) -> str | None:
    """The name of the interface that leads to ``address`` (a name or an IPv4 address), or that has it.

    Where it is this machine's loopback, it is the interface of the default route; None where nothing is known.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((address, 9))
            own = probe.getsockname()[0]
    except OSError:
        return None
    names = [name for name, found in _addresses().items() if found == own and not own.startswith("127.")]
    return names[0] if names else _of_default_route()


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
