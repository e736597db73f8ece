"""How a mistake of the user ends a program: one sentence on stderr, exit code 2, no traceback."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

EXIT_CODE = 2
SECONDS_FOR_RANK_0_TO_SPEAK = 4.0
SECONDS_FOR_THE_LAUNCHER = 8.0


class UserError(ValueError):
    """What the user gave cannot be used. The message says what was wrong, the offending value and what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Run ``main`` and turn a :class:`UserError` into one sentence and exit code 2.

    Every other exception is a bug of ours and keeps its traceback. Under a launcher all ranks meet most
    mistakes together; rank 0 speaks first, and another rank only if it is still alive some seconds later
    (the launcher ends the group as soon as one rank has left).
    """
    try:
        main()
    except Exception as error:
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if world > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's, once another rank has left
        if not isinstance(error, UserError):
            if world > 1 and isinstance(error, RuntimeError):
                # Most likely what torch says of a rank that has left: the launcher then ends this one too.
                time.sleep(SECONDS_FOR_THE_LAUNCHER)
            raise
        if rank:
            time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
        speaker = f"rank {rank}: " if rank else ""
        with suppress(OSError):  # nobody reads it any more
            sys.stdout.flush()
        with suppress(OSError):
            print(f"error: {speaker}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        # Not sys.exit: a process group or a reader thread that is still up must not hold the exit back.
        os._exit(EXIT_CODE)
