"""What a run reports: ``metrics.jsonl`` (what a repeated run reproduces), ``speed.jsonl`` (times) and the screen."""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model.ntxent import Contrast
from shards.errors import UserError
from train.engine import Process


class Reporter:
    """Collects each step's numbers on the device and writes them when drained, so that no step waits for the device.

    metrics.jsonl has one line per step: step, epoch, lr, loss, and of the embeddings (model.ntxent.Contrast) positive,
    hardest_negative, top1, alignment (mean squared distance of two views of an image) and uniformity (the last two as
    in Wang and Isola 2020). speed.jsonl has one per drain: step, images_per_s (images, each of which gives two views)
    and wait_share (share of the host's time spent waiting for input, which on a GPU leaves out what the device itself
    waits).
    """

    def __init__(
        self, run: Path, process: Process, *, batch: int, steps_per_epoch: int, total_steps: int, first_step: int
    ) -> None:
        self._run, self._process = run, process
        self._batch, self._steps_per_epoch, self._total_steps = batch, steps_per_epoch, total_steps
        self._pending: list[tuple[int, float, Tensor]] = []
        self._waited = 0.0
        self._since = time.perf_counter()
        self._rates: list[float] = []
        if process.rank == 0:
            for name in ("metrics.jsonl", "speed.jsonl"):
                _drop_lines_from(run / name, first_step)

    def waited(self, seconds: float) -> None:
        """Count time that the training thread spent waiting for its input."""
        self._waited += seconds

    def add(self, step: int, lr: float, contrast: Contrast) -> None:
        numbers = torch.stack([value.detach() for value in vars(contrast).values()]).double()
        self._pending.append((step, lr, numbers))

    def drain(self, last_checkpoint: str) -> None:
        """Average over ranks, write and show what has come since the last call. All ranks call it at the same steps.

        Raises UserError for a loss that is not finite, before any later checkpoint is written.
        """
        if not self._pending:
            return
        steps = len(self._pending)
        values = torch.stack([numbers for _, _, numbers in self._pending])
        dist.all_reduce(values)
        rows = (values / self._process.world).tolist()
        seconds = time.perf_counter() - self._since
        for (step, _, _), (loss, *_) in zip(self._pending, rows, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {step} (epoch {step // self._steps_per_epoch}); the last checkpoint "
                    f"is {last_checkpoint}: "
                    "look at the data, or lower the learning rate and give another --run"
                )
        if self._process.rank == 0:
            self._write(rows, steps * self._batch / seconds, self._waited / seconds)
        self._pending.clear()
        self._waited = 0.0
        self._since = time.perf_counter()

    def images_per_s(self) -> float:
        """Median over the drains of this process, without the first, which pays for warming up."""
        rates = sorted(self._rates[1:] or self._rates)
        return rates[len(rates) // 2] if rates else 0.0

    def _write(self, rows: Sequence[Sequence[float]], images_per_s: float, wait_share: float) -> None:
        self._rates.append(images_per_s)
        with (self._run / "metrics.jsonl").open("a") as metrics:
            for (step, lr, _), row in zip(self._pending, rows, strict=True):
                metrics.write(json.dumps(self._line(step, lr, *row)) + "\n")
        if self._pending[0][0] == 0:
            # What no information gives; embeddings that point anywhere begin a little above it.
            others = 2 * self._batch - 1
            print(f"the first loss is {rows[0][0]:.3f}; chance is ln({others}) = {math.log(others):.3f}", flush=True)
        step, lr, _ = self._pending[-1]
        with (self._run / "speed.jsonl").open("a") as speed:
            line = {"step": step, "images_per_s": round(images_per_s, 2), "wait_share": round(wait_share, 4)}
            speed.write(json.dumps(line) + "\n")
        left = (self._total_steps - step - 1) * self._batch / images_per_s
        text = (
            f"epoch {step // self._steps_per_epoch + 1}/{self._total_steps // self._steps_per_epoch}  step "
            f"{step + 1}/{self._total_steps}  "
            f"loss {rows[-1][0]:.4f}  lr {lr:.3g}  {images_per_s:,.0f} images/s  waiting for input {wait_share:.1%}  "
            f"ETA {_duration(left)}"
        )
        print(f"\r\033[K{text}" if sys.stdout.isatty() else text, end="" if sys.stdout.isatty() else "\n", flush=True)

    def _line(
        self, step: int, lr: float, loss: float, positive: float, hardest_negative: float, top1: float, potential: float
    ) -> dict[str, float]:
        return {
            "step": step,
            "epoch": step // self._steps_per_epoch,
            "lr": lr,
            "loss": loss,
            "positive": positive,
            "hardest_negative": hardest_negative,
            "top1": top1,
            "alignment": 2 - 2 * positive,
            "uniformity": math.log(max(potential, sys.float_info.min)),
        }


def _drop_lines_from(path: Path, first_step: int) -> None:
    """Remove the lines of steps that will be run again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step]
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
