"""What a machine reads and fetches: its own lanes' share of the set, counted where the bytes pass."""

import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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

LANES, BATCH = 4, 8
SETTING = LoaderConfig(size=16, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def small_shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 pictures in 48 shards."""
    out = tmp_path_factory.mktemp("shares") / "packed"
    pack(pictures, out, Options(samples_per_shard=5))
    return out


@pytest.fixture
def server(small_shards: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Its address, and the bytes that it has sent of each tar."""
    sent: dict[str, int] = {}

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words, directory=str(small_shards))

        def copyfile(self, source: Any, output: Any) -> None:
            data = source.read()
            output.write(data)
            if self.path.endswith(".tar"):
                sent[self.path] = sent.get(self.path, 0) + len(data)

        def log_message(self, *words: Any) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}", sent
    found.shutdown()
    found.server_close()


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
    machines: int, server: tuple[str, dict[str, int]], small_shards: Path, tmp_path: Path
) -> None:
    url, sent = server
    sizes = {f"/train/{shard.name}": shard.bytes for shard in load_split(small_shards, "train").shards}
    seen: set[str] = set()
    for rank in range(machines):
        sent.clear()
        split = open_split(url, "train", Cache(tmp_path / f"machine-{rank}", 1 << 30))
        batches = list(two_views(split, order_of(split), Recipe(), SETTING, epochs=1, rank=rank, world=machines))
        assert len(batches) == 240 // BATCH
        assert all(sent[path] == sizes[path] for path in sent)
        # A border between two lanes may cut a shard, which both then read.
        assert len(sent) <= len(sizes) / machines + 1
        assert sum(sent.values()) == pytest.approx(sum(sizes.values()) / machines, rel=0.1)
        seen |= set(sent)
    assert seen == set(sizes)
