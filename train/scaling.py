"""What a training step takes on many GPUs, from what one GPU was measured to take and what links are said to do.

Legend: W = GPUs, B = images of the global batch, b = B / W, R = 2 b rows of a GPU, N = 2 B rows of all, D = width of an
embedding, g = GPUs of a node, m = nodes, C = channels of a BatchNorm.

A step is compute, waited for by the slowest GPU, and what is communicated and not hidden behind it:

    compute      fixed + per_image * b; with b over what fits, a second forward pass (a third of it)
    stragglers   compute * STEP_TIME_STD * what the largest of W normal variables is expected to be (Blom 1958)
    embeddings   all-gather of R D numbers of each GPU, and of R for the backward pass (model/ntxent.py)
    loss         three products of R by D by N in float32, and 13 passes of memory over R N similarities
    BatchNorm    per layer an all-gather of 2 C + 1 numbers forward and an all-reduce of 2 C backward, none hidden
    gradients    all-reduce in buckets of 25 MB, hidden behind the backward pass but for the last bucket
    input        where the decoders of a GPU make fewer images than the step takes

A collective of n bytes takes what NCCL's own model says (NCCL 2.28, src/graph/tuning.cc), by the better of its
protocols for small and for large messages: an all-gather goes round a ring of all GPUs, W - m hops inside nodes and
m - 1 between them; an all-reduce up and down a tree, g - 1 + log2 m hops each way. Each GPU has a link of its own to
other nodes. Not in it: SHARP, NVLS and PAT, which NCCL has where switches, GPUs or one GPU a node allow them.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

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
    memory_bandwidth: float
    """Bytes/s, read or written."""
    float32: float
    """Operations/s of products of matrices."""
    input_rate: float
    """Images/s that its share of decoders and cores makes."""


@dataclass(frozen=True)
class Interconnect:
    """How GPUs are joined, each way."""

    name: str
    per_node: int
    """g."""
    intra_node: float
    """Bytes/s of a GPU to the others of its node."""
    inter_node: float
    """Bytes/s of a GPU's share of the links between nodes."""
    hop: float = 0.0
    """Seconds that a hop between nodes takes longer than by InfiniBand."""

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.per_node)


@dataclass(frozen=True)
class Protocol:
    """How NCCL moves a message: seconds before it begins, seconds of a hop (inside a node, between nodes) of a ring and
    of a tree, and the share of the bandwidth that it uses."""

    base: float
    ring: tuple[float, float]
    tree: tuple[float, float]
    share: float


# LL, for small messages, and Simple, for large ones, over NVLink and a network: tuning.cc of NCCL 2.28.
PROTOCOLS = (
    Protocol(6.8e-6, (0.6e-6, 2.7e-6), (0.6e-6, 5.0e-6), 0.5),
    Protocol(8.4e-6, (3.4e-6, 14e-6), (4.0e-6, 14e-6), 1.0),
)


@dataclass(frozen=True)
class Traffic:
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
    batchnorm_group: str | int = "all"
    """Over which GPUs BatchNorm's statistics go, as simclr.batchnorm_group says it."""


def traffic_of(network: nn.Module, embedding: int) -> Traffic:
    """What a network of model.simclr sends in a step (train.step), whose embeddings have this width."""
    parameters: list[Tensor] = [p for p in reversed(list(network.parameters())) if p.requires_grad]
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return Traffic(
        sum(p.numel() for p in parameters),
        tuple(norm.num_features for norm in norms),
        embedding,
        tuple(sum(p.numel() for p in group) for group in by_size(parameters)),
    )


# ResNet-50, 224 px, bfloat16, compiled, on one H200 (scripts/bench/results/step-variants-h200.json): 71.0 ms for 256
# images. Uncompiled steps of 128, 256 and 512 took 54.8, 104.0 and 201.4 ms, by least squares a line with 6.1 ms at no
# image, whose part of a step is taken for the compiled one's. Input: the JPEG engine's row of loader-h200.json.
# float32: nine tenths of the maker's 67 TFLOP/s.
H200 = Gpu(
    "H200", fixed=6.1e-3 * 71.0 / 104.0, per_image=71.0e-3 * (1 - 6.1 / 104.0) / 256, memory_per_image=22.2e9 / 256,
    memory=141e9, memory_bandwidth=4.28e12, float32=60e12, input_rate=5_042.0,
)  # fmt: skip
# Bandwidths are the links' own, times four fifths; what a hop by TCP takes longer is assumed.
INTERCONNECTS = {
    "InfiniBand": Interconnect("InfiniBand, 400 Gb/s a GPU", 8, 0.8 * 450e9, 0.8 * 50e9),
    "Ethernet": Interconnect("Ethernet, 100 Gb/s a node", 8, 0.8 * 450e9, 0.8 * 12.5e9 / 8, hop=25e-6),
}
STEP_TIME_STD = 0.015  # of a GPU's step; assumed
_PASSES_OF_LOSS = 13  # of memory over the similarities: 5 forward, 8 backward
_PRODUCTS_OF_LOSS = 3  # one forward, two backward
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


def all_gather(links: Interconnect, gpus: int, own: float) -> float:
    """Seconds, where each GPU has ``own`` bytes; round a ring."""
    nodes = links.nodes(gpus)
    if gpus == 1:
        return 0.0
    return min(
        by.base
        + (gpus - nodes) * by.ring[0]
        + (nodes - 1) * (by.ring[1] + links.hop)
        + _transfer(links, gpus, own * gpus) / by.share
        for by in PROTOCOLS
    )


