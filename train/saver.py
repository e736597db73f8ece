"""Checkpoints that are written while training goes on, of states that are sound."""

import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_dali.model import checkpoint
from simclr_dali.model.process import Process
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

    def save(self, state: dict[str, Any], *, keep_forever: bool = False) -> None:
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
                checkpoint.save(self._run, host, self._keep, keep_forever=keep_forever)
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


def all_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether weights, statistics and momenta are finite on all ranks. All ranks call it; it waits for the device."""
    momenta = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    tensors = [value for value in (*model.state_dict().values(), *momenta) if value.is_floating_point()]
    device = next(model.parameters()).device
    finite = torch.stack([value.isfinite().all().to(device) for value in tensors]).all().int()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def refuse_drift(model: nn.Module, process: Process, step: int) -> None:
    """Raise UserError unless all ranks hold the same weights to the bit. All ranks call it; it waits for the device."""
    # A sum over the bits, as integers, changes with every single one of them.
    sums = torch.stack([parameter.detach().view(torch.int32).sum() for parameter in model.parameters()])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        names = [name for name, _ in model.named_parameters()]
        first = names[int((low != high).nonzero()[0])]
        raise UserError(
            f"the ranks do not hold the same weights at step {step} (first: {first}); one of them computes wrongly: "
            "look at its memory errors; nothing was saved, so the run goes on from the last checkpoint"
        )
