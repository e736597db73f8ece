"""Trackers: what their own libraries read back, over stops, kills and repeated steps; and that none holds a run up."""

import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr_dali.shards.errors import UserError
from simclr_dali.train import trackers
from simclr_dali.train.trackers import Trackers, chosen
from tests.conftest import assert_sentence
from tests.runs import metrics, pretrain, tiny_config, wait_until

CONFIG = {"train_batch_size": 16, "simclr": {"epochs": 2}}


def line(step: int) -> dict[str, float]:
    return {"step": step, "epoch": step // 5, "lr": 0.1, "loss": 5.0 - step / 100, "top1": step / 100}


def tell(names: list[str], run: Path, first: int, last: int, *, knn: int) -> None:
    """Of the steps first .. last - 1 of a run, three at a time, and of a kNN check after step ``knn``."""
    with Trackers(names, run, CONFIG, first) as told:
        if first == 0:
            told.picture("views", lambda: np.full((20, 30, 3), 128, np.uint8))
        for step in range(first, last, 3):
            lines = [line(step) for step in range(step, min(step + 3, last))]
            told.progress(lines, {"step": lines[-1]["step"], "images_per_s": 100.0, "wait_share": 0.25})
        told.knn({"step": knn, "top1": 37.5})


def begin_and_go_on(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten steps, and after a kill the same from the checkpoint at 6 on: to 14, with a check that was missed at 5."""
    run.mkdir()
    tell([name], run, 0, 10, knn=2)
    tell([name], run, 6, 14, knn=5)
    assert "warning" not in capsys.readouterr().err


def tensorboard_scalars(run: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert len(steps) == len(set(steps)), name
        found[name] = {event.step: event.value for event in events.Scalars(name)}
    return found


def assert_whole(found: dict[str, dict[int, float]]) -> None:
    for name in ("loss", "lr", "epoch", "top1"):
        assert found[name] == pytest.approx({step: line(step)[name] for step in range(14)})
    assert found["images_per_s"].keys() == found["wait_share"].keys() >= {2, 5, 8, 13}


def test_tensorboard_has_every_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin_and_go_on("tensorboard", tmp_path / "run", capsys)
    found = tensorboard_scalars(tmp_path / "run")
    assert_whole(found)
    assert found["knn_top1"] == {2: 37.5, 5: 37.5}


def records(path: Path) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format, blocks of 32 KiB with records in parts, behind 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def wandb_scalars(run: Path) -> tuple[dict[str, dict[int, float]], set[str], set[str]]:
    """Of all starts together: scalars by name and step, ids of runs, and keys of their config."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    found: dict[str, dict[int, float]] = {}
    ids, keys = set(), set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(path):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                keys |= {item.key for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for name, value in values.items():
                    steps = found.setdefault(name, {})
                    step = int(values["knn_step"] if name == "knn_top1" else values["_step"])
                    assert step not in steps
                    steps[step] = value
    return found, ids, keys


def test_wandb_has_every_step_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    begin_and_go_on("wandb", run, capsys)
    # Its own process writes the file, and may do so a little later.
    wait_until(lambda: len(wandb_scalars(run)[0].get("knn_top1", ())) == 2, seconds=30)
    found, ids, keys = wandb_scalars(run)
    assert len(ids) == 1 and {"train_batch_size", "simclr"} <= keys
    assert_whole(found)
    assert found["knn_top1"] == {2: 37.5, 5: 37.5}
    assert list((run / "wandb").rglob("views*.png"))


def test_mlflow_has_every_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.tracking import MlflowClient

    run = tmp_path / "run"
    begin_and_go_on("mlflow", run, capsys)
    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("simclr-dali")
    assert experiment is not None
    (kept,) = client.search_runs([experiment.experiment_id])
    found = {}
    for name in kept.data.metrics:
        history = [(entry.step, entry.value) for entry in client.get_metric_history(kept.info.run_id, name)]
        assert len(history) == len(dict(history)), name
        found[name] = dict(history)
    assert_whole(found)
    assert found["knn_top1"] == {2: 37.5, 5: 37.5}
    assert kept.data.params["simclr.epochs"] == "2" and kept.info.status == "FINISHED"
    assert {path.name for path in (run / "mlflow").rglob("*.*")} >= {"views.png", "config.json"}


class Failing:
    """Takes what it is told until it is told once too often, as a server that goes away."""

    def __init__(self, run: Path, config: dict[str, Any], first_step: int) -> None:
        self.left = 2

    def scalars(self, step: int, values: dict[str, float], kind: str) -> None:
        self.left -= 1
        if not self.left:
            raise OSError("the server\nis gone")

    def picture(self, name: str, pixels: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_a_tracker_that_fails_is_left_behind_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers._MADE_BY, "wandb", Failing)
    tell(["wandb", "tensorboard"], tmp_path, 0, 14, knn=2)
    assert capsys.readouterr().err == (
        "warning: wandb is told nothing any more (OSError: the server is gone); the run goes on, and its own files "
        "have everything\n"
    )
    assert len(tensorboard_scalars(tmp_path)["loss"]) == 14


def test_a_tracker_that_hangs_neither_stops_a_run_nor_slows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()

    class Hanging(Failing):
        def scalars(self, step: int, values: dict[str, float], kind: str) -> None:
            held.wait()

    monkeypatch.setitem(trackers._MADE_BY, "wandb", Hanging)
    monkeypatch.setattr(trackers, "_SECONDS_AT_THE_END", 0.1)
    tell(["wandb"], tmp_path, 0, 14, knn=2)
    assert capsys.readouterr().err.count("takes too long to end") == 1
    monkeypatch.setattr(trackers, "_WAITING", 2)
    tell(["wandb"], tmp_path, 0, 99, knn=2)
    assert capsys.readouterr().err.count("does not keep up") == 1
    held.set()


def test_views_that_cannot_be_drawn_cost_a_tracker_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw() -> Any:
        raise UserError("the disk is gone")

    with Trackers(["tensorboard"], tmp_path, CONFIG, 0) as told:
        told.picture("views", draw)
        told.progress([line(0)], {"step": 0, "images_per_s": 100.0, "wait_share": 0.25})
    assert "no views: the disk is gone" in capsys.readouterr().err and tensorboard_scalars(tmp_path)["loss"] == {0: 5.0}


def test_tensorboard_is_told_where_it_is_installed_and_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen("auto") == ["tensorboard"] and chosen([]) == []
    assert chosen(["mlflow", "wandb", "mlflow"]) == ["mlflow", "wandb"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen("auto") == []
    with pytest.raises(UserError, match=r"simclr\.track names wandb, which is not installed; run pip install"):
        chosen(["wandb"])


@pytest.mark.launch
def test_a_run_is_told_to_tensorboard_as_it_is_written(packed: Path, tmp_path: Path) -> None:
    """Over a stop; with the views of its first batch, and a check of nearest neighbours."""
    config, run = tiny_config(tmp_path), tmp_path / "run"
    words = ["--set", 'simclr.track="auto"', "--set", "simclr.knn_every_epochs=1", "--set", "simclr.knn_images=100"]
    for more in (["--stop-after-steps", 17], []):
        done = pretrain(config, packed, run, *words, *more)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    found = tensorboard_scalars(run)
    for written in metrics(run):
        for name, value in written.items():
            assert name == "step" or found[name][int(written["step"])] == pytest.approx(value, rel=1e-6)
    assert len(found["loss"]) == 30 and len(found["knn_top1"]) == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["views"] and "config/text_summary" in events.Tags()["tensors"]


def test_an_unknown_tracker_is_refused(packed: Path, tmp_path: Path) -> None:
    done = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", "--set", 'simclr.track=["comet"]')
    assert_sentence(done, "simclr.track")
