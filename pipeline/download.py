"""Files from s3://, gs:// and http(s)://, through servers that fail, break off or fall silent."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from simclr_dali.pipeline.cache import loader_closed
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.errors import UserError

_SILENCE = 20  # seconds without a byte after which an http answer counts as failed


@dataclass(frozen=True)
class Patience:
    """How a server is asked, and how often again."""

    chunk: int = 8 << 20
    """Bytes per request."""
    attempts: int = 6
    """Without a byte of progress."""
    pause: float = 0.5
    """Seconds before the second attempt; pauses double, half a minute in all."""


class RemoteFolder:
    """A folder on a server."""

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        """Raises UserError where the packages for such an address are not installed."""
        self.url, self._patience = url, patience or Patience()
        self._filesystem, self._root = _filesystem(url)

    def read(self, name: str) -> bytes:
        """The bytes of a small file. Raises FileNotFoundError, and UserError where the server does not answer."""
        attempts, pause = self._patience.attempts, self._patience.pause
        for attempt in range(attempts):
            try:
                data: bytes = self._filesystem.cat_file(f"{self._root}/{name}")
                return data
            except FileNotFoundError:
                raise
            except Exception as error:
                if attempt == attempts - 1:
                    raise self._unreachable(name, error) from error
                time.sleep(pause * 2**attempt)
        raise AssertionError

    def download(self, name: str, target: Path, size: int, stop: threading.Event) -> None:
        """Copy a file of ``size`` bytes into ``target``, going on where an attempt broke off; it is then on disk.

        Raises UserError where the server does not give it, the disk refuses it, or ``stop`` is set meanwhile.
        """
        at, best, failures, streaming = 0, 0, 0, False
        with target.open("r+b") as file:
            while at < size:
                if streaming:
                    at = 0
                how = {"block_size": 0} if streaming else {"cache_type": "none"}
                try:
                    with self._filesystem.open(f"{self._root}/{name}", "rb", **how) as remote:
                        if at:
                            remote.seek(at)
                        file.seek(at)
                        while chunk := remote.read(min(self._patience.chunk, size - at)):
                            if stop.is_set():
                                raise loader_closed()
                            with refusals_named(target):
                                at += file.write(chunk)
                    if at < size:
                        raise EOFError(f"it ended after {at:,} of {size:,} bytes")
                except UserError:
                    raise
                except ValueError:
                    if streaming:
                        raise
                    streaming = True  # a server that knows no ranges: whole files only, from the start
                except Exception as error:
                    failures = 0 if at > best else failures + 1
                    best = max(best, at)
                    if failures == self._patience.attempts:
                        raise self._unreachable(name, error) from error
                    stop.wait(self._patience.pause * 2**failures)
            # Its name will say that it is whole and checked, after a loss of power too.
            file.flush()
            os.fsync(file.fileno())

    def _unreachable(self, name: str, error: Exception) -> UserError:
        return UserError(
            f"{self.url}/{name} cannot be read after {self._patience.attempts} attempts ({type(error).__name__}: "
            f"{error}); look at the address, the credentials and the network, then start the same command again"
        )


def _filesystem(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    try:
        if url.startswith("http"):
            import aiohttp

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=_SILENCE, sock_read=_SILENCE)}
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot read {url}: {error}; the packages for remote data come with: pip install 'simclr-dali[remote]'"
        ) from error
    return filesystem, root
