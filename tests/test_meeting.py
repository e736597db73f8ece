"""Ranks that are started again meet one another, not those who were there before."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_dali.model.meeting import own_part

PATIENCE = timedelta(seconds=20)


def meet(store: Any, world: int) -> list[bytes]:
    """All ranks say in their part what rank 0 drew, and who they are; what each found of rank 0."""
    arrived = threading.Barrier(world)

    def come(rank: int) -> bytes:
        part = own_part(store, rank, world, PATIENCE)
        assert not part.check(["address"]) or rank  # nothing of an earlier start
        if rank == 0:
            part.set("address", uuid.uuid4().hex)
        arrived.wait()
        return bytes(part.get("address"))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(come, range(world)))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=2, max_size=4), st.integers(1, 4))
def test_each_start_has_a_part_of_the_store_of_its_own(worlds: list[int], dead: int) -> None:
    """Also where a rank has asked to be met and died before it was, and where fewer or more come next time."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    seen: set[bytes] = set()
    for world in worlds:
        store.set(f"meeting/{dead}", "of one who died")
        (address,) = set(meet(store, world))
        assert address not in seen
        seen.add(address)


def test_who_does_not_come_is_named() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="2 ranks did not come, rank 1 among them"):
        own_part(store, 0, 3, timedelta(seconds=0.2))
    with pytest.raises(RuntimeError):
        own_part(store, 1, 3, timedelta(seconds=0.2))
