"""What goes wrong around a run: disks, shards, folders. One sentence each, and nothing is lost."""

import ast
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from simclr_dali.model import checkpoint
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from tests.conftest import ROOT, assert_sentence, on_small_disk
from tests.runs import metrics, pretrain, reached, running, tiny_config, trainer, wait_until

LONG = ["--set", "simclr.epochs=1000", "--set", "simclr.log_every=1"]


def shell(config: Path, data: Path, *words: Any) -> str:
    """The command of a run in /mnt/run."""
    command = [sys.executable, ROOT / "train/pretrain.py", "--config", config, "--data", data, "--run", "/mnt/run"]
    return "DS_ACCELERATOR=cpu " + shlex.join(map(str, [*command, *words]))


@pytest.mark.launch
def test_a_full_disk_stops_the_run_and_with_room_it_goes_on(packed: Path, tmp_path: Path) -> None:
    command = shell(tiny_config(tmp_path), packed, "--set", "simclr.checkpoint_every=2")
    look = "ls /mnt/run/checkpoints"
    script = f"{command}; echo code $?; {look}; mount -o remount,size=64m /mnt && {command}; echo code $?; {look}"
    # Two checkpoints of this network fit, the third beside them does not.
    done = on_small_disk(4000, script)
    _, second = done.stdout.split("code 2\n")
    assert "cannot write /mnt/run/checkpoints" in done.stderr and "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    kept = [line for line in second.splitlines() if line.startswith("step-")]
    assert any(f"going on from step {int(name[5:])}" in second for name in kept)
    assert "code 0" in second and "step-00000030" in second
    assert done.stderr.count("error: ") == 1


@pytest.mark.launch
def test_a_run_folder_that_becomes_read_only_stops_the_run(packed: Path, tmp_path: Path) -> None:
    words = [*LONG, "--set", "simclr.checkpoint_every=4"]
    become_read_only = (
        "until [ -e /mnt/run/checkpoints/latest ]; do sleep 0.1; done; "
        "mount --bind /mnt/run/checkpoints /mnt/run/checkpoints; "
        "until mount -o remount,ro,bind /mnt/run/checkpoints 2>/dev/null; do :; done"
    )
    script = f"({become_read_only}) & {shell(tiny_config(tmp_path), packed, *words)}; echo code $?; wait"
    done = on_small_disk(64_000, script)
    assert "code 2" in done.stdout, done.stderr
    assert "cannot write /mnt/run/checkpoints" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.launch
def test_a_folder_that_cannot_be_written_is_refused_at_once(packed: Path, tmp_path: Path) -> None:
    script = f"mkdir /mnt/run; mount -o remount,ro /mnt; {shell(tiny_config(tmp_path), packed)}; echo code $?"
    done = on_small_disk(64_000, script)
    assert "code 2" in done.stdout and "Traceback" not in done.stderr
    assert "cannot write /mnt/run/lock" in done.stderr and "Read-only file system" in done.stderr


@pytest.mark.launch
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_shards_that_go_bad_while_they_are_read_stop_the_run(damage: str, pictures: Path, tmp_path: Path) -> None:
    pack(pictures, tmp_path / "packed", Options(samples_per_shard=40))
    config, run = tiny_config(tmp_path), tmp_path / "run"
    with running(trainer(0, config, tmp_path / "packed", run, *LONG, "--set", "simclr.checkpoint_every=2")) as process:
        wait_until(reached(run, 3), process)
        for tar in (tmp_path / "packed/train").glob("*.tar"):
            data = tar.read_bytes()
            with tar.open("r+b") as file:
                file.write(bytes(byte ^ 255 for byte in data)) if damage == "flipped" else file.truncate(1000)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err
    assert "damaged" in err.splitlines()[-1] and ".tar" in err.splitlines()[-1]
    found = checkpoint.newest(run)
    assert found is not None and found.state["step"] >= 2
    # The next start says so at once; with the shards mended it goes on.
    shutil.rmtree(tmp_path / "packed")
    again = ["--stop-after-steps", 1]
    assert_sentence(pretrain(config, tmp_path / "packed", run, *LONG, *again), "packed")
    pack(pictures, tmp_path / "packed", Options(samples_per_shard=40))
    done = pretrain(config, tmp_path / "packed", run, *LONG, *again)
    assert done.returncode == 0 and f"going on from step {found.state['step']}" in done.stdout


@pytest.mark.launch
def test_a_shard_that_vanishes_is_read_to_the_end_and_missed_at_the_next_start(pictures: Path, tmp_path: Path) -> None:
    pack(pictures, tmp_path / "packed", Options(samples_per_shard=40))
    config, run = tiny_config(tmp_path), tmp_path / "run"
    with running(trainer(0, config, tmp_path / "packed", run, *LONG)) as process:
        wait_until(reached(run, 1), process)
        tar = next((tmp_path / "packed/train").glob("*.tar"))
        tar.unlink()
        wait_until(reached(run, 20), process)  # more than an epoch
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert_sentence(pretrain(config, tmp_path / "packed", run, *LONG), tar.name, "missing")


@pytest.mark.launch
def test_metrics_that_were_damaged_are_told_and_do_not_stop_the_run(packed: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    assert pretrain(config, packed, run, "--stop-after-steps", 6).returncode == 0
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"step"', '"stxp"')
    lines[4] = "\0\xff" + lines[4][:20] + "\n"
    (run / "metrics.jsonl").write_text("".join(lines))
    done = pretrain(config, packed, run, "--stop-after-steps", 1)
    assert done.returncode == 0 and "lacks 2 steps before 6: 2, 4" in done.stderr
    assert [line["step"] for line in metrics(run)] == [0, 1, 3, 5, 6]


@pytest.mark.parametrize("package", ["train", "model"])
def test_no_decision_depends_on_the_time_of_day(package: str) -> None:
    """Clocks jump; only those that cannot are asked, but for what writes down when something was, or compares them."""
    clocks = {"time", "time_ns", "localtime", "gmtime", "now", "utcnow", "today"}
    writes_it_down = {ROOT / name for name in ("train/announce.py", "train/doctor.py", "train/trackers.py")}
    for path in {*(ROOT / package).rglob("*.py")} - writes_it_down:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                module = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
                assert module not in ("time", "datetime", "date") or node.attr not in clocks, path
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not clocks & {name.name for name in node.names}, path
