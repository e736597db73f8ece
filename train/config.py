"""What a configuration may hold: DeepSpeed's keys that we use, and ours under "simclr".

Every key is known here, typed and checked before anything is built; an unknown one is an error, since DeepSpeed itself
passes over a misspelt top-level key in silence. train/config_file.py reads it from a file.
"""

import json
import math
from dataclasses import asdict
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from simclr_dali.model.batchnorm import MIN_BATCHNORM_IMAGES, NOISY_BATCHNORM_IMAGES
from simclr_dali.model.encoder import Description
from simclr_dali.model.ntxent import SMALLEST_TEMPERATURE
from simclr_dali.model.simclr import ENCODERS, Architecture, describe
from simclr_dali.pipeline.cache import Cache
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.kept_place import Place
from simclr_dali.pipeline.loader import MAX_BAD_FRACTION
from simclr_dali.shards.errors import UserError

# SimCLR (Chen et al. 2020), section 2.1 and appendix B.1, by name: global batch -> peak learning rate.
LR_RULES = {
    "linear": lambda batch: 0.3 * batch / 256,
    "sqrt": lambda batch: 0.075 * math.sqrt(batch),
}
LR_FORMULAS = {"linear": "0.3 B/256", "sqrt": "0.075 sqrt(B)"}
# Cosines are divided by it: at 10 the best and the worst embeddings differ by 0.2 in the exponent.
LARGEST_TEMPERATURE = 10.0
_LR_TOLERANCE = 1e-3  # relative; a rate written with three digits still fits its rule

Positive = Annotated[int, Field(ge=1, lt=2**31)]