def all_reduce(links: Interconnect, gpus: int, size: float) -> float:
    """Seconds of ``size`` bytes; up and down a tree."""
    depth = math.ceil(math.log2(links.nodes(gpus)))
    if gpus == 1:
        return 0.0
    return min(
        by.base
        + 2 * (min(gpus, links.per_node) - 1) * by.tree[0]
        + 2 * depth * (by.tree[1] + links.hop)
        + 2 * _transfer(links, gpus, size) / by.share
        for by in PROTOCOLS
    )


def _transfer(links: Interconnect, gpus: int, size: float) -> float:
    """Seconds in which ``size`` bytes reach every GPU, of which it has its part."""
    inside, nodes = min(gpus, links.per_node), links.nodes(gpus)
    by_switch = size * (inside - 1) / inside / links.intra_node
    by_links = size * (nodes - 1) / nodes / (links.inter_node * inside)
    return max(by_switch, by_links)


def step_of(gpu: Gpu, links: Interconnect, traffic: Traffic, gpus: int, batch: int, passes: int | None = None) -> Step:
    """A step of ``batch`` images on ``gpus`` GPUs, in ``passes`` micro-batches, or as few as memory allows.

    Raises ValueError where they cannot share it.
    """
    if batch % gpus:
        raise ValueError(f"a batch of {batch} cannot be shared by {gpus} GPUs")
    own = batch // gpus
    most = int(_LARGEST_SHARE * gpu.memory / gpu.memory_per_image)
    passes = passes or next((count for count in range(1, own + 1) if own % count == 0 and own // count <= most), 0)
    if not passes:
        raise ValueError(f"{gpu.name} has no memory for one image of this network")
    once = passes * gpu.fixed + own * gpu.per_image
    # Gradient caching (train/micro_batches.py) computes and sends all of the forward pass twice.
    forward_passes = 2 if passes > 1 else 1
    compute = once * (_BACKWARD + forward_passes * (1 - _BACKWARD))
    rows, rows_of_all = 2 * own, 2 * batch
    similarities = rows * rows_of_all
    buckets = [all_reduce(links, gpus, numbers * traffic.gradient_bytes) for numbers in traffic.buckets]
    hidden = _BACKWARD * once / passes  # the last pass's, since gradients add up until then
    parts = {
        "compute": once,
        "second forward pass": compute - once,
        "stragglers": compute * STEP_TIME_STD * _largest_of(gpus),
        "embeddings": sum(all_gather(links, gpus, rows * numbers * FLOAT) for numbers in (traffic.embedding, 1)),
        "loss": _PASSES_OF_LOSS * similarities * FLOAT / gpu.memory_bandwidth
        + _PRODUCTS_OF_LOSS * 2 * similarities * traffic.embedding / gpu.float32,
        "BatchNorm": passes * _of_batchnorm(links, traffic, gpus, forward_passes),
        "gradients": max(buckets[-1], sum(buckets) - hidden) if gpus > 1 else 0.0,
    }
    parts["input"] = max(0.0, own / gpu.input_rate - sum(parts.values()))
    memory = own // passes * gpu.memory_per_image + rows_of_all * traffic.embedding * FLOAT
    return Step(gpus, batch, parts, memory, passes)


def _of_batchnorm(links: Interconnect, traffic: Traffic, gpus: int, forward_passes: int) -> float:
    """Seconds of its messages, of one micro-batch."""
    group = traffic.batchnorm_group
    together = {"all": gpus, "node": min(gpus, links.per_node)}[group] if isinstance(group, str) else min(group, gpus)
    return sum(
        forward_passes * all_gather(links, together, (2 * channels + 1) * FLOAT)
        + all_reduce(links, together, 2 * channels * FLOAT)
        for channels in traffic.batchnorms
    )


def _largest_of(count: int) -> float:
    """About what the largest of so many standard normal variables is expected to be (Blom 1958)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def efficiency(gpu: Gpu, step: Step) -> float:
    """Images/s against those of as many GPUs that each train alone at 256 images."""
    alone = 256 / (gpu.fixed + 256 * gpu.per_image)
    return step.images_per_s / (step.gpus * alone)


def last_that_pays(gpu: Gpu, links: Interconnect, traffic: Traffic, batch: int, most: int, gain: float = 1.5) -> int:
    """The number of GPUs, doubled from one, after which twice as many are less than ``gain`` times as fast."""
    gpus = 1
    while 2 * gpus <= min(most, batch // 2) and batch % (2 * gpus) == 0:
        now, twice = (step_of(gpu, links, traffic, count, batch) for count in (gpus, 2 * gpus))
        if twice.images_per_s < gain * now.images_per_s:
            break
        gpus *= 2
    return gpus


def speedups(gpu: Gpu, links: Interconnect, traffic: Traffic, gpus: int, batch: int) -> dict[str, float]:
    """How many times as fast a step is with each of what may help, one at a time."""
    now = step_of(gpu, links, traffic, gpus, batch).seconds
    tried = {
        "BatchNorm over a node": step_of(gpu, links, replace(traffic, batchnorm_group="node"), gpus, batch).seconds,
        "gradients in bfloat16": step_of(gpu, links, replace(traffic, gradient_bytes=2), gpus, batch).seconds,
    }
    if 2 * batch // gpus <= int(_LARGEST_SHARE * gpu.memory / gpu.memory_per_image):
        tried["twice the batch"] = step_of(gpu, links, traffic, gpus, 2 * batch).seconds / 2
    return {name: now / seconds for name, seconds in tried.items()}
