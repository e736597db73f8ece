"""The pictures of a report: views that the training saw, nearest neighbours, and a map of embeddings."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import torch
from sklearn.manifold import TSNE

from simclr_dali.eval.evaluation import own_device
from simclr_dali.eval.nearest import OTHER_CLASS, SAME_CLASS
from simclr_dali.eval.report_run import Run
from simclr_dali.model.neighbours import nearest
from simclr_dali.model.pretrained import open_pretrained
from simclr_dali.pipeline.cache import Cache
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.features import Features, extract
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.reader import SampleReader
from simclr_dali.pipeline.remote import open_split
from simclr_dali.pipeline.replay import Replay
from simclr_dali.pipeline.views import VIEW_COLORS, seen, with_boxes
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import rgb

_VIEWS, _QUERIES, _NEIGHBOURS = 4, 4, 6
# That are embedded at most, of all runs of a page together: neighbours and the map are of these.
_IMAGES, _FIRST_IMAGES, _SECONDS = 600, 32, 40.0
_SIDE, _SMALL = 168, 34  # pixels
_FEWEST_ON_A_MAP, _MARGIN = 12, 2.0  # pictures; percent of a side
_APART = 1e-6  # of unit embeddings


class Shown(NamedTuple):
    """A picture and what is written below it."""

    picture: str
    """As an address with the picture in it."""
    words: list[str]
    color: str = ""
    """Of its frame."""


class Dot(NamedTuple):
    """A picture on the map."""

    picture: str
    left: float
    """Percent of the map's width."""
    top: float
    color: str
    name: str


@dataclass(frozen=True)
class Pictures:
    """What there is to look at of one run."""

    views_of: str
    """From which step the views are."""
    views: list[list[Shown]]
    """Of each sample: the original with boxes, then its views."""
    neighbours_of: str
    neighbours: list[list[Shown]]
    """Of each query: itself, then the most similar ones."""
    dots: list[Dot]
    """The map; empty where there are too few pictures, or their embeddings have collapsed."""
    labelled: bool
    """Whether the pictures have classes."""


