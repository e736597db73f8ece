"""What a run tells to TensorBoard, Weights & Biases and MLflow, by their own libraries, beside its own files.

A tracker gets the scalars of metrics.jsonl and speed.jsonl under the names that they have there, knn_top1, the config,
and a sheet of the first views. It works in a thread of its own: one that fails or cannot keep up is left behind with
one warning, and the run neither stops nor waits for it.
"""

import importlib.util
import json
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from simclr_dali.model.process import print_now
from simclr_dali.shards.durable import write_durably
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.nested import flat

_PROJECT = "simclr-dali"
# What may wait for a tracker: some minutes of lines of progress.
_WAITING = 256
_SECONDS_AT_THE_END = 60.0

Pixels = npt.NDArray[np.uint8]


class Tracker(Protocol):
    """One of the libraries, on its way into one run."""

    def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
        """kind: "progress" or "knn", each of which comes once for a step."""

    def picture(self, name: str, pixels: Pixels) -> None:
        """pixels: uint8 [h, w, 3]."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard. What an interrupted run wrote past its checkpoint is purged as TensorBoard does
    it: by the step at which the next file begins."""

    def __init__(self, run: Path, config: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(run / "tensorboard", purge_step=first_step)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", first_step)

    def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: Pixels) -> None:
        self._writer.add_image(name, pixels, 0, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, where its own variables (WANDB_MODE, WANDB_PROJECT and so on) say; its files lie in
    RUN/wandb."""

    def __init__(self, run: Path, config: dict[str, Any], first_step: int) -> None:
        import wandb

        self._told = _Told(run / "wandb-run.json", _new_id)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            id=self._told.id,
            resume="allow",
            dir=run,
            config=config,
            # The run's own lines stay its own, and its signals too.
            settings=wandb.Settings(console="off", quiet=True, disable_git=True, save_code=False),
        )

    def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
        if not self._told.is_new(step, kind):
            return
        if kind == "progress":
            self._run.log(dict(values), step=step)
        else:  # may be about a step before the last one, to which W&B does not go back
            self._run.log({**values, f"{kind}_step": step})

    def picture(self, name: str, pixels: Pixels) -> None:
        import wandb

        self._run.summary[name] = wandb.Image(pixels)

    def flush(self) -> None:
        self._told.save()

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says, else in RUN/mlflow.db (MLflow's own folders of files are not
    maintained any more)."""

    def __init__(self, run: Path, config: dict[str, Any], first_step: int) -> None:
        from mlflow.tracking import MlflowClient

        self._told = _Told(run / "mlflow-run.json", lambda: self._begin(run, config))
        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.absolute() / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=address)
        self._client.set_terminated(self._told.id, status="RUNNING")

    def _begin(self, run: Path, config: dict[str, Any]) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        place = None if os.environ.get("MLFLOW_TRACKING_URI") else (run.absolute() / "mlflow").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=place)
        begun = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        self._client.log_batch(begun, params=[Param(key, str(value)[:500]) for key, value in flat(config).items()])
        self._client.log_dict(begun, config, "config.json")
        return begun

    def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
        from mlflow.entities import Metric

        if self._told.is_new(step, kind):
            now = int(1e3 * time.time())
            self._client.log_batch(self._told.id, [Metric(name, value, now, step) for name, value in values.items()])

    def picture(self, name: str, pixels: Pixels) -> None:
        self._client.log_image(self._told.id, pixels, f"{name}.png")

    def flush(self) -> None:
        self._told.save()

    def close(self) -> None:
        self._client.set_terminated(self._told.id)


