"""BatchNorm by our own kernels, under Triton's interpreter where there is no GPU, against float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simclr_dali.model.batchnorm import SyncBatchNorm, synchronised
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture, build_model
from tests.conftest import ROOT, assert_sentence, run_python, run_ranks
from tests.runs import pretrain, tiny_config

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(channels: int, *, kernels: bool) -> Any:
    found = SyncBatchNorm(nn.BatchNorm2d(channels), "", kernels=kernels)
    generator = torch.Generator().manual_seed(channels)
    for parameter in found.parameters():
        parameter.data = torch.randn(channels, generator=generator)
    return found


def forward_and_backward(norm: Any, x: Tensor, dy: Tensor, *, relu: bool) -> list[Tensor]:
    """Output, gradients of input, weight and bias, and the running statistics."""
    leaf = x.clone().requires_grad_()
    y = norm(leaf, relu=relu)
    y.backward(dy.to(y.dtype))
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def compare(x: Tensor, dy: Tensor, *, relu: bool) -> None:
    """Ours in x's dtype with float64, of the same rounded values."""
    channels = x.shape[1]
    ours = forward_and_backward(layer(channels, kernels=True).to(DEVICE), x, dy, relu=relu)
    exact = forward_and_backward(layer(channels, kernels=False).double().to(DEVICE), x.double(), dy.double(), relu=relu)
    assert ours[0].dtype == ours[1].dtype == x.dtype and ours[2].dtype == torch.float32
    for name, got, wanted in zip(("y", "dx", "dweight", "dbias", "mean", "variance"), ours, exact, strict=True):
        rounding = torch.finfo(x.dtype if name in ("y", "dx") else torch.float32).eps
        # Where the ReLU begins, rounding tells on which side a value is: a gradient comes through or not.
        looser = 30 if relu and name in ("dx", "dweight", "dbias") else 1
        error, size = (got.double() - wanted).norm(), wanted.norm() + 1e-6
        assert error <= looser * (4 * rounding + 1e-5) * size, (name, float(error / size))


