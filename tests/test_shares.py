"""What a machine reads and fetches: its own lanes' share of the set, counted where the bytes pass."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simclr_dali.pipeline.cache import Cache
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.remote import open_split
from simclr_dali.shards.manifest import load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from tests.loaders import two_views
from tests.web import served

LANES, BATCH = 4, 8
SETTING = LoaderConfig(size=16, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def small_shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 pictures in 48 shards."""
    out = tmp_path_factory.mktemp("shares") / "packed"
    pack(pictures, out, Options(samples_per_shard=5))
    return out


@pytest.fixture
def server(small_shards: Path) -> Iterator[tuple[str, Counter[str]]]:
    with served(small_shards) as found:
        yield found


def order_of(split: Split) -> Order:
    return Order(split.shards.shard_sizes(), BATCH, LANES, 2, 0)


@pytest.mark.parametrize("machines", [1, 2, 4])
def test_a_machine_reads_the_samples_of_its_lanes_and_no_other_byte(
    machines: int, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        read.append(length)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    split = Split.local(small_shards, "train")
    lengths = split.shards.samples["length"].astype(int)
    for rank in range(machines):
        read.clear()
        batches = list(two_views(split, order_of(split), Recipe(), SETTING, epochs=1, rank=rank, world=machines))
        ids = torch.cat([batch.ids for batch in batches]).numpy()
        assert len(ids) == 240 // machines
        assert sum(read) == lengths[ids].sum() == pytest.approx(lengths.sum() / machines, rel=0.1)


@pytest.mark.parametrize("machines", [1, 2, 4])
def test_a_machine_fetches_the_shards_of_its_lanes_once(
    machines: int, server: tuple[str, Counter[str]], small_shards: Path, tmp_path: Path
) -> None:
    url, sent = server
    sizes = {f"/train/{shard.name}": shard.bytes for shard in load_split(small_shards, "train").shards}
    seen: set[str] = set()
    for rank in range(machines):
        sent.clear()
        split = open_split(url, "train", Cache(tmp_path / f"machine-{rank}", 1 << 30))
        batches = list(two_views(split, order_of(split), Recipe(), SETTING, epochs=1, rank=rank, world=machines))
        assert len(batches) == 240 // BATCH
        tars = {path: size for path, size in sent.items() if path.endswith(".tar")}
        assert all(size == sizes[path] for path, size in tars.items())
        # A border between two lanes may cut a shard, which both then read.
        assert len(tars) <= len(sizes) / machines + 1
        assert sum(tars.values()) == pytest.approx(sum(sizes.values()) / machines, rel=0.1)
        seen |= set(tars)
    assert seen == set(sizes)
