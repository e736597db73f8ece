"""Whether the encoder gets better while it trains: nearest neighbours on a part of train, every few epochs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr_dali.model.collectives import all_rows
from simclr_dali.model.neighbours import accuracies
from simclr_dali.model.process import by_rank_0, show
from simclr_dali.pipeline.features import Features, extract, share
from simclr_dali.pipeline.loader import Setting
from simclr_dali.pipeline.subset import Ids, class_balanced
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.errors import UserError
from simclr_dali.train.job import Job
from simclr_dali.train.watchdog import Watchdog

K, TEMPERATURE = 20, 0.1
_ASKED = 10  # every tenth image is asked about, the others are compared with
_PER_CLASS = 3  # images, at least: fewer would leave most of those asked about without one of their own class


class Health:
    """Writes ``knn.jsonl``: per check step (the last one done), epoch, top1 in percent, and what it was measured on.

    The images are a class-balanced part of train, the same at every check and on any number of ranks; val stays
    untouched. It is a signal for one run, not a number to compare with eval/knn.py's.
    """

    def __init__(self, job: Job, watchdog: Watchdog) -> None:
        """Raises UserError where ``simclr.knn_images`` is too small for the classes of the set."""
        self._job, self._watchdog = job, watchdog
        simclr, shards = job.config.simclr, job.shards
        self._every = simclr.knn_every_epochs * job.order.steps_per_epoch
        if not self._every:
            return
        images, classes = min(simclr.knn_images, len(shards)), len(shards.classes)
        if images < _PER_CLASS * classes:
            raise UserError(
                f"kNN during training would have {images} images of {classes} classes; set simclr.knn_images to at "
                f"least {_PER_CLASS * classes}, or simclr.knn_every_epochs to 0"
            )
        ids = class_balanced(shards.samples["label"], classes, images / len(shards), simclr.seed)
        self._asked = ids[::_ASKED]
        self._known = np.setdiff1d(ids, self._asked)

    def due(self, done: int) -> bool:
        """Whether a check belongs after ``done`` steps."""
        return bool(self._every) and done > 0 and done % self._every == 0

    def catch_up(self, model: Any, done: int) -> None:
        """Make the check after ``done`` steps if it was due and a stop came before it. All ranks call it together."""
        path = self._job.run / "knn.jsonl"

        def lacks() -> bool:
            try:
                return f'"step": {done - 1},' not in path.read_text()
            except OSError:
                return True

        if self.due(done) and by_rank_0(self._job.process, lacks):
            self.check(model, done)

    def check(self, model: Any, done: int) -> None:
        """All ranks call it together. ``model`` is in training mode before and after; nothing of it changes."""
        job = self._job
        encoder = model.encoder.eval()

        def watched(views: torch.Tensor) -> torch.Tensor:
            self._watchdog.at(f"step {done - 1}, nearest neighbours")
            features: torch.Tensor = encoder(views)
            return features

        known, asked = self._features(watched, self._known), self._features(watched, self._asked)
        encoder.train()
        k = min(K, len(self._known))
        found = accuracies(
            known.features,
            known.labels,
            all_rows(asked.features),
            all_rows(asked.labels),
            len(job.shards.classes),
            [k],
            TEMPERATURE,
        )
        line = {
            "step": done - 1,
            "epoch": (done - 1) // job.order.steps_per_epoch,
            "top1": found[k][0],
            "k": k,
            "temperature": TEMPERATURE,
            "bank": len(self._known),
            "queries": len(self._asked),
        }
        if job.process.rank == 0:
            _append(job.run / "knn.jsonl", line)
            show(
                f"kNN after epoch {line['epoch'] + 1}: {line['top1']:.2f} % of {line['queries']:,} images of train "
                f"(k {k}, against {line['bank']:,} others)",
            )

    def _features(self, encoder: Callable[[torch.Tensor], torch.Tensor], ids: Ids) -> Features:
        job = self._job
        own = ids[share(len(ids), job.process.rank, job.process.world)]
        simclr = job.config.simclr
        setting = Setting(simclr.image_size, job.process.device, threads=simclr.loader_threads or job.process.cores)
        batch = min(256, job.config.micro_batch(job.process.world) * 2)  # what the device has room for
        return extract(
            encoder,
            job.shards,
            job.files,
            setting,
            batch=batch,
            ids=own,
            max_bad_fraction=simclr.max_bad_fraction,
            silent=True,
        )


def _append(path: Path, line: dict[str, Any]) -> None:
    with refusals_named(path), path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
