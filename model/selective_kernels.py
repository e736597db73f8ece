"""Selective kernels as in SimCLRv2 (Chen et al. 2020b; Li et al. 2019), for ResNets with bottlenecks.

google-research/simclr, tf2/resnet.py, with sk_ratio 0.0625: the 3x3 convolution of each bottleneck gets two streams,
mixed by weights that depend on the image, and the network gets the stem and shortcuts of ResNet-D (He et al. 2019).
"""

import torch
from torch import Tensor, nn

from simclr_dali.model.vision import resnet

RATIO = 0.0625  # width of the hidden layer of the mixing weights, of the channels of a stream
SMALLEST_HIDDEN = 32  # channels


class SelectiveKernel(nn.Module):
    """[n, c_in, h, w] -> [n, c, h / stride, w / stride], not negative: two 3x3 streams, mixed channel by channel."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        hidden = max(int(channels * RATIO), SMALLEST_HIDDEN)
        self.conv = nn.Conv2d(channels_in, 2 * channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2 * channels)
        self.mix1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.mix_bn = nn.BatchNorm2d(hidden)
        self.mix2 = nn.Conv2d(hidden, 2 * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.bn(self.conv(x)).relu().chunk(2, dim=1)
        pooled = (first + second).mean((2, 3), keepdim=True)
        first_weight, second_weight = self.mix2(self.mix_bn(self.mix1(pooled)).relu()).chunk(2, dim=1)
        # A softmax over the two streams.
        share = torch.sigmoid(first_weight - second_weight)
        return share * first + (1 - share) * second


def add_selective_kernels(encoder: resnet.ResNet) -> None:
    """Rebuild ``encoder`` in place. Keys of untouched layers stay torchvision's."""
    for module in list(encoder.modules()):
        if isinstance(module, resnet.Bottleneck):
            plain = module.conv2
            stride = plain.stride[0]
            module.conv2 = SelectiveKernel(plain.in_channels, plain.out_channels, stride)
            module.bn2 = nn.Identity()  # inside the selective kernel
            if module.downsample is not None:
                projection, norm = module.downsample
                # Padded at the lower right: TensorFlow's pool of stride 1 leaves the padding out of its mean, which
                # is what repeating the border does; the pool of stride 2 follows a padding with zeros.
                pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride > 1 else nn.ReplicationPad2d((0, 1, 0, 1))
                pooled = nn.Sequential(pad, nn.AvgPool2d(2, stride))
                plain = nn.Conv2d(projection.in_channels, projection.out_channels, 1, bias=False)
                module.downsample = nn.Sequential(pooled, plain, norm)
    channels = encoder.bn1.num_features
    encoder.conv1 = nn.Sequential(
        nn.Conv2d(3, channels // 2, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(channels // 2),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels // 2, channels // 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels // 2),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels // 2, channels, 3, padding=1, bias=False),
    )
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
