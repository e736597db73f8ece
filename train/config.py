"""The one configuration file: a DeepSpeed JSON whose key "simclr" holds what is ours.

Every key is known here, typed and checked before anything is built; an unknown one is an error, since DeepSpeed itself
passes over a misspelt top-level key in silence.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from model.encoder import ARCHITECTURES, SMALLEST_SIZE_FOR_7X7, Architecture
from model.ntxent import SMALLEST_TEMPERATURE
from pipeline.draws import Recipe
from pipeline.loader import MAX_BAD_FRACTION
from pipeline.remote import Cache
from shards.errors import UserError
from train.schedule import LR_RULES

PRESETS = Path(__file__).resolve().parent / "configs"
_LR_TOLERANCE = 1e-3  # relative; a rate written with three digits still fits its rule

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class _Block(pydantic.BaseModel):
    # protected_namespaces: pydantic would reserve names that start with "model".
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Encoder(_Block):
    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """Which ResNet."""
    width: float = Field(default=1.0, gt=0)
    """Factor on every number of channels."""
    stem: Literal["auto", "7x7", "3x3"] = "auto"
    """First convolution; auto takes 3x3 without max-pool for views under 64 pixels."""
    projector: list[Positive] = Field(default=[2048, 128], min_length=1)
    """Widths of the projector's layers; the last is the width of the embeddings that the loss compares."""


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


class Simclr(_Block):
    about: str = ""
    """For the reader: command, hardware, time and expected number of this preset."""
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
    """What lr must be for the global batch: 0.3 B/256, 0.075 sqrt(B), or none to allow any."""
    temperature: float = Field(default=0.1, ge=SMALLEST_TEMPERATURE)
    """Of NT-Xent."""
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


class OptimizerParams(_Block):
    lr: float = Field(gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-6, ge=0)
    trust_coefficient: float = Field(default=0.001, gt=0)
    """Eta of LARS."""


class Optimizer(_Block):
    type: Literal["LARS"]
    params: OptimizerParams


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
    optimizer: Optimizer
    simclr: Simclr

    @pydantic.model_validator(mode="after")
    def _refuse_contradictions(self) -> "Config":
        stage = self.zero_optimization.stage
        if stage != 0:
            raise ValueError(
                f"zero_optimization.stage is {stage}; LARS needs stage 0, since the others flatten all layers into "
                f"one tensor and LARS "
                "scales each layer by its own norm"
            )
        if self.gradient_clipping != 0:
            raise ValueError(
                f"gradient_clipping is {self.gradient_clipping}; LARS scales every layer itself: set it to 0.0"
            )
        if 64 * self.simclr.encoder.width % 1:
            raise ValueError(f"simclr.encoder.width is {self.simclr.encoder.width}; it must be a multiple of 1/64")
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
        return Architecture(encoder.name, encoder.width, stem, tuple(encoder.projector))

    def shard_cache(self) -> Cache:
        return Cache(Path(self.simclr.cache).expanduser(), int(self.simclr.cache_gb * 1e9))

    def local_batch(self, world: int) -> int:
        """Images per step of each of ``world`` processes. Raises UserError where they cannot share the batch."""
        if self.simclr.lanes % world:
            raise UserError(
                f"{world} processes do not divide the {self.simclr.lanes} lanes of the data order; start a divisor "
                f"of {self.simclr.lanes} "
                "processes, or set simclr.lanes to a multiple that divides train_batch_size"
            )
        return self.train_batch_size // world

    def micro_batch(self, world: int) -> int:
        """Images a process embeds at a time: the largest divisor of its share that is at most the configured number."""
        local = self.local_batch(world)
        most = min(self.train_micro_batch_size_per_gpu or local, local)
        return next(size for size in range(most, 0, -1) if local % size == 0)


def load_config(name: str, overrides: list[str], data: str | None = None, run: str | None = None) -> Config:
    """Read config ``name`` (a path, or a preset of train/configs), apply ``key.key=value`` overrides and check it.

    Raises UserError with one sentence for the first thing that is wrong.
    """
    path = Path(name)
    if not path.is_file():
        path = PRESETS / name
    if not path.is_file():
        presets = ", ".join(sorted(preset.name for preset in PRESETS.glob("*.json")))
        raise UserError(f"config {name} is neither a file nor a preset; the presets are {presets}")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("simclr", {}), dict):
        raise UserError(f"{path} must be a JSON object whose key 'simclr' is an object too")
    simclr = raw.setdefault("simclr", {})
    for override in overrides:
        _set(raw, override)
    if data is not None:
        simclr["data"] = data
    if run is not None:
        simclr["run"] = run
    if not simclr.get("run"):
        simclr["run"] = f"runs/{path.stem}"
    try:
        config = Config.model_validate(raw)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {_sentence(error)}") from error
    if not config.simclr.data:
        raise UserError(f"{path} names no data folder; give --data FOLDER, made by scripts/make_shards.sh")
    return config


def _set(raw: dict[str, Any], override: str) -> None:
    keys, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override!r} has no '='; write it as --set simclr.epochs=100")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = keys.split(".")
    block = raw
    for key in parents:
        block = block.setdefault(key, {})
        if not isinstance(block, dict):
            raise UserError(f"--set {override!r}: {key!r} is a value, not a block of the config")
    block[last] = value


def _sentence(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; see train/config.py for the known ones"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    if first["type"] == "value_error" and not key:
        return str(first["ctx"]["error"])
    return f"{key} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
