"""The loaders: complete, ordered, the same for every number of processes, threads and depths, strict about damage."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.draws import Recipe
from pipeline.files import LocalFiles
from pipeline.loader import Batch, Setting, labelled, two_views
from pipeline.order import Order
from pipeline.reading import SampleReader, ahead
from shards.errors import UserError
from shards.manifest import ShardSet, load_split
from shards.pack import pack
from shards.plan import Options

CPU = torch.device("cpu")
SETTING = Setting(size=32, device=CPU)


def order_of(shards: ShardSet, batch: int = 24, lanes: int = 4) -> Order:
    return Order(tuple(int(size) for size in shards.shard_sizes()), batch, lanes, 2, 9)


def views_of(shards: ShardSet, setting: Setting = SETTING, **options: object) -> list[Batch]:
    return list(two_views(shards, order_of(shards), Recipe(), setting, epochs=2, **options))  # type: ignore[arg-type]


def test_two_views_follow_the_order_and_carry_labels(train_split: ShardSet) -> None:
    order = order_of(train_split)
    batches = views_of(train_split)
    assert len(batches) == 2 * order.steps_per_epoch
    for number, batch in enumerate(batches):
        assert np.array_equal(batch.ids, order.batch(*divmod(number, order.steps_per_epoch)))
        assert np.array_equal(batch.labels, train_split.samples["label"][batch.ids])
        assert batch.views.shape == (48, 3, 32, 32) and batch.views.dtype == torch.float32
        assert batch.views.is_contiguous(memory_format=torch.channels_last)
        first, second = batch.views.chunk(2)
        assert not torch.equal(first, second)


def test_ranks_see_the_parts_of_the_same_global_batches(train_split: ShardSet) -> None:
    whole = views_of(train_split)
    parts = [views_of(train_split, rank=rank, world=2) for rank in range(2)]
    for one, *split in zip(whole, *parts, strict=True):
        assert torch.equal(one.ids, torch.cat([part.ids for part in split]))
        for view in range(2):
            together = torch.cat([part.views.chunk(2)[view] for part in split])
            assert torch.equal(one.views.chunk(2)[view], together)


def test_threads_and_depths_change_nothing(train_split: ShardSet) -> None:
    plain = views_of(train_split, Setting(size=32, device=CPU, threads=1, read_ahead=0, prefetch=1))
    busy = views_of(train_split, Setting(size=32, device=CPU, threads=5, read_ahead=9, prefetch=3))
    assert all(torch.equal(a.views, b.views) and torch.equal(a.ids, b.ids) for a, b in zip(plain, busy, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_global_batches_are_the_orders_for_every_world_and_number_of_reader_threads(
    train_split: ShardSet, world: int, threads: int
) -> None:
    order, setting = order_of(train_split), Setting(size=16, device=CPU, threads=threads)
    ranks = [two_views(train_split, order, Recipe(), setting, epochs=1, rank=r, world=world) for r in range(world)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert np.array_equal(np.concatenate([part.ids for part in parts]), order.batch(0, step))


def test_start_in_the_middle_is_the_rest_of_the_stream(train_split: ShardSet) -> None:
    whole = views_of(train_split)
    rest = views_of(train_split, start=(1, 3))
    assert len(rest) == order_of(train_split).steps_per_epoch - 3
    assert all(torch.equal(a.views, b.views) for a, b in zip(whole[-len(rest) :], rest, strict=True))


def test_micro_batches_are_slices_of_the_batch(train_split: ShardSet) -> None:
    whole = views_of(train_split)[0]
    micro = views_of(train_split, micro_batch=6)[:4]
    assert torch.equal(whole.ids, torch.cat([part.ids for part in micro]))
    assert torch.equal(whole.views.chunk(2)[1], torch.cat([part.views.chunk(2)[1] for part in micro]))


def test_labelled_gives_every_image_once(train_split: ShardSet) -> None:
    batches = list(labelled(train_split, SETTING, batch=50, center_fraction=0.875))
    ids = torch.cat([batch.ids for batch in batches])
    assert torch.equal(ids, torch.arange(len(train_split)))
    assert [len(batch.views) for batch in batches] == [50, 50, 50, 50, 40]


def test_batches_that_are_kept_stay_as_they_were(train_split: ShardSet) -> None:
    stream = two_views(train_split, order_of(train_split), Recipe(), SETTING, epochs=2)
    first = next(stream)
    copy = first.views.clone()
    for _ in stream:
        pass
    assert torch.equal(first.views, copy)


def test_a_flipped_bit_stops_the_loader_with_the_name_of_the_sample(odd_pictures: Path, tmp_path: Path) -> None:
    pack(odd_pictures, tmp_path / "out", Options(samples_per_shard=8))
    shards = load_split(tmp_path / "out", "train")
    row = shards.samples[10]
    tar = shards.folder / shards.shards[row["shard"]].name
    data = bytearray(tar.read_bytes())
    data[int(row["offset"]) + int(row["length"]) // 2] ^= 4
    tar.write_bytes(data)
    with pytest.raises(UserError, match=rf"{tar.name}, offset {row['offset']}, member 00000010_"):
        list(labelled(shards, SETTING, batch=4, center_fraction=1.0))


def test_reader_gives_the_asked_order(train_split: ShardSet) -> None:
    reader = SampleReader(train_split, LocalFiles(train_split))
    ids = np.array([200, 3, 77, 3])
    images, shown = reader.read(ids)
    assert np.array_equal(shown, ids)
    reader.close()
    assert [len(image) for image in images] == train_split.samples["length"][ids].tolist()


def test_ahead_keeps_order_bounds_its_depth_and_passes_errors_on() -> None:
    running = []

    def plans() -> list[int]:
        return list(range(20))

    def prepare(plan: int) -> int:
        running.append(plan)
        if plan == 12:
            raise UserError("twelve")
        return plan * plan

    stream = ahead(plans(), prepare, threads=3, depth=4)
    assert [next(stream) for _ in range(3)] == [0, 1, 4]
    assert max(running) <= 3 + 4
    with pytest.raises(UserError, match="twelve"):
        list(stream)
