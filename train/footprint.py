"""How much memory of a device an image takes while a network trains, without a device."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from simclr_dali.model.simclr import Architecture, SimCLR


def bytes_per_image(architecture: Architecture, image_size: int, *, autocast: bool) -> int:
    """What the forward pass keeps of an image's two views until the backward pass, in bytes.

    image_size: side of a view, in pixels. autocast: convolutions and matrix products in bfloat16. Nothing is computed:
    shapes alone are followed through the network. The peak of a step has weights, their gradients and momenta on top,
    and what the backward pass needs in between; of ResNet-50 at 224 px an H200 took 89 MB an image
    (scripts/bench/README.md).
    """
    one, three = (_kept(architecture, image_size, images, autocast=autocast) for images in (1, 3))
    return (three - one) // 2  # weights that autocast has converted are kept once, however many images there are


def bytes_of_step(architecture: Architecture, image_size: int, images: int, *, autocast: bool) -> int:
    """About what a training takes of a device that embeds ``images`` at a time, in bytes.

    An H200's peak was 3 % above what the images of ResNet-50 keep; a quarter is added, for workspaces and for what
    memory in pieces wastes, and four numbers a weight: itself, gradient, momentum, and what LARS needs at a time.
    """
    with FakeTensorMode():
        weights = sum(parameter.numel() for parameter in SimCLR(architecture).parameters())
    kept = bytes_per_image(architecture, image_size, autocast=autocast)
    return int(1.25 * images * kept) + 4 * 4 * weights


def _kept(architecture: Architecture, image_size: int, images: int, *, autocast: bool) -> int:
    sizes: dict[int, int] = {}  # of each storage, since views of one are kept once
    storages = []  # which keep their addresses from being used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.append(storage)
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        model = SimCLR(architecture)
        views = torch.empty(2 * images, 3, image_size, image_size)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model(views)
    return sum(sizes.values())
