"""Packing: complete, reproducible, restartable, readable by everybody, and clear about what it refuses."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def

from simclr_dali.pipeline.files import LocalFiles, Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.loader import central_views
from simclr_dali.shards import manifest
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import load_split, read_split, write_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options, storage_order
from simclr_dali.shards.tar import header
from tests.conftest import originals


def test_every_image_is_stored_once_with_its_own_bytes_label_and_size(odd_pictures: Path, tmp_path: Path) -> None:
    pack(odd_pictures, tmp_path / "out", Options(samples_per_shard=5), workers=2)
    for split in ("train", "val"):
        shards = load_split(tmp_path / "out", split)
        found = {}
        for row in shards.samples:
            with (shards.folder / shards.shards[row["shard"]].name).open("rb") as tar:
                tar.seek(int(row["offset"]))
                data = tar.read(int(row["length"]))
            found[data] = shards.classes[row["label"]]
            with PIL.Image.open(io.BytesIO(data)) as picture:
                assert picture.size == (row["width"], row["height"])
        assert found == originals(odd_pictures, split)
        assert len(shards) == len(found)


def test_shards_have_equal_sizes_and_are_class_mixed(packed: Path) -> None:
    shards = load_split(packed, "train")
    sizes = shards.shard_sizes()
    assert sum(sizes) == 240 and max(sizes) - min(sizes) <= 1
    for number in range(len(sizes)):
        assert len(set(shards.samples["label"][shards.samples["shard"] == number])) > 6


def test_webdataset_reads_the_shards(packed: Path, pictures: Path) -> None:
    urls = sorted(str(path) for path in (packed / "train").glob("*.tar"))
    found = {sample["jpg"]: int(sample["cls"]) for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    classes = load_split(packed, "train").classes
    assert {data: classes[label] for data, label in found.items()} == originals(pictures, "train")


def test_dali_reads_the_shards_by_our_index(packed: Path, pictures: Path) -> None:
    tars = sorted((packed / "train").glob("*.tar"))

    @pipeline_def(batch_size=240, num_threads=1, device_id=None)
    def reader() -> Any:
        components: Any = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
            dont_use_mmap=True,
        )
        return tuple(components)

    pipeline: Any = reader()
    pipeline.build()
    images, labels = pipeline.run()
    classes = load_split(packed, "train").classes
    found = {images.at(i).tobytes(): classes[int(labels.at(i).tobytes())] for i in range(240)}
    assert found == originals(pictures, "train")


@settings(deadline=None)
@given(
    name=st.text(
        st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters="/"), min_size=1, max_size=100
    ),
    size=st.integers(0, 8**11 - 1),
)
def test_our_headers_are_what_tarfile_writes(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert header(name, size) == member.tobuf(tarfile.USTAR_FORMAT, "ascii")


def test_our_index_is_what_wds2idx_writes(packed: Path, tmp_path: Path) -> None:
    tar = sorted((packed / "train").glob("*.tar"))[0]
    tool = Path(sys.executable).with_name("wds2idx")
    subprocess.run([tool, tar, tmp_path / "theirs.idx"], check=True, capture_output=True, timeout=60)
    assert tar.with_suffix(".idx").read_text() == (tmp_path / "theirs.idx").read_text()


def test_seed_changes_the_order_only(odd_pictures: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        pack(odd_pictures, tmp_path / f"s{seed}", Options(samples_per_shard=100, seed=seed))
    first, second = (load_split(tmp_path / f"s{seed}", "train").samples["crc32"] for seed in (0, 1))
    assert sorted(first) == sorted(second) and list(first) != list(second)


def test_storage_order_is_pinned() -> None:
    # A change here would make a half-done pack of an older version go on differently.
    assert storage_order(10, 0, "train").tolist() == [4, 7, 0, 8, 9, 1, 5, 6, 2, 3]


def test_a_large_table_is_mapped_and_says_the_same(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So processes of a machine share its pages, of which hundred millions of samples have three gigabytes."""
    small = load_split(packed, "train")
    monkeypatch.setattr(manifest, "SHARED_TABLE", 0)
    monkeypatch.setattr(manifest, "ROWS_AT_A_TIME", 7)
    large = load_split(packed, "train")
    assert isinstance(large.samples, np.memmap) and not isinstance(small.samples, np.memmap)
    assert (large.samples == small.samples).all() and large.fingerprint == small.fingerprint
    setting = LoaderConfig(32, torch.device("cpu"))
    views = [
        torch.cat([batch.views.clone() for batch in central_views(Split(shards, files), setting, batch=48)])
        for shards, files in ((small, lambda: LocalFiles(small)), (large, lambda: LocalFiles(large)))
    ]
    assert torch.equal(*views)


def test_each_row_of_a_table_is_checked_whichever_block_it_is_in(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "ROWS_AT_A_TIME", 7)
    shards = load_split(packed, "val")
    for column, value, sentence in (("label", 12, "labels"), ("width", 0, "sizes"), ("shard", 9, "shards")):
        rows = shards.samples.copy()
        rows[column][-1] = value
        folder = tmp_path / column
        folder.mkdir()
        write_split(folder, "val", list(shards.classes), list(shards.shards), rows, {})
        with pytest.raises(UserError, match=sentence):
            read_split(folder)


@pytest.mark.parametrize("damage", ["manifest", "table", "missing tar", "short tar", "no split"])
def test_damaged_set_is_refused_when_loaded(damage: str, odd_pictures: Path, tmp_path: Path) -> None:
    pack(odd_pictures, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    tar = next(folder.glob("*.tar"))
    if damage == "manifest":
        (folder / "manifest.json").write_text(json.dumps({"format": "other"}))
    elif damage == "table":
        data = bytearray((folder / "samples.npy").read_bytes())
        data[-3] ^= 1
        (folder / "samples.npy").write_bytes(data)
    elif damage == "missing tar":
        tar.unlink()
    elif damage == "short tar":
        tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(UserError):
        load_split(tmp_path / "out", "test" if damage == "no split" else "train")
