"""Packing: complete, reproducible, restartable, readable by everybody, and clear about what it refuses."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def

from shards.errors import UserError
from shards.folder import read_image, scan
from shards.manifest import load_split
from shards.pack import pack, storage_order
from tests.conftest import ROOT, assert_sentence, run_python


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def originals(folder: Path, split: str) -> dict[bytes, str]:
    return {path.read_bytes(): path.parent.name for path in (folder / split).rglob("*.*")}


def test_every_image_is_stored_once_with_its_own_bytes_label_and_size(odd_pictures: Path, tmp_path: Path) -> None:
    pack(odd_pictures, tmp_path / "out", samples_per_shard=5, workers=2)
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
    assert sizes.sum() == 240 and sizes.max() - sizes.min() <= 1
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


def test_our_index_is_what_wds2idx_writes(packed: Path, tmp_path: Path) -> None:
    tar = sorted((packed / "train").glob("*.tar"))[0]
    tool = Path(sys.executable).with_name("wds2idx")
    subprocess.run([tool, tar, tmp_path / "theirs.idx"], check=True, capture_output=True, timeout=60)
    assert tar.with_suffix(".idx").read_text() == (tmp_path / "theirs.idx").read_text()


def test_workers_do_not_change_a_byte(odd_pictures: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        pack(odd_pictures, tmp_path / f"w{workers}", samples_per_shard=4, workers=workers)
    assert tree(tmp_path / "w1") == tree(tmp_path / "w3")


def test_seed_changes_the_order_only(odd_pictures: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        pack(odd_pictures, tmp_path / f"s{seed}", samples_per_shard=100, seed=seed)
    first, second = (load_split(tmp_path / f"s{seed}", "train").samples["crc32"] for seed in (0, 1))
    assert sorted(first) == sorted(second) and list(first) != list(second)


def test_storage_order_is_pinned() -> None:
    # A change here would make a half-done pack of an older version go on differently.
    assert storage_order(10, 0, "train").tolist() == [4, 7, 0, 8, 9, 1, 5, 6, 2, 3]


def test_killed_pack_goes_on_and_ends_byte_identical(pictures: Path, tmp_path: Path) -> None:
    options = ["--samples-per-shard", "10", "--workers", "2"]
    command = [sys.executable, "-m", "shards.pack", str(pictures), str(tmp_path / "killed"), *options]
    random = np.random.default_rng(3)
    kills = 0
    for _ in range(6):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        # From the first finished shard on, so that there is something to go on with.
        parts = len(list(tmp_path.rglob("*.part.npz")))
        while process.poll() is None and len(list(tmp_path.rglob("*.part.npz"))) <= parts:
            time.sleep(0.005)
        time.sleep(float(random.uniform(0, 0.05)))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert not (tmp_path / "killed").exists() or load_split(tmp_path / "killed", "train")
    assert kills
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False).returncode == 0
    pack(pictures, tmp_path / "whole", samples_per_shard=10, workers=1)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_second_run_finds_nothing_to_do_and_other_options_are_refused(odd_pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(odd_pictures, out)
    before = tree(out)
    pack(odd_pictures, out)
    assert tree(out) == before
    with pytest.raises(UserError, match="other options"):
        pack(odd_pictures, out, seed=1)
    assert tree(out) == before


@pytest.mark.parametrize("kind", ["png", "palette", "cmyk", "gray16", "alpha"])
def test_odd_formats_become_rgb_jpeg(kind: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    rgb = np.stack([np.tile(ramp, (30, 1))] * 3, axis=2)
    picture = PIL.Image.fromarray(rgb)
    folder = tmp_path / "set" / "train" / "only"
    folder.mkdir(parents=True)
    path = folder / "odd one.name.JPEG"
    if kind == "png":
        picture.save(path, "PNG")
    elif kind == "palette":
        picture.quantize(256).save(path, "PNG")
    elif kind == "cmyk":
        picture.convert("CMYK").save(path, "JPEG", quality=100)
    elif kind == "alpha":
        picture.convert("RGBA").save(path, "PNG")
    else:
        PIL.Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(path, "PNG")
    image = read_image(scan(tmp_path / "set")[0], 0, 0)
    assert image.key == "00000000_odd_one_name" and (image.width, image.height) == (40, 30)
    with PIL.Image.open(io.BytesIO(image.encoded)) as stored:
        assert stored.format == "JPEG" and stored.mode == "RGB"
        assert np.abs(np.asarray(stored).astype(int) - rgb).mean() < 4


def broken_sources(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (source folder, word that the sentence must have)."""
    good = np.zeros((8, 8, 3), np.uint8)

    def make(name: str, *files: str) -> Path:
        for file in files:
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(good).save(path)
        return folder / name

    empty_class = make("empty", "train/a/1.jpg")
    (empty_class / "train" / "b").mkdir()
    unreadable = make("unreadable", "train/a/1.jpg", "train/a/2.jpg")
    (unreadable / "train/a/2.jpg").write_bytes((unreadable / "train/a/1.jpg").read_bytes()[:200])
    stray = make("stray", "train/a/1.jpg")
    (stray / "train/a/notes.txt").write_text("x")
    no_classes = folder / "bare"
    (no_classes / "train").mkdir(parents=True)
    return {
        "missing": (folder / "nowhere", "nowhere"),
        "no train": (make("flat", "val/a/1.jpg"), "train"),
        "no classes": (no_classes, "no class folders"),
        "empty class": (empty_class, "b is empty"),
        "unreadable": (unreadable, "2.jpg"),
        "stray file": (stray, "notes.txt"),
        "unknown class": (make("unknown", "train/a/1.jpg", "val/b/1.jpg"), "'b'"),
    }


@pytest.mark.parametrize(
    "case", ["missing", "no train", "no classes", "empty class", "unreadable", "stray file", "unknown class"]
)
def test_bad_source_is_one_sentence_and_leaves_no_data_set(case: str, tmp_path: Path) -> None:
    source, word = broken_sources(tmp_path)[case]
    done = run_python("-m", "shards.pack", source, tmp_path / "out", "--workers", 1)
    assert_sentence(done, word)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("manifest.json"))


def test_default_target_is_source_with_suffix(odd_pictures: Path) -> None:
    done = subprocess.run([ROOT / "scripts/make_shards.sh", odd_pictures], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(load_split(f"{odd_pictures}-shards", "train")) == 24


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
