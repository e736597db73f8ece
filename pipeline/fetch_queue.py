"""Background threads that fetch shards, the most urgent first, each once however many ask for it."""

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from simclr_dali.pipeline.cache import loader_closed

URGENT, AHEAD = 0, 1
_END = -1
THREADS = 4  # shards that come at a time


@dataclass
class Fetch:
    """A shard on its way."""

    done: "Future[None]"
    urgency: int
    """URGENT or AHEAD; it may rise while the shard is on its way."""


class FetchQueue:
    """Runs ``fetch(shard, state)`` for each shard that is asked for; see :meth:`request`."""

    def __init__(
        self, fetch: Callable[[int, Fetch], None], is_there: Callable[[int], bool], threads: int = THREADS
    ) -> None:
        """is_there: whether a shard that was fetched is still there."""
        self._fetch, self._is_there = fetch, is_there
        self._lock = threading.Lock()
        self._fetches: dict[int, Fetch] = {}
        self._queue: queue.PriorityQueue[tuple[int, int, int]] = queue.PriorityQueue()
        self._turn = itertools.count()
        self.stopped = threading.Event()
        self._threads = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def request(self, shard: int, urgency: int) -> "Future[None]":
        """Done when the shard was fetched. Raises UserError where the queue was stopped."""
        with self._lock:
            if self.stopped.is_set():
                raise loader_closed()
            fetch = self._fetches.get(shard)
            over = fetch is not None and fetch.done.done()
            if fetch is None or (over and (fetch.done.exception() or not self._is_there(shard))):
                fetch = self._fetches[shard] = Fetch(Future(), urgency)
                self._queue.put((urgency, next(self._turn), shard))
            elif urgency < fetch.urgency and not over:
                fetch.urgency = urgency
                self._queue.put((urgency, next(self._turn), shard))
            return fetch.done

    def find(self, shard: int) -> "Future[None] | None":
        """Of the shard's last request."""
        with self._lock:
            fetch = self._fetches.get(shard)
            return fetch.done if fetch else None

    def stop(self) -> None:
        """Let nobody wait any more; who does gets an error."""
        self.stopped.set()
        with self._lock:
            for fetch in self._fetches.values():
                if not (fetch.done.running() or fetch.done.done()):  # what runs notices by itself
                    fetch.done.set_exception(loader_closed())

    def close(self) -> None:
        """Stop, and end the threads."""
        self.stop()
        for _ in self._threads:
            self._queue.put((_END, 0, 0))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            turn, _, shard = self._queue.get()
            if turn == _END:
                return
            with self._lock:
                fetch = self._fetches[shard]
                if fetch.done.running() or fetch.done.done():
                    continue
                fetch.done.set_running_or_notify_cancel()
            try:
                self._fetch(shard, fetch)
                fetch.done.set_result(None)
            except BaseException as error:
                fetch.done.set_exception(error)
