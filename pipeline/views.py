"""A sheet of pictures: each sample as stored, and its two views with what they drew.

    simclr-dali views SHARDS --out views.png               # as ds_lars.json would augment them in epoch 0
    simclr-dali views SHARDS --out views.png --epoch 3 --strength 0.5 --size 96
    simclr-dali views --replay RUN/bad-step-00001234-rank-3.json --out views.png   # a batch that a run kept

The draws of each view are also printed, one line each.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from simclr_dali.shards.command_line import parser_of, positive_int
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.shards.sources.source import SPLITS


def parse_arguments() -> argparse.Namespace:
    parser = parser_of("Show samples and their two views.", __doc__)
    parser.add_argument(
        "data",
        nargs="?",
        metavar="SHARDS",
        help="folder made by scripts/make_shards.sh, or its address (with --replay: as it says)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the sheet")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    parser.add_argument("--count", type=positive_int, default=8, metavar="N", help="samples (default: 8)")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="whose order and draws (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the run (default: 0)")
    parser.add_argument("--size", type=positive_int, default=224, metavar="PX", help="of a view (default: 224)")
    parser.add_argument("--strength", type=float, default=1.0, metavar="S", help="of the colors (default: 1)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="show the first --count samples of a kept batch")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import numpy as np
import PIL.Image
import PIL.ImageDraw
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
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.shards.show import save

_SIDE = 224  # pixels of every picture on the sheet
_CAPTION = 44  # pixels below each, three lines
_LETTERS = {BRIGHTNESS: "b", CONTRAST: "c", SATURATION: "s", HUE: "h"}


def described(draws: Draws, row: int) -> list[str]:
    """What a view drew, in three short lines: geometry; colors in their order; gray, blur and solarize."""
    x0, y0, x1, y1 = draws.box[row]
    geometry = f"{x1 - x0:.0f}x{y1 - y0:.0f} at {x0:.0f},{y0:.0f}{' flipped' if draws.flip[row] else ''}"
    factors = " ".join(f"{_LETTERS[step]} {draws.factors[row, step]:.2f}" for step in draws.order[row])
    colors = factors if draws.jitter[row] else "colors kept"
    blur = f"blur {draws.sigma[row]:.2f} px" if draws.blur[row] else "no blur"
    solarize = f", solarized from {draws.threshold[row]:.0f}" if draws.solarize[row] else ""
    return [geometry, colors, f"{'gray, ' if draws.gray[row] else ''}{blur}{solarize}"]


def sheet(split: Split, batch: Replay) -> tuple[PIL.Image.Image, list[str]]:
    """The picture of a batch, and its draws as lines of text."""
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
    width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    draws = batch.draws(shards, ids)
    reader = SampleReader(split)
    reader.expect([int(shard) for shard in np.unique(rows["shard"])], [])
    originals = [rgb(data.tobytes()) for data in reader.read(ids)[0]]
    reader.close()

    result = PIL.Image.new("RGB", (3 * _SIDE, len(ids) * (_SIDE + _CAPTION)), "white")
    pen = PIL.ImageDraw.Draw(result)
    lines = []
    for row, sample in enumerate(ids):
        name = shards.class_name(int(labels[row])) or "no label"
        captions = [[f"sample {sample}, {name}"[:36], f"{width[row]}x{height[row]} pixels"]]
        captions += [described(view, row) for view in draws]
        for column, picture in enumerate((originals[row], pictures[row], pictures[len(ids) + row])):
            x, y = column * _SIDE, row * (_SIDE + _CAPTION)
            picture.thumbnail((_SIDE, _SIDE))
            result.paste(picture, (x + (_SIDE - picture.width) // 2, y + (_SIDE - picture.height) // 2))
            pen.multiline_text((x + 3, y + _SIDE), "\n".join(captions[column]), fill="black", spacing=2)
            if column:
                lines.append(f"sample {sample} ({name}) view {column}: {'; '.join(captions[column])}")
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
