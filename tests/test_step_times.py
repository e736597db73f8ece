"""Where the time of a step goes: by parts that add up, whatever lies between."""

import json
import time
from pathlib import Path

import pytest
import torch

from simclr_dali.train.step_times import PARTS, StepTimes

CPU = torch.device("cpu")


def test_time_belongs_to_the_part_that_was_marked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 110.0, 111.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    times = StepTimes(CPU)
    for part in ("input", "forward", "input", "forward"):
        times.mark(part)
    nothing = dict.fromkeys(PARTS, 0.0)
    assert times.spent() == nothing | {"input": 1 + 3, "forward": 2}
    times.mark("other")  # what was begun before goes on
    assert times.spent() == nothing | {"forward": 4}
    times.forget()
    times.mark("input")  # the hundred seconds before it belong to nobody
    assert times.spent() == {}
    times.mark("other")
    assert times.spent() == nothing | {"input": 1}


def test_a_run_records_what_its_steps_are_made_of(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()]
    before = -1
    for line in lines:
        parts = {part: line[f"ms_{part}"] for part in PARTS}
        assert all(spent >= 0 for spent in parts.values()) and min(parts["forward"], parts["backward"]) > 0
        # They are all that a step takes, but for what lies before the first mark.
        steps, whole = line["step"] - before, 1000 * 32 / line["images_per_s"]
        before = line["step"]
        assert sum(parts.values()) <= 1.05 * whole + 50 / steps
