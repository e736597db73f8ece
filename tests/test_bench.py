"""The benchmarks run, agree on what they compute, and their parts add up; nothing here looks at how long it took."""

import json
import sys
from pathlib import Path

import pytest
import torch

from scripts.bench.in_turn import in_turn
from scripts.bench.rivals import CONTENDERS, Given
from scripts.bench.step import BEGIN, PHASES, Clock
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import SAMPLE
from tests.conftest import ROOT, assert_sentence, run_python
from tests.runs import launch_script, tiny_config


def test_the_loss_benchmark_compares_contenders_of_equal_value(tmp_path: Path) -> None:
    out = tmp_path / "loss.json"
    words = ["--pairs", 16, 32, "--rounds", 1, "--seconds", 0, "--json", out]
    done = run_python(ROOT / "scripts/bench/loss.py", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    for pairs in ("16", "32"):
        assert result["pairs"][pairs]["ours"]["ms"]["median"] > 0
        assert result["pairs"][pairs]["full matrix"]["x ours"]["median"] > 0


def test_a_contender_without_memory_is_reported_as_such(tmp_path: Path) -> None:
    """16,384 rows squared are a gigabyte; ours needs a small part of the limit."""
    words = ["--pairs", 8192, "--rounds", 1, "--seconds", 0, "--limit-gb", 0.9]
    # The stacks of threads count too.
    done = run_python(ROOT / "scripts/bench/loss.py", *words, env={"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    rows = {line.split()[1]: line for line in done.stdout.splitlines() if line.split()[:1] == ["8192"]}
    assert "out of memory" in rows["full"] and "out of memory" not in rows["ours"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_loss_benchmark_without_a_gpu_says_so() -> None:
    assert_sentence(run_python(ROOT / "scripts/bench/loss.py", "--device", "gpu"), "torch sees none")


def test_the_clock_splits_steps_into_phases() -> None:
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        clock.mark(BEGIN)
        for _ in clock.timed(iter([torch.zeros(1)])):
            for phase in PHASES[2:]:
                clock.mark(phase)
    clock.mark("end")
    first, second = clock.read()
    assert set(first) == set(second) == set(PHASES) and min(first.values()) > 0
    assert clock.read() == []


@pytest.mark.launch
def test_the_step_benchmark_splits_a_step_with_both_inputs(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    words = ["--steps", 2, "--warm-up", 1, "--rounds", 1, "--set", "train_micro_batch_size_per_gpu=4", "--json", out]
    script = ROOT / "scripts/bench/step.py"
    done = launch_script(2, script, "--config", tiny_config(tmp_path), "--data", packed, *words)
    assert done.returncode == 0, done.stderr
    assert "global batch 16 = 2 x 2 x 4" in done.stdout and "lost to input" in done.stdout
    result = json.loads(out.read_text())
    for kind in ("synthetic", "real"):
        parts = [result[kind][phase]["median"] for phase in PHASES]
        assert min(parts) > 0 and sum(parts) == pytest.approx(result[kind]["step"]["median"])


@pytest.mark.launch
def test_the_step_benchmark_compares_ways_to_compute_a_step(tmp_path: Path) -> None:
    """A way that this machine has not is named, and costs the others nothing."""
    out = tmp_path / "step.json"
    words = ["--steps", 2, "--warm-up", 1, "--rounds", 1, "--synthetic-only", "--json", out]
    rows = ["eager", *(() if torch.cuda.is_available() else ("kernels",)), "eager"]
    done = run_python(ROOT / "scripts/bench/step.py", "--config", tiny_config(tmp_path), *words, "--compile", *rows)
    assert done.returncode == ("kernels" in rows), done.stderr  # which a script that calls this should hear of
    result = json.loads(out.read_text())["rows"]
    assert result["eager"]["synthetic"]["step"]["median"] > 0 and result["eager"]["first step, s"] > 0
    assert "simclr.compile=no" in result["eager"]["set"] and "x eager" in done.stdout
    assert "kernels" not in rows or ("failed" in result["kernels"] and "kernels        failed" in done.stdout)


def test_a_result_that_could_not_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for path in (tmp_path / "no folder" / "file.json", tmp_path):
        done = run_python(ROOT / "scripts/bench/step.py", "--config", "imagenette.json", "--json", path)
        assert done.returncode == 2 and ("there is no folder" in done.stderr or "is a folder" in done.stderr)


def test_the_step_benchmark_refuses_more_steps_than_a_run_has(packed: Path, tmp_path: Path) -> None:
    words = ["--config", tiny_config(tmp_path), "--data", packed, "--steps", 30]
    done = run_python(ROOT / "scripts/bench/step.py", *words)
    assert_sentence(done, "114 steps", "the run has 30")


@pytest.mark.launch
def test_the_probe_benchmark_agrees_with_scikit_learn_and_lightly(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "probe.json"
    done = run_python(ROOT / "scripts/bench/probe.py", "--ckpt", trained, "--rounds", 1, "--json", out)
    assert done.returncode == 0 and "lost to input" in done.stdout, done.stderr
    found = {name: row["top1"] for name, row in json.loads(out.read_text())["contenders"].items()}
    # One image of 48 may be tipped by rounding.
    assert found["fast"]["linear"] == pytest.approx(found["scikit-learn"]["linear"], abs=100 / 48 + 0.01)
    for k in ("k 20", "k 200"):
        assert found["knn"][k] == pytest.approx(found["lightly knn"][k], abs=100 / 48 + 0.01)


def test_the_loader_benchmark_has_a_table_for_each_size_of_pictures(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    words = ["--only", "solo", "kept", "--stored", 32, "--batch", 8, "--seconds", 0.1, "--rounds", 1]
    done = run_python(ROOT / "scripts/bench/loader.py", pictures, *words, "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    for table in (result, result["stored"]["32 px"]):
        assert list(table["images_per_s"]) == ["ours", "solo-learn", "ours, decoded kept"]
        assert all(rate["min"] > 0 for rate in table["images_per_s"].values())
        assert "ours" not in table["ratios"] and len(table["ratios"]) == 2


def test_the_loader_benchmark_names_its_rows_and_what_failed(pictures: Path, tmp_path: Path) -> None:
    script = ROOT / "scripts/bench/loader.py"
    assert_sentence(run_python(script, pictures, "--only", "nonsense"), "names none of the rows", "solo-learn")
    words = ["--only", "ours", "--batch", 1000, "--seconds", 0.1, "--rounds", 1]
    done = run_python(script, pictures, *words)
    assert "a global batch of 1000 does not fit" in done.stderr
    assert_sentence(done, "ours, decoded kept could not be measured, as said above")


def test_contenders_deliver_views_of_the_size_that_is_asked(pictures: Path, packed: Path) -> None:
    for name in ("ours", "torchvision-v1", "torchvision-v2", "solo-learn"):
        asked = Given(pictures, packed, torch.device("cpu"), 8, 1, view=64)
        assert next(CONTENDERS[name](asked)).shape == (16, 3, 64, 64)
    assert [asked._replace(view=view).kernel for view in (32, 48, 64, 128, 224)] == [3, 5, 7, 13, 23]


def test_processes_are_measured_in_turn_and_all_end(tmp_path: Path) -> None:
    """None begins before all have started; one that fails costs the others nothing."""

    def code(number: int, then: str = "") -> list[str]:
        began = f"open({str(tmp_path / str(number))!r}, 'w').close()"
        return [sys.executable, "-c", f"print('ready', flush=True); input(); {began}; {then or f'print({number})'}"]

    found = []
    for row, rate in in_turn({"a": code(1), "b": code(2)}):
        found.append((row, rate))
        assert (tmp_path / "2").exists() == (row == "b")
    assert found == [("a", 1.0), ("b", 2.0)]
    turns = dict(in_turn({"c": code(3), "d": code(4, "1 / 0"), "e": code(5)}))
    assert (turns["c"], turns["e"]) == (3.0, 5.0) and "ZeroDivisionError" in str(turns["d"])
    turns = dict(in_turn({"f": [sys.executable, "-c", "1 / 0"], "g": code(7)}))
    assert isinstance(turns["f"], UserError) and turns["g"] == 7.0


def test_trainers_are_compared_on_the_same_network(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "trainers.json"
    words = ["--width", 0.125, "--image-size", 32, "--batch", 8, "--seconds", 0.1, "--rounds", 1, "--json", out]
    done = run_python(ROOT / "scripts/bench/trainers.py", pictures, *words, "--only", "plain", "solo-learn")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert list(result["images_per_s"]) == ["ours", "solo-learn", "plain"] and list(result["ratios"]) == [
        "solo-learn",
        "plain",
    ]
    assert result["batch"] == 8 and result["versions"]["torch"]


def test_memory_is_measured_by_batch_and_over_steps(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    words = ["--config", tiny_config(tmp_path), "--batches", 4, 16, "--steps", 10, "--json", out]
    done = run_python(ROOT / "scripts/bench/memory.py", *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["batches"]
    for row in rows.values():
        assert len(row["held"]) == 10 and 0 < row["held"][-1] <= 1.01 * row["peak"] and row["kept_of_an_image"] > 0
    assert_sentence(run_python(ROOT / "scripts/bench/memory.py", *words[:2], "--batches", 1), "batch 1 failed")


@pytest.mark.launch
def test_the_start_of_a_run_is_timed_by_the_size_of_its_set(tmp_path: Path) -> None:
    out = tmp_path / "start.json"
    words = ["--samples", 64, 9_000_000, "--samples-per-shard", 1_000_000, "--processes", 1, "--rounds", 1]
    done = run_python(ROOT / "scripts/bench/start.py", *words, "--folder", tmp_path, "--json", out)
    assert done.returncode == 0, done.stderr
    small, large = json.loads(out.read_text())["rows"].values()
    assert small["shards"] == 4 and large["shards"] == 9
    table = 9_000_000 * SAMPLE.itemsize / 1e9
    assert table < large["gigabytes"]["max"] - small["gigabytes"]["max"] < 1.5 * table
    assert list(tmp_path.iterdir()) == [out]  # the sets are removed
