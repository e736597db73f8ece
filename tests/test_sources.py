"""Every kind of source gives the same set: folder, ILSVRC archives, WebDataset tars, a set that was packed before."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import webdataset

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet, load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from simclr_dali.shards.sources.find import find_sources
from simclr_dali.shards.sources.ilsvrc import DEVKIT, TRAIN, VAL
from simclr_dali.shards.sources.source import Source, read_item
from tests.conftest import later, originals

WORDNET_IDS = ["n01440764", "n02102040", "n03000684"]
# The devkit counts classes in another order than the sorted WordNet ids, and hypernyms behind them.
DEVKIT_IDS = {1: "n03000684", 2: "n01440764", 3: "n02102040"}


@pytest.fixture
def unpacked(odd_pictures: Path, pictures: Path, tmp_path: Path) -> Path:
    """An image folder with the names of ILSVRC: three classes, 5 pictures each in train, 7 in val."""
    folder = tmp_path / "unpacked"
    drawn = sorted((odd_pictures / "train").rglob("*.JPEG")) + sorted((pictures / "val").rglob("*.jpg"))
    for label, name in enumerate(WORDNET_IDS):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "val" / name).mkdir(parents=True)
        for number in range(5):
            shutil.copy(drawn[5 * label + number], folder / "train" / name / f"{name}_{number}.JPEG")
    for number in range(1, 8):
        name = WORDNET_IDS[number * 5 % 3]
        shutil.copy(drawn[14 + number], folder / "val" / name / f"ILSVRC2012_val_{number:08d}.JPEG")
    return folder


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def make_archives(unpacked: Path, folder: Path) -> Path:
    """The three files as they are downloaded, made of ``unpacked``."""
    folder.mkdir()
    with tarfile.open(folder / TRAIN, "w") as outer:
        for name in reversed(WORDNET_IDS):  # the real one is sorted, but nothing promises it
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for path in sorted((unpacked / "train" / name).iterdir()):
                    add(archive, path.name, path.read_bytes())
            add(outer, f"{name}.tar", inner.getvalue())
    number_of = {name: number for number, name in DEVKIT_IDS.items()}
    truth = []
    with tarfile.open(folder / VAL, "w") as archive:
        for path in sorted((unpacked / "val").rglob("*.JPEG"), key=lambda path: path.name):
            add(archive, path.name, path.read_bytes())
            truth.append(number_of[path.parent.name])
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, name, "a word", 0) for number, name in DEVKIT_IDS.items()] + [(4, "n00001740", "entity", 3)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    with tarfile.open(folder / DEVKIT, "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        text = "".join(f"{number}\n" for number in truth).encode()
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", text)
    return folder


def make_webdataset(unpacked: Path, folder: Path, pattern: str) -> Path:
    """Tars by webdataset's own writer, a few samples each, with a component that nobody asked for."""
    for split in ("train", "val"):
        path = folder / pattern.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        with webdataset.ShardWriter(str(path), maxcount=4, verbose=0) as writer:
            for picture in sorted((unpacked / split).rglob("*.JPEG"), key=lambda path: path.name):
                label = WORDNET_IDS.index(picture.parent.name)
                writer.write(
                    {"__key__": picture.stem, "jpg": picture.read_bytes(), "cls": label, "json": {"from": "a test"}}
                )
    return folder


def stored(shards: ShardSet) -> dict[bytes, str]:
    found = {}
    for row in shards.samples:
        with (shards.folder / shards.shards[row["shard"]].name).open("rb") as tar:
            tar.seek(int(row["offset"]))
            found[tar.read(int(row["length"]))] = shards.classes[row["label"]]
    return found


def test_archives_are_read_in_place_and_give_the_bytes_of_the_folder(unpacked: Path, tmp_path: Path) -> None:
    archives = make_archives(unpacked, tmp_path / "archives")
    before = {path.name for path in archives.iterdir()}
    pack(archives, tmp_path / "out", Options(samples_per_shard=4), workers=2)
    assert {path.name for path in archives.iterdir()} == before
    for split in ("train", "val"):
        shards = load_split(tmp_path / "out", split)
        assert shards.classes == tuple(WORDNET_IDS)
        assert stored(shards) == originals(unpacked, split)
    # Sorted by class and name as the folder is: the same pictures at the same places.
    pack(unpacked, tmp_path / "folder", Options(samples_per_shard=4))
    theirs, ours = load_split(tmp_path / "folder", "train"), load_split(tmp_path / "out", "train")
    assert ours.samples.tobytes() == theirs.samples.tobytes()
    assert [shard.sha256 for shard in ours.shards] == [shard.sha256 for shard in theirs.shards]


