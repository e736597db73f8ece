"""What a training step takes on many GPUs, from what one GPU was measured to take and what links are said to do.

Legend: W = GPUs, B = images of the global batch, b = B / W, R = 2 b rows of a GPU, N = 2 B rows of all, D = width of an
embedding, g = GPUs of a machine, m = machines, C = channels of a BatchNorm.

A step is compute, waited for by the slowest GPU, and what is communicated and not hidden behind it:

    compute      fixed + per_image * b; with b over what fits, one more forward pass (a third of it)
    stragglers   compute * spread * sqrt(2 ln W), about what the slowest of W normal variables is above their mean
    embeddings   all-gather of R D numbers of each GPU, and of R for the backward pass (model/ntxent.py)
    loss         passes over R N similarities, in tiles, at the speed of memory
    BatchNorm    per layer an all-gather of 2 C + 1 numbers forward and an all-reduce of 2 C backward, none hidden
    gradients    all-reduce in buckets of 25 MB, hidden behind two thirds of compute but for the last bucket
    input        where the decoders of a GPU make fewer images than the step takes

A collective of n bytes takes launch + hops of latency + bytes / bandwidth (Thakur et al. 2005,
section 3): inside a machine by its switch, between machines log2 m hops by as many links as it has GPUs.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor, nn

from simclr_dali.train.reduction import by_size

IMAGENET = 1_281_167  # images of train
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Gpu:
    """One GPU, as it was measured."""

    name: str
    fixed: float
    """Seconds of a step that do not depend on the number of images."""
    per_image: float
    """Seconds; an image gives two views."""
    memory_per_image: float
    """Bytes of a training step."""
    memory: float
    """Bytes."""
    copies: float
    """Bytes/s of its memory, read or written."""
    input: float
    """Images/s that its share of decoders and cores makes."""


@dataclass(frozen=True)
class Network:
    """How GPUs are joined, each way."""

    name: str
    per_machine: int
    """g."""
    inside: float
    """Bytes/s of a GPU to the others of its machine."""
    between: float
    """Bytes/s of a GPU's share of the links between machines."""
    launch: float
    """Seconds before a collective begins."""
    hop_inside: float
    """Seconds."""
    hop_between: float


@dataclass(frozen=True)
class Model:
    """What a network sends."""

    gradients: int
    """Numbers."""
    batchnorms: tuple[int, ...]
    """C of each layer."""
    embedding: int
    """D."""
    buckets: tuple[int, ...]
    """Numbers of each, in the order in which they leave."""
    gradient_bytes: int = FLOAT
    """Of a number on the wire."""
    group: str = "all"
    """Over which GPUs BatchNorm's statistics go: "all", or "node"."""


def of_network(network: nn.Module, embedding: int) -> Model:
    """What a network of model.simclr sends, whose embeddings have this width."""
    parameters: list[Tensor] = [p for p in reversed(list(network.parameters())) if p.requires_grad]
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return Model(
        sum(p.numel() for p in parameters),
        tuple(norm.num_features for norm in norms),
        embedding,
        tuple(sum(p.numel() for p in group) for group in by_size(parameters)),
    )


