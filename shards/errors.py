"""How a mistake of the user ends a program: one sentence on stderr, exit code 2, no traceback."""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, Protocol

EXIT_CODE = 2
SECONDS_FOR_RANK_0_TO_SPEAK = 4.0
SECONDS_FOR_THE_LAUNCHER = 8.0
_SECONDS_TO_LOOK = 1.5


class Group(Protocol):
    """What a process of several knows of the others; model.peers is one."""

    def say_goodbye(self) -> None:
        """Let the others know that this one leaves with an error that it has told."""

    def is_told(self) -> bool:
        """Whether another one has left with an error that it told."""

    def look(self) -> None:
        """End this process, saying why, where another one was killed."""

    def lost_to(self, error: Exception) -> str:
        """What an error says of another machine; empty where it says nothing of one."""


groups: list[Group] = []  # that this process is in: none, or one


class UserError(ValueError):
    """What the user gave cannot be used. The message says what was wrong, the offending value and what to do."""


def run_main(main: Callable[[], None], *, shares_work: bool = False) -> None:
    """Run ``main`` and turn a :class:`UserError` into one sentence and exit code 2.

    shares_work: whether several processes do it together; where not, more than one is refused. Every other exception
    is a bug of ours and keeps its traceback. Under a launcher all ranks meet most mistakes together; rank 0 speaks
    first, and another rank only if it is still alive some seconds later (the launcher ends the group as soon as one
    rank has left).
    """
    from simclr_dali.shards.launch import Launch, read_launch  # it needs UserError

    # Names of files need not be text; what is printed of them must not end a command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    launch = Launch("")
    try:
        launch = read_launch()
        if launch.world > 1 and not shares_work:
            raise UserError(
                f"{launch.world} processes were started by {launch.launcher}, and this command is one process's; start "
                f"it without a launcher (with srun, as srun -n 1)"
            )
        main()
    except Exception as error:
        rank, world = launch.rank, launch.world
        if groups and not isinstance(error, UserError):
            _look_for_the_cause()
        if world > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's, once another rank has left
        if not isinstance(error, UserError):
            if world > 1 and isinstance(error, RuntimeError):
                # Most likely what torch says of a rank that has left: the launcher then ends this one too.
                time.sleep(SECONDS_FOR_THE_LAUNCHER)
                if any(group.is_told() for group in groups):
                    with suppress(OSError):
                        print(f"rank {rank} ends, as another rank has ended with an error", file=sys.stderr, flush=True)
                    os._exit(1)
                if lost := next(filter(None, (group.lost_to(error) for group in groups)), ""):
                    _end(f"rank {rank}: {lost}", 1)
            say_goodbye()
            raise
        if rank:
            time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
        _end(f"{f'rank {rank}: ' if rank else ''}{error}", EXIT_CODE)
    except BaseException:  # Ctrl-C, or an exit code of its own
        if launch.world > 1:
            say_goodbye()
        raise


def _end(text: str, code: int) -> NoReturn:
    """Say what was wrong, to the other ranks as well, and end this process."""
    with suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
    with suppress(OSError):
        print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    say_goodbye()
    # Not sys.exit: a process group or a reader thread that is still up must not hold the exit back.
    os._exit(code)


def _look_for_the_cause() -> None:
    """Give another rank, which may just be dying, a moment to be found dead.

    The launcher's SIGTERM, which comes as soon as it notices, must not end this process before it has told.
    """
    with suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    until = time.monotonic() + _SECONDS_TO_LOOK
    while time.monotonic() < until:
        for group in groups:
            group.look()
        time.sleep(0.1)


def say_goodbye() -> None:
    """Let the other ranks know that this one leaves with an error that it has told; takes three seconds at most."""

    def call() -> None:
        for group in groups:
            with suppress(Exception):  # whatever it is, the error that was told counts
                group.say_goodbye()

    calling = threading.Thread(target=call, daemon=True)
    calling.start()
    calling.join(3)