def test_one_archive_alone_is_enough_for_its_split(unpacked: Path, tmp_path: Path) -> None:
    archives = make_archives(unpacked, tmp_path / "archives")
    (archives / VAL).unlink()
    (archives / DEVKIT).rename(tmp_path / DEVKIT)
    assert [source.split for source in find_sources(archives).sources] == ["train"]
    archives = make_archives(unpacked, tmp_path / "second")
    (archives / TRAIN).unlink()
    assert find_sources(archives).sources[0].classes == WORDNET_IDS
    (archives / DEVKIT).unlink()
    with pytest.raises(UserError, match=f"{DEVKIT} is missing"):
        find_sources(archives)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (TRAIN, "cut in the middle"),
        (TRAIN, "cut before its end"),
        (TRAIN, "text"),
        (VAL, "cut in the middle"),
        (VAL, "cut before its end"),
        (VAL, "text"),
        (DEVKIT, "cut in the middle"),
        (DEVKIT, "text"),
    ],
)
def test_damaged_archives_are_refused(name: str, damage: str, unpacked: Path, tmp_path: Path) -> None:
    archives = make_archives(unpacked, tmp_path / "archives")
    whole = (archives / name).read_bytes()
    if damage == "text":
        damaged = b"404 not found"
    elif damage == "cut in the middle":
        damaged = whole[: len(whole) // 2]
    else:
        # Exactly behind the last member, where only the mark of the end is missing.
        damaged = whole[: -(-len(whole.rstrip(b"\0")) // 512) * 512]
    (archives / name).write_bytes(damaged)
    with pytest.raises(UserError, match=name):
        find_sources(archives)


def test_archives_that_do_not_fit_are_refused(unpacked: Path, tmp_path: Path) -> None:
    archives = make_archives(unpacked, tmp_path / "archives")
    shutil.rmtree(unpacked / "train" / WORDNET_IDS[1])
    (unpacked / "train" / WORDNET_IDS[1]).mkdir()
    with tarfile.open(archives / VAL, "a") as archive:
        add(archive, "ILSVRC2012_val_00000008.JPEG", b"x")
    with pytest.raises(UserError, match=r"ILSVRC2012_val_00000008\.JPEG.*has no label"):
        find_sources(archives)
    with tarfile.open(archives / TRAIN, "a") as archive:
        add(archive, "readme.txt", b"x")
    with pytest.raises(UserError, match=r"readme\.txt"):
        find_sources(archives)


@pytest.mark.parametrize("pattern", ["{split}/%05d.tar", "imagenet-{split}-%06d.tar"])
def test_webdataset_tars_are_packed_again(pattern: str, unpacked: Path, tmp_path: Path) -> None:
    tars = make_webdataset(unpacked, tmp_path / "tars", pattern)
    assert find_sources(tars).sources[0].classes == ["0", "1", "2"]
    assert find_sources(tars).sources[0].left_out.counts == {"no picture (.json)": 15}
    (tars / "classes.txt").write_text("\n".join(WORDNET_IDS) + "\n")
    pack(tars, tmp_path / "out", Options(samples_per_shard=4))
    for split in ("train", "val"):
        assert stored(load_split(tmp_path / "out", split)) == originals(unpacked, split)


def test_a_packed_set_can_be_packed_again(unpacked: Path, tmp_path: Path) -> None:
    pack(unpacked, tmp_path / "first", Options(samples_per_shard=4))
    pack(tmp_path / "first", tmp_path / "second", Options(samples_per_shard=7, seed=5))
    shards = load_split(tmp_path / "second", "train")
    assert shards.classes == tuple(WORDNET_IDS) and stored(shards) == originals(unpacked, "train")


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"a.cls": b"1"}, r"hold no samples \(1 label without a picture\)"),
        ({"a.jpg": b"x", "a.cls": b"dog"}, "'dog', not the number of a class; write classes.txt"),
        ({"a.jpg": b"x", "a.png": b"y", "a.cls": b"1"}, "'a' has two pictures"),
        ({"a.txt": b"x"}, "hold no samples"),
    ],
)
def test_unusable_webdataset_tars_are_refused(members: dict[str, bytes], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as archive:
        for name, data in members.items():
            add(archive, name, data)
    with pytest.raises(UserError, match=sentence):
        find_sources(tmp_path)


def test_too_few_class_names_are_refused(unpacked: Path, tmp_path: Path) -> None:
    tars = make_webdataset(unpacked, tmp_path / "tars", "{split}-%d.tar")
    (tars / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="names 2 classes, but a picture has label 2"):
        find_sources(tars)


def test_an_archive_that_is_replaced_after_it_was_listed_is_refused(unpacked: Path, tmp_path: Path) -> None:
    archives = make_archives(unpacked, tmp_path / "archives")
    source: Source = find_sources(archives).sources[0]
    assert read_item(source.root, source.items[0]) in originals(unpacked, "train")
    (archives / TRAIN).write_bytes((archives / TRAIN).read_bytes())
    later(archives / TRAIN)
    with pytest.raises(UserError, match="changed while it was packed"):
        read_item(source.root, source.items[0])
    with pytest.raises(UserError, match="changed while it was packed"):
        source.check_unchanged()
