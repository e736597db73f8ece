"""One run at a time in a run folder."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from simclr_dali.model.process import print_now
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.errors import UserError


def lock_run(run: Path) -> TextIO:
    """Hold ``run`` until the file that is returned is closed or this process ends, however it ends.

    Raises UserError where another process holds it, naming host and process, or where the folder cannot be written.
    """
    path = run / "lock"
    with refusals_named(path):
        run.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        holder = path.read_text().strip() or "another process"
        raise UserError(f"{run} is in use by {holder}; wait for it to end, stop it, or give another --run") from error
    except OSError as error:  # some network file systems have no locks
        print_now(f"warning: {path} cannot be locked ({error.strerror}); see to it that no other run uses {run}")
    with refusals_named(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file
