"""The order of samples: a pure function, complete, the same for every number of processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.philox import WINDOW_ORDER, permutation, philox
from simclr_dali.shards.errors import UserError


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.sampled_from([1, 2, 4, 6, 12]))
    per_lane = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    sizes.append(lanes * per_lane)  # at least one global batch
    return Order(tuple(sizes), lanes * per_lane, lanes, draw(st.integers(1, 5)), draw(st.integers(0, 2**63 - 1)))


@given(orders(), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_an_epoch_visits_each_sample_at_most_once_and_drops_less_than_a_batch_and_the_lanes(
    order: Order, epoch: int
) -> None:
    ids = np.concatenate([order.batch(epoch, step) for step in range(order.steps_per_epoch)])
    assert len(set(ids.tolist())) == len(ids)
    assert ids.min() >= 0 and ids.max() < order.samples
    assert order.samples - len(ids) < order.global_batch + order.lanes


@given(orders(), st.integers(0, 5), st.data())
@settings(max_examples=100, deadline=None)
def test_ranks_split_the_same_global_batch_in_the_same_order(order: Order, epoch: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    whole = order.batch(epoch, step)
    for world in (w for w in range(1, order.lanes + 1) if order.lanes % w == 0):
        parts = [order.batch(epoch, step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), whole)


@given(orders(), st.integers(0, 5), st.data())
@settings(max_examples=100, deadline=None)
def test_the_windows_name_every_shard_that_is_read(order: Order, epoch: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    world = data.draw(st.sampled_from([w for w in range(1, order.lanes + 1) if order.lanes % w == 0]))
    shard_of = np.repeat(np.arange(len(order.shard_sizes)), order.shard_sizes)
    for rank in range(world):
        now, after = order.windows(epoch, step, rank, world)
        assert set(shard_of[order.batch(epoch, step, rank, world)]) <= set(now)
        assert not set(now) & set(after) and len(set(now)) == len(now)
        if step + 1 < order.steps_per_epoch:
            then = set(order.windows(epoch, step + 1, rank, world)[0])
            if order.global_batch // order.lanes == 1:  # one step enters one window at most
                assert then <= set(now) | set(after)


def test_any_position_is_reached_without_replay() -> None:
    def order() -> Order:
        return Order((100,) * 20, 64, 8, 4, 3)

    forward = [order().batch(2, step) for step in range(order().steps_per_epoch)]
    # Backwards and from fresh objects: no hidden state.
    for step in reversed(range(len(forward))):
        assert np.array_equal(Order((100,) * 20, 64, 8, 4, 3).batch(2, step), forward[step])


def test_epochs_and_seeds_differ() -> None:
    batches = [Order((50,) * 10, 20, 4, 2, seed).batch(epoch, 0).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(batch) for batch in batches}) == 4


def test_every_sample_comes_up_over_epochs_and_positions_are_even() -> None:
    order = Order((37,) * 9, 36, 4, 3, 11)
    seen = np.zeros(order.samples)
    epochs = 300
    for epoch in range(epochs):
        for step in range(order.steps_per_epoch):
            seen[order.batch(epoch, step)] += 1
    share = order.steps_per_epoch * order.global_batch / order.samples
    # A count is binomial: 5 standard deviations either way.
    slack = 5 * np.sqrt(epochs * share * (1 - share) + 1)
    assert np.all(np.abs(seen - epochs * share) < slack)


def test_a_lane_reads_few_shards_at_a_time() -> None:
    order = Order((100,) * 64, 64, 8, 2, 0)
    shard_of = np.repeat(np.arange(64), 100)
    for step in range(0, order.steps_per_epoch, 7):
        for lane in range(8):
            ids = order.batch(0, step, lane, 8)
            assert len(set(shard_of[ids])) <= 2 * order.window + 1


@pytest.mark.parametrize("machines", [1, 2, 8, 16])
def test_a_machine_reads_its_share_of_the_shards_only(machines: int) -> None:
    """Of ImageNet's size: over an epoch 1/machines of all samples, out of hardly more than 1/machines of all shards."""
    order = Order((1000,) * 1281, 4096, 64, 8, 0)
    per_machine = []
    for rank in range(machines):
        ids = np.concatenate([order.batch(3, step, rank, machines) for step in range(order.steps_per_epoch)])
        assert len(ids) == len(set(ids.tolist())) == order.steps_per_epoch * 4096 // machines
        per_machine.append(set((ids // 1000).tolist()))
        # A border between two lanes may cut a shard, which both then read.
        assert len(per_machine[-1]) <= 1281 / machines + 2
    assert set().union(*per_machine) == set(range(1281))
    assert sum(map(len, per_machine)) <= 1281 + machines


def test_order_is_pinned() -> None:
    # Changing these numbers changes every run that goes on from a checkpoint.
    assert Order((5, 4, 6), 6, 2, 1, 42).batch(1, 1).tolist() == [1, 0, 6, 11, 14, 10]
    assert permutation(8, 7, WINDOW_ORDER, 3, 5).tolist() == [2, 6, 1, 5, 3, 0, 4, 7]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: int, expected: list[int]) -> None:
    """Known answers of Random123, kat_vectors, philox4x32 10 rounds."""
    assert philox(key, np.array([counter], np.uint32))[0].tolist() == expected


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="lanes is 3"):
        Order((100,), 16, 3, 1, 0)
    with pytest.raises(UserError, match="does not fit the 10 samples"):
        Order((10,), 16, 4, 1, 0)
    with pytest.raises(UserError, match="3 processes"):
        Order((100,), 16, 4, 1, 0).batch(0, 0, 0, 3)
