"""Sources that were packed wrongly, refused wrongly or in part passed over when strangers tried to break the packer."""

import io
import os
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import rgb
from simclr_dali.shards.manifest import load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from simclr_dali.shards.sources.class_list import read_classes
from simclr_dali.shards.sources.ilsvrc import DEVKIT, TRAIN, VAL
from tests.conftest import assert_sentence, run_command
from tests.drawn import class_folders, encoded, labels, left_out, link, put, put_tar, report, samples, stored
from tests.test_disks import IDS, flat_val, solution


def archive(path: Path, classes: dict[str, int]) -> Path:
    """A train archive of ILSVRC: a tar of a tar for each class."""
    inner = {}
    for name, count in classes.items():
        members = {f"{name}_{number}.JPEG": encoded() for number in range(count)}
        inner[f"{name}.tar"] = put_tar(path.parent / "inner" / name, members).read_bytes()
    shutil.rmtree(path.parent / "inner")
    return put_tar(path, inner)


def test_a_stray_tar_does_not_hide_a_tree_of_pictures(tmp_path: Path) -> None:
    for number in range(20):
        put(tmp_path / f"in/photos/{number}.jpg")
    put_tar(tmp_path / "in/backup.tar", {"1.jpg": encoded()})
    with pytest.raises(UserError, match=r"1 of 21 pictures would be left out \(1 archive \.tar beside pictures\)"):
        pack(tmp_path / "in", tmp_path / "out")
    pack(tmp_path / "in", tmp_path / "out", max_bad=5)
    assert len(labels(tmp_path / "out", "train")) == 20


def test_an_archive_beside_the_folder_of_its_split_is_counted(tmp_path: Path) -> None:
    archive(class_folders(tmp_path / "in", {"train": 2}, IDS) / TRAIN, dict.fromkeys(IDS, 3))
    pack(tmp_path / "in", tmp_path / "out")
    assert left_out(tmp_path / "out") == {"beside the splits": 1}


def test_an_empty_folder_does_not_stand_in_the_way_of_an_archive(tmp_path: Path) -> None:
    (tmp_path / "in/train").mkdir(parents=True)
    archive(tmp_path / "in" / TRAIN, dict.fromkeys(IDS, 3))
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == [IDS[0]] * 3 + [IDS[1]] * 3


@pytest.mark.parametrize("place", ["", "val/"])
def test_the_val_archive_takes_kaggles_labels_and_may_lie_in_its_folder(place: str, tmp_path: Path) -> None:
    flat = flat_val(tmp_path / "flat")
    pictures = {path.name: path.read_bytes() for path in sorted((flat / "val").iterdir())}
    put_tar(tmp_path / f"in/{place}{VAL}", pictures)
    put(tmp_path / "in/LOC_val_solution.csv", solution())
    pack(tmp_path / "in", tmp_path / "out", Options(split="val"))
    assert labels(tmp_path / "out", "val") == [IDS[0]] * 2 + [IDS[1]] * 2


def test_the_train_archive_may_lie_in_its_folder(tmp_path: Path) -> None:
    archive(tmp_path / "in/train" / TRAIN, dict.fromkeys(IDS, 3))
    pack(tmp_path / "in", tmp_path / "out")
    assert len(labels(tmp_path / "out", "train")) == 6


@pytest.mark.parametrize("empty_folders", [False, True])
def test_class_archives_beside_another_tar_are_still_classes(empty_folders: bool, tmp_path: Path) -> None:
    for name in IDS:
        put_tar(tmp_path / f"in/train/{name}.tar", {f"{name}_{number}.JPEG": encoded() for number in range(3)})
        if empty_folders:
            (tmp_path / "in/train" / name).mkdir()
    put_tar(tmp_path / "in/train/notes.tar", {"a.txt": b"x"})
    pack(tmp_path / "in", tmp_path / "out", max_bad=20)
    assert labels(tmp_path / "out", "train") == [IDS[0]] * 3 + [IDS[1]] * 3


