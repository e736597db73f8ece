"""What a run says while it trains: means, chance, slow stages, and views that are not told apart."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_dali.train.progress import ApartWatch, Progress, SlowInputWatch

SPEED = {"step": 9, "images_per_s": 100.0, "wait_share": 0.01}
SPENT = {"reading": 1.0, "drawing": 1.0, "inputs": 0.1, "decoding": 5.0}


def line(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "epoch": 0, "lr": 0.1, "loss": 4.0, "positive": 0.5, "top1": 0.25, **values}


def progress(**changes: Any) -> Progress:
    return Progress(**{"batch": 16, "steps_per_epoch": 10, "total_steps": 100, **changes})


def test_the_line_has_means_since_the_last_one_and_chance() -> None:
    lines = [line(8, loss=5.0, top1=0.2, positive=0.3), line(9, loss=4.0, top1=0.4, positive=0.4)]
    text = progress().text(lines, {**SPEED, "gpu_memory_gb": 12.34})
    assert text == (
        "epoch 1/10 step 10/100 | loss 4.5000 | top-1 30.0 % (chance 3.2) | similarity 0.350 (chance 0) | "
        "100 images/s | waiting for data 1.0% | 12.3 GB | ETA 0:00:14 | lr 0.1"
    )


def test_another_loss_is_shown_with_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"step": 0, "epoch": 0, "lr": 0.1, "loss": 2.0, "redundancy": 1.0}]
    progress().show(lines, SPEED, SPENT)
    out = capsys.readouterr().out
    assert "loss 2.0000 | 100 images/s" in out and "top-1" not in out


def test_chance_is_explained_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress()
    for step in (0, 10):
        shown.show([line(step)], SPEED, SPENT)
    out = capsys.readouterr().out
    assert out.count("chance is ln(31) = 3.434") == 1 and "The first losses lie above it" in out
    assert "by chance 3.2 %" in out and len(out.splitlines()) == 3


def test_the_line_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("simclr_dali.model.process._line_is_open", False)  # and put back, for the tests behind
    progress().show([line(9)], SPEED, SPENT)
    out = capsys.readouterr().out
    assert out.startswith("\r\033[K") and not out.endswith("\n") and len(out) == len("\r\033[K") + 59


@pytest.mark.parametrize(
    ("spent", "words"),
    [
        ({"inputs": 6.0, "reading": 5.0, "drawing": 1.0}, "reading is the slow part"),
        ({"inputs": 6.0, "reading": 1.0, "drawing": 5.0}, "preparing batches in Python"),
        ({"inputs": 1.0, "reading": 5.0}, "decoding and augmenting is the slow part: give the process more cores"),
    ],
)
def test_the_slow_stage_of_an_input_is_named_once_with_what_to_try(spent: dict[str, float], words: str) -> None:
    watch = SlowInputWatch()
    slow, took = {**SPEED, "wait_share": 0.2}, {**SPENT, **spent}
    assert watch.hint(slow, took) is None  # once may be the start
    assert watch.hint(SPEED, took) is None and watch.hint(slow, took) is None
    told = watch.hint(slow, took)
    assert told and told.startswith("20% of the time waits for data") and words in told
    assert watch.hint(slow, took) is None


def test_a_gpu_is_told_of_its_engine() -> None:
    watch, slow = SlowInputWatch(), {**SPEED, "wait_share": 0.2, "gpu_memory_gb": 1.0}
    watch.hint(slow, SPENT)
    assert "simclr.engine_share" in (watch.hint(slow, SPENT) or "")


@given(st.integers(2, 64), st.integers(1, 400), st.floats(0, 1), st.integers(1, 7))
def test_views_that_are_not_told_apart_are_told_at_a_tenth_and_at_the_end(
    batch: int, total: int, top1: float, every: int
) -> None:
    watch, told = ApartWatch(batch, total), {}
    for first in range(0, total, every):
        lines = [line(step, top1=top1) for step in range(first, min(first + every, total))]
        if warning := watch.warning(lines):
            told[range(first, first + every)] = warning
    due = {math.ceil(total / 10) - 1, total - 1}
    if top1 < 2 / (2 * batch - 1) * (1 - 1e-9):
        assert all(any(step in steps for steps in told) for step in due) and len(told) <= 2
        assert "views are not told apart" in next(iter(told.values()))
    elif top1 > 2 / (2 * batch - 1) * (1 + 1e-9):
        assert not told
