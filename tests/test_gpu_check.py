"""The check of a GPU, tried on the CPU: every stage, cut, failed and killed ones, and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import gpu_check
from scripts.gpu_check import STAGES, Setting, Stage
from tests.conftest import ROOT, assert_sentence, run_python

SCRIPT = ROOT / "scripts/gpu_check.py"


def setting(folder: Path) -> Setting:
    (folder / "raw").mkdir()
    return Setting(folder, on_gpu=False, given=None)


def stage(*commands: str) -> Stage:
    """One that runs Python code, which may write a result."""
    return Stage(
        "one", 1, lambda setting, seconds: [["-c", code] for code in commands], ("r",), lambda found: str(found)
    )


def outcome(folder: Path, name: str = "one") -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return result


def test_a_stage_that_takes_too_long_is_cut_with_what_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(97)'])"
    write = f"from pathlib import Path; Path({str(tmp_path)!r}, 'raw/r.json').write_text('7')"
    started = time.monotonic()
    gpu_check.do(stage(write, child), setting(tmp_path), 2.0)
    assert time.monotonic() - started < 20
    found = outcome(tmp_path)
    assert found["outcome"] == "cut" and found["results"] == {"r": 7} and found["words"] == "{'r': 7}"
    assert "time.sleep(97)" not in subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=True).stdout


def test_a_stage_that_fails_says_so_and_keeps_what_it_printed(tmp_path: Path) -> None:
    where = setting(tmp_path)
    gpu_check.do(stage("print('hello'); 1 / 0", "print('after it')"), where, 20.0)
    assert outcome(tmp_path)["outcome"] == "failed" and outcome(tmp_path)["words"] == "nothing"
    log = (tmp_path / "one.log").read_text()
    assert "hello" in log and "ZeroDivisionError" in log and "after it" in log
    assert not gpu_check.went_well(where, stage())
    gpu_check.do(stage("pass"), where, 20.0)
    assert gpu_check.went_well(where, stage())


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert_sentence(run_python(SCRIPT, "--data", tmp_path, tmp_path / "out"), "has no folder 'val'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    assert_sentence(run_python(SCRIPT, tmp_path / "out"), "torch sees no GPU", "--device cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.launch
def test_every_stage_runs_at_small_sizes_and_a_killed_check_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, str(SCRIPT), "--device", "cpu", "--minutes", "10", str(out)]
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (out / "smoke.json").exists():
        assert first.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)  # in the middle of the next one
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = (out / "smoke.json").stat().st_mtime_ns
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "smoke.json").stat().st_mtime_ns == before
    table = done.stdout.split("stage  ")[-1]
    for one in STAGES:
        result = outcome(out, one.name)
        assert result["outcome"] == "done" and set(result["results"]) <= set(one.results), result
        assert f"{one.name:9} done" in table and result["words"] in table
    measured = {name for one in STAGES for name in outcome(out, one.name)["results"]}
    assert measured == {"linear", "tests", "step-real", "step-rows", "loader", "plateau", "loss", "quality", "rivals"}
    assert "nothing" not in table and "missing" not in table
