"""Going on with as many processes as can share the work, where a launcher starts what is left of them again."""

import os
import sys

from simclr_dali.model.process import print_now
from simclr_dali.shards.launch import read_launch
from simclr_dali.train.config import Config

_RESTARTS = "TORCHELASTIC_MAX_RESTARTS"


def leave_where_left_over(config: Config) -> None:
    """Under torchrun with --max_restarts: end this process, with exit code 0, where it is one too many.

    A run needs a number of processes that divides simclr.lanes. After a machine is lost torchrun starts the others
    again, and may have a number that does not; the last ranks then leave, and the others are told of the smaller
    number. Without --max_restarts, or with another launcher, such a number is refused, as a mistake.
    """
    if not int(os.environ.get(_RESTARTS) or 0):
        return
    launch = read_launch()
    usable = next(count for count in range(launch.world, 0, -1) if config.simclr.lanes % count == 0)
    if usable == launch.world:
        return
    if launch.rank >= usable:
        print_now(
            f"rank {launch.rank} of {launch.world} leaves: {usable} processes share the {config.simclr.lanes} lanes",
            file=sys.stderr,
        )
        os._exit(0)
    first = launch.rank - launch.local_rank
    os.environ.update(WORLD_SIZE=str(usable), LOCAL_WORLD_SIZE=str(min(launch.local_world, usable - first)))
