"""Pooled features of a whole split, or of some of its images."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.kept_pictures import KeptPictures
from simclr_dali.pipeline.loader import central_views


@dataclass(frozen=True)
class Features:
    """Of some images, on the device, in the order in which they were asked for."""

    features: Tensor
    """float32 [n, width]."""
    labels: Tensor
    """int64 [n]."""
    seconds: float = 0.0
    """How long they took."""
    waited: float = 0.0
    """How many of these the host waited for input (a GPU's own waiting is not in it)."""


def share(count: int, rank: int, world: int) -> npt.NDArray[np.int64]:
    """Ids of ``rank``'s part of ``count`` images: every image falls to one rank, and parts differ by one at most."""
    return np.arange(count * rank // world, count * (rank + 1) // world)


@torch.inference_mode()
def extract(
    encoder: Callable[[Tensor], Tensor],
    split: Split,
    config: LoaderConfig,
    *,
    batch: int,
    ids: npt.NDArray[np.int64] | None = None,
    max_bad_fraction: float = 0.0,
    silent: bool = False,
    kept: KeptPictures | None = None,
) -> Features:
    """Run every image of ``ids`` (default: of the split) once, centrally cropped, through ``encoder``.

    encoder: in eval mode, on config.device; images [n, 3, size, size] -> features [n, width]. max_bad_fraction,
    kept: see pipeline.loader.central_views.
    """
    began, waited = time.monotonic(), 0.0
    count = len(split.shards) if ids is None else len(ids)
    # Its width is known with the first batch; for an empty share, by asking.
    features = None if count else encoder(torch.zeros(1, 3, config.size, config.size, device=config.device))[:0]
    labels = torch.empty(count, dtype=torch.int64)
    done = 0
    images = central_views(split, config, batch=batch, ids=ids, max_bad_fraction=max_bad_fraction, kept=kept)
    with tqdm(total=count, desc=f"features of {split.shards.split}", unit=" images", disable=silent or None) as bar:
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
    return Features(features.float(), labels.to(config.device), time.monotonic() - began, waited)
