"""Training on labels, step by step, on any number of ranks: of a classifier alone, or of the whole network."""

import io
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from simclr_dali.eval.evaluation import Evaluation
from simclr_dali.eval.protocols import Schedule
from simclr_dali.model import migrations
from simclr_dali.model.checkpoint import plain_values
from simclr_dali.model.collectives import all_sum
from simclr_dali.model.lars import LARS
from simclr_dali.model.process import Process, from_all_ranks, on_rank_0, print_rank_0
from simclr_dali.model.schedule import learning_rate
from simclr_dali.pipeline.batch_plan import BatchPlan
from simclr_dali.pipeline.draws import PROBE
from simclr_dali.pipeline.kept_memory import Processes, set_aside
from simclr_dali.pipeline.loader import TwoViews
from simclr_dali.pipeline.order import Ids, Order
from simclr_dali.pipeline.subset import Subset
from simclr_dali.shards.durable import write_durably
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet

_LANES = 64
_WINDOW = 8


def train(
    job: Evaluation,
    model: nn.Module,
    scores: Callable[[Tensor], Tensor],
    ids: Ids | None,
    schedule: Schedule,
    state_path: Path,
    *,
    seed: int,
    save_every: int,
) -> None:
    """Train ``model`` in place, on the device, by cross-entropy on crops and flips of the samples ``ids`` (None: all).

    scores: views [n, 3, size, size] -> scores [n, classes], through ``model``. state_path: file from which a stopped
    training goes on, on the CPU to the bit on as many ranks; rank 0 writes it every ``save_every`` steps and at the
    end, and who called removes it once the results are written. Raises UserError where it is of another training, the
    ranks cannot share the batch, or the loss is not finite.
    """
    process = job.process
    order = build_order(job.train.shards, ids, schedule.batch, process.world, seed)
    optimizer = build_optimizer(model, schedule)
    local = order.local_batch(process.world)
    micro = micro_batch(job.batch, local)
    identity = identity_of(job, model, schedule, order, seed, micro)
    step = resume(process, state_path, identity, model, optimizer)
    total = schedule.epochs * order.steps_per_epoch
    batches = crops_and_flips(job, order, ids, schedule, step, micro)
    parameters = list(model.parameters())
    with tqdm(total=total, initial=step, desc="training", unit=" steps", disable=process.rank > 0 or None) as bar:
        while step < total:
            for group in optimizer.param_groups:
                group["lr"] = rate(schedule, step, order.steps_per_epoch)
            optimizer.zero_grad()
            loss = torch.zeros((), device=process.device)
            for _ in range(local // micro):
                images = next(batches)
                part = F.cross_entropy(scores(images.views), images.labels.to(process.device), reduction="sum")
                (part / schedule.batch).backward()
                loss += part.detach() / schedule.batch
            reduce_gradients(parameters)
            optimizer.step()
            step += 1
            bar.update()
            if step % save_every == 0 or step == total:
                if not torch.isfinite(all_sum(loss)):
                    raise UserError(
                        f"the loss is {loss.item()} at step {step - 1}; this encoder does not take a learning rate of "
                        f"{schedule.lr:g}: give a smaller --train-batch, which lowers it"
                    )
                if process.rank == 0:
                    save(state_path, identity, step, model, optimizer)
    batches.close()


def identity_of(
    job: Evaluation, model: nn.Module, schedule: Schedule, order: Order | Subset, seed: int, micro: int
) -> dict[str, Any]:
    """What must be equal for a stopped training to be continued."""
    return {
        "schedule": asdict(schedule),
        "seed": seed,
        "encoder_sha256": job.encoder_sha256,
        "image_size": job.image_size,
        "train_manifest": job.train.shards.fingerprint,
        "conventions": job.encoder.conventions(),
        "normalised together": micro * job.process.world if any(map(_is_norm, model.modules())) else 0,
        "images": "all" if isinstance(order, Order) else order.fingerprint(),
    }


def crops_and_flips(
    job: Evaluation, order: Order | Subset, ids: Ids | None, schedule: Schedule, step: int, micro: int
) -> TwoViews:
    """This rank's micro-batches of one view each, from ``step`` on. All ranks call it."""
    kept = None
    if step < (schedule.epochs - 1) * order.steps_per_epoch:
        kept, told = set_aside(
            job.train.shards,
            job.keep_decoded,
            job.process.device,
            ids=ids,
            processes=Processes(job.process.rank, from_all_ranks),
        )
        print_rank_0(job.process, told)
    plan = BatchPlan(
        order,
        epochs=schedule.epochs,
        start=divmod(step, order.steps_per_epoch),
        rank=job.process.rank,
        world=job.process.world,
        micro_batch=micro,
    )
    config = job.loader_config(schedule.interpolation)
    return TwoViews(job.train, plan, (PROBE,), config, max_bad_fraction=0.0, kept=kept)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def state_of(out: Path) -> Path:
    """Where a training whose results are called ``out`` keeps what it needs to go on."""
    return out.with_name(f"{out.name}.state.pt")


def reduce_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients of all ranks, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    summed = all_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    places = np.cumsum([gradient.numel() for gradient in gradients])[:-1].tolist()
    for gradient, part in zip(gradients, summed.tensor_split(places), strict=True):
        gradient.copy_(part.view_as(gradient))


def rate(schedule: Schedule, step: int, steps_per_epoch: int) -> float:
    """The learning rate of ``step``, from 0."""
    at = step if schedule.cosine == "step" else step // steps_per_epoch * steps_per_epoch
    return learning_rate(at, schedule.lr, 0, schedule.epochs * steps_per_epoch)


def build_order(shards: ShardSet, ids: Ids | None, batch: int, world: int, seed: int) -> Order | Subset:
    """The order over ``ids`` (None: all). Raises UserError where ``world`` ranks cannot share the batch."""
    images = len(shards) if ids is None else len(ids)
    if batch % world:
        raise UserError(f"{world} processes cannot share a batch of {batch}; give --train-batch a multiple of {world}")
    if images < batch:
        raise UserError(
            f"a batch of {batch} does not fit the {images} images to train on; give a smaller --train-batch"
        )
    # The same lanes, and so the same batches, for any number of ranks that divides them.
    most = min(max(_LANES, world), batch)
    lanes = next(lanes for lanes in range(most, 0, -1) if batch % lanes == 0 and lanes % world == 0)
    if ids is None:
        return Order(shards.shard_sizes(), batch, lanes, _WINDOW, seed)
    return Subset(shards, ids, batch, lanes, _WINDOW, seed)


def micro_batch(most: int, local: int) -> int:
    """The largest divisor of a rank's share ``local`` of a batch that is at most ``most``.

    Raises UserError where that is less than half of it.
    """
    size = next(size for size in range(min(most, local), 0, -1) if local % size == 0)
    if 2 * size < min(most, local):
        raise UserError(
            f"the {local} images of a process have no divisor close below --batch {most} (the largest is {size}); "
            "change --train-batch, --batch or the number of processes"
        )
    return size


def build_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": schedule.weight_decay},
        {"params": others, "weight_decay": schedule.weight_decay if schedule.decay_bias else 0.0},
    ]
    if schedule.optimizer == "lars":
        return LARS(groups, schedule.lr, schedule.momentum)
    return torch.optim.SGD(groups, schedule.lr, schedule.momentum, nesterov=schedule.optimizer == "nesterov")


def resume(
    process: Process, path: Path, identity: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load what :func:`save` wrote on rank 0 into all ranks; return the step to go on with, 0 where there is none.

    Raises UserError where the file is damaged, or of a training with another ``identity``.
    """

    def read() -> dict[Any, Any] | None:
        if not path.is_file():
            return None
        try:
            state = plain_values(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); repair it, or remove it to begin anew"
            ) from error
        if state is None or "identity" not in state:
            raise UserError(f"{path} is damaged; remove it to begin anew")
        then = migrations.conventions(state["identity"])
        for key, value in identity.items():
            if then.get(key) != value:
                raise UserError(
                    f"{path} is of a training with {key} {then.get(key)!r}, this one has {value!r}; give the same "
                    "command, another --out, or remove the file"
                )
        return state

    state = on_rank_0(process, read)
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print_rank_0(process, f"going on from step {state['step']}")
    step: int = state["step"]
    return step


def save(path: Path, identity: dict[str, Any], step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Keep what a stopped training needs; whole or as it was before, whenever the process is killed."""
    buffer = io.BytesIO()
    torch.save(
        {"identity": identity, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer
    )
    write_durably(path, buffer.getbuffer(), tag=f".{os.getpid()}")
