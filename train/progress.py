"""What a run says on the screen while it trains."""

import math
import shutil
import sys
from collections import deque
from collections.abc import Mapping, Sequence

from simclr_dali.model.process import print_now
from simclr_dali.train.collapse import CollapseWatch

WAITING = 0.05  # share of the time that waits for data from which on its cause is named
_RECENT = 100  # steps over which views are told apart, or not
# Of the images whose other view must be the nearest, in multiples of chance, for views to be told apart.
_TOLD_APART = 2.0

_WHAT_TO_TRY = {
    "reading": "reading is the slow part: keep the shards on a faster disk or in memory, or give simclr.loader_threads",
    "drawing": "preparing batches in Python is the slow part: give the process more cores (fewer processes a machine)",
    "decoding": "decoding and augmenting is the slow part: give the process more cores (simclr.loader_threads), pack "
    "smaller images (--resize 256), or let decoded pictures be kept (simclr.keep_decoded)",
    "decoding on a GPU": "decoding and augmenting is the slow part: raise simclr.engine_share, pack smaller images "
    "(--resize 256), or let decoded pictures be kept (simclr.keep_decoded)",
}


class Progress:
    """A line of progress, in place on a terminal; sentences on what is new, slow or wrong."""

    def __init__(self, *, batch: int, steps_per_epoch: int, total_steps: int) -> None:
        """batch: images of a step over all processes."""
        self._batch, self._steps_per_epoch, self._total_steps = batch, steps_per_epoch, total_steps
        self._collapse = CollapseWatch()
        self._apart = ApartWatch(batch, total_steps)
        self._slow = SlowInputWatch()

    def show(
        self, lines: Sequence[Mapping[str, float]], speed: Mapping[str, float], spent: Mapping[str, float]
    ) -> None:
        """Tell of the steps of ``lines`` (of metrics.jsonl), the line of speed.jsonl after them, and the seconds that
        were ``spent`` on making their batches, by stage (pipeline.stream.Pace)."""
        if lines[0]["step"] == 0:
            print_now(self._about_chance(lines[0]))
        for warning in (self._collapse.warning(lines), self._apart.warning(lines)):
            if warning:
                print_now(warning, file=sys.stderr)
        if hint := self._slow.hint(speed, spent):
            print_now(hint)
        text, on_terminal = self.text(lines, speed), sys.stdout.isatty()
        if on_terminal:
            text = f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}"
        print_now(text, end="" if on_terminal else "\n")

    def text(self, lines: Sequence[Mapping[str, float]], speed: Mapping[str, float]) -> str:
        """The line of progress: where the run is, means over ``lines``, and its speed."""
        step = int(lines[-1]["step"])
        epochs = self._total_steps // self._steps_per_epoch
        parts = [
            f"epoch {step // self._steps_per_epoch + 1}/{epochs} step {step + 1:,}/{self._total_steps:,}",
            f"loss {_mean(lines, 'loss'):.4f}",
        ]
        if "top1" in lines[-1]:
            chance = 100 / (2 * self._batch - 1)
            parts.append(f"top-1 {100 * _mean(lines, 'top1'):.1f} % (chance {chance:.2g})")
        if "positive" in lines[-1]:
            parts.append(f"similarity {_mean(lines, 'positive'):.3f} (chance 0)")
        left = (self._total_steps - step - 1) * self._batch / speed["images_per_s"]
        parts += [
            f"{speed['images_per_s']:,.0f} images/s",
            f"waiting for data {speed['wait_share']:.1%}",
            *([f"{speed['gpu_memory_gb']:.1f} GB"] if "gpu_memory_gb" in speed else []),
            f"ETA {duration(left)}",
            f"lr {lines[-1]['lr']:.3g}",
        ]
        return " | ".join(parts)

    def _about_chance(self, first: Mapping[str, float]) -> str:
        others = 2 * self._batch - 1
        text = (
            f"the first loss is {first['loss']:.3f}; chance is ln({others}) = {math.log(others):.3f}, the loss where "
            "all views are equally similar. "
        )
        if "top1" in first:
            text += (
                "The first losses lie above it: a fresh network, whose blocks begin as zero, makes some views more "
                "similar than others, and not yet the right ones. top-1 is how often the other view of an image is the "
                f"most similar of all {others}, by chance {100 / others:.2g} %; similarity is the cosine between the "
                "two views of an image, 0 for vectors that have nothing to do with each other"
            )
        return text.rstrip(". ")


class ApartWatch:
    """Speaks at a tenth of a run, and at its end, where embeddings do not tell the views of images apart."""

    def __init__(self, batch: int, total_steps: int) -> None:
        self._chance = 1 / (2 * batch - 1)
        self._looks = {math.ceil(total_steps / 10) - 1: "a tenth of the run", total_steps - 1: "the end of the run"}
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def warning(self, lines: Sequence[Mapping[str, float]]) -> str | None:
        """What to tell after the steps of ``lines``; None where nothing is due, or views are told apart."""
        told = None
        for line in lines:
            if "top1" not in line:
                return None
            self._recent.append(line["top1"])
            seen = sum(self._recent) / len(self._recent)
            if (when := self._looks.get(int(line["step"]))) and seen < _TOLD_APART * self._chance:
                told = (
                    f"WARNING: at {when} the other view of an image is the most similar one in {100 * seen:.2g} % of "
                    f"cases (chance {100 * self._chance:.2g} %): views are not told apart; look at them with "
                    "simclr-dali views, raise optimizer.params.lr or its trust_coefficient, or lower them where the "
                    "loss has risen"
                )
        return told


class SlowInputWatch:
    """Names, once, the slowest stage of an input that a training waits for."""

    def __init__(self) -> None:
        self._waiting_before = False
        self._told = False

    def hint(self, speed: Mapping[str, float], spent: Mapping[str, float]) -> str | None:
        """What to tell; None unless two lines of speed in a row show more than WAITING, or it was told before."""
        waiting = speed["wait_share"] > WAITING
        twice, self._waiting_before = waiting and self._waiting_before, waiting
        if not twice or self._told or not spent:
            return None
        self._told = True
        if spent["decoding"] >= spent["inputs"]:
            slow = "decoding on a GPU" if "gpu_memory_gb" in speed else "decoding"
        else:
            slow = max(("reading", "drawing"), key=lambda stage: spent[stage])
        return f"{speed['wait_share']:.0%} of the time waits for data; {_WHAT_TO_TRY[slow]}"


def _mean(lines: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(line[name] for line in lines) / len(lines)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
