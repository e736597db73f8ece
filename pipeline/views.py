"""Draw a sheet: samples as stored, with the boxes of their two views, and the views with what they drew.

    simclr-dali views SHARDS --out views.png               # as ds_lars.json would augment them in epoch 0
    simclr-dali views SHARDS --out views.png --epoch 3 --strength 0.5 --size 96
    simclr-dali views --replay RUN/bad-step-00001234-rank-3.json --out views.png   # a batch that a run kept

The draws of each view are also printed, one line each.
"""

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from simclr_dali.shards.command_line import parser_of, positive_int
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.shards.sources.source import SPLITS


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "data",
        nargs="?",
        metavar="SHARDS",
        help="It is a folder made by scripts/make_shards.sh, or its address; --replay says it itself.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="Write the sheet here.")
    parser.add_argument("--split", choices=SPLITS, default="train", help="Take samples of this split (default: train).")
    parser.add_argument("--count", type=positive_int, default=8, metavar="N", help="Draw N samples (default: 8).")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="Show them as in epoch N (default: 0).")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Draw as a run of this seed (default: 0).")
    parser.add_argument(
        "--size", type=positive_int, default=224, metavar="PX", help="Make views of PX pixels a side (default: 224)."
    )
    parser.add_argument(
        "--strength", type=float, default=1.0, metavar="S", help="Change colors by this strength (default: 1)."
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="Show samples of a batch that a run kept.")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps
import torch

from simclr_dali.pipeline.cache import Cache
from simclr_dali.pipeline.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws, Recipe
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import MEAN, STD, LoaderConfig
from simclr_dali.pipeline.loader import views_in_epoch
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.reader import SampleReader
from simclr_dali.pipeline.remote import open_split
from simclr_dali.pipeline.replay import Replay, read
from simclr_dali.shards.image import rgb
from simclr_dali.shards.lettering import font, lettered
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.shards.show import save
from simclr_dali.shards.wording import printable

_SIDE, _GAP, _FRAME = 224, 12, 3  # pixels: of a picture on the sheet, between them, of the frames
_CAPTION, _TITLE = 62, 22  # pixels: of the four lines below each picture, of the titles above
# Of each view: its frame, and its box on the original. Told apart by people who see few colors.
VIEW_COLORS = ("#0072b2", "#d55e00")
_FACTORS = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation"}


class Seen(NamedTuple):
    """A sample as a training sees it."""

    sample: int
    name: str
    """Of its class, or "no label"."""
    original: PIL.Image.Image
    views: list[PIL.Image.Image]
    boxes: list[tuple[float, float, float, float]]
    """Of each view: left, top, right, bottom, in pixels of the original."""
    words: list[list[str]]
    """Of each view, what it drew: crop, colors in their order, and the rest."""


def described(draws: Draws, row: int, size: tuple[int, int]) -> list[str]:
    """What a view drew of a picture of ``size`` (width, height): geometry; colors in their order; the rest."""
    x0, y0, x1, y1 = draws.box[row]
    share = (x1 - x0) * (y1 - y0) / (size[0] * size[1])
    geometry = f"{share:.0%} of the picture, {x1 - x0:.0f}x{y1 - y0:.0f} at {x0:.0f},{y0:.0f}"
    colors = [
        f"hue {360 * draws.factors[row, step]:+.0f} deg"
        if step == HUE
        else f"{_FACTORS[step]} x {draws.factors[row, step]:.2f}"
        for step in draws.order[row]
    ]
    rest = [
        *(["mirrored"] if draws.flip[row] else []),
        *(["gray"] if draws.gray[row] else []),
        f"blur {draws.sigma[row]:.2f} px" if draws.blur[row] else "no blur",
        *([f"solarized from {draws.threshold[row]:.0f}"] if draws.solarize[row] else []),
    ]
    return [geometry, ", ".join(colors) if draws.jitter[row] else "colors kept", ", ".join(rest)]


def seen(split: Split, batch: Replay) -> list[Seen]:
    """The samples of a batch with their views, made as a training makes them."""
    shards = split.shards
    config = LoaderConfig(size=batch.size, device=torch.device("cpu"), interpolation=batch.interpolation)
    # Damaged samples are shown by what stands in for them, as in training.
    views, labels, ids_shown = views_in_epoch(
        split, batch.ids, batch.recipes, config, seed=batch.seed, epoch=batch.epoch, max_bad_fraction=1.0
    )
    ids = ids_shown.numpy()
    pixels = views.permute(0, 2, 3, 1).numpy() * np.array(STD) + np.array(MEAN)
    pictures = [PIL.Image.fromarray(view.clip(0, 255).round().astype(np.uint8)) for view in pixels]
    rows = shards.samples[ids]
    sizes = list(zip(rows["width"].tolist(), rows["height"].tolist(), strict=True))
    draws = batch.draws(shards, ids)
    reader = SampleReader(split)
    reader.expect([int(shard) for shard in np.unique(rows["shard"])], [])
    originals = [rgb(data.tobytes()) for data in reader.read(ids)[0]]
    reader.close()
    return [
        Seen(
            int(sample),
            shards.class_name(int(labels[row])) or "no label",
            originals[row],
            [pictures[view * len(ids) + row] for view in range(len(draws))],
            [tuple(view.box[row].tolist()) for view in draws],
            [described(view, row, sizes[row]) for view in draws],
        )
        for row, sample in enumerate(ids)
    ]