@settings(max_examples=20, deadline=None)
@given(
    images=st.integers(1, 5),
    channels=st.sampled_from([1, 3, 63, 64, 65, 130]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    relu=st.booleans(),
    last=st.booleans(),
)
def test_any_shape_in_any_precision(
    images: int, channels: int, height: int, width: int, dtype: torch.dtype, relu: bool, last: bool
) -> None:
    """Also with rows that do not fill a tile, and memory that is not channels_last."""
    images += 4 * (images * height * width < 4)  # a variance of next to nothing magnifies any rounding
    generator = torch.Generator().manual_seed(images * 1000 + channels)
    x, dy = (torch.randn(images, channels, height, width, generator=generator).to(DEVICE, dtype) for _ in range(2))
    if last:
        x = x.to(memory_format=torch.channels_last)
    compare(x, dy, relu=relu)


@pytest.mark.parametrize("channels", [1, 64, 2048])
def test_one_pixel_of_many_images_and_many_rows_of_one_image(channels: int) -> None:
    for shape in ((70, channels, 1, 1), (1, channels, 65, 3)):
        x, dy = torch.randn(2, *shape).to(DEVICE)
        compare(x, dy, relu=True)


def test_a_mean_far_from_zero_costs_no_precision() -> None:
    """Sums of squares would lose all of it: 1e4 squared has no place for a variance of 1 in float32, which holds a mean
    of 1e4 to 5e-4."""
    x = torch.randn(8, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    norm = layer(3, kernels=True).to(DEVICE)
    norm(x.float().to(DEVICE))
    variance = x.float().double().transpose(0, 1).flatten(1).var(1)
    assert torch.allclose(norm.running_var.double().cpu(), 0.9 + 0.1 * variance, rtol=2e-4)


def test_what_is_not_a_number_stays_visible() -> None:
    x = torch.randn(4, 2, 3, 3)
    x[1, 1, 2, 2] = torch.nan
    y = layer(2, kernels=True).to(DEVICE)(x.to(DEVICE), relu=True)
    assert y[:, 1].isnan().all() and not y[:, 0].isnan().any()


def split(rank: int, x: Tensor, dy: Tensor) -> list[Tensor]:
    network = synchronised(nn.Sequential(nn.BatchNorm2d(x.shape[1])), torch.device(DEVICE), kernels=True)
    cut = slice(0, 3) if rank == 0 else slice(3, None)
    return forward_and_backward(network[0], x[cut], dy[cut], relu=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="two processes of the CPU")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    x, dy = torch.randn(2, 8, 5, 6, 6)
    ours = run_ranks(split, 2, tmp_path, x, dy)
    whole = SyncBatchNorm(nn.BatchNorm2d(5), "").double()
    exact = forward_and_backward(whole, x.double(), dy.double(), relu=True)
    for number, wanted in enumerate(exact):
        first, second = ours[0][number].double(), ours[1][number].double()
        got = torch.cat([first, second]) if number < 2 else first + second if number < 4 else first
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4), number


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_network_with_them_computes_the_same(name: str) -> None:
    """One step's embeddings and gradients; every BatchNorm that a ReLU follows directly has taken it over."""
    architecture = Architecture(ResNet(name, 0.0625, "7x7"), (8, 4))
    images = torch.randn(6, 3, 32, 32, device=DEVICE)
    results = []
    for kernels in (False, True):
        model = synchronised(build_model(architecture, 0), torch.device(DEVICE), kernels=kernels).to(DEVICE).double()
        if kernels:
            model.float()
        z = model(images.to(next(model.parameters()).dtype))
        (z**2).sum().backward()
        results.append([z, *(p.grad for p in model.parameters() if p.grad is not None)])
    for wanted, got in zip(*results, strict=True):
        assert (got.double() - wanted).norm() <= 1e-3 * (wanted.norm() + 1e-3)


def test_a_compiler_traces_them_into_one_graph() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = synchronised(
        build_model(Architecture(ResNet("resnet18", 0.0625, "7x7"), (8, 4)), 0), torch.device(DEVICE), kernels=True
    )
    model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(6, 3, 32, 32, device=DEVICE)
    found = []
    for called in (model, torch.compile(model, backend="aot_eager", dynamic=False)):
        model.zero_grad()
        (called(images) ** 2).sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for wanted, got in zip(*found, strict=True):
        assert (got - wanted).norm() <= 1e-5 * (wanted.norm() + 1e-3)


TO_MACHINE_CODE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from simclr_dali.model import batchnorm_kernels as kernels

POINTERS = {"x": "*bf16", "y": "*bf16", "dy": "*bf16", "dx": "*bf16"}
NUMBERS = {"rows": "i32", "channels": "i32", "chunk": "i32"}
CONSTANTS = {"RELU": True, "ROWS": 64, "CHANNELS": 64}
for name in ("_moments", "_normalise", "_sums", "_gradient"):
    kernel = getattr(kernels, name)
    kinds = {**POINTERS, **NUMBERS, **dict.fromkeys(CONSTANTS, "constexpr")}
    signature = {a: kinds.get(a, "*fp32") for a in kernel.arg_names}
    constants = {(kernel.arg_names.index(a),): value for a, value in CONSTANTS.items() if a in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
    assert "cubin" in code and ".visible .entry" in code["ptx"], name
    print(name, "spills" if "local.b32" in code["ptx"] else "fits")
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile them")
def test_the_kernels_become_machine_code_of_an_h100(tmp_path: Path) -> None:
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / ".package")}
    done = run_python("-c", TO_MACHINE_CODE, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fits") == 4, done.stdout


@pytest.mark.launch
@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_they_are_refused(packed: Path, tmp_path: Path) -> None:
    done = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", "--set", "simclr.batchnorm_kernels=true")
    assert_sentence(done, "simclr.batchnorm_kernels", "GPU")
