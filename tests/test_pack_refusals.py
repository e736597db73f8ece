"""What packing refuses, and what it keeps when it must stop: bad sources, full disks, two packers, foreign folders."""

import errno
import fcntl
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.pack import pack
from simclr_dali.shards.pack_shard import ShardTask, pack_shard
from simclr_dali.shards.plan import Options, split_into_shards
from simclr_dali.shards.sources.find import find_sources
from simclr_dali.shards.sources.source import Item
from simclr_dali.shards.verify import verify
from tests.conftest import assert_sentence, later, on_small_disk, run_command, tree


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
    no_classes = folder / "bare"
    (no_classes / "train").mkdir(parents=True)
    hollow = make("hollow", "train/a/1.jpg")
    (hollow / "train/a/2.jpg").symlink_to("nowhere.jpg")
    (folder / "nothing").mkdir()
    return {
        "missing": (folder / "nowhere", "nowhere"),
        "nothing": (folder / "nothing", "no pictures to pack"),
        "no train": (make("flat", "val/a/1.jpg"), "no folder 'train'"),
        "no classes": (no_classes, "holds no pictures"),
        "empty class": (empty_class, "b holds no picture"),
        "dead link": (hollow, "1 of 2 pictures would be left out (1 link to nothing)"),
        "unknown class": (make("unknown", "train/a/1.jpg", "val/b/1.jpg"), "'b'"),
    }


@pytest.mark.parametrize(
    "case", ["missing", "nothing", "no train", "no classes", "empty class", "dead link", "unknown class"]
)
def test_bad_source_is_one_sentence_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    source, word = broken_sources(tmp_path)[case]
    done = run_command("pack", source, tmp_path / "out", "--workers", 1)
    assert_sentence(done, word)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("change", ["rewritten", "grown", "removed", "added"])
def test_source_that_changes_while_it_is_packed_is_refused(
    change: str, odd_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = odd_pictures / "train" / "b" / "5.JPEG"
    original = pack_shard
    calls: list[ShardTask] = []

    def disturbed(one: ShardTask) -> tuple[int, int]:
        if len(calls) == 1 and change == "added":
            shutil.copy(victim, victim.with_stem("new"))
            later(victim.parent)
        elif len(calls) == 1 and change == "removed":
            victim.unlink()
        elif len(calls) == 1:
            victim.write_bytes(victim.read_bytes() + (b"x" if change == "grown" else b""))
            later(victim)
        calls.append(one)
        return original(one)

    # The victim must not lie in the first shard, which is written before the change.
    monkeypatch.setattr("simclr_dali.shards.pack.pack_shard", disturbed)
    first = {item.name for item in _first_shard(odd_pictures)}
    assert "train/b/5.JPEG" not in first
    word = "cannot read" if change == "removed" else "changed while it was packed"
    with pytest.raises(UserError, match=word):
        pack(odd_pictures, tmp_path / "out", Options(samples_per_shard=4))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "train" / "train-000000.tar.part.npz").exists()


def _first_shard(source: Path) -> list[Item]:
    train = find_sources(source).sources[0]
    return [train.items[i] for i in split_into_shards(train, Options(samples_per_shard=4))[0]]


def test_images_written_again_under_a_stopped_pack_are_refused(odd_pictures: Path, tmp_path: Path) -> None:
    pack(odd_pictures, tmp_path / "out", part=(1, 2))
    time.sleep(0.01)
    (odd_pictures / "train" / "a" / "1.JPEG").touch()
    with pytest.raises(UserError, match="was begun before images were written again"):
        pack(odd_pictures, tmp_path / "out", part=(1, 2))


def test_two_packers_on_one_target(odd_pictures: Path, tmp_path: Path) -> None:
    pack(odd_pictures, tmp_path / "out", part=(1, 2))
    with (tmp_path / "out.partial" / "part-1-of-2.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = tree(tmp_path / "out.partial")
        for words in (["--part", "1/2"], ["--merge"]):
            done = run_command("pack", odd_pictures, tmp_path / "out", *words)
            assert_sentence(done, "another process is packing")
        assert {name: digest for name, digest in tree(tmp_path / "out.partial").items() if name in before} == before
        pack(odd_pictures, tmp_path / "out", part=(2, 2))
    pack(odd_pictures, tmp_path / "out", merge=True)
    assert verify(tmp_path / "out", full=True) == []


def test_foreign_target_is_left_alone(odd_pictures: Path, tmp_path: Path) -> None:
    for name in ("out", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a packed data set"):
        pack(odd_pictures, tmp_path / "out")
    with pytest.raises(UserError, match="not a half-done pack"):
        pack(odd_pictures, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other.partial").iterdir()] == ["thesis.txt"]


def test_full_disk_is_one_sentence_and_the_same_command_goes_on(pictures: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m simclr_dali pack {pictures} /mnt/out --samples-per-shard 6 --workers 2"
    done = on_small_disk(300, f"{command} --resize 80 --quality 100; echo code $?; ls /mnt")
    assert "code 2" in done.stdout and "Traceback" not in done.stderr and "out.partial" in done.stdout
    assert "cannot write /mnt/out.partial/train/train-" in done.stderr and "No space left on device" in done.stderr

    again = f"{command} --resize 80 --quality 100"
    verify_it = f"{sys.executable} -m simclr_dali verify --full /mnt/out"
    done = on_small_disk(300, f"{again}; mount -o remount,size=64m /mnt && {again} && {verify_it}; echo code $?")
    assert "code 0" in done.stdout and "is sound" in done.stdout, done.stderr


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(pictures: Path) -> None:
    done = on_small_disk(
        300, f"{sys.executable} -m simclr_dali pack {pictures} /mnt/out; echo code $?; find /mnt -name *.tar"
    )
    assert "code 2" in done.stdout and "are free" in done.stderr and ".tar" not in done.stdout


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=["full", "quota", "read-only"])
def test_a_disk_that_refuses_in_the_middle_keeps_the_earlier_shards(
    fault: int, odd_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(fault, os.strerror(fault))
        sync(descriptor)

    options = Options(samples_per_shard=4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(UserError, match=f"cannot write .*{os.strerror(fault)}.*the same command goes on"):
            pack(odd_pictures, tmp_path / "out", options)
    finished = {name: digest for name, digest in tree(tmp_path / "out.partial").items() if name.endswith(".tar")}
    assert finished and not (tmp_path / "out").exists()
    pack(odd_pictures, tmp_path / "out", options)
    assert finished.items() <= tree(tmp_path / "out").items()
    assert verify(tmp_path / "out", full=True) == []


def test_a_target_where_nothing_can_be_written_is_one_sentence(odd_pictures: Path) -> None:
    assert_sentence(run_command("pack", odd_pictures, "/proc/shards"), "cannot write", "/proc/shards")