def pictures(run: Run, runs: int = 1, *, with_map: bool = True) -> Pictures:
    """What there is to look at of ``run``, one of ``runs`` on a page; the map is left out where nobody asks for it.

    Raises UserError where the data or the checkpoint is not there any more.
    """
    source = open_pretrained(run.path)
    simclr = run.config["simclr"]
    cache = Cache.at(simclr["cache"], simclr["cache_gb"])
    data = source.data or simclr["data"]
    train = open_split(data, "train", cache)
    views = _views(run, train, str(data))
    try:
        split = open_split(data, "val", cache)
    except UserError:
        split = train
    device, cores = own_device()
    config = LoaderConfig(size=simclr["image_size"], device=device, threads=cores)
    encoder = source.encoder.place(device)

    def of(count: int) -> tuple[npt.NDArray[np.int64], Features]:
        ids = np.unique(np.linspace(0, len(split.shards) - 1, min(count, len(split.shards))).astype(np.int64))
        return ids, extract(encoder, split, config, batch=_FIRST_IMAGES, ids=ids, silent=True)

    ids, found = of(_FIRST_IMAGES)  # which tell how many there is time for
    ids, found = of(min(_IMAGES // runs, max(len(ids), int(_SECONDS * len(ids) / found.seconds))))
    features = found.features.cpu()
    small = dict(zip(ids.tolist(), _read(split, ids), strict=True))
    where = f"{len(ids):,} images of {split.shards.split}"
    return Pictures(
        f"step {run.steps:,}, the last one that was taken",
        views,
        where,
        list(_neighbours(split, ids, features, small)),
        map_of(split, ids, features, small) if with_map else [],
        bool(split.shards.classes),
    )


def _views(run: Run, train: Split, data: str) -> list[list[Shown]]:
    simclr = run.config["simclr"]
    order = Order(
        train.shards.shard_sizes(), run.config["train_batch_size"], simclr["lanes"], simclr["shuffle_window"],
        simclr["seed"],
    )  # fmt: skip
    epoch, step = divmod(run.steps - 1, order.steps_per_epoch)
    first, second = recipes(simclr["views"])
    replay = Replay(
        data=data,
        manifest=train.shards.fingerprint,
        about={},
        seed=simclr["seed"],
        epoch=epoch,
        size=simclr["image_size"],
        interpolation=simclr["views"]["interpolation"],
        recipes=(first, second),
        ids=order.batch(epoch, step)[:_VIEWS],
    )
    rows = []
    for one in seen(train, replay):
        row = [Shown(address(with_boxes(one, _SIDE)), [one.name, f"sample {one.sample}"])]
        for picture, words, color in zip(one.views, one.words, VIEW_COLORS, strict=True):
            row.append(Shown(address(PIL.ImageOps.contain(picture, (_SIDE, _SIDE))), words, color))
        rows.append(row)
    return rows


def recipes(views: dict[str, Any]) -> tuple[Recipe, Recipe]:
    """Of both views, from the block of a resolved config."""
    fields = {key: value for key, value in views.items() if key in Recipe.model_fields}
    first = Recipe.model_validate(fields)
    return first, Recipe.model_validate(views["second"]) if views.get("second") else first


def _read(split: Split, ids: npt.NDArray[np.int64]) -> Iterator[PIL.Image.Image]:
    """Pictures, each at most _SIDE pixels wide and high."""
    reader = SampleReader(split)
    try:
        for some in np.array_split(ids, -(-len(ids) // 64)):
            reader.expect(np.unique(split.shards.samples["shard"][some]).tolist(), [])
            for data in reader.read(some).encoded:
                picture = rgb(data.tobytes())
                picture.thumbnail((_SIDE, _SIDE))
                yield picture
    finally:
        reader.close()


def _neighbours(
    split: Split, ids: npt.NDArray[np.int64], features: torch.Tensor, small: dict[int, PIL.Image.Image]
) -> Iterator[list[Shown]]:
    queries = np.linspace(0, len(ids) - 1, min(_QUERIES, len(ids))).astype(int)
    count = min(_NEIGHBOURS + 1, len(ids))
    cosines, found = nearest(features, features[queries], count)
    for query, of_row, places in zip(queries.tolist(), cosines.tolist(), found.tolist(), strict=True):
        row = [Shown(address(small[int(ids[query])]), ["asked", _class(split, int(ids[query]))])]
        for cosine, place in zip(of_row, places, strict=True):
            if place == query:
                continue
            same = _class(split, int(ids[place])) == _class(split, int(ids[query]))
            color = (SAME_CLASS if same else OTHER_CLASS) if split.shards.classes else ""
            words = [_class(split, int(ids[place])), f"cosine {cosine:.3f}"]
            row.append(Shown(address(small[int(ids[place])]), words, color))
        yield row[: _NEIGHBOURS + 1]


def map_of(
    split: Split, ids: npt.NDArray[np.int64], features: torch.Tensor, small: dict[int, PIL.Image.Image]
) -> list[Dot]:
    """Where t-SNE (van der Maaten and Hinton 2008) puts each picture by its unit embedding; nothing of a few."""
    if len(ids) < _FEWEST_ON_A_MAP:
        return []
    unit = torch.nn.functional.normalize(features.double(), dim=1).numpy()
    if not np.isfinite(unit).all() or np.ptp(unit, axis=0).max() < _APART:  # collapsed: t-SNE divides by the spread
        return []
    neighbours = min(30.0, (len(ids) - 1) / 3)  # scikit-learn's default, as far as there are so many
    placed = TSNE(perplexity=neighbours, init="pca", random_state=0).fit_transform(unit)
    low, high = placed.min(axis=0), placed.max(axis=0)
    places = _MARGIN + (100 - 2 * _MARGIN) * (placed - low) / np.maximum(high - low, 1e-9)
    labels = split.shards.samples["label"][ids]
    dots = []
    for sample, label, (left, top) in zip(ids.tolist(), labels.tolist(), places.tolist(), strict=True):
        picture = small[sample].copy()
        picture.thumbnail((_SMALL, _SMALL))
        color = f"hsl({(label * 137.5) % 360:.0f} 70% 50%)" if split.shards.classes else ""
        dots.append(Dot(address(picture, 70), left, top, color, _class(split, sample)))
    return dots


def _class(split: Split, sample: int) -> str:
    return split.shards.class_name(int(split.shards.samples["label"][sample])) or f"sample {sample}"


def address(picture: PIL.Image.Image, quality: int = 85) -> str:
    """A picture as an address that holds it."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