class _Told:
    """The id that a run has with a tracker, and the last step it was told of, by kind, kept in the run folder: steps
    that a resumed run takes again are the same, and are not told twice."""

    def __init__(self, path: Path, new_id: Callable[[], str]) -> None:
        self._path, self._new_id = path, new_id
        self._id = ""
        self._before: dict[str, int] = {}
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(path.read_text())
            self._id = str(found["id"])
            self._before = {str(kind): int(step) for kind, step in found["last_steps"].items()}
        self._now = dict(self._before)

    @property
    def id(self) -> str:
        if not self._id:
            self._id = self._new_id()
            self.save()
        return self._id

    def is_new(self, step: int, kind: str) -> bool:
        """Whether ``step`` was not told by an earlier start; it counts as told from then on."""
        self._now[kind] = max(step, self._now.get(kind, -1))
        return step > self._before.get(kind, -1)

    def save(self) -> None:
        write_durably(self._path, json.dumps({"id": self._id, "last_steps": self._now}).encode())


def _new_id() -> str:
    return uuid.uuid4().hex


# By the name of the library, which is also that of its module.
_MADE_BY: dict[str, type] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def chosen(track: Sequence[str] | str) -> list[str]:
    """The trackers that ``simclr.track`` stands for: "auto" is TensorBoard where it is installed.

    Raises UserError for one that is named and not installed.
    """
    installed = [name for name in _MADE_BY if importlib.util.find_spec(name)]
    if isinstance(track, str):
        return [name for name in ("tensorboard",) if name in installed]
    if missing := [name for name in track if name not in installed]:
        raise UserError(
            f"simclr.track names {missing[0]}, which is not installed; run pip install -e '.[track]', or remove it"
        )
    return list(dict.fromkeys(track))


class Trackers:
    """The chosen trackers of a run; a context, at whose end each has what it was told."""

    def __init__(
        self, names: Sequence[str] = (), run: Path = Path(), config: dict[str, Any] | None = None, first_step: int = 0
    ) -> None:
        """config: as resolved. first_step: at which this start of the run begins."""
        config = config or {}
        self._background = [_Background(name, partial(_MADE_BY[name], run, config, first_step)) for name in names]

    def progress(self, lines: Sequence[Mapping[str, float]], speed: Mapping[str, float]) -> None:
        """Tell of lines of metrics.jsonl, and of the line of speed.jsonl after them."""

        def tell(tracker: Tracker) -> None:
            for line in lines:
                last = speed if line is lines[-1] else {}
                values = {name: value for name, value in {**line, **last}.items() if name != "step"}
                tracker.scalars(int(line["step"]), values, "progress")
            tracker.flush()

        self._tell(tell)

    def knn(self, line: Mapping[str, float]) -> None:
        """Tell of a line of knn.jsonl."""
        self._tell(lambda tracker: tracker.scalars(int(line["step"]), {"knn_top1": line["top1"]}, "knn"))

    def picture(self, name: str, draw: Callable[[], Pixels]) -> None:
        """Show a picture, uint8 [h, w, 3], which is drawn in the background; one that cannot be drawn is left out."""

        def tell(tracker: Tracker) -> None:
            try:
                pixels = draw()
            except Exception as error:
                print_now(f"warning: trackers are shown no {name}: {error}", file=sys.stderr)
            else:
                tracker.picture(name, pixels)

        self._tell(tell)

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for one in self._background:
            one.tell(what)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._background:
            one.close()


class _Background:
    """A tracker in a thread of its own, from its import on."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name, self._make = name, make
        self._queue: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_WAITING)
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def tell(self, what: Callable[[Tracker], None]) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait(what)
        except queue.Full:
            self._fail("it does not keep up")

    def close(self) -> None:
        with suppress(queue.Full):
            self._queue.put(None, timeout=_SECONDS_AT_THE_END)
        self._thread.join(0.0 if self._failed else _SECONDS_AT_THE_END)
        if self._thread.is_alive() and not self._failed:
            self._fail("it takes too long to end")

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (what := self._queue.get()) is not None and not self._failed:
                what(tracker)
            tracker.close()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            print_now(
                f"warning: {self._name} is told nothing any more ({' '.join(why.split())[:300]}); the run goes on, and "
                "its own files have everything",
                file=sys.stderr,
            )