class _Block(pydantic.BaseModel):
    # protected_namespaces: pydantic would reserve names that start with "model".
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Encoder(_Block):
    """Encoder and projector. The keys beside these two are the fields of the encoder's description, such as width, stem
    and selective_kernels of a ResNet (model/resnet.py)."""

    model_config = pydantic.ConfigDict(extra="allow")

    name: str = "resnet50"
    """Which encoder, one of model.simclr.ENCODERS."""
    projector: list[Positive] = Field(default=[2048, 128], min_length=1)
    """Widths of the projector's layers, two in the paper and three in SimCLRv2; the last is that of the embeddings."""

    @pydantic.model_validator(mode="after")
    def _refuse_one_number(self) -> "Encoder":
        if min(self.projector) < 2:
            raise ValueError(f"projector is {self.projector}; a layer of one number leaves only its sign to learn")
        return self

    @pydantic.model_validator(mode="before")
    @classmethod
    def _complete(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        name = raw.get("name", cls.model_fields["name"].default)
        rest = {key: value for key, value in raw.items() if key in cls.model_fields}
        return {**asdict(_described(name, {key: raw[key] for key in raw.keys() - rest.keys()})), **rest}

    def description(self) -> Description:
        assert self.model_extra is not None
        return describe(self.name, self.model_extra)


def _described(name: Any, values: dict[str, Any]) -> Description:
    """A description whose values have the types of its fields. Raises ValueError that names the key."""
    kind = ENCODERS.get(name) if isinstance(name, str) else None
    try:
        if kind is not None and values.keys() <= kind.__dataclass_fields__.keys():
            # As JSON, of which strict types make a dataclass.
            return pydantic.TypeAdapter(kind).validate_json(json.dumps({"name": name, **values}), strict=True)
        return describe(name, values)  # says what is not known
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # the description's own
            raise first["ctx"]["error"] from None
        raise ValueError(wrong_value(".".join(map(str, first["loc"])), first)) from error


def wrong_value(key: str, detail: Any) -> str:
    """What is wrong with the value of ``key``, in the words of one of pydantic's errors()."""
    return f"{key} is {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


class Views(Recipe):
    """Both views: the recipe of the first, and what the second has otherwise."""

    second: Recipe | None = None
    """Of the second view, any of the fields of a recipe; those left out are as in the first."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How crops are resized."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _complete_second(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("second"), dict):
            first = {key: value for key, value in raw.items() if key in Recipe.model_fields}
            raw = {**raw, "second": {**first, **raw["second"]}}
        return raw

    def recipes(self) -> tuple[Recipe, Recipe]:
        first = Recipe(**{name: getattr(self, name) for name in Recipe.model_fields})
        return first, self.second or first


class Graph(_Block):
    """How DALI computes the views (pipeline.graph); "auto" is what was measured to be faster on the device: on an H200
    no conditionals (by 8 %), region (10 %) and 4 batches ahead (2 %)."""

    conditionals: Literal["auto", True, False] = "auto"
    """Skip steps for samples that did not draw them, instead of computing them with neutral parameters; on a CPU."""
    region: Literal["auto", True, False] = "auto"
    """Decode only the part of a picture that its views cover; on a GPU."""
    prefetch: int = Field(default=0, ge=0)
    """Batches that are inside the graph at a time; 0: 4 on a GPU, 2 on a CPU."""

    def on(self, device: str, *, whole: bool = False) -> dict[str, Any]:
        """Each field's value on ``device``, "cuda" or "cpu"; whole: "auto" decodes whole pictures."""
        on_gpu = device == "cuda"
        return {
            "conditionals": not on_gpu if self.conditionals == "auto" else self.conditionals,
            "region": on_gpu and not whole if self.region == "auto" else self.region,
            "prefetch": self.prefetch or (4 if on_gpu else 2),
        }


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
    init_from: str = ""
    """What the weights begin as: a run, whose projector is taken too where it is as wide, or any file with an encoder
    that simclr_dali.load reads; empty: random numbers."""
    epochs: Positive = 200
    """Length of the run, in passes over the data."""
    warmup_epochs: float = Field(default=10.0, ge=0)
    """Linear warm-up, in epochs; then a cosine to 0 at the end."""
    lr_rule: Literal["linear", "sqrt", "none"] = "linear"
    """What lr must be, or "auto" makes it, for the global batch: 0.3 B/256 or 0.075 sqrt(B); none allows any number."""
    temperature: float = Field(default=0.1, ge=SMALLEST_TEMPERATURE, le=LARGEST_TEMPERATURE)
    """Of NT-Xent."""
    compile: Literal["auto", "no", "inductor", "coordinate-descent-tuning", "max-autotune-no-cudagraphs"] = "auto"
    """How torch.compile compiles encoder and projector: auto is inductor on a GPU and no on a CPU; the last two are
    inductor's searches for faster kernels, which take minutes once."""
    batchnorm_kernels: bool = False
    """BatchNorm with its ReLU by our own Triton kernels (model/batchnorm_kernels.py); on a GPU, where nobody has
    measured them yet."""
    deterministic: bool = False
    """Only algorithms whose result is the same to the bit each time (train/determinism.py), which may be slower. On a
    CPU all are."""
    image_size: Annotated[int, Field(ge=16)] = 224
    """Side of a view, in pixels."""
    lanes: Positive = 64
    """Lanes of the data order; divides the global batch and is divided by the number of processes."""
    shuffle_window: Positive = 8
    """Shards of a lane that are shuffled together."""
    encoder: Encoder = Encoder()
    views: Views = Views()
    graph: Graph = Graph()
    engine_share: float = Field(default=0.75, ge=0, le=1)
    """Share of the baseline JPEGs that a GPU's JPEG engine decodes, the same pictures always (pipeline/engine.py)."""
    keep_decoded: Place = "auto"
    """Where decoded pictures stay, so that each is read and decoded once, with the same views to the bit as whole ones
    (pipeline/kept_memory.py): auto is the GPU for one process a machine, else the host's memory, where they take at
    most half of what is free."""
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
    """Epochs between two checkpoints that are never removed; 0: there are none."""
    knn_every_epochs: int = Field(default=0, ge=0)
    """Epochs between two kNN checks on a part of train (train/knn_monitor.py); 0: none."""
    knn_images: Positive = 20_000
    """Images of train that a kNN check uses, as many of each class; a tenth of them are the queries."""


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


class Config(_Block):
    train_batch_size: Positive
    """Global batch B: images per step over all processes; each gives two views."""
    train_micro_batch_size_per_gpu: Positive | None = None
    """Images a process embeds at a time (the largest divisor of its share up to this number); None: all."""
    torch_autocast: Autocast = Autocast()
    """bfloat16 convolutions and matrix products, on a GPU; parameters stay float32. Not used on the CPU."""
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
