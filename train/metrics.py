"""What a run reports: ``metrics.jsonl`` (what a repeated run reproduces), ``speed.jsonl`` (times) and the screen."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_dali.model.process import Process, from_all_ranks, print_now
from simclr_dali.shards.durable import refusals_named, write_durably
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.wording import listed
from simclr_dali.train.progress import Progress
from simclr_dali.train.step import StepResult
from simclr_dali.train.step_times import StepTimes, no_mark

Listener = Callable[[Sequence[Mapping[str, float]], Mapping[str, float]], None]


class Reporter:
    """Collects each step's numbers on the device and writes them when drained, so that no step waits for the device.

    metrics.jsonl has one line per step: step, epoch, lr, loss, what the loss reports by name (of NT-Xent: model.ntxent,
    Contrast and NTXent.derived), and gradient_norm, of all parameters together, after averaging. speed.jsonl has one
    per drain: step, images_per_s (images, each of which gives two views), wait_share (share of the host's time spent
    waiting for input, which on a GPU leaves out what the device itself waits), ms_input, ms_forward and so on
    (milliseconds of a step by train.step_times.PARTS, on rank 0) and, on a GPU, gpu_memory_gb (the most that torch has
    held of rank 0's so far, in 1e9 bytes).
    """

    def __init__(
        self,
        run: Path,
        process: Process,
        *,
        batch: int,
        steps_per_epoch: int,
        total_steps: int,
        first_step: int,
        keep_batch: Callable[[int, str], list[int]],
        derived: Callable[[dict[str, float]], dict[str, float]] = dict,
        spent: Callable[[], dict[str, float]] = dict,
        listeners: Sequence[Listener] = (),
    ) -> None:
        """``keep_batch(step, reason)`` writes this rank's samples into the run folder and returns their ids.

        ``derived`` turns the means over ranks of what the loss reports into what is written. ``spent`` gives the
        seconds that went into making batches since it was last asked, by stage. ``listeners`` hear, on rank 0, of the
        lines that were written: those of metrics.jsonl, and that of speed.jsonl.
        """
        self._run, self._process, self._keep_batch, self._derived = run, process, keep_batch, derived
        self._batch, self._steps_per_epoch = batch, steps_per_epoch
        self._progress = Progress(batch=batch, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        self._spent, self._listeners = spent, listeners
        self._names: list[str] = []
        self._pending: list[tuple[int, float, Tensor]] = []
        self._waited = 0.0
        self._since = time.perf_counter()
        self._times = StepTimes(process.device)
        self.mark = self._times.mark if process.rank == 0 else no_mark
        """For train.step.train_step."""
        if process.rank == 0:
            for name in ("metrics.jsonl", "speed.jsonl", "knn.jsonl"):
                _drop_lines_from(run / name, first_step)
            _warn_of_missing_lines(run / "metrics.jsonl", first_step)

    def waited(self, seconds: float) -> None:
        """Count time that the training thread spent waiting for its input."""
        self._waited += seconds

    def paused(self) -> None:
        """Leave the time since the last drain out of the rates; something else than steps was done."""
        self._times.forget()
        self._since = time.perf_counter()

    def add(self, step: int, lr: float, result: StepResult) -> None:
        """Take a step's numbers, which stay on the device; the loss reports the same names at every step."""
        numbers = {"loss": result.loss, **result.metrics, "gradient_norm": result.gradient_norm}
        self._names = self._names or list(numbers)
        stacked = torch.stack([numbers[name].detach() for name in self._names])
        assert len(stacked) == len(numbers)
        self._pending.append((step, lr, stacked.double()))

    def drain(self, last_checkpoint: Callable[[], str], *, durably: bool = False) -> None:
        """Average over ranks, write and show what has come since the last call. All ranks call it at the same steps.

        durably: on disk when it returns. last_checkpoint: tells on rank 0 what the run would go on from. Raises
        UserError for a loss or gradient that is not finite, before any later checkpoint is written.
        """
        if not self._pending:
            return
        own = torch.stack([numbers for _, _, numbers in self._pending])
        values = own.clone()
        dist.all_reduce(values)
        rows = [self._named(row) for row in (values / self._process.world).tolist()]
        seconds = time.perf_counter() - self._since
        sound = next((n for n, row in enumerate(rows) if not _is_finite(row)), len(rows))
        if self._process.rank == 0 and sound:
            with refusals_named(self._run / "metrics.jsonl"):
                self._write(rows[:sound], self._speed(seconds), durably)
        if sound < len(rows):
            self._refuse_numbers(self._pending[sound][0], self._named(own[sound].tolist()), last_checkpoint)
        self._pending.clear()
        self._waited = 0.0
        self._since = time.perf_counter()

    def _named(self, row: list[float]) -> dict[str, float]:
        return dict(zip(self._names, row, strict=True))

    def _refuse_numbers(self, step: int, own: dict[str, float], last_checkpoint: Callable[[], str]) -> None:
        """Blame the ranks whose loss is not finite, or all if only the gradient is."""
        losses = from_all_ranks(own["loss"])
        blamed = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        what = f"loss is {losses[blamed[0]]}" if blamed else f"gradient is {own['gradient_norm']}"
        self.refuse(step, what, last_checkpoint, blamed)

    def refuse(
        self, step: int, what: str, last_checkpoint: Callable[[], str], blamed: Sequence[int] | None = None
    ) -> None:
        """Keep the batch of each blamed rank (default: all) and raise UserError. All ranks call it."""
        process = self._process
        blamed = blamed or range(process.world)
        kept: tuple[list[int], str] = ([], "")
        if process.rank in blamed:
            try:
                kept = (self._keep_batch(step, what), "")
            except UserError as error:
                kept = ([], f"; its batch could not be kept: {error}")
        of_ranks = from_all_ranks((*kept, last_checkpoint() if process.rank == 0 else ""))
        ids, failure, _ = of_ranks[blamed[0]]
        file = batch_file(self._run, step, blamed[0])
        raise UserError(
            f"the {what} at step {step} (epoch {step // self._steps_per_epoch}) on rank "
            f"{', '.join(map(str, blamed))} of {process.world}, samples {_some(ids)}{failure}; look at them with: "
            f"simclr-dali views --replay {file} --out batch.png; the last good checkpoint is {of_ranks[0][2]}: lower "
            f"the learning rate and give another --run, or mend the data"
        )

    def _speed(self, seconds: float) -> dict[str, float]:
        """The line of speed.jsonl for the steps that are pending and took ``seconds``."""
        found = {
            "step": self._pending[-1][0],
            "images_per_s": round(len(self._pending) * self._batch / seconds, 2),
            "wait_share": round(self._waited / seconds, 4),
        }
        for part, spent in self._times.spent().items():
            found[f"ms_{part}"] = round(1000 * spent / len(self._pending), 3)
        if self._process.device.type == "cuda":
            found["gpu_memory_gb"] = round(torch.cuda.max_memory_reserved(self._process.device) / 1e9, 3)
        return found

    def _write(self, rows: Sequence[dict[str, float]], speed: dict[str, float], durably: bool) -> None:
        lines = [self._line(step, lr, row) for (step, lr, _), row in zip(self._pending, rows, strict=False)]
        with (self._run / "metrics.jsonl").open("a") as metrics:
            metrics.writelines(json.dumps(line) + "\n" for line in lines)
            metrics.flush()
            if durably:
                os.fsync(metrics.fileno())
        with (self._run / "speed.jsonl").open("a") as file:
            file.write(json.dumps(speed) + "\n")
        self._progress.show(lines, speed, self._spent())
        for listener in self._listeners:
            listener(lines, speed)

    def _line(self, step: int, lr: float, row: dict[str, float]) -> dict[str, float]:
        metrics = dict(row)
        loss, norm = metrics.pop("loss"), metrics.pop("gradient_norm")
        epoch = step // self._steps_per_epoch
        return {"step": step, "epoch": epoch, "lr": lr, "loss": loss, **self._derived(metrics), "gradient_norm": norm}


def _is_finite(row: dict[str, float]) -> bool:
    return math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])


