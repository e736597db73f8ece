"""Processes, device, optimizer and the DeepSpeed engine."""

import logging
import os
from datetime import timedelta
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from simclr_dali.model.batchnorm import groups_of_ranks, synchronised
from simclr_dali.model.lars import LARS, parameter_groups
from simclr_dali.model.process import Process, init_distributed, on_gpu
from simclr_dali.model.simclr import SimCLR
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.wording import listed
from simclr_dali.train.compilation import compile_network, resolved
from simclr_dali.train.config import CONSTANTS, AdamWBlock, Config, LARSBlock
from simclr_dali.train.reduction import GradientReduction


def start(patience: timedelta) -> Process:
    """Join the other ranks with DeepSpeed; see model.process.init_distributed."""
    import_deepspeed(torch.device("cuda" if on_gpu() else "cpu"))
    # Gradients and BatchNorm use a process group each at the same time, in the same order on all ranks; NCCL is to keep
    # that order on the device as well.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    process = init_distributed(patience)
    import_deepspeed(process.device).init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, timeout=patience
    )
    return process


def import_deepspeed(device: torch.device) -> Any:
    """The module deepspeed, kept from compiling anything on the CPU."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read on import
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # On the CPU, init_distributed compiles a C++ all-reduce for inference (many minutes, and a killed build hangs
        # the next run) unless DeepSpeed's cached table of ops that this machine can build lacks it. 0.19.8 offers no
        # other switch.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed


def deepspeed_config(config: Config, process: Process) -> dict[str, Any]:
    """The part of the configuration that DeepSpeed sees, resolved for this number of processes and this device."""
    return {
        "train_batch_size": config.train_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch(process.world),
        "gradient_accumulation_steps": config.passes(process.world),
        "gradient_clipping": CONSTANTS["gradient_clipping"],
        "communication_data_type": CONSTANTS["communication_data_type"],
        "zero_optimization": {"stage": CONSTANTS["zero_optimization.stage"]},
        "torch_autocast": {
            "enabled": config.torch_autocast.on(process.device.type),
            "dtype": CONSTANTS["torch_autocast.dtype"],
        },
        # The timer would wait for the device twice a step; we time on the host.
        "timers": {"throughput": {"enabled": False}},
    }


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """LARS (ours), or torch's SGD or AdamW; biases and BatchNorm are not decayed by any of them."""
    block = config.optimizer
    groups = parameter_groups(model, block.params.weight_decay)
    if isinstance(block, LARSBlock):
        lars = block.params
        return LARS(groups, lars.lr, lars.momentum, trust_coefficient=lars.trust_coefficient)
    if isinstance(block, AdamWBlock):
        adamw = block.params
        return torch.optim.AdamW(groups, adamw.lr, (adamw.betas[0], adamw.betas[1]), adamw.eps)
    sgd = block.params
    return torch.optim.SGD(groups, sgd.lr, sgd.momentum, nesterov=sgd.nesterov)


def _processes_of_batchnorm(config: Config, process: Process) -> int:
    """How many ranks, one after the other, see their images together. All ranks call it.

    Raises UserError where a machine's ranks are to, and machines differ or their ranks do not follow each other.
    """
    if config.simclr.batchnorm_group == "node" and process.peers:
        peers = process.peers
        runs = [(host, len(list(ranks))) for (_, host), ranks in groupby(zip(peers.machines, peers.hosts, strict=True))]
        if len(runs) > len(set(peers.machines)) or len({count for _, count in runs}) > 1:
            named = listed([f"{count} on {host}" for host, count in runs], 8)
            raise UserError(
                "simclr.batchnorm_group is 'node', which needs as many processes on each machine, with ranks that "
                f"follow each other (they are, in order, {named}); with srun: --distribution=block"
            )
    return config.batchnorm_processes(process.world, process.local_world)


def build_engine(model: SimCLR, config: Config, process: Process) -> tuple[Any, torch.optim.Optimizer]:
    """Wrap ``model``, whose BatchNorms then see all ranks, in a DeepSpeed engine. Rank 0's parameters and buffers are
    given to all ranks.

    Raises UserError where the config asks for kernels that this machine cannot run.
    """
    if config.simclr.batchnorm_kernels and (process.device.type != "cuda" or not find_spec("triton")):
        raise UserError("simclr.batchnorm_kernels is true, which needs a GPU and Triton; set it to false")
    setting, backend = resolved(config.simclr.compile, process.device), None
    group = groups_of_ranks(_processes_of_batchnorm(config, process))
    synchronised(model, process.device, compiled=setting != "no", kernels=config.simclr.batchnorm_kernels, group=group)
    model.to(process.device)
    for buffer in model.buffers():  # the engine gives all ranks the parameters of rank 0, but not the buffers
        dist.broadcast(buffer, 0)
    optimizer = build_optimizer(model, config)
    if setting != "no":  # inside of the engine, whose hooks are then not traced
        backend = compile_network(model, setting, config.shard_cache().folder / "compiled", process)
    engine, wrapped, _, _ = import_deepspeed(process.device).initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, process)
    )
    engine.compiled_by = backend
    # DeepSpeed would average all gradients in one piece after the backward pass.
    engine.enable_backward_allreduce = False
    # LARS needs the model's own tensors, layer by layer and in float32, and unclipped gradients.
    assert wrapped is optimizer and engine.zero_optimization_stage() == 0 and engine.gradient_clipping() == 0
    assert all(p.dtype == torch.float32 for p in model.parameters())
    # Only now: DeepSpeed's broadcast of the parameters needs dense strides.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if process.world > 1:
        engine.reduction = GradientReduction(model, config.passes(process.world))
    # DeepSpeed makes groups of its own, which have torch's default; they too are to wait as long as the watchdog does.
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(process.patience, group)
    return engine, optimizer
