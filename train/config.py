"""What a configuration may hold: DeepSpeed's keys that we use, and ours under "simclr" (train/simclr_block.py).

Every key is known here, typed and checked before anything is built; an unknown one is an error, since DeepSpeed itself
passes over a misspelt top-level key in silence. train/config_file.py reads it from a file.
"""

import math
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from simclr_dali.model.batchnorm import MIN_BATCHNORM_IMAGES, NOISY_BATCHNORM_IMAGES
from simclr_dali.model.simclr import Architecture
from simclr_dali.pipeline.cache import Cache
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.wording import counted
from simclr_dali.train.simclr_block import Block, Positive, Simclr

# SimCLR (Chen et al. 2020), section 2.1 and appendix B.1, by name: global batch -> peak learning rate.
LR_RULES = {
    "linear": lambda batch: 0.3 * batch / 256,
    "sqrt": lambda batch: 0.075 * math.sqrt(batch),
}
LR_FORMULAS = {"linear": "0.3 B/256", "sqrt": "0.075 sqrt(B)"}
_LR_TOLERANCE = 1e-3  # relative; a rate written with three digits still fits its rule


class _OptimizerParams(Block):
    lr: float = Field(gt=0)
    """Peak learning rate; "auto" takes it from simclr.lr_rule."""
    weight_decay: float = Field(default=1e-6, ge=0)
    """Of weights; biases and BatchNorm have none."""


class LARSParams(_OptimizerParams):
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the last step that is taken again."""
    trust_coefficient: float = Field(default=0.001, gt=0)
    """Eta of LARS."""


class SGDParams(_OptimizerParams):
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the last step that is taken again."""
    nesterov: bool = False
    """Whether momentum looks ahead."""


class AdamWParams(_OptimizerParams):
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Decay of the means of gradients and of their squares."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square."""


class LARSBlock(Block):
    type: Literal["LARS"]
    params: LARSParams


class SGDBlock(Block):
    type: Literal["SGD"]
    params: SGDParams


class AdamWBlock(Block):
    type: Literal["AdamW"]
    params: AdamWParams


class Autocast(Block):
    enabled: bool = False
    """Whether convolutions and matrix products are computed in bfloat16."""
    on_cpu: bool = False
    """On a CPU too: about half the time where it computes in bfloat16 (avx512_bf16, AMX), far more where it cannot."""

    def on(self, device_type: str) -> bool:
        """Whether a step is computed in bfloat16 on "cuda" or "cpu"."""
        return self.enabled and (device_type == "cuda" or self.on_cpu)


# DeepSpeed's keys that have one value here: train/engine.py gives it, and a config may say the same.
CONSTANTS: dict[str, Any] = {
    "gradient_clipping": 0.0,
    "zero_optimization.stage": 0,
    "communication_data_type": "fp32",
    "torch_autocast.dtype": "bfloat16",
}
_WHY_CONSTANT = {
    "gradient_clipping": "the method clips no gradients",
    "zero_optimization.stage": "the other stages flatten all layers into one tensor, while LARS scales each layer by "
    "its own norm, and every process saves what it alone holds",
    "communication_data_type": "gradients are averaged in float32",
    "torch_autocast.dtype": "float16 would need its loss scaled",
}