# ResNet-50, 224 px, bfloat16, compiled, on one H200: 70.6 ms for 256 images. Uncompiled steps of 128, 256 and 512 took
# 54.8, 104.0 and 201.4 ms, a straight line with 5.9 ms at no image; its part of a step is taken for the compiled one's.
H200 = Gpu(
    "H200", fixed=5.9e-3 * 70.6 / 104.0, per_image=70.6e-3 * (1 - 5.9 / 104.0) / 256, memory_per_image=22.2e9 / 256,
    memory=141e9, copies=4.28e12, input=5_042.0,
)  # fmt: skip
# Bandwidths are the links' own, times four fifths; latencies are of the order that NCCL's tests show.
NETWORKS = {
    "InfiniBand": Network("InfiniBand, 400 Gb/s a GPU", 8, 0.8 * 450e9, 0.8 * 50e9, 8e-6, 2e-6, 6e-6),
    "Ethernet": Network("Ethernet, 100 Gb/s a machine", 8, 0.8 * 450e9, 0.8 * 12.5e9 / 8, 8e-6, 2e-6, 30e-6),
}
SPREAD = 0.015  # of a GPU's step, one standard deviation
_PASSES_OF_LOSS = 6  # over the similarities, forward and backward
_BACKWARD = 2 / 3  # of compute
_LARGEST_SHARE = 0.9  # of memory


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by part, and what follows."""

    gpus: int
    batch: int
    parts: dict[str, float]
    memory: float
    """Bytes of a GPU."""
    passes: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def images_per_s(self) -> float:
        return self.batch / self.seconds

    def hours(self, epochs: int, images: int = IMAGENET) -> float:
        return epochs * images / self.images_per_s / 3600

    @property
    def limit(self) -> str:
        """The largest part that is not compute."""
        return max((name for name in self.parts if name != "compute"), key=lambda name: self.parts[name])


def collective(network: Network, gpus: int, received: float, rounds: int) -> float:
    """Seconds of one in which each machine receives ``received`` bytes from the others of its kind.

    rounds: 1 of an all-gather, 2 of an all-reduce, which goes there and back.
    """
    if gpus == 1:
        return 0.0
    inside, machines = min(gpus, network.per_machine), -(-gpus // network.per_machine)
    hops = network.hop_inside * (inside > 1) + network.hop_between * math.ceil(math.log2(machines))
    by_switch = received * (inside - 1) / inside / network.inside
    by_links = received * (machines - 1) / machines / (network.between * inside)
    return network.launch + rounds * hops + rounds * max(by_switch, by_links)


def all_gather(network: Network, gpus: int, own: float) -> float:
    """Seconds, where each GPU has ``own`` bytes."""
    return collective(network, gpus, own * gpus, 1)


def all_reduce(network: Network, gpus: int, size: float) -> float:
    """Seconds of ``size`` bytes."""
    return collective(network, gpus, size, 2)


def step_of(gpu: Gpu, network: Network, model: Model, gpus: int, batch: int, passes: int | None = None) -> Step:
    """A step of ``batch`` images on ``gpus`` GPUs, in ``passes`` micro-batches, or as few as memory allows.

    Raises ValueError where they cannot share it.
    """
    if batch % gpus:
        raise ValueError(f"a batch of {batch} cannot be shared by {gpus} GPUs")
    own = batch // gpus
    most = int(_LARGEST_SHARE * gpu.memory / gpu.memory_per_image)
    passes = passes or next(count for count in range(1, own + 1) if own % count == 0 and own // count <= most)
    compute = passes * gpu.fixed + own * gpu.per_image
    if passes > 1:
        compute *= 1 + (1 - _BACKWARD)
    rows, rows_of_all = 2 * own, 2 * batch
    together = min(gpus, network.per_machine) if model.group == "node" else gpus
    norms = passes * sum(
        all_gather(network, together, (2 * channels + 1) * FLOAT) + all_reduce(network, together, 2 * channels * FLOAT)
        for channels in model.batchnorms
    )
    buckets = [all_reduce(network, gpus, numbers * model.gradient_bytes) for numbers in model.buckets]
    hidden = _BACKWARD * compute / passes  # the last pass's, since gradients add up until then
    parts = {
        "compute": compute,
        "stragglers": compute * SPREAD * math.sqrt(2 * math.log(gpus)) if gpus > 1 else 0.0,
        "embeddings": sum(all_gather(network, gpus, rows * numbers * FLOAT) for numbers in (model.embedding, 1)),
        "loss": _PASSES_OF_LOSS * rows * rows_of_all * FLOAT / gpu.copies,
        "BatchNorm": norms,
        "gradients": max(buckets[-1], sum(buckets) - hidden) if gpus > 1 else 0.0,
    }
    parts["input"] = max(0.0, own / gpu.input - sum(parts.values()))
    memory = own // passes * gpu.memory_per_image + rows_of_all * model.embedding * FLOAT
    return Step(gpus, batch, parts, memory, passes)


def efficiency(gpu: Gpu, step: Step) -> float:
    """Images/s against those of as many GPUs that each train alone at 256 images."""
    alone = 256 / (gpu.fixed + 256 * gpu.per_image)
    return step.images_per_s / (step.gpus * alone)


def last_that_pays(gpu: Gpu, network: Network, model: Model, batch: int, most: int, gain: float = 1.5) -> int:
    """The number of GPUs, doubled from one, after which twice as many are less than ``gain`` times as fast."""
    gpus = 1
    while 2 * gpus <= min(most, batch // 2):
        now, twice = (step_of(gpu, network, model, count, batch) for count in (gpus, 2 * gpus))
        if twice.images_per_s < gain * now.images_per_s:
            break
        gpus *= 2
    return gpus


def cures(gpu: Gpu, network: Network, model: Model, gpus: int, batch: int) -> dict[str, float]:
    """How many times as fast a step is with each of what may help, one at a time."""
    now = step_of(gpu, network, model, gpus, batch).seconds
    tried = {
        "BatchNorm over a machine": step_of(gpu, network, replace(model, group="node"), gpus, batch).seconds,
        "gradients in bfloat16": step_of(gpu, network, replace(model, gradient_bytes=2), gpus, batch).seconds,
    }
    if 2 * batch // gpus <= int(_LARGEST_SHARE * gpu.memory / gpu.memory_per_image):
        tried["twice the batch"] = step_of(gpu, network, model, gpus, 2 * batch).seconds / 2
    return {name: now / seconds for name, seconds in tried.items()}
