"""The loaders: complete, ordered, the same for every number of processes, threads and depths, strict about damage."""

import gc
import os
import resource
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from simclr_dali.pipeline import graph
from simclr_dali.pipeline.draws import PROBE, Recipe
from simclr_dali.pipeline.files import LocalFiles
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.loader import central_views
from simclr_dali.pipeline.memory import Recycled
from simclr_dali.pipeline.order import Ids, Order
from simclr_dali.pipeline.reader import Found, SampleReader, map_ahead
from simclr_dali.pipeline.stream import Batch
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet, load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from tests.loaders import local, two_views

CPU = torch.device("cpu")
SETTING = LoaderConfig(size=32, device=CPU)


def order_of(shards: ShardSet, batch: int = 24, lanes: int = 4) -> Order:
    return Order(shards.shard_sizes(), batch, lanes, 2, 9)


def views_of(shards: ShardSet, setting: LoaderConfig = SETTING, **options: object) -> list[Batch]:
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
    plain = views_of(train_split, LoaderConfig(size=32, device=CPU, threads=1, read_ahead=0, prefetch=1))
    busy = views_of(train_split, LoaderConfig(size=32, device=CPU, threads=5, read_ahead=9, prefetch=3))
    assert all(torch.equal(a.views, b.views) and torch.equal(a.ids, b.ids) for a, b in zip(plain, busy, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_global_batches_are_the_orders_for_every_world_and_number_of_reader_threads(
    train_split: ShardSet, world: int, threads: int
) -> None:
    order, setting = order_of(train_split), LoaderConfig(size=16, device=CPU, threads=threads)
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
    batches = list(central_views(local(train_split), SETTING, batch=50, center_fraction=0.875))
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


@pytest.fixture
def damaged_set(odd_pictures: Path, tmp_path: Path) -> ShardSet:
    """24 pictures of odd sizes in three shards; one bit of samples 7 and 8 is flipped, which lie in two of them."""
    pack(odd_pictures, tmp_path / "out", Options(samples_per_shard=8))
    shards = load_split(tmp_path / "out", "train")
    for sample in (7, 8):
        row = shards.samples[sample]
        tar = shards.folder / shards.shards[row["shard"]].name
        data = bytearray(tar.read_bytes())
        data[int(row["offset"]) + int(row["length"]) // 2] ^= 4
        tar.write_bytes(data)
    return shards


def test_evaluation_stops_at_a_flipped_bit_with_the_name_of_the_sample(damaged_set: ShardSet) -> None:
    with pytest.raises(UserError, match=rf"offset {damaged_set.samples['offset'][7]}, member 00000007_"):
        list(central_views(local(damaged_set), SETTING, batch=4, center_fraction=1.0))


def test_a_damaged_sample_is_an_error_each_time_it_is_met(damaged_set: ShardSet) -> None:
    reader = SampleReader(local(damaged_set))
    for _ in range(3):
        with pytest.raises(UserError, match="member 00000007_"):
            reader.read(np.array([7]))
    reader.close()


def test_what_could_not_be_read_is_tried_again(damaged_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may fail for a moment."""

    def fail(*_: int) -> bytes:
        raise OSError(5, "Input/output error")

    reader = SampleReader(local(damaged_set), 0.1)
    with monkeypatch.context() as failing:
        failing.setattr(os, "pread", fail)
        with pytest.raises(UserError, match=r"cannot read the sample in .*: Input/output error.*number 3 of 24"):
            reader.read(np.array([1]))
    assert np.array_equal(reader.read(np.array([1])).ids, [1])
    reader.close()


def test_damaged_samples_are_replaced_named_and_counted_the_same_for_any_world(
    damaged_set: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    order = order_of(damaged_set, batch=12)
    options: dict[str, Any] = {"epochs": 2, "max_bad_fraction": 0.1}
    loader = two_views(damaged_set, order, Recipe(), SETTING, **options)
    whole = list(loader)
    planned = np.concatenate([order.batch(epoch, step) for epoch in range(2) for step in range(2)])
    shown = torch.cat([batch.ids for batch in whole]).numpy()
    # Sample 9 is the next sound one after both.
    assert np.array_equal(shown, np.where((planned == 7) | (planned == 8), 9, planned)) and 7 in planned
    labels = torch.cat([batch.labels for batch in whole])
    assert np.array_equal(labels, damaged_set.samples["label"][shown])
    assert loader.damaged() == [7, 8]
    assert sum("member 00000007_" in record.message for record in caplog.records) == 1
    parts = [list(two_views(damaged_set, order, Recipe(), SETTING, rank=rank, world=2, **options)) for rank in range(2)]
    for one, *split in zip(whole, *parts, strict=True):
        assert torch.equal(one.ids, torch.cat([part.ids for part in split]))
        assert torch.equal(one.views.chunk(2)[1], torch.cat([part.views.chunk(2)[1] for part in split]))
    # A stand-in that comes up itself in the same batch is drawn differently.
    for batch in whole:
        twice = (batch.ids == 9).nonzero().flatten().tolist()
        assert len(twice) < 2 or not torch.equal(batch.views[twice[0]], batch.views[twice[1]])


def test_more_damage_than_is_allowed_stops_with_a_sentence(damaged_set: ShardSet) -> None:
    with pytest.raises(UserError, match=r"number 2 of 24, more than max_bad_fraction = 0\.05 allows"):
        list(two_views(damaged_set, order_of(damaged_set, 12), Recipe(), SETTING, epochs=2, max_bad_fraction=0.05))


def test_inputs_of_the_graph_are_not_read_after_they_were_let_go(
    train_split: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph reads them where they lie, so each is overwritten in the moment in which nothing refers to it."""
    setting = replace(SETTING, prefetch=3, threads=2)
    expected = views_of(train_split, setting)
    plain, poisoned = graph.graph_inputs, []

    def overwrite(memory: bytearray) -> None:
        memory[:] = b"\x01" * len(memory)
        poisoned.append(len(memory))

    def doomed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        memory = bytearray(array.tobytes())
        copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
        weakref.finalize(copy, overwrite, memory).atexit = False
        return copy

    def all_doomed(*words: Any, **options: Any) -> list[Any]:
        encoded, *numbers = plain(*words, **options)
        return [[doomed(image) for image in encoded], *map(doomed, numbers)]

    monkeypatch.setattr(graph, "graph_inputs", all_doomed)
    for ours, wanted in zip(views_of(train_split, setting), expected, strict=True):
        assert torch.equal(ours.views, wanted.views)
    assert len(poisoned) >= len(expected) * (24 + 5)


def test_a_loader_that_is_left_behind_ends_its_threads(train_split: ShardSet) -> None:
    loader = two_views(train_split, order_of(train_split), Recipe(), SETTING, epochs=100)
    next(loader)
    assert any(thread.name == "graph" for thread in threading.enumerate())
    del loader
    gc.collect()
    assert not any(thread.name == "graph" for thread in threading.enumerate())


def test_a_loader_may_begin_before_it_is_asked(damaged_set: ShardSet, train_split: ShardSet) -> None:
    """The same batches from the same position; an error waits for whoever asks; one may leave without asking."""
    order = Order(train_split.shard_sizes(), 24, 4, 2, 9)
    made = [two_views(train_split, order, Recipe(), SETTING, epochs=1) for _ in range(3)]
    plain, begun, left = made[0], made[1].start(), made[2].start()
    left.close()
    assert begun.state_dict() == plain.state_dict()
    for expected, batch in zip(plain, begun, strict=True):
        assert torch.equal(batch.views, expected.views) and begun.state_dict() == plain.state_dict()
    order = Order(damaged_set.shard_sizes(), 8, 1, 2, 0)
    broken = two_views(damaged_set, order, Recipe(), SETTING, epochs=1, max_bad_fraction=0.0).start()
    with pytest.raises(UserError, match="its crc32 differs"):
        list(broken)


def test_length_and_position(train_split: ShardSet) -> None:
    order = order_of(train_split)
    whole = views_of(train_split, micro_batch=6)
    loader = two_views(train_split, order, Recipe(), SETTING, epochs=2, micro_batch=6)
    assert len(loader) == len(whole) == 2 * order.steps_per_epoch * 4
    assert loader.state_dict() == {"epoch": 0, "step": 0, "manifest": train_split.fingerprint}
    for _ in range(4 * order.steps_per_epoch + 6):  # an epoch, a step and half a step
        next(loader)
    state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (1, 1)
    loader.close()
    other = two_views(train_split, order, Recipe(), SETTING, epochs=2, micro_batch=6)
    other.load_state_dict(state)
    rest = list(other)
    assert len(rest) == len(other) == len(whole) - 4 * (order.steps_per_epoch + 1)
    assert all(torch.equal(a.views, b.views) for a, b in zip(rest, whole[-len(rest) :], strict=True))
    with pytest.raises(UserError, match="another data set"):
        other.load_state_dict({**state, "manifest": "0" * 64})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precisions_are_the_rounded_views(train_split: ShardSet, dtype: torch.dtype) -> None:
    full, low = views_of(train_split)[0], views_of(train_split, LoaderConfig(size=32, device=CPU, dtype=dtype))[0]
    assert low.views.dtype == dtype and low.views.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(low.views.float(), full.views, atol=0.02)


def test_each_view_can_have_a_recipe_of_its_own(train_split: ShardSet) -> None:
    both = views_of(train_split)[0].views.chunk(2)
    order = order_of(train_split)
    mixed = next(two_views(train_split, order, (PROBE, Recipe()), SETTING, epochs=1)).views.chunk(2)
    plain = next(two_views(train_split, order, (PROBE, PROBE), SETTING, epochs=1)).views.chunk(2)
    assert torch.equal(mixed[1], both[1]) and not torch.equal(mixed[0], both[0])
    # Crop and flip are drawn alike with and without colors, by the graph with them and the one without.
    assert torch.allclose(mixed[0], plain[0], atol=1e-5)


def test_memory_is_used_again_only_once_nothing_refers_to_it() -> None:
    memory = Recycled()
    first = memory.empty((4, 5), torch.float32)
    place = first.data_ptr()
    view = first[1:].permute(1, 0)
    del first
    assert memory.empty((4, 5), torch.float32).data_ptr() != place
    del view
    assert memory.empty((4, 5), torch.float32).data_ptr() == place
    assert memory.empty((2, 5), torch.bfloat16).shape == (2, 5)


def test_no_more_batches_are_read_ahead_than_stated(train_split: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = SampleReader.read

    def counted(self: SampleReader, ids: Ids) -> Found:
        read.append(len(ids))
        return plain(self, ids)

    monkeypatch.setattr(SampleReader, "read", counted)
    setting = LoaderConfig(size=32, device=CPU, read_ahead=2, prefetch=1)
    loader = two_views(train_split, order_of(train_split), Recipe(), setting, epochs=50)
    for taken in range(1, 6):
        next(loader)
        time.sleep(0.2)
        assert len(read) <= taken + setting.read_ahead + setting.prefetch + 2
    loader.close()


def test_reader_gives_the_asked_order(train_split: ShardSet) -> None:
    reader = SampleReader(local(train_split))
    ids = np.array([200, 3, 77, 3])
    images, shown, _ = reader.read(ids)
    assert np.array_equal(shown, ids)
    reader.close()
    assert [len(image) for image in images] == train_split.samples["length"][ids].tolist()


def test_many_open_sets_raise_the_limit_of_open_files(train_split: ShardSet) -> None:
    """As where an evaluation opens the shards that training holds open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[LocalFiles] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 300, limits[1]))
        for _ in range(60):
            opened.append(LocalFiles(train_split))
    finally:
        for files in opened:
            files.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_limit_of_open_files_that_cannot_be_raised_is_named(
    train_split: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (20, 20))
    with pytest.raises(UserError, match="6 of them for a set of shards, and its limit is 20; raise it"):
        LocalFiles(train_split)


def test_ahead_keeps_order_bounds_its_depth_and_passes_errors_on() -> None:
    running = []

    def plans() -> list[int]:
        return list(range(20))

    def prepare(plan: int) -> int:
        running.append(plan)
        if plan == 12:
            raise UserError("twelve")
        return plan * plan

    stream = map_ahead(plans(), prepare, threads=3, depth=4)
    assert [next(stream) for _ in range(3)] == [0, 1, 4]
    assert max(running) <= 3 + 4
    with pytest.raises(UserError, match="twelve"):
        list(stream)