class Config(Block):
    train_batch_size: Positive
    """Global batch B: images per step over all processes; each gives two views."""
    train_micro_batch_size_per_gpu: Positive | None = None
    """Images a process embeds at a time (the largest divisor of its share up to this number); None: all."""
    torch_autocast: Autocast = Autocast()
    """bfloat16 convolutions and matrix products; parameters stay float32. Not used on a CPU unless on_cpu says so."""
    optimizer: LARSBlock | SGDBlock | AdamWBlock = Field(discriminator="type")
    simclr: Simclr

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_low_precision_blocks(cls, raw: Any) -> Any:
        for block in {"bf16", "fp16"} & set(raw if isinstance(raw, dict) else ()):
            raise ValueError(
                f"the {block} block casts parameters and BatchNorm to half precision, in which LARS's norms and the "
                "running statistics are wrong; remove it and use torch_autocast, which keeps them in float32"
            )
        return raw

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_constants(cls, raw: Any) -> Any:
        """Take out DeepSpeed's keys of CONSTANTS, which may stand in a config with the one value they have."""
        if not isinstance(raw, dict):
            return raw
        for path, constant in CONSTANTS.items():
            *blocks, last = path.split(".")
            if blocks and not isinstance(raw.get(blocks[0]), dict):
                continue
            block = dict(raw[blocks[0]]) if blocks else dict(raw)
            if last in block and (block[last] != constant or isinstance(block[last], bool)):
                raise ValueError(f"{path} is {block[last]!r}; set it to {constant!r}: {_WHY_CONSTANT[path]}")
            block.pop(last, None)
            raw = {**raw, blocks[0]: block} if blocks else block
        if raw.get("zero_optimization") == {}:
            raw = {key: value for key, value in raw.items() if key != "zero_optimization"}
        return raw

    @pydantic.model_validator(mode="after")
    def _refuse_contradictions(self) -> "Config":
        if isinstance(self.optimizer, SGDBlock):
            sgd = self.optimizer.params
            if sgd.nesterov and not sgd.momentum:
                raise ValueError("optimizer.params.nesterov is true, but momentum is 0; give a momentum")
        if self.train_batch_size < 2:
            raise ValueError("train_batch_size is 1; NT-Xent compares an image with others: use at least 2")
        if self.train_batch_size % self.simclr.lanes:
            raise ValueError(
                f"simclr.lanes is {self.simclr.lanes}, which does not divide train_batch_size {self.train_batch_size}; "
                f"set simclr.lanes to {math.gcd(self.simclr.lanes, self.train_batch_size)}"
                + ("" if self._lr_fits() else ' and optimizer.params.lr to "auto"')
            )
        if self.simclr.warmup_epochs > self.simclr.epochs:
            raise ValueError(
                f"simclr.warmup_epochs is {self.simclr.warmup_epochs}, longer than the {self.simclr.epochs} epochs "
                f"of the run"
            )
        rule, lr = self.simclr.lr_rule, self.optimizer.params.lr
        if rule != "none" and self.optimizer.type == "AdamW":
            raise ValueError(
                f'simclr.lr_rule is "{rule}", which is for LARS and SGD; for AdamW set it to "none" and lr to a number'
            )
        if not self._lr_fits():
            raise ValueError(
                f"optimizer.params.lr is {lr}, but the {rule} rule gives {LR_RULES[rule](self.train_batch_size):.4g} "
                f'for a global batch of {self.train_batch_size}; set optimizer.params.lr to "auto", or simclr.lr_rule '
                f'to "none" to force it'
            )
        return self

    def _lr_fits(self) -> bool:
        """Whether the learning rate is what its rule gives for the global batch."""
        rule, lr = self.simclr.lr_rule, self.optimizer.params.lr
        if rule == "none":
            return True
        expected = LR_RULES[rule](self.train_batch_size)
        return abs(lr - expected) <= _LR_TOLERANCE * expected

    def architecture(self) -> Architecture:
        encoder = self.simclr.encoder
        return Architecture(encoder.description().for_image_size(self.simclr.image_size), tuple(encoder.projector))

    def shard_cache(self) -> Cache:
        return Cache.at(self.simclr.cache, self.simclr.cache_gb)

    def local_batch(self, world: int) -> int:
        """Images per step of each of ``world`` processes. Raises UserError where they cannot share the batch."""
        if self.simclr.lanes % world:
            raise UserError(
                f"{world} processes do not divide the {self.simclr.lanes} lanes of the data order; start a divisor "
                f"of {self.simclr.lanes} "
                "processes, or set simclr.lanes to a multiple that divides train_batch_size"
            )
        return self.train_batch_size // world

    def passes(self, world: int) -> int:
        """Micro-batches of a process in a step. Raises what :meth:`micro_batch` raises."""
        return self.local_batch(world) // self.micro_batch(world)

    def batchnorm_processes(self, world: int, local_world: int) -> int:
        """Processes whose images BatchNorm sees together. Raises UserError where they do not divide all of them."""
        named = {"all": world, "node": local_world}
        group = self.simclr.batchnorm_group
        size = named[group] if isinstance(group, str) else group
        if world % size:
            raise UserError(
                f"simclr.batchnorm_group is {group!r}, and groups of {counted(size, 'process', 'processes')} do not "
                f"divide the {world} of the run; give a divisor of them, or start as many on each machine"
            )
        if self.micro_batch(world) * size < MIN_BATCHNORM_IMAGES:
            raise UserError(
                f"simclr.batchnorm_group is {group!r}, so BatchNorm would see one image at a time, whose two views "
                "become opposites; give more processes, or a larger train_micro_batch_size_per_gpu"
            )
        return size

    def micro_batch(self, world: int) -> int:
        """Images a process embeds at a time: the largest divisor of its share that is at most the configured number.

        Raises UserError where that is less than half of it, or leaves BatchNorm one image over all processes.
        """
        local = self.local_batch(world)
        most = min(self.train_micro_batch_size_per_gpu or local, local)
        size = next(size for size in range(most, 0, -1) if local % size == 0)
        if 2 * size < most:
            raise UserError(
                f"the {local} images of each of {world} processes have no divisor close below "
                f"train_micro_batch_size_per_gpu {most} (the largest is {size}); change train_batch_size, the number "
                "of processes, or the micro-batch"
            )
        if size * world < MIN_BATCHNORM_IMAGES:
            raise UserError(
                f"{size} image on {world} process is what BatchNorm would see at a time: it makes opposites of the two "
                f"views of one image; set train_micro_batch_size_per_gpu to {NOISY_BATCHNORM_IMAGES} or more"
            )
        return size
