"""The optimizer that a configuration names, over our groups of parameters."""

import torch
from torch import nn

from simclr_dali.model.lars import LARS, parameter_groups
from simclr_dali.train.config import AdamWBlock, Config, LARSBlock


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
