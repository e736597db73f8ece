"""DALI's threads do not live on in a forked process, which would wait for them without end."""

import os

from simclr_dali.shards.errors import UserError

_used = _is_forked = False


def _on_fork() -> None:
    global _is_forked
    _is_forked = _used


os.register_at_fork(after_in_child=_on_fork)


def use_dali() -> None:
    """Call it before DALI is used. Raises UserError in a process that was forked from one that had used it."""
    global _used
    if _is_forked:
        raise UserError(
            "this process was forked from one that had decoded pictures, and DALI would hang in it; start it by "
            "multiprocessing's spawn (of a DataLoader: multiprocessing_context='spawn')"
        )
    _used = True
