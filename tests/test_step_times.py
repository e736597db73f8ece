"""Where the time of a step goes: by parts that add up, whatever lies between."""

import json
import time
from pathlib import Path

import pytest
import torch

from simclr_dali.train.step import train_step
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


def test_each_part_of_a_step_is_marked_where_it_begins() -> None:
    class Engine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))

        def forward(self, views: torch.Tensor) -> torch.Tensor:
            told.append("embeds")
            found: torch.Tensor = self.module(views)
            return found

        def backward(self, loss: torch.Tensor, **_: bool) -> None:
            told.append("goes back")
            loss.backward()

        def step(self) -> None:
            told.append("steps")

    def loss(z: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        told.append("compares")
        return z.square().mean(), {}

    told: list[str] = []
    views = [torch.rand(4, 3, 2, 2) for _ in range(2)]
    train_step(Engine(), views[:1], loss, told.append)
    assert told == [
        "input", "forward", "embeds", "loss", "compares", "backward", "goes back", "update", "steps", "other"
    ]  # fmt: skip
    told.clear()
    train_step(Engine(), views, loss, told.append)
    assert told == [
        "input", "forward", "embeds", "input", "forward", "embeds", "input", "loss", "compares", "backward",
        "embeds", "goes back", "steps", "embeds", "goes back", "update", "steps", "other",
    ]  # fmt: skip


def test_a_run_records_what_its_steps_are_made_of(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()]
    assert lines
    for line in lines:
        assert [name for name in line if name.startswith("ms_")] == [f"ms_{part}" for part in PARTS]
        assert min(line["ms_forward"], line["ms_loss"], line["ms_backward"], line["ms_update"]) > 0