@pytest.mark.parametrize("place", ["train/part0/0.tar", "train/A.TAR"])
def test_tars_may_lie_deeper_and_end_in_capitals(place: str, tmp_path: Path) -> None:
    put_tar(tmp_path / "in" / place, samples(4))
    pack(tmp_path / "in", tmp_path / "out")
    assert len(labels(tmp_path / "out", "train")) == 4


@pytest.mark.parametrize("names", [("train/0.tar", "train/._0.tar"), ("train-0.tar", "._train-0.tar")])
def test_what_macos_puts_beside_tars_is_no_tar(names: tuple[str, str], tmp_path: Path) -> None:
    put_tar(tmp_path / "in" / names[0], samples(4))
    put(tmp_path / "in" / names[1], b"\0\5\x16\7")
    pack(tmp_path / "in", tmp_path / "out")
    assert left_out(tmp_path / "out") == {"rubbish of file managers": 1}


def test_pipes_and_folders_called_tar_are_no_tars(tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/0.tar", samples(4))
    os.mkfifo(tmp_path / "in/train/x.tar")
    (tmp_path / "in/train/old.tar").mkdir()
    done = run_command("pack", tmp_path / "in", tmp_path / "out", "--workers", 1)
    assert done.returncode == 0 and "1 no regular file" in done.stdout, done.stderr
    unlabelled = tmp_path / "tree/old.tar/0.jpg"
    put(unlabelled)
    pack(tmp_path / "tree", tmp_path / "out2")
    assert len(labels(tmp_path / "out2", "train")) == 1


def test_a_sparse_member_is_lost_and_not_read_wrongly(tmp_path: Path) -> None:
    holes = tmp_path / "holes.jpg"
    with holes.open("wb") as file:
        file.truncate(1 << 22)
        file.seek(1 << 21)
        file.write(encoded())
    for number in range(4):
        put(tmp_path / f"{number}.jpg")
    names = ["holes.jpg", *(f"{number}.jpg" for number in range(4))]
    (tmp_path / "in/train").mkdir(parents=True)
    made = subprocess.run(
        ["tar", "--sparse", "--format=gnu", "-cf", tmp_path / "in/train/0.tar", *names], cwd=tmp_path, check=False
    )
    with tarfile.open(tmp_path / "in/train/0.tar") as tar:
        if made.returncode or not tar.getmember("holes.jpg").issparse():
            pytest.skip("this tar or this disk knows no holes")
    with pytest.raises(UserError, match="1 sparse member"):
        pack(tmp_path / "in", tmp_path / "out")
    pack(tmp_path / "in", tmp_path / "out", max_bad=30)
    assert len(labels(tmp_path / "out", "train")) == 4


def test_a_link_to_a_folder_in_a_tar_is_no_lost_sample(tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/0.tar", {**samples(4, "2020/{}"), "latest": link("latest", "2020")})
    pack(tmp_path / "in", tmp_path / "out")
    assert left_out(tmp_path / "out") == {"link to a folder inside of a tar": 1}


def test_dots_in_names_of_folders_inside_of_tars_are_no_endings(tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/0.tar", {"a.d/b": encoded(), "a.d/c": encoded()})
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == ["", ""]


def test_two_labels_of_a_sample_are_refused_and_empty_ones_are_none(tmp_path: Path) -> None:
    put_tar(tmp_path / "two/train/0.tar", {"0.jpg": encoded(), "0.cls": b"1", "./0.cls": b"2"})
    pack(tmp_path / "two", tmp_path / "out", max_bad=60)
    assert labels(tmp_path / "out", "train") == ["1"]
    path = put_tar(tmp_path / "three/train/0.tar", {"0.jpg": encoded(), "0.cls": b"1"})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("0.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"2"))
    with pytest.raises(UserError, match="'0' has two labels"):
        pack(tmp_path / "three", tmp_path / "out3")
    put_tar(tmp_path / "empty/train/0.tar", {"0.jpg": encoded(), "0.cls": b""})
    pack(tmp_path / "empty", tmp_path / "out4")
    assert labels(tmp_path / "out4", "train") == [""]


def test_lost_and_undecodable_pictures_share_one_limit(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 9}, ["ant"])
    put(tmp_path / "in/train/ant/a.heic", b"x")
    put(tmp_path / "in/train/ant/b.jpg", b"x")
    with pytest.raises(UserError, match="1 of 10 images cannot be decoded and 1 are lost"):
        pack(tmp_path / "in", tmp_path / "out", max_bad=10)
    put_tar(tmp_path / "tars/train/0.tar", {**samples(9), "x.heic": b"x", "x.cls": b"1"})
    pack(tmp_path / "tars", tmp_path / "out2", max_bad=10)  # one sample, though both its members are lost
    assert left_out(tmp_path / "out2") == {"no decoder for .heic": 1}


def test_numbers_of_a_split_that_is_added_mean_the_classes_that_are_there(tmp_path: Path) -> None:
    train = {f"{number}.jpg": encoded() for number in range(6)}
    train |= {f"{number}.cls": str(number % 3).encode() for number in range(6)}
    put_tar(tmp_path / "in/train/0.tar", train)
    put_tar(tmp_path / "in/val/0.tar", samples(4))
    pack(tmp_path / "in", tmp_path / "out", Options(split="train"))
    pack(tmp_path / "in", tmp_path / "out", Options(split="val"))
    assert load_split(tmp_path / "out", "val").classes == ("0", "1", "2")
    assert [one["reason"] for one in report(tmp_path / "out")["beside"]] == []
    class_folders(tmp_path / "other", {"train": 2}, ["ant", "bee", "cow"])
    class_folders(tmp_path / "other2", {"val": 2}, ["bee"])
    pack(tmp_path / "other", tmp_path / "out2")
    pack(tmp_path / "other2", tmp_path / "out2", Options(split="val"))
    assert labels(tmp_path / "out2", "val") == ["bee", "bee"]
    put(tmp_path / "flat/val/0.jpg")
    pack(tmp_path / "other", tmp_path / "out3")
    with pytest.raises(UserError, match=r"1 picture of val in .* have no labels"):
        pack(tmp_path / "flat", tmp_path / "out3", Options(split="val"))


def test_what_a_limit_leaves_out_is_counted(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 9})
    pack(tmp_path / "in", tmp_path / "out", Options(limit_per_class=2))
    assert left_out(tmp_path / "out") == {"beyond --limit-per-class": 14}


def test_links_beside_the_splits_and_broken_ones_are_not_passed_over(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2})
    class_folders(tmp_path / "else", {"where": 2})
    (tmp_path / "in/more").symlink_to(tmp_path / "else")
    pack(tmp_path / "in", tmp_path / "out")
    assert left_out(tmp_path / "out") == {"link to a folder beside the splits": 1}
    (tmp_path / "in/val").symlink_to("/nowhere")
    with pytest.raises(UserError, match="val is a link to nothing"):
        pack(tmp_path / "in", tmp_path / "out2")


def test_a_packed_split_is_not_passed_over(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2})
    put(tmp_path / "in/val.zip", b"PK")
    with pytest.raises(UserError, match=r"val\.zip is compressed"):
        pack(tmp_path / "in", tmp_path / "out")


