"""Pooled features of a whole split."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.files import Files
from pipeline.loader import Setting, labelled
from shards.manifest import ShardSet


@dataclass(frozen=True)
class Features:
    """features: float32 [n, width]; labels: int64 [n]; both on the device, in storage order."""

    features: Tensor
    labels: Tensor


@torch.inference_mode()
def extract(
    encoder: nn.Module,
    shards: ShardSet,
    files: Callable[[], Files],
    setting: Setting,
    *,
    batch: int,
    center_fraction: float,
) -> Features:
    """Run every image of ``shards`` once, centrally cropped, through ``encoder`` (in eval mode, on setting.device)."""
    assert not encoder.training
    features, labels = [], []
    with tqdm(total=len(shards), desc=f"features of {shards.split}", unit=" images", disable=None) as bar:
        for images in labelled(shards, setting, batch=batch, center_fraction=center_fraction, files=files):
            features.append(encoder(images.views).float())
            labels.append(images.labels)
            bar.update(len(images.labels))
    return Features(torch.cat(features), torch.cat(labels).to(setting.device))
