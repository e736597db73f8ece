"""Pooled features of a whole split, or of some of its images."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from simclr_dali.pipeline.files import Files
from simclr_dali.pipeline.loader import Setting, labelled
from simclr_dali.shards.manifest import ShardSet


@dataclass(frozen=True)
class Features:
    """features: float32 [n, width]; labels: int64 [n]; both on the device, in the order of the ids that were asked.

    seconds: they took; waited: of these, how many the host waited for input (on a GPU not those that it waited itself).
    """

    features: Tensor
    labels: Tensor
    seconds: float = 0.0
    waited: float = 0.0


def share(count: int, rank: int, world: int) -> npt.NDArray[np.int64]:
    """Ids of ``rank``'s part of ``count`` images: every image falls to one rank, and parts differ by one at most."""
    return np.arange(count * rank // world, count * (rank + 1) // world)


@torch.inference_mode()
def extract(
    encoder: Callable[[Tensor], Tensor],
    shards: ShardSet,
    files: Callable[[], Files],
    setting: Setting,
    *,
    batch: int,
    ids: npt.NDArray[np.int64] | None = None,
    max_bad_fraction: float = 0.0,
    silent: bool = False,
) -> Features:
    """Run every image of ``ids`` (default: of the set) once, centrally cropped, through ``encoder``.

    encoder: in eval mode, on setting.device; images [n, 3, size, size] -> features [n, width]. max_bad_fraction: see
    pipeline.loader.labelled.
    """
    began, waited = time.monotonic(), 0.0
    count = len(shards) if ids is None else len(ids)
    # Its width is known with the first batch; for an empty share, by asking.
    features = None if count else encoder(torch.zeros(1, 3, setting.size, setting.size, device=setting.device))[:0]
    labels = torch.empty(count, dtype=torch.int64)
    done = 0
    images = labelled(
        shards,
        setting,
        batch=batch,
        ids=ids,
        max_bad_fraction=max_bad_fraction,
        files=files,
    )
    with tqdm(total=count, desc=f"features of {shards.split}", unit=" images", disable=silent or None) as bar:
        while True:
            asked = time.monotonic()
            found = next(images, None)
            waited += time.monotonic() - asked
            if found is None:
                break
            rows = encoder(found.views)
            if features is None:  # once, in one piece: twice the features of ImageNet would not fit everywhere
                features = torch.empty(count, rows.shape[1], device=rows.device)
            features[done : done + len(rows)] = rows
            labels[done : done + len(rows)] = found.labels
            done += len(rows)
            bar.update(len(rows))
    assert features is not None and done == count
    return Features(features.float(), labels.to(setting.device), time.monotonic() - began, waited)