def test_an_empty_folder_beside_loose_pictures_is_no_class(tmp_path: Path) -> None:
    put(tmp_path / "in/train/0.jpg")
    (tmp_path / "in/train/new folder").mkdir()
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == [""]


def test_pictures_without_an_ending_are_recognised_whole(tmp_path: Path) -> None:
    """Their header may lie behind much else: thumbnails of cameras, or the directory of a TIFF at its end."""
    plain = encoded()
    long_header = plain[:2] + b"".join(b"\xff\xec\xff\xff" + b"x" * 65533 for _ in range(2)) + plain[2:]
    tiff = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tiff, "TIFF", compression="tiff_lzw")
    huge = io.BytesIO()
    PIL.Image.new("L", (20_000, 10_000)).save(huge, "PNG")
    members = {"photo": long_header, "scan001": tiff.getvalue(), "p.jpg_orig": long_header}
    for name, data in members.items():
        put(tmp_path / "in/train/ant" / name, data)
    put_tar(tmp_path / "tars/train/0.tar", members)
    for source in ("in", "tars"):
        pack(tmp_path / source, tmp_path / f"out-{source}")
        assert len(stored(tmp_path / f"out-{source}", "train")) == 3
    put(tmp_path / "in/train/ant/large", huge.getvalue())
    with pytest.raises(UserError, match="--max-pixels allows more"):
        pack(tmp_path / "in", tmp_path / "out2")


