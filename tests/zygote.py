"""Scripts of ours in processes that have imported torch, DALI and DeepSpeed already.

Most of what a test waits for is an interpreter that imports them, four seconds each time. Here one process does it and
forks for each script; none of our own modules is imported before the fork, so the script runs as it would on its own.
Tests that signal, kill or launch processes, or set their environment, start them as a user does.
"""

import atexit
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

_LIBRARIES = (
    "torch", "torch.distributed", "torch._dynamo", "nvidia.dali", "nvidia.dali.fn", "deepspeed", "pydantic", "scipy",
    "fsspec", "safetensors.torch", "PIL.Image", "tqdm", "numpy",
)  # fmt: skip


class Zygote:
    """A process that forks for each script; it ends with the one that made it."""

    def __init__(self, environment: dict[str, str]) -> None:
        own, theirs = socket.socketpair()
        self._socket = own
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def run(
        self, words: list[str], cwd: Path, environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run ``script.py ...`` or ``-m module ...`` as subprocess.run does, with its output kept."""
        with self._lock:
            pipes = [os.pipe(), os.pipe()]
            request = json.dumps([str(cwd), environment, words]).encode()
            socket.send_fds(self._socket, [len(request).to_bytes(4, "little")], [write for _, write in pipes])
            self._socket.sendall(request)
            for _, write in pipes:
                os.close(write)
            pid = int.from_bytes(self._read(4), "little")
        kept: list[bytes] = [b"", b""]

        def drain(number: int) -> None:
            with os.fdopen(pipes[number][0], "rb") as stream:
                kept[number] = stream.read()

        threads = [threading.Thread(target=drain, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        if any(thread.is_alive() for thread in threads):
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(words, timeout)
        with self._lock:
            self._socket.sendall(pid.to_bytes(4, "little"))
            code = int.from_bytes(self._read(4), "little", signed=True)
        out, err = (data.decode(errors="replace") for data in kept)
        return subprocess.CompletedProcess(words, code, out, err)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(60)

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._socket.recv(count - len(data))
            assert more, "the process that forks has ended"
            data += more
        return data


def _serve(channel: socket.socket) -> None:
    """Requests are a length with two descriptors and then words, for a script, or 4 bytes, for the end of one."""
    while True:
        head, descriptors, _, _ = socket.recv_fds(channel, 4, 2)
        if not head:
            return
        if not descriptors:  # somebody waits for this process
            _, status = os.waitpid(int.from_bytes(head, "little"), 0)
            channel.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))
            continue
        length, request = int.from_bytes(head, "little"), b""
        while len(request) < length:
            request += channel.recv(length - len(request))
        pid = os.fork()
        if pid == 0:
            channel.close()
            cwd, environment, words = json.loads(request)
            _become(cwd, environment, words, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.sendall(pid.to_bytes(4, "little"))


def import_libraries() -> None:
    """All that our own modules take from elsewhere."""
    for name in _LIBRARIES:
        importlib.import_module(name)


def _become(cwd: str, environment: dict[str, str], words: list[str], descriptors: list[int]) -> None:
    code: Any = 1
    try:
        for target, descriptor in zip((1, 2), descriptors, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", line_buffering=True)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], cwd
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")
    import_libraries()
    _serve(socket.socket(fileno=int(sys.argv[1])))
