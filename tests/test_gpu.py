"""The input path on a GPU; skipped where there is none."""

from dataclasses import replace

import pytest
import torch

from pipeline.draws import Recipe
from pipeline.loader import Batch, Setting, two_views
from pipeline.order import Order
from shards.manifest import ShardSet

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = Setting(size=32, device=torch.device("cuda", 0))


def views_of(shards: ShardSet, setting: Setting, **options: object) -> list[Batch]:
    order = Order(shards.shard_sizes(), 24, 4, 2, 9)
    return list(two_views(shards, order, Recipe(), setting, epochs=2, **options))  # type: ignore[arg-type]


def test_views_of_the_gpu_are_those_of_the_cpu_but_for_rounding(train_split: ShardSet) -> None:
    on_gpu, on_cpu = (views_of(train_split, replace(GPU, device=torch.device(name))) for name in ("cuda", "cpu"))
    for ours, expected in zip(on_gpu, on_cpu, strict=True):
        assert ours.views.is_cuda and torch.equal(ours.ids, expected.ids)
        # In units of the standard deviation, about 57 levels: two levels in the mean.
        assert (ours.views.cpu() - expected.views).abs().mean() < 2 / 57


def test_pixels_on_the_gpu_do_not_depend_on_how_the_batch_is_split(train_split: ShardSet) -> None:
    whole = views_of(train_split, GPU)
    micro = views_of(train_split, GPU, micro_batch=6)
    for number, batch in enumerate(whole):
        parts = micro[4 * number : 4 * number + 4]
        for view in range(2):
            together = torch.cat([part.views.chunk(2)[view] for part in parts])
            assert torch.equal(batch.views.chunk(2)[view], together)


def test_batches_on_the_gpu_that_are_kept_stay_as_they_were(train_split: ShardSet) -> None:
    batches = views_of(train_split, GPU)
    again = views_of(train_split, GPU)
    assert all(torch.equal(a.views, b.views) for a, b in zip(batches, again, strict=True))


def test_half_precision_on_the_gpu_is_the_rounded_view(train_split: ShardSet) -> None:
    full, half = (views_of(train_split, replace(GPU, dtype=dtype))[0] for dtype in (torch.float32, torch.float16))
    assert torch.allclose(half.views.float(), full.views, atol=0.02)
