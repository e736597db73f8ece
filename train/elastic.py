"""Going on with as many processes as can share the work, where a launcher starts what is left of them again."""

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from simclr_dali.model.process import Process, print_now
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.launch import Launch, read_launch
from simclr_dali.train.config import Config

_RESTARTS, _STANDING_BY = "TORCHELASTIC_MAX_RESTARTS", "SIMCLR_DALI_STANDING_BY"
_ENDED, _HEARD = "the run has ended", "ranks that stood by and have heard it"  # keys of the store
_PERIOD = 1.0  # seconds
_PATIENCE_WITH_END = 20.0  # seconds
# By then torchrun has started all of them anew where it is going to: a silent machine is noticed after a minute.
_PATIENCE_WITHOUT_RANK_0 = 600.0  # seconds


def stand_by_where_left_over(config: Config) -> None:
    """Under torchrun with --max_restarts: have this process wait for the end of the run, where it is one too many.

    A run needs a number of processes that divides simclr.lanes, and groups of BatchNorm that divide it. After a machine
    is lost torchrun starts the others again, and may have a number that does not; the last ranks then stand by, and the
    others are told of the smaller number. They must not end before the run does: torchrun takes the end of all
    processes of a machine for that of the run, and starts nothing again. Without --max_restarts, or with another
    launcher, such a number is refused, as a mistake.
    """
    if not int(os.environ.get(_RESTARTS) or 0):
        return
    launch = read_launch()
    usable = _usable(config, launch)
    if usable == launch.world:
        return
    if launch.rank >= usable:
        print_now(
            f"rank {launch.rank} of {launch.world} stands by: {usable} processes share the {config.simclr.lanes} lanes",
            file=sys.stderr,
        )
        _stand_by(launch)
    first = launch.rank - launch.local_rank
    os.environ.update(
        {
            "WORLD_SIZE": str(usable),
            "LOCAL_WORLD_SIZE": str(min(launch.local_world, usable - first)),
            _STANDING_BY: str(launch.world - usable),
        }
    )


def _usable(config: Config, launch: Launch) -> int:
    """The most processes that can share the run; all of them where none can, which is then refused with its reason."""
    for count in range(launch.world, 0, -1):
        if config.simclr.lanes % count == 0:
            with suppress(UserError):
                config.batchnorm_processes(count, min(count, launch.local_world))
                return count
    return launch.world


def let_go_who_stands_by(process: Process) -> None:
    """On rank 0, at the end of the run: tell the ranks that stand by, and see that they have heard it."""
    count = int(os.environ.get(_STANDING_BY) or 0)
    if process.rank or not count:
        return
    store, until = _store(), time.monotonic() + _PATIENCE_WITH_END
    store.set(_ENDED, "")
    while store.add(_HEARD, 0) < count and time.monotonic() < until:
        time.sleep(_PERIOD / 10)


def _stand_by(launch: Launch) -> NoReturn:
    """Wait until the run has ended; torchrun ends this process with SIGTERM where it starts all of them again."""
    try:
        store = _store()
        while not store.check([_ENDED]):
            time.sleep(_PERIOD)
        store.add(_HEARD, 1)
    except RuntimeError:  # rank 0 is gone, with the store
        time.sleep(_PATIENCE_WITHOUT_RANK_0)
        print_now(f"error: rank {launch.rank} stood by, and rank 0 did not come back", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _store() -> Any:
    """The key-value store of the launcher, or of rank 0, whichever holds it."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=_PATIENCE_WITHOUT_RANK_0),
        wait_for_workers=False,
    )
