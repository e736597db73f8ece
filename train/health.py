"""Whether the encoder gets better while it trains: nearest neighbours on a part of train, every few epochs."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from model.collectives import all_rows
from model.neighbours import accuracies
from pipeline.features import extract, share
from pipeline.loader import Setting
from pipeline.subset import class_balanced
from shards.durable import refusals_named
from train.job import Job

K, TEMPERATURE = 20, 0.1
CENTER_FRACTION = 0.875
_ASKED = 10  # every tenth image is asked about, the others are compared with


class Health:
    """Writes ``knn.jsonl``: per check step (the last one done), epoch, top1 in percent, and what it was measured on.

    The images are a class-balanced part of train, the same at every check and on any number of ranks; val stays
    untouched. It is a signal for one run, not a number to compare with eval/knn.py's.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        simclr, shards = job.config.simclr, job.shards
        fraction = min(1.0, max(simclr.knn_images, len(shards.classes)) / len(shards))
        ids = class_balanced(shards.samples["label"], len(shards.classes), fraction, simclr.seed)
        self._asked = ids[::_ASKED]
        self._known = np.setdiff1d(ids, self._asked)

    def due(self, done: int) -> bool:
        """Whether a check follows after ``done`` steps."""
        every = self._job.config.simclr.knn_every_epochs * self._job.order.steps_per_epoch
        return bool(every) and done % every == 0

    def check(self, model: Any, done: int) -> None:
        """All ranks call it together. ``model`` is in training mode before and after; nothing of it changes."""
        job = self._job
        encoder = model.encoder.eval()
        known, asked = self._features(encoder, self._known), self._features(encoder, self._asked)
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
            print(
                f"kNN after epoch {line['epoch'] + 1}: {line['top1']:.2f} % of {line['queries']:,} images of train "
                f"(k {k}, against {line['bank']:,} others)",
                flush=True,
            )

    def _features(self, encoder: Any, ids: Any) -> Any:
        job = self._job
        own = ids[share(len(ids), job.process.rank, job.process.world)]
        setting = Setting(job.config.simclr.image_size, job.process.device, threads=job.process.cores)
        batch = min(256, job.config.micro_batch(job.process.world) * 2)  # what the device has room for
        return extract(
            encoder,
            job.shards,
            job.files,
            setting,
            batch=batch,
            center_fraction=CENTER_FRACTION,
            ids=own,
            max_bad_fraction=job.config.simclr.max_bad_fraction,
            silent=True,
        )


def _append(path: Path, line: dict[str, Any]) -> None:
    with refusals_named(path), path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
