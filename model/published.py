"""Weights that others publish, by their names: fetched once, checked, and kept where torchvision's are.

The four SimCLR models of mmpretrain (configs/simclr/README.md there). The first eight digits of each file's sha256
stand in its name; a file that has others is never used.
"""

import fcntl
import hashlib
import http.client
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.shards.durable import refusals_named

URL_VARIABLE = "SIMCLR_DALI_WEIGHTS_URL"  # in the environment: an address to ask instead of the publisher's
PUBLISHER = "https://download.openmmlab.com/mmselfsup/1.x/simclr"
_SILENCE = 60.0  # seconds without a byte after which an attempt counts as failed
_ATTEMPTS, _PAUSE = 3, 1.0  # seconds, before the second attempt; then twice as many


@dataclass(frozen=True)
class Published:
    """A file of weights on a server."""

    path: str
    """Below the publisher's address. Its name ends with a dash, digits of the sha256 and .pth, as torch.hub's do."""

    @property
    def file(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def sha256_prefix(self) -> str:
        """The digits of the file's sha256 that its name has."""
        return self.file.removesuffix(".pth").rpartition("-")[2]


def _mmpretrain(epochs: int, pretrained: str, linear: str) -> dict[str, Published]:
    run, probe = f"simclr_resnet50_16xb256-coslr-{epochs}e_in1k", "resnet50_linear-8xb512-coslr-90e_in1k"
    return {
        run: Published(f"{run}/{run}_20220825-{pretrained}.pth"),
        f"resnet50_simclr-{epochs}e-pre_8xb512-linear-coslr-90e_in1k": Published(
            f"{run}/{probe}/{probe}_20220825-{linear}.pth"
        ),
    }


WEIGHTS = _mmpretrain(200, "4d9cce50", "f12c0457") | _mmpretrain(800, "85fcc4de", "b80ae1e5")


def is_published(name: str | Path) -> bool:
    """Whether it is one of WEIGHTS, and no path that exists."""
    return str(name) in WEIGHTS and not Path(name).exists()


def fetch(name: str) -> Path:
    """The file of one of WEIGHTS, fetched where it is not there yet, in torch.hub's folder (TORCH_HOME moves it).

    Raises CheckpointError where the server does not give it, or gives another file than the one that was published,
    and UserError where the disk refuses it.
    """
    published = WEIGHTS[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / published.file
    if _is_right(path, published):
        return path
    with refusals_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened for reading: another user's, in a folder that is shared, cannot be written.
        lock = os.open(path.with_suffix(".lock"), os.O_RDONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one fetches it
            if not _is_right(path, published):
                _fetch(published, path)
        finally:
            os.close(lock)
    return path


def _is_right(path: Path, published: Published) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest().startswith(published.sha256_prefix)


def _fetch(published: Published, path: Path) -> None:
    address = f"{(os.environ.get(URL_VARIABLE) or PUBLISHER).rstrip('/')}/{published.path}"
    failure = ""
    for attempt in range(_ATTEMPTS):
        time.sleep(attempt * _PAUSE)
        try:
            urllib.request.Request(address)  # torch.hub would leave its file behind where this fails
            with _silence_ends():
                # It writes beside the path, and gives the file its name once the digits are right.
                torch.hub.download_url_to_file(
                    address, str(path), published.sha256_prefix, progress=sys.stderr.isatty()
                )
            return
        except RuntimeError as error:  # the digits are others
            failure = f"what arrives is another file, or cut off ({error})"
        except urllib.error.HTTPError as error:
            failure = f"the server says {error.code} {error.reason}"
            if error.code < 500:
                break
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            failure = f"the server does not answer ({error})"
        except (http.client.InvalidURL, ValueError) as error:
            failure = f"it is no address, or what its server says is no HTTP ({error})"
            break
        except http.client.HTTPException as error:
            failure = f"the answer is cut off, or no HTTP ({type(error).__name__})"
    shown = re.sub(r"//[^/@]*@", "//", address)  # without a password
    raise CheckpointError(
        f"{shown} cannot be used: {failure}; look at the network, put the file into {path.parent} yourself, or name "
        f"another server in {URL_VARIABLE}"
    )


@contextmanager
def _silence_ends() -> Iterator[None]:
    """torch.hub sets no limit to its waiting."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
