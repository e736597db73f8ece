"""What a configuration may hold: DeepSpeed's keys that we use, and ours under "simclr".

Every key is known here, typed and checked before anything is built; an unknown one is an error, since DeepSpeed itself
passes over a misspelt top-level key in silence. train/config_file.py reads it from a file.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from simclr_dali.model.encoder import ARCHITECTURES, SMALLEST_SIZE_FOR_7X7, Architecture
from simclr_dali.model.ntxent import SMALLEST_TEMPERATURE
from simclr_dali.pipeline.cache import Cache
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.loader import MAX_BAD_FRACTION
from simclr_dali.shards.errors import UserError
from simclr_dali.train.schedule import LR_RULES

_LR_TOLERANCE = 1e-3  # relative; a rate written with three digits still fits its rule

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Probability = Annotated[float, Field(ge=0, le=1)]


class _Block(pydantic.BaseModel):
    # protected_namespaces: pydantic would reserve names that start with "model".
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Encoder(_Block):
    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """Which ResNet."""
    width: float = Field(default=1.0, gt=0)
    """Factor on every number of channels."""
    stem: Literal["auto", "7x7", "3x3"] = "auto"
    """First convolution; auto takes 3x3 without max-pool for views under 64 pixels."""
    selective_kernels: bool = False
    """Selective kernels and ResNet-D's stem and shortcuts, as in SimCLRv2; resnet50 and deeper."""
    projector: list[Positive] = Field(default=[2048, 128], min_length=1)
    """Widths of the projector's layers, two in the paper and three in SimCLRv2; the last is that of the embeddings."""


class View(_Block):
    """Augmentation of a view; the defaults are the paper's for ImageNet (see pipeline.draws)."""

    area: list[float] = Field(default=[0.08, 1.0], min_length=2, max_length=2)
    """Smallest and largest share of the picture that a crop covers."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability of color jitter."""
    strength: float = Field(default=1.0, ge=0)
    """Strength s of color jitter (paper: 1 for ImageNet, 0.5 for CIFAR-10)."""
    gray: Probability = 0.2
    """Probability of dropping all color."""
    blur: Probability = 0.5
    """Probability of a Gaussian blur."""
    sigma: list[float] = Field(default=[0.1, 2.0], min_length=2, max_length=2)
    """Range of the blur's standard deviation, in pixels of the view."""

    def recipe(self) -> Recipe:
        return Recipe(
            area=(self.area[0], self.area[1]),
            flip=self.flip,
            jitter=self.jitter,
            strength=self.strength,
            gray=self.gray,
            blur=self.blur,
            sigma=(self.sigma[0], self.sigma[1]),
        )


