"""Packing: restartable, the same by any number of hands, from every kind of source, and clear about what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pytest

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import load_split, unseal
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from simclr_dali.shards.verify import verify
from tests.conftest import ROOT, assert_sentence, originals, run_command, run_python, tree
from tests.runs import environment, family, left

KILLS = 30


def test_killed_pack_goes_on_and_ends_byte_identical(pictures: Path, tmp_path: Path) -> None:
    """kill -9 at random points, until KILLS of them hit; each time the work of finished shards stays."""
    command = [sys.executable, "-m", "simclr_dali", "pack", pictures, tmp_path / "killed", "--samples-per-shard", "6"]
    command += ["--workers", "2", "--decoder", "none"]
    random = np.random.default_rng(3)
    kills, kept = 0, 0
    while kills < KILLS:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # From its first write on: before, there is nothing to lose.
        before = _files(tmp_path)
        while process.poll() is None and _files(tmp_path) == before:
            time.sleep(0.002)
        time.sleep(float(random.uniform(0, 0.04)))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        finished = _finished_shards(tmp_path)
        if (tmp_path / "killed").exists():
            assert verify(tmp_path / "killed", full=True) == []
            shutil.rmtree(tmp_path / "killed")
            kept = 0
            continue
        assert finished >= kept
        kept = finished
    done = run_python(*command[1:])
    assert done.returncode == 0, done.stderr
    pack(pictures, tmp_path / "whole", Options(samples_per_shard=6, decoder="none"))
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_a_worker_of_a_killed_pack_may_still_write_when_the_next_comes_to_its_shard(tmp_path: Path) -> None:
    """Two processes at one shard, each halfway when the other begins or ends, leave one whole shard."""
    code = """
import sys
from pathlib import Path
from simclr_dali.shards.tar import Image, write_shard

def images():
    for number in range(6):
        if number in (2, 4):
            print(number, flush=True)
            sys.stdin.readline()
        yield Image(f"{number:06d}", b"\\x89PNG" + bytes([number]) * 70_000, 8, 8, number)

