"""A linear classifier trained on augmented views through the frozen encoder, step by step, on any number of ranks."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from eval.frozen import Frozen
from eval.protocols import Schedule
from model.checkpoint import plain_values
from model.collectives import all_sum
from model.lars import LARS
from model.process import Process, by_rank_0, say
from model.schedule import learning_rate
from pipeline.draws import PROBE
from pipeline.loader import two_views
from pipeline.order import Order
from shards.durable import refusals_named, write_durably
from shards.errors import UserError

_LANES = 64
_WINDOW = 8


def train_head(frozen: Frozen, schedule: Schedule, state_path: Path, *, seed: int, save_every: int) -> nn.Linear:
    """The classifier after the last epoch; the encoder stays in eval mode and gets no gradient.

    state_path: file from which a stopped training goes on, to the bit, on the same number of ranks; rank 0 writes it
    every ``save_every`` steps, and it is gone at the end. Raises UserError where it is of another training, or the
    batch cannot be shared by the ranks.
    """
    process, width, classes = frozen.process, frozen.encoder.width, len(frozen.classes)
    order = build_order(frozen.train.shards.shard_sizes(), schedule.batch, process.world, seed)
    head = nn.Linear(width, classes)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        head.weight.normal_(0, schedule.init_std, generator=generator) if schedule.init_std else head.weight.zero_()
        head.bias.zero_()
    head.to(process.device)
    optimizer = build_optimizer(head, schedule)
    identity = {
        "schedule": asdict(schedule),
        "seed": seed,
        "encoder_sha256": frozen.encoder_sha256,
        "image_size": frozen.image_size,
        "train_manifest": frozen.train.shards.fingerprint,
    }
    step = resume(process, state_path, identity, head, optimizer)
    total = schedule.epochs * order.steps_per_epoch
    local = order.local_batch(process.world)
    micro_batch = next(size for size in range(min(frozen.batch, local), 0, -1) if local % size == 0)
    batches = two_views(
        frozen.train.shards,
        order,
        (PROBE,),
        frozen.setting(schedule.interpolation),
        epochs=schedule.epochs,
        start=divmod(step, order.steps_per_epoch),
        rank=process.rank,
        world=process.world,
        max_bad_fraction=0.0,
        files=frozen.train.files,
        micro_batch=micro_batch,
    )
    frozen.encoder.eval()
    with tqdm(total=total, initial=step, desc="classifier", unit=" steps", disable=process.rank > 0 or None) as bar:
        while step < total:
            for group in optimizer.param_groups:
                group["lr"] = rate(schedule, step, order.steps_per_epoch)
            optimizer.zero_grad()
            for _ in range(local // micro_batch):
                images = next(batches)
                with torch.no_grad():
                    features = frozen.encoder(images.views).float()
                labels = images.labels.to(process.device)
                (F.cross_entropy(head(features), labels, reduction="sum") / schedule.batch).backward()
            for parameter in head.parameters():
                assert parameter.grad is not None
                all_sum(parameter.grad)
            optimizer.step()
            step += 1
            bar.update()
            if process.rank == 0 and step % save_every == 0 and step < total:
                save(state_path, identity, step, head, optimizer)
    batches.close()
    if process.rank == 0:
        state_path.unlink(missing_ok=True)
    return head.requires_grad_(False)


def rate(schedule: Schedule, step: int, steps_per_epoch: int) -> float:
    """The learning rate of ``step``, from 0."""
    at = step if schedule.cosine == "step" else step // steps_per_epoch * steps_per_epoch
    return learning_rate(at, schedule.lr, 0, schedule.epochs * steps_per_epoch)


def build_order(shard_sizes: tuple[int, ...], batch: int, world: int, seed: int) -> Order:
    """The order of a training on labels. Raises UserError where ``world`` ranks cannot share the batch."""
    if batch % world:
        raise UserError(f"{world} processes cannot share a batch of {batch}; give --train-batch a multiple of {world}")
    if sum(shard_sizes) < batch:
        raise UserError(
            f"a batch of {batch} does not fit the {sum(shard_sizes)} images to train on; give a smaller --train-batch"
        )
    # The same lanes, and so the same batches, for any number of ranks that divides them.
    most = min(max(_LANES, world), batch)
    lanes = next(lanes for lanes in range(most, 0, -1) if batch % lanes == 0 and lanes % world == 0)
    return Order(shard_sizes, batch, lanes, _WINDOW, seed)


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
        state = plain_values(path.read_bytes())
        if state is None or "identity" not in state:
            raise UserError(f"{path} is damaged; remove it to begin anew")
        for key, value in identity.items():
            if state["identity"].get(key) != value:
                raise UserError(
                    f"{path} is of a training with {key} {state['identity'].get(key)!r}, this one has {value!r}; give "
                    "the same command, another --out, or remove the file"
                )
        return state

    state = by_rank_0(process, read)
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    say(process, f"going on from step {state['step']}")
    step: int = state["step"]
    return step


def save(path: Path, identity: dict[str, Any], step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Keep what a stopped training needs; whole or as it was before, whenever the process is killed."""
    buffer = io.BytesIO()
    torch.save(
        {"identity": identity, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer
    )
    with refusals_named(path):
        write_durably(path, buffer.getvalue())