class Views(View):
    """Both views."""

    second: View | None = None
    """What the second view has otherwise: any of the fields above; those left out are as in the first."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How crops are resized."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _complete_second(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("second"), dict):
            first = {key: value for key, value in raw.items() if key in View.model_fields}
            raw = {**raw, "second": {**first, **raw["second"]}}
        return raw

    def recipes(self) -> tuple[Recipe, Recipe]:
        return self.recipe(), (self.second or self).recipe()


class About(_Block):
    """For the reader; nothing here changes a run."""

    what: str = ""
    """What is trained."""
    command: str = ""
    """How to start it."""
    hardware: str = ""
    """What it needs, or what the time was measured on."""
    time: str = ""
    """How long that takes, or "not run"."""
    expected: str = ""
    """The number at its end, with its source."""


class Simclr(_Block):
    about: About = About()
    """For the reader: what a preset is."""
    data: str = ""
    """Folder of packed shards, or its s3://, gs:// or http(s):// address; --data overrides."""
    run: str = ""
    """Run folder; empty: runs/ and the config's name. --run overrides."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of initial weights, order and draws."""
    epochs: Positive = 200
    """Length of the run, in passes over the data."""
    warmup_epochs: float = Field(default=10.0, ge=0)
    """Linear warm-up, in epochs; then a cosine to 0 at the end."""
    lr_rule: Literal["linear", "sqrt", "none"] = "linear"
    """What lr must be, or "auto" makes it, for the global batch: 0.3 B/256 or 0.075 sqrt(B); none allows any number."""
    temperature: float = Field(default=0.1, ge=SMALLEST_TEMPERATURE)
    """Of NT-Xent."""
    ring: bool = False
    """Pass embeddings from process to process instead of gathering them all: less memory, more messages."""
    compile: Literal["no", "inductor", "aot_eager", "eager"] = "no"
    """Backend of torch.compile for encoder and projector; the last two only show that the model can be captured."""
    image_size: Annotated[int, Field(ge=16)] = 224
    """Side of a view, in pixels."""
    lanes: Positive = 64
    """Lanes of the data order; divides the global batch and is divided by the number of processes."""
    shuffle_window: Positive = 8
    """Shards of a lane that are shuffled together."""
    encoder: Encoder = Encoder()
    views: Views = Views()
    max_bad_fraction: float = Field(default=MAX_BAD_FRACTION, ge=0, lt=1)
    """Share of the data set that may be damaged; up to it each damaged sample is replaced by the next sound one."""
    cache: str = "~/.cache/simclr-dali"
    """Folder that keeps shards of remote data; processes of a machine share it."""
    cache_gb: float = Field(default=200.0, gt=0)
    """How much that folder may hold, in gigabytes (1e9 bytes)."""
    loader_threads: int = Field(default=0, ge=0)
    """Threads of reading and of DALI, each, per process; 0: the cores shared out over the processes of the node."""
    log_every: Positive = 10
    """Steps between two lines of progress; metrics.jsonl has every step."""
    checkpoint_every: Positive = 1000
    """Steps between two checkpoints; there is always one at the end."""
    keep_checkpoints: Positive = 3
    """How many of the newest checkpoints stay."""
    keep_every_epochs: int = Field(default=0, ge=0)
    """Epochs between two checkpoints that stay for good; 0: none do."""
    knn_every_epochs: int = Field(default=0, ge=0)
    """Epochs between two looks at how well nearest neighbours classify (train/knn_monitor.py); 0: none."""
    knn_images: Positive = 20_000
    """Images of train that it uses, as many of each class; a tenth of them are asked about."""


class _OptimizerParams(_Block):
    lr: float = Field(gt=0)
    """Peak learning rate; "auto" takes it from simclr.lr_rule."""
    weight_decay: float = Field(default=1e-6, ge=0)
    """Of weights; biases and BatchNorm have none."""


class LARSParams(_OptimizerParams):
    momentum: float = Field(default=0.9, ge=0, lt=1)
    trust_coefficient: float = Field(default=0.001, gt=0)
    """Eta of LARS."""


class SGDParams(_OptimizerParams):
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False


class AdamWParams(_OptimizerParams):
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(default=1e-8, gt=0)


class LARSBlock(_Block):
    type: Literal["LARS"]
    params: LARSParams


class SGDBlock(_Block):
    type: Literal["SGD"]
    params: SGDParams


class AdamWBlock(_Block):
    type: Literal["AdamW"]
    params: AdamWParams


class Autocast(_Block):
    enabled: bool = False
    dtype: Literal["bfloat16"] = "bfloat16"


class ZeroOptimization(_Block):
    stage: int = 0