def with_boxes(picture: Seen, side: int) -> PIL.Image.Image:
    """The original, at most ``side`` pixels wide and high, with the box of each view on it in the view's color."""
    drawn = picture.original.copy()
    drawn.thumbnail((side, side))
    scale = drawn.width / picture.original.width, drawn.height / picture.original.height
    pen = PIL.ImageDraw.Draw(drawn)
    for (x0, y0, x1, y1), color in zip(picture.boxes, VIEW_COLORS, strict=False):
        box = x0 * scale[0], y0 * scale[1], x1 * scale[0] - 1, y1 * scale[1] - 1
        pen.rectangle(box, outline="white", width=_FRAME + 2)
        pen.rectangle(box, outline=color, width=_FRAME)
    return drawn


def sheet(split: Split, batch: Replay) -> tuple[PIL.Image.Image, list[str]]:
    """The picture of a batch, and its draws as lines of text."""
    found = seen(split, batch)
    columns, line = 1 + len(batch.recipes), _SIDE + _CAPTION
    width = columns * (_SIDE + _GAP) + _GAP
    result = PIL.Image.new("RGB", (width, _TITLE + len(found) * line), "white")
    pen = PIL.ImageDraw.Draw(result)
    for column in range(columns):
        title = f"view {column}" if column else "as stored, with the boxes of its views"
        pen.text((_GAP + column * (_SIDE + _GAP), 5), title, fill="black", font=font())
    lines = []
    for row, one in enumerate(found):
        width, height = one.original.size
        captions = [[f"sample {one.sample}", one.name, f"{width}x{height} pixels"], *one.words]
        for column, picture in enumerate([with_boxes(one, _SIDE), *one.views]):
            x, y = _GAP + column * (_SIDE + _GAP), _TITLE + row * line
            if column:  # small views are made larger
                picture = PIL.ImageOps.contain(picture, (_SIDE - 2 * _FRAME, _SIDE - 2 * _FRAME))
            at = x + (_SIDE - picture.width) // 2, y + (_SIDE - picture.height) // 2
            if 0 < column <= len(VIEW_COLORS):
                frame = at[0] - _FRAME, at[1] - _FRAME, at[0] + picture.width + 2, at[1] + picture.height + 2
                pen.rectangle(frame, outline=VIEW_COLORS[column - 1], width=_FRAME)
            result.paste(picture, at)
            folded = [part for words in captions[column] for part in textwrap.wrap(printable(words), _SIDE // 6)]
            pen.multiline_text(
                (x, y + _SIDE + 2), lettered("\n".join(folded[:4])), fill="black", spacing=2, font=font()
            )
            if column:
                lines.append(f"sample {one.sample} ({one.name}) view {column}: {'; '.join(captions[column])}")
    return result, lines


def planned(given: argparse.Namespace, shards: ShardSet) -> Replay:
    """The first --count samples of an epoch, as the command line describes them."""
    order = Order(shards.shard_sizes(), given.count, 1, 8, given.seed)
    recipe = Recipe(strength=given.strength)
    return Replay(
        data=str(given.data),
        manifest=shards.fingerprint,
        about={},
        seed=given.seed,
        epoch=given.epoch,
        size=given.size,
        interpolation="bilinear",
        recipes=(recipe, recipe),
        ids=order.batch(given.epoch, 0),
    )


def main(given: argparse.Namespace) -> None:
    if given.epoch < 0 or given.seed < 0 or given.strength < 0:
        raise UserError(
            f"--epoch {given.epoch}, --seed {given.seed} and --strength {given.strength} must not be negative"
        )
    if not given.data and not given.replay:
        raise UserError("neither SHARDS nor --replay is given; name the shards, or a batch that a run kept")
    data = given.data or read(given.replay).data
    split = open_split(data, given.split, Cache.at("~/.cache/simclr-dali", 200))
    batch = read(given.replay, split.shards) if given.replay else planned(given, split.shards)
    picture, lines = sheet(split, replace(batch, ids=batch.ids[: given.count]))
    save(picture, given.out, "--out")
    if batch.about:
        print(", ".join(f"{key} {value}" for key, value in batch.about.items()))
    print("\n".join(lines))
    print(f"{len(lines) // 2} samples: {given.out}")


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
