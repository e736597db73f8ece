"""NT-Xent over several processes: the mean gradient is that of one process, however it is averaged."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_dali.model.ntxent import Contrast, nt_xent
from simclr_dali.train.engine import import_deepspeed
from tests.conftest import run_ranks
from tests.test_ntxent import embeddings, reference

TAU, TILE = 0.1, 5


def projector() -> nn.Linear:
    linear = nn.Linear(12, 6, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(embeddings(6, 12, seed=1))
    return linear


def own_part(images: Tensor, rank: int) -> Tensor:
    return torch.cat([view.chunk(dist.get_world_size())[rank] for view in images.chunk(2)])


def mean_over_ranks(value: Tensor) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def by_hand(images: Tensor) -> tuple[Tensor, Contrast]:
    model = projector()
    contrast = nt_xent(model(images), TAU, TILE)
    contrast.loss.backward()
    assert model.weight.grad is not None
    return mean_over_ranks(model.weight.grad), contrast


def by_ddp(images: Tensor) -> Tensor:
    model = DistributedDataParallel(projector())
    nt_xent(model(images), TAU, TILE).loss.backward()
    gradient = model.module.weight.grad
    assert isinstance(gradient, Tensor)
    return gradient


def by_deepspeed(images: Tensor) -> Tensor:
    """DeepSpeed drops gradients after its step: they are read off a step of plain descent at rate 1."""
    model = projector()
    before = model.weight.detach().clone()
    deepspeed = import_deepspeed(torch.device("cpu"))
    deepspeed.get_accelerator().supported_dtypes = lambda: [torch.float64]  # which it reduces, but does not list
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={"train_micro_batch_size_per_gpu": len(images) // 2, "gradient_clipping": 0.0},
    )
    engine.communication_data_type = torch.float64
    engine.backward(nt_xent(engine(images), TAU, TILE).loss)
    engine.step()
    return before - model.weight.detach()


def in_bfloat16(images: Tensor) -> tuple[Tensor, Tensor]:
    z = images.bfloat16().requires_grad_()
    loss = nt_xent(z, TAU, TILE).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert z.grad is not None and z.grad.dtype == torch.bfloat16
    return mean_over_ranks(loss), z.grad


def measure(rank: int, images: Tensor) -> dict[str, Any]:
    import_deepspeed(torch.device("cpu")).init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    images = own_part(images, rank)
    gradient, contrast = by_hand(images)
    return {
        "by hand": gradient,
        "DDP": by_ddp(images),
        "DeepSpeed": by_deepspeed(images),
        "contrast": {key: mean_over_ranks(value) for key, value in vars(contrast).items()},
        "bfloat16": in_bfloat16(images),
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_mean_over_processes_is_the_gradient_of_one(world: int, tmp_path: Path) -> None:
    images = embeddings(16, 12).detach()
    model = projector()
    loss = reference(model(images), TAU)
    (gradient,) = torch.autograd.grad(loss, model.weight)
    alone = nt_xent(model(images), TAU)
    rounded = images.bfloat16().double().requires_grad_()
    rounded_loss = reference(rounded, TAU)
    (rounded_gradient,) = torch.autograd.grad(rounded_loss, rounded)

    for rank, found in enumerate(run_ranks(measure, world, tmp_path, images)):
        for way in ("by hand", "DDP", "DeepSpeed"):
            error = (found[way] - gradient).norm() / gradient.norm()
            assert error < 1e-10, f"{way}, rank {rank}"
        for name, value in vars(alone).items():
            assert found["contrast"][name].item() == pytest.approx(value.item(), abs=1e-12), name
        half_loss, half_gradient = found["bfloat16"]
        assert half_loss.item() == pytest.approx(rounded_loss.item(), rel=1e-5)
        own = torch.cat([view.chunk(world)[rank] for view in rounded_gradient.chunk(2)])
        # A rank's own gradient is W times its rows' share; 2^-8 is the rounding of bfloat16 itself.
        assert (half_gradient.double() - world * own).norm() < 2**-7 * (world * own).norm()
