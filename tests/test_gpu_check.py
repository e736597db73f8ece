"""The check of a GPU, tried on the CPU: every stage, cut, failed and killed ones, and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from scripts import gpu_check
from scripts.bench.figures import Table
from scripts.gpu_stages import STAGES, Setting, Stage
from simclr_dali.shards.errors import UserError
from tests.conftest import ROOT, assert_sentence, run_python
from tests.runs import left, wait_until

SCRIPT = ROOT / "scripts/gpu_check.py"
ABOUT = {"device": "cpu"}


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
    write = f"from pathlib import Path; Path({str(tmp_path)!r}, 'raw/r.json').write_text('{{\"a\": 7}}')"
    started = time.monotonic()
    gpu_check.do(stage(write, child), setting(tmp_path), 2.0, ABOUT)
    assert time.monotonic() - started < 20
    found = outcome(tmp_path)
    assert found["outcome"] == "cut" and found["results"] == {"r": {"a": 7}} and found["words"] == "{'r': {'a': 7}}"
    assert found["on"] == ABOUT
    assert "time.sleep(97)" not in subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=True).stdout


def test_a_stage_that_fails_says_so_and_keeps_what_it_printed(tmp_path: Path) -> None:
    where = setting(tmp_path)
    gpu_check.do(stage("print('hello'); 1 / 0", "print('after it')"), where, 20.0, ABOUT)
    assert outcome(tmp_path)["outcome"] == "failed"
    assert outcome(tmp_path)["words"] == "ZeroDivisionError: division by zero (one.log)"
    log = (tmp_path / "one.log").read_text()
    assert "hello" in log and "ZeroDivisionError" in log and "after it" in log
    assert not gpu_check.went_well(where, stage())
    gpu_check.do(stage("pass"), where, 20.0, ABOUT)
    assert gpu_check.went_well(where, stage())


def test_results_that_were_cut_while_they_were_written_do_not_end_the_check(tmp_path: Path) -> None:
    where = setting(tmp_path)
    half = f"from pathlib import Path; Path({str(tmp_path)!r}, 'raw/r.json').write_text('{{\"a\": ')"
    gpu_check.do(stage(half), where, 20.0, ABOUT)
    assert outcome(tmp_path)["results"] == {} and outcome(tmp_path)["words"] == "nothing"
    odd = Stage("one", 1, stage().commands, (), lambda found: str(found["missing"]))
    gpu_check.do(odd, where, 20.0, ABOUT)
    assert "cannot be read (KeyError" in outcome(tmp_path)["words"]
    (tmp_path / "one.json").write_text('{"outcome": ')
    assert not gpu_check.went_well(where, stage())


def test_a_check_that_is_asked_to_end_writes_its_stage_and_leaves_no_process(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "--device", "cpu", "--minutes", "10", str(tmp_path / "out")]
    check = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True, text=True)
    children: list[psutil.Process] = []

    def packs() -> bool:
        children[:] = psutil.Process(check.pid).children(recursive=True)
        with suppress(psutil.NoSuchProcess):
            return any("pack" in child.cmdline() for child in children)
        return False

    wait_until(packs, check)
    check.terminate()
    assert check.wait(30) == 128 + signal.SIGTERM
    assert outcome(tmp_path / "out", "prepare")["outcome"] == "cut"
    assert left(children, 5)


def test_rows_that_fail_are_named_and_leave_the_others_their_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(["ours", "theirs", "broken"])
    for ours, theirs in ((100.0, 50.0), (90.0, UserError("theirs failed: oh")), (80.0, 20.0)):
        table.add("ours", ours)
        table.add("theirs", theirs)
        table.add("broken", UserError("broken failed: no such module"))
    result = table.result()
    assert result["ratios"] == {"theirs": {"median": 3.0, "min": 2.0, "max": 4.0}}
    assert set(result["images_per_s"]) == {"ours", "theirs"} and result["failed"]["broken"].endswith("such module")
    with pytest.raises(UserError, match="broken; theirs could not be measured"):
        table.print()
    assert "3.00 (2.00 .. 4.00)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "tests", "loader", "{out}"], "cpu"),
        (["{out}", "--only", "tests", "loader"], "cpu"),
        (["--only", "tests", "lodaer", "{out}"], "--only lodaer: there is no such stage"),
        (["--only", "tests"], "OUT is missing"),
    ],
    ids=["before", "after", "unknown", "none"],
)
def test_stages_may_be_named_before_the_folder_and_after_it(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(out=tmp_path / "out") for word in words]
    monkeypatch.setattr(sys, "argv", ["gpu_check.sh", "--device", "cpu", *given])
    if said == "cpu":
        found = gpu_check.parse_arguments()
        assert (found.only, found.out, found.device) == (["tests", "loader"], tmp_path / "out", "cpu")
        return
    with pytest.raises(SystemExit):
        gpu_check.parse_arguments()
    assert said in capsys.readouterr().err


def test_a_folder_of_other_results_is_refused(tmp_path: Path) -> None:
    where = setting(tmp_path)
    about = gpu_check.described(where)
    assert about["device"] == "cpu" and about["data"] == "drawn" and about == gpu_check.described(where)
    with pytest.raises(UserError, match=r"holds results of data drawn, and this is /pictures; give another OUT"):
        gpu_check.described(Setting(tmp_path, on_gpu=False, given=Path("/pictures")))


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
