"""What a run folder says of its run, read for a report; whatever is missing or damaged in it is left out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simclr_dali.shards.durable import read_object
from simclr_dali.shards.errors import UserError

# More points than a screen has pixels only make a page heavy: longer curves are means over bins of steps.
POINTS = 800

Curve = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Run:
    """A run, as far as it has come."""

    path: Path
    name: str
    """By which it is told from the others of a report."""
    config: dict[str, Any]
    metrics: Curve
    """By name of metrics.jsonl, with "step" counted from 1; means over bins where there are more than POINTS steps."""
    speed: Curve
    knn: Curve
    starts: list[dict[str, Any]]
    """Lines of starts.jsonl."""
    steps: int
    """Steps that are done."""
    finished: dict[str, Any]
    """finished.json; empty while the run is not finished."""
    probes: list[dict[str, Any]]
    """Results of evaluations, with the name of their "file"."""
    trouble: list[str] = field(default_factory=list)
    """What was damaged or replaced, in words."""


def read_runs(paths: list[Path]) -> list[Run]:
    """Raises UserError where one of them is no run folder, or is given twice."""
    absolute = [path.absolute() for path in paths]
    for number, path in enumerate(absolute):
        if path in absolute[:number]:
            raise UserError(f"{paths[number]} is given twice; give each run once")
    return [read_run(path, name) for path, name in zip(absolute, names_of(absolute), strict=True)]


def names_of(paths: list[Path]) -> list[str]:
    """What tells paths apart: without the folders with which all begin, and those with which all end."""
    parts = [list(path.parts) for path in paths]
    for end in (0, -1):
        while all(len(one) > 1 and one[end] == parts[0][end] for one in parts):
            for one in parts:
                one.pop(end)
            if len(parts) == 1:
                return [paths[0].name]
    return ["/".join(one) for one in parts]


def read_run(path: Path, name: str) -> Run:
    """Raises UserError where ``path`` is no run folder."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no run folder (it has no config.json); give the --run of a training")
    config = read_object(path / "config.json")
    if not isinstance(config.get("simclr"), dict):
        raise UserError(f"{path / 'config.json'} is damaged; start the run's command again, which writes it anew")
    lines = list(_lines(path / "metrics.jsonl"))
    if not lines:
        raise UserError(f"{path} has no steps yet (metrics.jsonl is missing or empty); wait for its first lines")
    return Run(
        path=path,
        name=name,
        config=config,
        metrics=curve(lines),
        speed=curve(list(_lines(path / "speed.jsonl"))),
        knn=curve(list(_lines(path / "knn.jsonl"))),
        starts=list(_lines(path / "starts.jsonl")),
        steps=int(lines[-1]["step"]) + 1,
        finished=read_object(path / "finished.json"),
        probes=list(_probes(path)),
        trouble=list(_trouble(path)),
    )


def curve(lines: list[dict[str, Any]]) -> Curve:
    """Columns of numbers, of the names that all lines have; means over bins where there are more than POINTS lines."""
    if not lines:
        return {}
    names = [
        name
        for name, value in lines[0].items()
        if isinstance(value, int | float) and all(isinstance(line.get(name), int | float) for line in lines)
    ]
    columns = {name: np.array([line[name] for line in lines], np.float64) for name in names}
    columns["step"] = columns["step"] + 1
    edges = np.unique(np.linspace(0, len(lines), min(POINTS, len(lines)) + 1).astype(int))
    counts = np.diff(edges)
    return {name: np.add.reduceat(column, edges[:-1]) / counts for name, column in columns.items()}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The sound lines of a file of JSON lines."""
    if not path.is_file():
        return
    with path.open(errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and type(found.get("step")) is int:
                yield found


def _probes(path: Path) -> Iterator[dict[str, Any]]:
    for file in sorted([*path.glob("linear*.json"), *path.glob("knn*.json"), *path.glob("finetune*.json")]):
        found = read_object(file)
        if found:
            yield {**found, "file": file.name}


def _trouble(path: Path) -> Iterator[str]:
    for file in sorted(path.glob("bad-step-*.json")):
        found = read_object(file).get("about")
        about = found if isinstance(found, dict) else {}
        yield f"step {about.get('step')}: {about.get('reason')}, on rank {about.get('rank')} ({file.name})"
    for folder in sorted((path / "checkpoints").glob("damaged-*")):
        yield f"a checkpoint was damaged and set aside: {folder.name}"
