"""Nothing that lies in a source is left out without being counted, and what was meant to be a sample is not lost."""

import os
import socket
import tarfile
from pathlib import Path

import pytest

from simclr_dali.pipeline.image_files import find_images
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.left_out import LeftOut
from simclr_dali.shards.pack import pack
from simclr_dali.shards.sources.find import of_split
from simclr_dali.shards.walk import walk
from tests.conftest import run_command
from tests.drawn import class_folders, encoded, labels, left_out, link, put, put_tar, report, samples, stored


@pytest.mark.parametrize("key", ["shot_2.{}", "v1.0.{}", "a.b.c.{}", "{}", "./{}", "some/folder.d/{}"])
@pytest.mark.parametrize("kind", ["jpg", "JPG", "jfif"])
def test_keys_may_hold_dots(key: str, kind: str, tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/a.tar", samples(6, key, kind))
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == ["0"] * 3 + ["1"] * 3


def test_a_short_key_serves_one_picture_with_a_longer_ending(tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/a.tar", {"7.input.jpg": encoded(), "7.cls": b"3"})
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == ["3"]
    put_tar(tmp_path / "two/train/a.tar", {"7.left.jpg": encoded(), "7.right.jpg": encoded(), "7.cls": b"3"})
    with pytest.raises(UserError, match="sample '7' has two pictures"):
        pack(tmp_path / "two", tmp_path / "out2")


def test_other_pictures_of_a_sample_are_counted(tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/a.tar", {"7.jpg": encoded(), "7.mask.png": encoded("PNG"), "7.cls": b"0"})
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == ["0"] and left_out(tmp_path / "out") == {"other picture of a sample": 1}


@pytest.mark.parametrize("parts", [2, 3])
def test_tars_joined_with_cat_are_read_to_their_end(parts: int, tmp_path: Path) -> None:
    joined = b""
    for part in range(parts):
        joined += put_tar(tmp_path / f"{part}.tar", samples(4, f"{part}_{{}}")).read_bytes()
    put(tmp_path / "in/train/all.tar", joined)
    pack(tmp_path / "in", tmp_path / "out")
    assert len(labels(tmp_path / "out", "train")) == 4 * parts


def test_what_is_no_tar_behind_the_end_of_one_is_refused(tmp_path: Path) -> None:
    whole = put_tar(tmp_path / "0.tar", samples(4)).read_bytes()
    put(tmp_path / "in/train/all.tar", whole + b"some text" + whole)
    with pytest.raises(UserError, match="is no tar, or cut"):
        pack(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_inside_of_tars_are_the_files_they_lead_to(kind: bytes, tmp_path: Path) -> None:
    first = encoded()
    members = {"d/0.jpg": first, "d/0.cls": b"0", "d/1.cls": b"1", "d/2.cls": b"1"}
    target = "0.jpg" if kind == tarfile.SYMTYPE else "d/0.jpg"
    linked = {"1": link("d/1.jpg", target, kind), "2": link("d/2.jpg", target.replace("0", "1"), kind)}
    put_tar(tmp_path / "in/train/a.tar", {**members, **linked})
    pack(tmp_path / "in", tmp_path / "out")
    assert stored(tmp_path / "out", "train") == [first] * 3 and labels(tmp_path / "out", "train") == ["0", "1", "1"]
    assert report(tmp_path / "out")["equal_images"]["counts"]["in two classes"] == 1


@pytest.mark.parametrize("target", ["missing.jpg", "../../etc/passwd", "/etc/passwd", "1.jpg"])
def test_links_that_lead_out_of_a_tar_are_lost_samples(target: str, tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/a.tar", {**samples(1), "1.cls": b"1", "1": link("1.jpg", target)})
    with pytest.raises(UserError, match=r"2 of 3 pictures would be left out \(1 link to nothing, 1 label without"):
        pack(tmp_path / "in", tmp_path / "out")
    pack(tmp_path / "in", tmp_path / "out", max_bad=70)
    assert left_out(tmp_path / "out") == {"link to nothing": 1, "label without a picture": 1}


def test_samples_that_lack_what_others_have_are_lost(tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/a.tar", {**samples(6), "x.jpg": encoded(), "y.jpg": encoded(), "z.cls": b"1"})
    with pytest.raises(UserError, match=r"3 of 9 pictures would be left out \(2 no label"):
        pack(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    pack(tmp_path / "in", tmp_path / "out", max_bad=40)
    assert left_out(tmp_path / "out") == {"no label (.cls)": 2, "label without a picture": 1}
    named = {one["reason"]: one["names"] for one in report(tmp_path / "out")["train"]["not_packed"]}
    assert named["no label (.cls)"] == ["x.jpg", "y.jpg"]


RUBBISH = [
    "._0.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "@eaDir/0.jpg/SYNOPHOTO_THUMB_XL.jpg",
    ".ipynb_checkpoints/0-checkpoint.jpg", "__MACOSX/._0.jpg", "ehthumbs.db",
]  # fmt: skip


@pytest.mark.parametrize("in_tar", [False, True])
def test_rubbish_of_file_managers_is_counted_and_not_packed(in_tar: bool, tmp_path: Path) -> None:
    if in_tar:
        put_tar(tmp_path / "in/train/a.tar", {**samples(8), **{f"d/{name}": encoded() for name in RUBBISH}})
        put(tmp_path / "in/train/.DS_Store", b"x")
    else:
        class_folders(tmp_path / "in", {"train": 4})
        for name in RUBBISH:
            put(tmp_path / "in/train/ant" / name)
        put(tmp_path / "in/train/.DS_Store", b"x")
        put(tmp_path / "in/Thumbs.db", b"x")
        put(tmp_path / "in/train/@eaDir/ant/0.jpg")
    done = run_command("pack", tmp_path / "in", tmp_path / "out", "--workers", 1)
    count = len(RUBBISH) + (1 if in_tar else 3)
    assert done.returncode == 0 and f"left out: {count} rubbish of file managers" in done.stdout, done.stderr
    assert len(labels(tmp_path / "out", "train")) == 8 and left_out(tmp_path / "out") == {
        "rubbish of file managers": count
    }


def test_strays_do_not_stop_a_pack_and_are_counted_in_one_line(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 4})
    for number in range(30):
        put(tmp_path / f"in/train/ant/note{number}.txt", b"a note")
    put(tmp_path / "in/train/bee/list.csv", b"a,b")
    put(tmp_path / "in/train/bee/.hidden.jpg")
    put(tmp_path / "in/readme.md", b"# about")
    done = run_command("pack", tmp_path / "in", tmp_path / "out", "--workers", 1)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "left out" in line]
    assert len(lines) == 1 and "30 no picture (.txt), 1 hidden, 1 no picture (.csv), 1 beside the splits" in lines[0]
    assert sum(left_out(tmp_path / "out").values()) == 33


def test_pictures_beside_class_folders_are_lost_samples(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 4})
    put(tmp_path / "in/train/loose.jpg")
    with pytest.raises(UserError, match=r"1 of 9 pictures would be left out \(1 no label\).*train/loose.jpg"):
        pack(tmp_path / "in", tmp_path / "out")
    pack(tmp_path / "in", tmp_path / "out", max_bad=20)
    assert left_out(tmp_path / "out") == {"no label": 1}


@pytest.mark.parametrize("name", ["0.heic", "1.DNG", "2.svg"])
def test_pictures_that_no_decoder_reads_are_lost_samples(name: str, tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 4})
    put(tmp_path / "in/train/ant" / name, b"whatever")
    with pytest.raises(UserError, match=r"1 of 9 pictures would be left out \(1 no decoder for \."):
        pack(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["0.JPE", "a.jfif", "b", "c.jpg_large", "d.JPEG~", "e.pgm", "f.avif", "g.jp2", "h.TIF"]
)
def test_whatever_the_decoders_read_is_taken_by_any_ending(name: str, tmp_path: Path) -> None:
    kinds = {"pgm": "PPM", "avif": "AVIF", "TIF": "TIFF"}
    put(tmp_path / "in/train/ant" / name, encoded(kinds.get(name.partition(".")[2], "JPEG")))
    put_tar(tmp_path / "tars/train/a.tar", {name: encoded(kinds.get(name.partition(".")[2], "JPEG"))})
    for source in ("in", "tars"):
        pack(tmp_path / source, tmp_path / f"out-{source}")
        assert len(stored(tmp_path / f"out-{source}", "train")) == 1 and left_out(tmp_path / f"out-{source}") == {}


def test_pipes_and_sockets_are_counted_and_never_opened(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2})
    os.mkfifo(tmp_path / "in/train/ant/pipe.jpg")
    os.mkfifo(tmp_path / "in/train/ant/pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path may have a hundred characters only
        try:
            listening.bind("in/train/bee/socket.jpg")
        finally:
            os.chdir(here)
    done = run_command("pack", tmp_path / "in", tmp_path / "out", "--workers", 1)
    assert done.returncode == 0 and "left out: 3 no regular file" in done.stdout, done.stderr


def test_links_to_folders_are_followed_by_every_command(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 3}, ["ant"])
    class_folders(tmp_path / "in", {"elsewhere": 3}, ["bee"])
    (tmp_path / "in/train/bee").symlink_to("../elsewhere/bee")
    (tmp_path / "in/train/ant/up").symlink_to("..")
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == ["ant"] * 3 + ["bee"] * 3
    assert left_out(tmp_path / "out") == {"link to a folder that it lies in": 1}
    assert len(find_images([tmp_path / "in/train"])) == 6


def test_a_dead_link_is_a_lost_sample_only_if_it_is_called_like_one(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2})
    (tmp_path / "in/train/ant/readme").symlink_to("nowhere")
    (tmp_path / "in/train/ant/itself").symlink_to("itself")
    pack(tmp_path / "in", tmp_path / "out")
    assert left_out(tmp_path / "out") == {"link to nothing, no picture": 2}
    (tmp_path / "in/train/bee/9.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match="1 of 5 pictures would be left out"):
        pack(tmp_path / "in", tmp_path / "out2")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_are_lost_samples(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 4})
    (tmp_path / "in/train/ant/1.jpg").chmod(0)
    with pytest.raises(UserError, match="more than --max-bad"):
        pack(tmp_path / "in", tmp_path / "out")


def test_names_that_are_no_text_are_kept(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2})
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    put(tmp_path / "in/train/ant" / name)
    put(tmp_path / "in/train/ant" / name.replace("jpg", "txt"), b"x")
    done = run_command("pack", tmp_path / "in", tmp_path / "out", "--workers", 1)
    assert done.returncode == 0 and len(labels(tmp_path / "out", "train")) == 5, done.stderr
    assert report(tmp_path / "out")["train"]["not_packed"][0]["names"] == [f"train/ant/{name.replace('jpg', 'txt')}"]


