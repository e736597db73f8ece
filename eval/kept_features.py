"""Features that an evaluation keeps in a folder for the next one."""

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr_dali.pipeline.features import Features
from simclr_dali.shards.durable import refusals_named, writing

_ABANDONED = 3600  # seconds without a write after which a file that was being written is a leftover


@dataclass(frozen=True)
class KeptFeatures:
    """A file for one rank's features of one split."""

    path: Path

    @staticmethod
    def named(folder: Path, split: str, depends_on: list[Any], rank: int, world: int) -> "KeptFeatures":
        """depends_on: all that the features depend on, in plain values; a device or version that rounds otherwise is
        not told apart."""
        name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
        return KeptFeatures(folder / f"{split}-{name}-{rank}of{world}.npz")

    def load(self, count: int, device: torch.device) -> Features | None:
        """The features of ``count`` images, or None, with a warning where the file is no good."""
        if not self.path.is_file():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                features, labels = torch.from_numpy(file["features"]), torch.from_numpy(file["labels"])
        except Exception as error:  # NumPy fails on a damaged file in a dozen ways
            print(f"warning: {self.path} cannot be read ({error}); its features are extracted again", file=sys.stderr)
            return None
        if len(features) != count or len(labels) != count:
            print(f"warning: {self.path} holds {len(features)} rows, not {count}; extracted again", file=sys.stderr)
            return None
        return Features(features.to(device), labels.to(device))

    def keep(self, found: Features) -> None:
        """Write them, whole or not at all. Raises UserError where the disk refuses."""
        path = self.path
        with refusals_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{path.name}.*.tmp"):
            with suppress(OSError):  # it is complete now, or somebody else's
                if time.time() - leftover.stat().st_mtime > _ABANDONED:  # by a process that was killed
                    leftover.unlink()
        with writing(path, f".{os.getpid()}") as file:  # another evaluation may be keeping the same
            np.savez(file, features=found.features.cpu().numpy(), labels=found.labels.cpu().numpy())
