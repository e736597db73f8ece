"""The key "simclr" of a configuration: what DeepSpeed does not know. train/config.py holds the rest."""

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from simclr_dali.model.encoder import Description
from simclr_dali.model.ntxent import SMALLEST_TEMPERATURE
from simclr_dali.model.simclr import ENCODERS, describe
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.kept_place import Place
from simclr_dali.pipeline.loader import MAX_BAD_FRACTION

# Cosines are divided by it: at 10 the best and the worst embeddings differ by 0.2 in the exponent.
LARGEST_TEMPERATURE = 10.0

Positive = Annotated[int, Field(ge=1, lt=2**31)]


class Block(pydantic.BaseModel):
    # protected_namespaces: pydantic would reserve names that start with "model".
    model_config = pydantic.ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class Encoder(Block):
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


class Graph(Block):
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


class About(Block):
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


class Simclr(Block):
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
    batchnorm_group: Literal["all", "node"] | Positive = "all"
    """Over which processes BatchNorm's statistics go: all of them (the paper's), those of a machine, or groups of so
    many consecutive ranks. Smaller groups send less; embeddings and gradients go over all in any case. It is part of a
    run; running statistics are averaged over all at each checkpoint."""
    batchnorm_kernels: bool = False
    """BatchNorm with its ReLU by our own Triton kernels (model/batchnorm_kernels.py); on a GPU, where nobody has
    measured them yet."""
    deterministic: bool = False
    """Only algorithms whose result is the same to the bit each time (train/determinism.py), which may be slower. On a
    CPU all are."""
    image_size: Annotated[int, Field(ge=16)] = 224
    """Side of a view, in pixels."""
    lanes: Positive = 64
    """Lanes of the data order, so the most processes that the run can ever have; divides the global batch, and is
    divided by the number of processes."""
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
    track: Literal["auto"] | list[Literal["tensorboard", "wandb", "mlflow"]] = "auto"
    """Who is told of the run beside its own files (train/trackers.py), such as ["tensorboard", "wandb"]; auto:
    TensorBoard where it is installed."""
    report: bool = True
    """Whether report.html is written into the run folder when the run is finished (eval/report.py)."""
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