RAMP = np.linspace(0, 1, 40 * 30).reshape(30, 40)


@pytest.mark.parametrize("kind", ["unsigned 32 bit", "PGM"])
def test_values_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    if kind == "PGM":
        levels = (4095 * RAMP).astype(">u2")
        put(tmp_path / "in/train/ant/0.pgm", b"P5 40 30 4095\n" + levels.tobytes())
        options = Options(value_range=(0.0, 4095.0))
    else:
        levels = (4_294_967_295 * RAMP).astype("<u4")
        memory = io.BytesIO()
        PIL.Image.fromarray(levels.view(np.int32)).save(memory, "TIFF")
        signed = struct.pack("<HHIH", 339, 3, 1, 2)  # Pillow writes no unsigned ones
        assert signed in memory.getvalue()
        put(tmp_path / "in/train/ant/0.tiff", memory.getvalue().replace(signed, struct.pack("<HHIH", 339, 3, 1, 1)))
        options = Options(value_range=(0.0, 4_294_967_295.0))
    pack(tmp_path / "in", tmp_path / "out", options)
    (found,) = map(rgb, stored(tmp_path / "out", "train"))
    assert np.abs(np.asarray(found)[..., 0] - 255 * RAMP).max() <= 2


def test_pictures_without_a_number_in_them_are_lost_and_measure_nothing(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.full((30, 40), np.nan, np.float32)).save(put(tmp_path / "in/train/ant/0.tiff"))
    with pytest.raises(UserError, match="no picture of more than 8 bits was found that has values"):
        pack(tmp_path / "in", tmp_path / "out", auto_range=True)
    with pytest.raises(UserError, match="none of its values is a number"):
        pack(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "data"),
    [("LOC_val_solution.csv", b'ImageId,PredictionString\n"' + b"x" * 200_000), (DEVKIT, b"\x1f\x8b no gzip")],
)
def test_damaged_tables_of_labels_are_one_sentence(name: str, data: bytes, tmp_path: Path) -> None:
    put(flat_val(tmp_path / "in") / name, data)
    assert_sentence(run_command("pack", tmp_path / "in", tmp_path / "out"), name, "fetch it again")


@pytest.mark.parametrize(
    ("data", "found"), [(b"cat\r\ndog\r\n\x1a", ["cat", "dog"]), ("cat\ndog\n".encode("utf-16-le"), None)]
)
def test_class_lists_of_old_editors(data: bytes, found: list[str] | None, tmp_path: Path) -> None:
    path = put(tmp_path / "classes.txt", data)
    if found:
        assert read_classes(path) == found
    else:
        with pytest.raises(UserError, match="holds NUL characters"):
            read_classes(path)


def test_numbers_in_a_class_list_are_ids_and_never_places(tmp_path: Path) -> None:
    """Labels 1 and 10 of a list 1 .. 10 must not be other classes than labels 1 and 9."""
    put(tmp_path / "in/classes.txt", b"\n".join(b"%d" % number for number in range(1, 11)))
    for split, found in (("train", (1, 10)), ("val", (1, 9))):
        members = {f"{number}.jpg": encoded() for number in found}
        put_tar(tmp_path / f"in/{split}/0.tar", members | {f"{number}.cls": b"%d" % number for number in found})
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == ["1", "10"] and labels(tmp_path / "out", "val") == ["1", "9"]
    put_tar(tmp_path / "in/val/1.tar", {"x.jpg": encoded(), "x.cls": b"0"})
    with pytest.raises(UserError, match=r"'0', which is no line of classes\.txt"):
        pack(tmp_path / "in", tmp_path / "out2")


@pytest.mark.parametrize("out", ["in/new/sub/out", "in/train/packed"])
def test_targets_anywhere_inside_of_the_source(out: str, tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2})
    for _ in range(2):
        pack(tmp_path / "in", tmp_path / out)
    assert len(labels(tmp_path / out, "train")) == 4