class Config(_Block):
    train_batch_size: Positive
    """Global batch B: images per step over all processes; each gives two views."""
    train_micro_batch_size_per_gpu: Positive | None = None
    """Images a process embeds at a time (the largest divisor of its share up to this number); None: all."""
    gradient_clipping: float = 0.0
    communication_data_type: Literal["fp32"] = "fp32"
    torch_autocast: Autocast = Autocast()
    """bfloat16 convolutions and matrix products, on a GPU; parameters stay float32. Not used on the CPU."""
    zero_optimization: ZeroOptimization = ZeroOptimization()
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

    @pydantic.model_validator(mode="after")
    def _refuse_contradictions(self) -> "Config":
        stage = self.zero_optimization.stage
        if stage != 0:
            raise ValueError(
                f"zero_optimization.stage is {stage}; set it to 0: the other stages flatten all layers into one "
                "tensor, while LARS scales each layer by its own norm, and every process saves what it alone holds"
            )
        if self.gradient_clipping != 0:
            raise ValueError(
                f"gradient_clipping is {self.gradient_clipping}, which the method does not have; set it to 0.0"
            )
        if 64 * self.simclr.encoder.width % 1:
            raise ValueError(f"simclr.encoder.width is {self.simclr.encoder.width}; it must be a multiple of 1/64")
        if self.simclr.encoder.selective_kernels and self.simclr.encoder.name in ("resnet18", "resnet34"):
            raise ValueError(
                f"simclr.encoder.selective_kernels is for resnet50 and deeper, not for {self.simclr.encoder.name}"
            )
        if self.simclr.encoder.selective_kernels and 64 * self.simclr.encoder.width < 2:
            raise ValueError(
                f"simclr.encoder.width is {self.simclr.encoder.width}; selective kernels need at least 1/32"
            )
        if isinstance(self.optimizer, SGDBlock):
            sgd = self.optimizer.params
            if sgd.nesterov and not sgd.momentum:
                raise ValueError("optimizer.params.nesterov is true, but momentum is 0; give a momentum")
        if self.train_batch_size < 2:
            raise ValueError("train_batch_size is 1; NT-Xent compares an image with others: use at least 2")
        if self.train_batch_size % self.simclr.lanes:
            raise ValueError(
                f"simclr.lanes is {self.simclr.lanes}, which does not divide train_batch_size {self.train_batch_size}"
            )
        if self.simclr.warmup_epochs > self.simclr.epochs:
            raise ValueError(
                f"simclr.warmup_epochs is {self.simclr.warmup_epochs}, longer than the {self.simclr.epochs} epochs "
                f"of the run"
            )
        views = self.simclr.views
        for where, view in (("views", views), ("views.second", views.second or views)):
            for name, (low, high), most in (("area", view.area, 1.0), ("sigma", view.sigma, float("inf"))):
                if not 0 < low <= high <= most:
                    raise ValueError(
                        f"simclr.{where}.{name} is [{low}, {high}], which is no range of positive numbers up to {most}"
                    )
        rule, lr = self.simclr.lr_rule, self.optimizer.params.lr
        if rule != "none" and self.optimizer.type == "AdamW":
            raise ValueError(
                f'simclr.lr_rule is "{rule}", which is for LARS and SGD; for AdamW set it to "none" and lr to a number'
            )
        if rule != "none":
            expected = LR_RULES[rule](self.train_batch_size)
            if abs(lr - expected) > _LR_TOLERANCE * expected:
                raise ValueError(
                    f"optimizer.params.lr is {lr}, but the {rule} rule gives {expected:.4g} for a global batch of "
                    f"{self.train_batch_size}; "
                    'change one of them, or set simclr.lr_rule to "none" to force it'
                )
        return self

    def architecture(self) -> Architecture:
        encoder = self.simclr.encoder
        stem = encoder.stem
        if stem == "auto":
            stem = "3x3" if self.simclr.image_size < SMALLEST_SIZE_FOR_7X7 else "7x7"
        assert encoder.name in ARCHITECTURES
        return Architecture(encoder.name, encoder.width, stem, tuple(encoder.projector), encoder.selective_kernels)

    def shard_cache(self) -> Cache:
        try:
            folder = Path(self.simclr.cache).expanduser()
        except RuntimeError as error:
            raise UserError(f"simclr.cache is {self.simclr.cache!r}, whose home folder nobody knows") from error
        return Cache(folder, int(self.simclr.cache_gb * 1e9))

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

    def micro_batch(self, world: int) -> int:
        """Images a process embeds at a time: the largest divisor of its share that is at most the configured number.

        Raises UserError where that is less than half of it.
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
        return size
