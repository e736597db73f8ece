"""Checkpoints that are written while training goes on."""

import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simclr_dali.model import checkpoint
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.errors import UserError


class Saver:
    """Copies the state to host memory and leaves writing it to a thread; one checkpoint is on its way at a time.

    As a context it ends only when the last checkpoint is on disk, also where an error ends the training: the process
    would leave without it.
    """

    def __init__(self, run: Path, keep: int, first_step: int = 0) -> None:
        """first_step: of the checkpoint that the run went on from, 0 for none."""
        self._run, self._keep, self._written = run, keep, first_step
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        with suppress(UserError) if error_type else nullcontext():
            self.wait()

    def save(self, state: dict[str, Any], *, for_good: bool = False) -> None:
        """Begin to write ``state`` as it is now (model.checkpoint.save); later changes of its tensors are not in it.

        Waits for the checkpoint before. Raises what :meth:`wait` raises.
        """
        self.wait()
        on_gpu = any(tensor.is_cuda for tensor in state["model"].values())
        host = _on_host(state)
        copied = torch.cuda.current_stream().record_event() if on_gpu else None

        def write() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                checkpoint.save(self._run, host, self._keep, for_good=for_good)
                self._written = state["step"]
            except BaseException as failure:  # handed to the thread that trains
                self._failure = failure

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is on disk. Raises UserError where the disk refused it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.refuse_failure()

    def last_kept(self) -> str:
        """Which checkpoint a run would go on from now, once what is being written is written. For a message."""
        with suppress(UserError):
            self.wait()
        return f"that of step {self._written}" if self._written else "none yet"

    def refuse_failure(self) -> None:
        """Raise UserError where the disk has refused a checkpoint by now."""
        failure, self._failure = self._failure, None
        if failure is not None:
            with refusals_named(self._run / "checkpoints"):
                raise failure


def _on_host(value: Any) -> Any:
    """A copy in host memory; from a GPU in the order of its stream, without waiting for it."""
    if isinstance(value, Tensor):
        on_gpu = value.is_cuda
        return torch.empty_like(value, device="cpu", pin_memory=on_gpu).copy_(value, non_blocking=on_gpu)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_host(item) for item in value)
    return value