write_shard(Path(sys.argv[1]), 0, images())
"""
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    shared.mkdir()
    alone.mkdir()

    def writer(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(folder / "train-000000.tar")]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def go_on(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    with writer(alone) as one:
        one.communicate("\n\n")
    with writer(shared) as orphan, writer(shared) as next_one:
        assert orphan.stdout is not None
        assert next_one.stdout is not None
        orphan.stdout.readline()
        next_one.stdout.readline()
        go_on(next_one)
        next_one.stdout.readline()
        orphan.kill()
        go_on(next_one)
        assert next_one.wait() == 0
    leftovers = [path for path in shared.iterdir() if path.suffix == ".tmp"]
    assert [path.name for path in leftovers] == [f"train-000000.tar.{orphan.pid}.tmp"]
    leftovers[0].unlink()
    assert tree(shared) == tree(alone)


@pytest.mark.parametrize("kept", [True, False], ids=["of a finished shard", "of a shard to be made"])
def test_what_a_killed_worker_left_half_written_is_removed(kept: bool, pictures: Path, tmp_path: Path) -> None:
    """Beside a shard that was finished since, or of one that is made now."""
    options = Options(samples_per_shard=6, decoder="none")
    pack(pictures, tmp_path / "whole", options)
    pack(pictures, tmp_path / "killed", options, part=(1, 2))
    number = 0 if kept else 1
    for name in (f"train-{number:06d}.tar.77.tmp", f"train-{number:06d}.tar.part.npz.77.tmp"):
        (tmp_path / "killed.partial" / "train" / name).write_bytes(b"half")
    pack(pictures, tmp_path / "killed", options, part=(2, 2))
    pack(pictures, tmp_path / "killed", options, merge=True)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def _files(folder: Path) -> set[tuple[str, int]]:
    """Names and times of all in a folder that a process moves and removes meanwhile, where Path.rglob may raise."""
    found = set()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):
                found.add((name, Path(parent, name).stat().st_mtime_ns))
    return found


def _finished_shards(folder: Path) -> int:
    return sum(name.endswith(".part.npz") for name, _ in _files(folder))


def test_workers_end_with_a_killed_parent(pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simclr_dali", "pack", str(pictures), str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen([*command, "--samples-per-shard", "2"], cwd=ROOT, stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    while process.poll() is None and not (workers and _finished_shards(tmp_path)):
        workers = family(process.pid) or workers
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert workers
    assert left(workers, 20), "a worker outlived its parent"


def test_workers_and_parts_do_not_change_a_byte(odd_pictures: Path, tmp_path: Path) -> None:
    options = Options(samples_per_shard=4)
    for workers in (1, 3):
        pack(odd_pictures, tmp_path / f"w{workers}", options, workers=workers)
    for number in (3, 1, 2):
        pack(odd_pictures, tmp_path / "merged", options, part=(number, 3))
        assert not (tmp_path / "merged").exists()
    pack(odd_pictures, tmp_path / "merged", options, merge=True)
    assert tree(tmp_path / "w1") == tree(tmp_path / "w3") == tree(tmp_path / "merged")


def test_parts_from_several_machines_are_merged_where_they_were_copied(odd_pictures: Path, tmp_path: Path) -> None:
    options = Options(samples_per_shard=4)
    for number in (1, 2):
        # Another machine's copy of the images has other times.
        shutil.copytree(odd_pictures, tmp_path / f"images{number}", copy_function=shutil.copyfile)
        pack(tmp_path / f"images{number}", tmp_path / f"m{number}" / "out", options, part=(number, 2))
    with pytest.raises(UserError, match="shards are missing or cut"):
        pack(odd_pictures, tmp_path / "m1" / "out", options, merge=True)
    shutil.copytree(tmp_path / "m2" / "out.partial", tmp_path / "m1" / "out.partial", dirs_exist_ok=True)
    cut = next((tmp_path / "m1" / "out.partial").rglob("*.tar"))
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=f"1 shards are missing or cut.*{cut.name}"):
        pack(odd_pictures, tmp_path / "m1" / "out", options, merge=True)
    cut.write_bytes(whole)
    pack(odd_pictures, tmp_path / "m1" / "out", options, merge=True)
    pack(odd_pictures, tmp_path / "whole", options)
    assert tree(tmp_path / "m1" / "out") == tree(tmp_path / "whole")


def test_parts_of_different_plans_are_not_mixed(odd_pictures: Path, tmp_path: Path) -> None:
    pack(odd_pictures, tmp_path / "out", part=(1, 2))
    before = tree(tmp_path / "out.partial")
    with pytest.raises(UserError, match="half-done pack of other images or options"):
        pack(odd_pictures, tmp_path / "out", Options(seed=1), part=(2, 2))
    with pytest.raises(UserError, match="half-done pack of other images or options"):
        pack(odd_pictures, tmp_path / "out", part=(2, 3))
    with pytest.raises(UserError, match="no parts to merge"):
        pack(odd_pictures, tmp_path / "elsewhere", merge=True)
    kept = tree(tmp_path / "out.partial")
    assert {name: kept[name] for name in before} == before


def test_second_run_finds_nothing_to_do_and_other_options_are_refused(odd_pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(odd_pictures, out)
    before = tree(out)
    pack(odd_pictures, out)
    assert tree(out) == before
    with pytest.raises(UserError, match="with another --seed"):
        pack(odd_pictures, out, Options(seed=1))
    assert tree(out) == before


def test_what_was_changed_or_left_out_is_reported(odd_pictures: Path, tmp_path: Path) -> None:
    folder = odd_pictures / "train" / "a"
    PIL.Image.new("RGB", (30, 40), "red").save(folder / "0.JPEG", "BMP")
    (folder / "1.JPEG").write_bytes((folder / "2.JPEG").read_bytes()[:300])
    pack(odd_pictures, tmp_path / "out", Options(samples_per_shard=5), max_bad=5, workers=2)
    report = unseal((tmp_path / "out" / "report.json").read_bytes())
    assert report["train"]["converted"] == [{"image": "train/a/0.JPEG", "reason": "BMP format"}]
    assert [entry["image"] for entry in report["train"]["left_out"]] == ["train/a/1.JPEG"]
    assert report["train"]["stored"] == 23 and report["val"] == {
        "stored": 8,
        "classes": 2,
        "resized": 0,
        "converted": [],
        "left_out": [],
        "not_packed": [],
    }
    shards = load_split(tmp_path / "out", "train")
    assert len(shards) == 23 and (shards.samples["label"] == 0).sum() == 11
    assert verify(tmp_path / "out", full=True) == []


def test_too_many_bad_images_stop_the_pack_and_keep_its_work(odd_pictures: Path, tmp_path: Path) -> None:
    for number in (3, 4):
        (odd_pictures / "train" / "b" / f"{number}.JPEG").write_bytes(b"no picture")
    options = Options(samples_per_shard=4)
    with pytest.raises(UserError, match=r"of 32 images cannot be decoded, more than --max-bad 0.1 %: train/b/"):
        pack(odd_pictures, tmp_path / "out", options)
    finished = tree(tmp_path / "out.partial")
    with pytest.raises(UserError, match="more than --max-bad 1 %"):
        pack(odd_pictures, tmp_path / "out", options, max_bad=1)
    pack(odd_pictures, tmp_path / "out", options, max_bad=7)
    assert len(load_split(tmp_path / "out", "train")) == 22
    tars = {name: digest for name, digest in finished.items() if name.endswith(".tar")}
    assert tars and tars.items() <= tree(tmp_path / "out").items()


def test_a_shard_of_bad_images_only_is_refused(odd_pictures: Path, tmp_path: Path) -> None:
    (odd_pictures / "train" / "b" / "3.JPEG").write_bytes(b"no picture")
    with pytest.raises(UserError, match="would be empty"):
        pack(odd_pictures, tmp_path / "out", Options(samples_per_shard=1), max_bad=50)


def test_options_choose_what_is_stored(odd_pictures: Path, tmp_path: Path) -> None:
    pack(odd_pictures, tmp_path / "few", Options(limit_per_class=3, split="train"))
    few = load_split(tmp_path / "few", "train")
    assert np.bincount(few.samples["label"]).tolist() == [3, 3] and not (tmp_path / "few" / "val").exists()

    pack(odd_pictures, tmp_path / "small", Options(resize=32))
    small = load_split(tmp_path / "small", "train").samples
    short = np.minimum(small["width"], small["height"])
    full = load_split(_packed(odd_pictures, tmp_path / "full"), "train").samples
    assert short.max() == 32 and (np.minimum(full["width"], full["height"]) > 32).any()
    assert unseal((tmp_path / "small" / "report.json").read_bytes())["train"]["resized"] > 0

    (odd_pictures / "train").rename(odd_pictures / "elsewhere")
    pack(odd_pictures, tmp_path / "val", Options(split="val"))
    assert load_split(tmp_path / "val", "val").classes == ("a", "b")
    with pytest.raises(UserError, match="nothing for --split train, only val"):
        pack(odd_pictures, tmp_path / "train", Options(split="train"))


def _packed(source: Path, out: Path) -> Path:
    pack(source, out)
    return out


def test_shard_size_sets_the_tars_sizes(pictures: Path, tmp_path: Path) -> None:
    pack(pictures, tmp_path / "out", Options(shard_size=0.1))
    sizes = [shard.bytes for shard in load_split(tmp_path / "out", "train").shards]
    assert len(sizes) > 4 and 80_000 < np.mean(sizes) < 120_000 and max(sizes) < 130_000


def test_dry_run_writes_nothing(odd_pictures: Path, tmp_path: Path) -> None:
    done = run_command("pack", odd_pictures, tmp_path / "out", "--dry-run", "--samples-per-shard", 6)
    assert done.returncode == 0 and list(tmp_path.iterdir()) == [odd_pictures]
    assert "train: 24 images of 2 classes" in done.stdout and "in 4 shards" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--quality", "101"], "--quality is 101"),
        (["--seed", "-1"], "--seed is -1"),
        (["--shard-size", "-3"], "--shard-size is -3.0"),
        (["--shard-size", "5", "--resize", "64"], "give --samples-per-shard"),
        (["--max-bad", "200"], "--max-bad is 200.0"),
    ],
)
def test_options_that_cannot_be_meant_are_one_sentence(
    words: list[str], sentence: str, odd_pictures: Path, tmp_path: Path
) -> None:
    assert_sentence(run_command("pack", odd_pictures, tmp_path / "out", *words), sentence)
    assert list(tmp_path.iterdir()) == [odd_pictures]


@pytest.mark.parametrize("words", [["--part", "3/2"], ["--part", "x"], ["--workers", "0"], ["--resize", "-1"]])
def test_arguments_of_the_wrong_form_are_refused_by_their_name(words: list[str], tmp_path: Path) -> None:
    done = run_command("pack", tmp_path, *words)
    assert done.returncode == 2 and words[0] in done.stderr and "Traceback" not in done.stderr


def test_help_names_every_option() -> None:
    text = run_command("pack", "--help").stdout
    options = (
        "workers samples-per-shard shard-size seed resize quality limit-per-class split part merge decoder max-bad"
    )
    for word in [
        *(f"--{option}" for option in options.split()),
        "--dry-run",
        "SRC",
        "OUT",
        "ILSVRC2012",
        "report.json",
    ]:
        assert word in text


def test_default_target_is_source_with_suffix(odd_pictures: Path) -> None:
    command = [ROOT / "scripts/make_shards.sh", odd_pictures]
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert len(load_split(f"{odd_pictures}-shards", "train")) == 24


def test_a_killed_last_step_is_finished_by_the_next_run(odd_pictures: Path, tmp_path: Path) -> None:
    before = originals(odd_pictures, "train")
    pack(odd_pictures, tmp_path / "out")
    whole = tree(tmp_path / "out")
    (tmp_path / "out" / "plan-1-of-1.json").write_text(json.dumps({}))
    (tmp_path / "out" / "part-1-of-1.lock").touch()
    (tmp_path / "out" / "train" / "train-000000.tar.part.npz").touch()
    pack(odd_pictures, tmp_path / "out")
    assert tree(tmp_path / "out") == whole
    assert originals(odd_pictures, "train") == before
