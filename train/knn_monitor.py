"""kNN checks while an encoder trains: on a part of train, every few epochs."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr_dali.model.collectives import all_rows
from simclr_dali.model.neighbours import accuracies
from simclr_dali.model.process import on_rank_0, print_now, print_rank_0
from simclr_dali.pipeline.features import Features, extract, share
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.order import Ids
from simclr_dali.pipeline.subset import class_balanced
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.wording import of_classes
from simclr_dali.train.job import Job
from simclr_dali.train.watchdog import Watchdog

K, TEMPERATURE = 20, 0.1
_QUERY_EVERY = 10  # every tenth image is a query, the others are what it is compared with
_PER_CLASS = 3  # images, at least: fewer would leave most queries without another image of their class


class KnnMonitor:
    """Writes ``knn.jsonl``: per check step (the last one done), epoch, top1 in percent, and what it was measured on.

    The images are a class-balanced part of train, the same at every check and on any number of ranks; val stays
    untouched. It is a signal for one run, not a number to compare with eval/knn.py's.
    """

    def __init__(self, job: Job, watchdog: Watchdog) -> None:
        """Raises UserError where ``simclr.knn_images`` is too small for the classes of the set."""
        self._job, self._watchdog = job, watchdog
        simclr, shards = job.config.simclr, job.split.shards
        self._every = simclr.knn_every_epochs * job.order.steps_per_epoch
        if self._every and not shards.classes:
            print_rank_0(job.process, "no kNN while training: the set has no labels")
            self._every = 0
        if not self._every:
            return
        images, classes = min(simclr.knn_images, len(shards)), len(shards.classes)
        if images < _PER_CLASS * classes:
            raise UserError(
                f"kNN during training would have {images} images {of_classes(classes)}; set simclr.knn_images to at "
                f"least {_PER_CLASS * classes}, or simclr.knn_every_epochs to 0"
            )
        ids = class_balanced(shards.samples["label"], classes, images / len(shards), simclr.seed)
        self._queries = ids[::_QUERY_EVERY]
        self._bank = np.setdiff1d(ids, self._queries)

    def due(self, done: int) -> bool:
        """Whether a check belongs after ``done`` steps."""
        return bool(self._every) and done > 0 and done % self._every == 0

    def run_missed_check(self, model: Any, done: int) -> None:
        """Make the check after ``done`` steps if it was due and a stop came before it. All ranks call it together."""
        path = self._job.run / "knn.jsonl"

        def lacks() -> bool:
            try:
                return f'"step": {done - 1},' not in path.read_text()
            except OSError:
                return True

        if self.due(done) and on_rank_0(self._job.process, lacks):
            self.check(model, done)

    def check(self, model: Any, done: int) -> None:
        """All ranks call it together. ``model`` is in training mode before and after; nothing of it changes."""
        job = self._job
        encoder = model.encoder.eval()

        def watched(views: torch.Tensor) -> torch.Tensor:
            self._watchdog.at(f"step {done - 1}, nearest neighbours")
            features: torch.Tensor = encoder(views)
            return features

        bank, queries = self._features(watched, self._bank), self._features(watched, self._queries)
        encoder.train()
        k = min(K, len(self._bank))
        found = accuracies(
            bank.features,
            bank.labels,
            all_rows(queries.features),
            all_rows(queries.labels),
            len(job.split.shards.classes),
            [k],
            TEMPERATURE,
        )
        line = {
            "step": done - 1,
            "epoch": (done - 1) // job.order.steps_per_epoch,
            "top1": found[k][0],
            "k": k,
            "temperature": TEMPERATURE,
            "bank": len(self._bank),
            "queries": len(self._queries),
        }
        if job.process.rank == 0:
            _append(job.run / "knn.jsonl", line)
            job.trackers.knn(line)
            print_now(
                f"kNN after epoch {line['epoch'] + 1}: {line['top1']:.2f} % of {line['queries']:,} images of train "
                f"(k {k}, against {line['bank']:,} others)",
            )

    def _features(self, encoder: Callable[[torch.Tensor], torch.Tensor], ids: Ids) -> Features:
        job = self._job
        own = ids[share(len(ids), job.process.rank, job.process.world)]
        simclr = job.config.simclr
        training = job.loader_config()
        config = LoaderConfig(simclr.image_size, job.process.device, threads=training.threads)
        if job.kept:  # pictures that training keeps are taken, and those that it lacks are kept: by the same decoders
            config = replace(config, engine_share=training.engine_share)
        return extract(
            encoder,
            job.split,
            config,
            batch=min(256, job.config.micro_batch(job.process.world) * 2),  # what the device has room for
            ids=own,
            max_bad_fraction=simclr.max_bad_fraction,
            silent=True,
            kept=job.kept,
        )


def _append(path: Path, line: dict[str, Any]) -> None:
    with refusals_named(path), path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
