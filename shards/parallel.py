"""A function over many things in worker processes that end when they are not needed any more."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from simclr_dali.shards.errors import UserError

Thing = TypeVar("Thing")
Result = TypeVar("Result")


def map_unordered(
    function: Callable[[Thing], Result], things: Iterable[Thing], workers: int
) -> Generator[Result, None, None]:
    """``function`` of each thing, as they get done; in this process where there is one worker.

    Closing the generator waits for what is being worked on and drops the rest. Raises what ``function`` raises, and
    UserError where a worker was killed.
    """
    waiting = iter(things)
    if workers == 1:
        yield from map(function, waiting)
        return
    # spawn: a forked child of a process that has DALI's or torch's threads may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare_worker)
    running: set[Future[Result]] = set()
    try:
        while True:
            # Things are sent one by one: all of ImageNet's file names at once would fill memory and pipes.
            while len(running) < 2 * workers and (thing := next(waiting, None)) is not None:
                running.add(pool.submit(function, thing))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory; try again, with fewer --workers if need be"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare_worker() -> None:
    """End with the parent, even one that is killed, instead of waiting for work for ever; leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