def run_speed(run: Path, batch: int, first_step: int = 0) -> tuple[float, float]:
    """Seconds that the steps of a run took from ``first_step`` on, over all its starts, and images/s.

    From speed.jsonl, which knows each stretch of steps once: those that a stop undid are not in it.
    """
    seconds, before, images = 0.0, 0, 0
    path = run / "speed.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError, ZeroDivisionError):
            found = json.loads(line)
            steps = found["step"] + 1 - max(before, first_step)
            if steps > 0:
                images += steps * batch
                seconds += steps * batch / found["images_per_s"]
            before = found["step"] + 1
    return seconds, images / seconds if seconds else 0.0


def _drop_lines_from(path: Path, first_step: int) -> None:
    """Remove the lines of steps that will be run again."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and 0 <= _step_of(line) < first_step]
        write_durably(path, "".join(kept).encode())


def _warn_of_missing_lines(path: Path, first_step: int) -> None:
    """Say so where someone removed lines of the steps before; the run itself needs none of them."""
    steps = map(_step_of, path.read_text().splitlines() if path.exists() else [])
    missing = sorted(set(range(first_step)) - set(steps))
    if missing:
        print_now(f"warning: {path} lacks {len(missing)} steps before {first_step}: {_some(missing)}", file=sys.stderr)


def _step_of(line: str) -> int:
    """The step that a line is about; -1 where it is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def batch_file(run: Path, step: int, rank: int) -> Path:
    """Where a rank keeps a batch that was bad."""
    return run / f"bad-step-{step:08d}-rank-{rank}.json"


def _some(numbers: Sequence[int]) -> str:
    return listed([str(number) for number in numbers], 8)
