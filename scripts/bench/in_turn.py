"""Processes that are measured: alone, or started together and then one after the other."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from simclr_dali.shards.errors import UserError

_READY = "ready"


def output_of(command: list[Any], name: str) -> str:
    """What a command prints. Raises UserError, by ``name`` and with the end of its errors, where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise failed(name, done.stderr)
    return done.stdout


def failed(name: str, errors: str) -> UserError:
    return UserError(f"{name} failed: {errors[-1500:]}")


class Waiting:
    """A process that has imported what it needs, and waits for its turn."""

    def __init__(self, command: list[Any]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by end()
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    @staticmethod
    def until_told() -> None:
        """What such a process calls before it begins."""
        print(_READY, flush=True)
        if not sys.stdin.readline():  # who would tell is gone
            sys.exit(1)

    def wait_until_ready(self) -> None:
        """Raises UserError where it ended before."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == _READY:
                return
        self._refuse()

    def go(self) -> str:
        """The last line that it prints. Raises UserError where it fails."""
        out, _ = self._process.communicate("go\n")
        if self._process.returncode:
            self._refuse()
        return out.splitlines()[-1]

    def end(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _refuse(self) -> None:
        self._process.wait()
        self._errors.seek(0)
        raise failed(" ".join(self._process.args), self._errors.read())  # type: ignore[arg-type]


def in_turn(commands: dict[str, list[Any]]) -> Iterator[tuple[str, float | UserError]]:
    """The number that each command prints last, as soon as it is there, or why there is none; all have started before
    the first begins."""
    waiting: dict[str, Waiting] = {}
    refused: dict[str, UserError] = {}
    try:
        for row, command in commands.items():
            waiting[row] = Waiting(command)
        for row, process in waiting.items():
            try:
                process.wait_until_ready()
            except UserError as error:
                refused[row] = error
        for row, process in waiting.items():
            try:
                yield row, refused.get(row) or float(json.loads(process.go()))
            except UserError as error:
                yield row, error
    finally:
        for process in waiting.values():
            process.end()