@pytest.mark.parametrize("name", ["train.tar.gz", "train-000.tgz", "train/a.tar.gz", "train/b.tgz"])
def test_compressed_tars_are_refused_and_not_passed_over(name: str, tmp_path: Path) -> None:
    put(tmp_path / "in" / name, b"\x1f\x8b")
    if name.startswith("train/"):
        put_tar(tmp_path / "in/train/c.tar", samples(2))
    with pytest.raises(UserError, match="is compressed"):
        pack(tmp_path / "in", tmp_path / "out")


def test_a_picture_beside_tars_is_a_lost_sample(tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/c.tar", samples(2))
    put(tmp_path / "in/train/loose.jpg")
    with pytest.raises(UserError, match="1 of 3 pictures would be left out"):
        pack(tmp_path / "in", tmp_path / "out")


def test_everything_under_a_source_is_packed_or_counted(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 3, "valid": 2, "test": 2, "other": 1})
    for name in ("a.txt", "train/x.csv", "train/ant/sub/deep.jpg", "valid/bee/Thumbs.db", ".git/config", "b.jpg"):
        put(tmp_path / "in" / name, b"x" if not name.endswith("jpg") else None)
    count = len(list(walk(tmp_path / "in", LeftOut()))) + 2  # .git/config and Thumbs.db, which walk() passes over
    pack(tmp_path / "in", tmp_path / "out")
    found = report(tmp_path / "out")
    packed = sum(found[split]["stored"] for split in ("train", "val"))
    counted = [*found["train"]["not_packed"], *found["val"]["not_packed"], *found["beside"]]
    assert packed == 11 and packed + sum(one["count"] for one in counted) == count
    assert {one["reason"]: one["count"] for one in found["beside"]} == {
        of_split("test"): 4,
        "beside the splits": 4,
        "hidden": 1,
    }
