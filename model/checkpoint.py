"""Checkpoints: complete or absent, hashed, readable without unpickling code.

``RUN/checkpoints/step-00001000/`` holds ``state.pt`` (tensors and plain values) and ``checkpoint.json`` (its sha256 and
size, and whether it is kept forever); ``RUN/checkpoints/latest`` names the newest folder.
"""

import hashlib
import io
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from simclr_dali.model import migrations
from simclr_dali.model.simclr import Architecture
from simclr_dali.shards.durable import refusals_named, sync_folder, write_durably
from simclr_dali.shards.errors import UserError

_FOLDER = "checkpoints"
STATE = "state.pt"
_DESCRIPTION = "checkpoint.json"
_LATEST = "latest"
_REQUIRED = {"step", "architecture", "model", "image_size"}


class CheckpointError(UserError):
    """A checkpoint cannot be used. The message names it, says why and what to do."""


class _UnreadableError(CheckpointError):
    """A checkpoint may be sound, but its disk does not give it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read."""

    path: Path
    """The file read."""
    sha256: str
    """Of that file."""
    state: dict[str, Any]
    """What ``save`` was given."""
    skipped: tuple[tuple[Path, str], ...] = ()
    """Folder of each newer checkpoint that is damaged, and a sentence that says so."""

    def architecture(self) -> Architecture:
        """Raises CheckpointError where the state names none that can be built."""
        try:
            return Architecture.of_plain(self.state["architecture"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise CheckpointError(f"{self.path} does not name an architecture of this trainer ({reason})") from error


def plain_values(data: bytes) -> dict[Any, Any] | None:
    """What torch.save wrote, where it is a dict of tensors and plain values; else None."""
    try:
        state = _unpickle(data)
    except Exception:  # the unpickler fails on foreign bytes in a dozen ways
        return None
    return state if isinstance(state, dict) else None


def _unpickle(data: bytes) -> Any:
    if not data.startswith(b"PK\x03\x04"):
        # Of torch's older format weights_only is no protection: its views of storages can be made to lie elsewhere.
        raise ValueError("it is no zip, as torch.save writes")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def is_ours(state: dict[Any, Any]) -> bool:
    """Whether ``state`` is that of a checkpoint of this trainer."""
    return state.keys() >= _REQUIRED


def save(run: Path, state: dict[str, Any], keep: int, *, keep_forever: bool = False) -> Path:
    """Write ``state`` as the checkpoint of its "step"; remove all but the newest ``keep`` and those kept forever.

    The folder appears under its name only when its files are complete and on disk, and ``latest`` moves after that;
    a kill at any instant leaves the checkpoint before it usable. Raises UserError where the disk refuses.
    """
    assert state.keys() >= _REQUIRED
    folder = run / _FOLDER
    with refusals_named(folder):
        return _save(folder, state, keep, keep_forever)


def _save(folder: Path, state: dict[str, Any], keep: int, keep_forever: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):  # of a save or a removal that was interrupted
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
    final = folder / f"step-{state['step']:08d}"
    temporary = final.with_name(f"{final.name}.tmp")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    temporary.mkdir()
    write_durably(temporary / STATE, data)
    description = {
        "step": state["step"],
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "keep_forever": keep_forever,
    }
    write_durably(temporary / _DESCRIPTION, json.dumps(description).encode())
    if final.exists():  # damaged, or it would have been gone on from
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(folder)
    write_durably(folder / _LATEST, final.name.encode())
    for old in _steps(folder)[:-keep]:
        if not _is_kept_forever(old):
            gone = old.with_name(f"{old.name}.tmp")
            with suppress(OSError):  # the next time will do
                old.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
    return final


def newest(run: Path) -> Checkpoint | None:
    """The newest sound checkpoint of a run folder, or None where there is none at all.

    Damaged ones are skipped and named in its ``skipped``. Raises CheckpointError where all are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(_steps(run / _FOLDER)):
        try:
            return replace(_load_verified(folder), skipped=tuple(damaged))
        except _UnreadableError:
            raise
        except CheckpointError as error:
            damaged.append((folder, str(error)))
    if damaged:
        raise CheckpointError(f"{damaged[0][1]}, and there is no sound one before it; start a new run")
    return None


def newest_step(run: Path) -> int | None:
    """The step of the newest checkpoint of a run folder, sound or not; None where there is none."""
    found = _steps(run / _FOLDER)
    return int(found[-1].name.removeprefix("step-")) if found else None


def load(path: Path) -> Checkpoint:
    """Read a run folder (its newest checkpoint), a checkpoint's folder or its ``state.pt``.

    Raises CheckpointError where it is missing, damaged or no checkpoint of ours.
    """
    if path.is_dir() and (path / STATE).is_file():
        return _load_verified(path)
    if path.is_dir():
        found = newest(path)
        if found is None:
            raise CheckpointError(f"{path} holds no checkpoint; give a run folder, a folder step-*, or its {STATE}")
        if found.skipped:
            raise CheckpointError(f"{found.skipped[0][1]}; to use the one before it, give {found.path.parent}")
        return found
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; give a run folder, a folder step-*, or its {STATE}")
    if path.name == STATE and (path.parent / _DESCRIPTION).is_file():
        return _load_verified(path.parent)
    return _load_file(path, path.read_bytes())


def _steps(folder: Path) -> list[Path]:
    return sorted(step for step in folder.glob("step-*") if step.suffix != ".tmp")


def _is_kept_forever(folder: Path) -> bool:
    try:
        description = migrations.checkpoint_description(json.loads((folder / _DESCRIPTION).read_text()))
    except OSError:
        return True  # it cannot be told now
    except (ValueError, TypeError):
        return False
    return bool(description.get("keep_forever"))


def _load_verified(folder: Path) -> Checkpoint:
    path = folder / STATE
    try:
        expected = json.loads((folder / _DESCRIPTION).read_text())["sha256"]
        data = path.read_bytes()
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged ({error})") from error
    except OSError as error:  # which says nothing about the checkpoint
        raise _UnreadableError(f"checkpoint {folder} cannot be read ({error.strerror}); see to the disk") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise CheckpointError(f"checkpoint {path} is damaged (its sha256 differs from {_DESCRIPTION})")
    return _load_file(path, data)


def _load_file(path: Path, data: bytes) -> Checkpoint:
    try:
        state = _unpickle(data)
    except Exception as error:  # the unpickler fails on foreign bytes in a dozen ways; whichever, it is no checkpoint
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read without running code from it ({reason})"
        ) from error
    if not isinstance(state, dict) or not is_ours(state):
        found = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path} is no checkpoint of this trainer (it holds {found}); give a run folder or its {STATE}"
        )
    return Checkpoint(path, hashlib.sha256(data).hexdigest(), state)
