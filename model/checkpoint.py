"""Checkpoints: complete or absent, hashed, readable without unpickling code.

``RUN/checkpoints/step-00001000/`` holds ``state.pt`` (tensors and plain values) and ``checkpoint.json`` (its sha256 and
size); ``RUN/checkpoints/latest`` names the newest folder.
"""

import hashlib
import io
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from model.encoder import Architecture

_FOLDER = "checkpoints"
_STATE = "state.pt"
_DESCRIPTION = "checkpoint.json"
_LATEST = "latest"
_REQUIRED = {"step", "architecture", "model", "image_size"}


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names it, says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """path: the file read. sha256: of that file. state: what ``save`` was given."""

    path: Path
    sha256: str
    state: dict[str, Any]

    def architecture(self) -> Architecture:
        fields = dict(self.state["architecture"])
        return Architecture(**{**fields, "projector": tuple(fields["projector"])})


def describe(architecture: Architecture) -> dict[str, Any]:
    """``architecture`` in plain values, as a checkpoint holds it."""
    return {**asdict(architecture), "projector": list(architecture.projector)}


def save(run: Path, state: dict[str, Any], keep: int) -> Path:
    """Write ``state`` as the checkpoint of its "step" and let all but the newest ``keep`` go.

    The folder appears under its name only when its files are complete and on disk, and ``latest`` moves after that;
    a kill at any instant leaves the checkpoint before it usable.
    """
    assert state.keys() >= _REQUIRED
    folder = run / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    final = folder / f"step-{state['step']:08d}"
    if final.exists():
        shutil.rmtree(final)
    temporary = final.with_name(f"{final.name}.tmp")
    temporary.mkdir()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    _write(temporary / _STATE, data)
    description = {"step": state["step"], "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    _write(temporary / _DESCRIPTION, json.dumps(description).encode())
    _sync(temporary)
    temporary.rename(final)
    latest = folder / f"{_LATEST}.tmp"
    _write(latest, final.name.encode())
    latest.replace(folder / _LATEST)
    _sync(folder)
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder, or None where there is none.

    Raises CheckpointError where the newest is damaged; it names the one before it, if any.
    """
    steps = _steps(run / _FOLDER)
    if not steps:
        return None
    try:
        return _load_verified(steps[-1])
    except CheckpointError as error:
        advice = (
            f"remove it to go on from {steps[-2].name}" if len(steps) > 1 else "it is the only one: start a new run"
        )
        raise CheckpointError(f"{error}; {advice}") from error


def load(path: Path) -> Checkpoint:
    """Read a run folder (its newest checkpoint), a checkpoint's folder or its ``state.pt``.

    Raises CheckpointError where it is missing, damaged or no checkpoint of ours.
    """
    if path.is_dir() and (path / _STATE).is_file():
        return _load_verified(path)
    if path.is_dir():
        found = newest(path)
        if found is None:
            raise CheckpointError(f"{path} holds no checkpoint; give a run folder, a folder step-*, or its {_STATE}")
        return found
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; give a run folder, a folder step-*, or its {_STATE}")
    if path.name == _STATE and (path.parent / _DESCRIPTION).is_file():
        return _load_verified(path.parent)
    return _load_file(path, path.read_bytes())


def _steps(folder: Path) -> list[Path]:
    return sorted(step for step in folder.glob("step-*") if step.suffix != ".tmp")


def _load_verified(folder: Path) -> Checkpoint:
    path = folder / _STATE
    try:
        expected = json.loads((folder / _DESCRIPTION).read_text())["sha256"]
        data = path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged ({error})") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise CheckpointError(f"checkpoint {path} is damaged (its sha256 differs from {_DESCRIPTION})")
    return _load_file(path, data)


def _load_file(path: Path, data: bytes) -> Checkpoint:
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler fails on foreign bytes in a dozen ways; whichever, it is no checkpoint
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read without running code from it ({reason})"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= _REQUIRED:
        found = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path} is no checkpoint of this trainer (it holds {found}); give a run folder or its {_STATE}"
        )
    return Checkpoint(path, hashlib.sha256(data).hexdigest(), state)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
