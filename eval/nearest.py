"""Draw, for each query, the pictures of a packed set that an encoder finds most similar.

    python eval/nearest.py bird.jpg --ckpt runs/ds_lars --data /data/imagenet-shards --out grid.png
    python eval/nearest.py queries/ --ckpt runs/ds_lars --split train --count 12 --out grid.png

A line per query: the query itself, set off, then the pictures whose embeddings have the largest cosine with its own,
with their class and the cosine. The same is printed. Where the folder of a query is named as a class of the set, frames
say which neighbours are of that class.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.eval.arguments import DataChoice, EncoderChoice, add_data_arguments, add_encoder_arguments
from simclr_dali.shards.command_line import parser_of, positive_int
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.shards.sources.source import SPLITS
from simclr_dali.shards.wording import printable


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("images", type=Path, nargs="+", metavar="QUERY", help="They are pictures, or folders of them.")
    add_encoder_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="val", help="Search in this split (default: val).")
    parser.add_argument(
        "--count", type=positive_int, default=8, metavar="N", help="Find N neighbours of each (default: 8)."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="Write the grid here.")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

from simclr_dali.eval.evaluation import cache_of, data_of, image_size_of, open_encoder, own_device
from simclr_dali.model.neighbours import nearest
from simclr_dali.pipeline.features import extract
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.image_files import ImageFiles, central_views_of_files, find_images, refuse_failures
from simclr_dali.pipeline.reader import Encoded, SampleReader
from simclr_dali.pipeline.remote import open_split
from simclr_dali.pipeline.subset import keys
from simclr_dali.shards.durable import refuse_read_only
from simclr_dali.shards.image import rgb
from simclr_dali.shards.lettering import font, lettered
from simclr_dali.shards.show import save

_SIDE, _CAPTION, _TITLE, _FRAME = 160, 30, 20, 4  # pixels
_QUERY_GAP = 24  # between a query and its neighbours
SAME_CLASS, OTHER_CLASS = "#009e73", "#d55e00"  # frames of the query's class and of others
_LINES = 64  # on the grid


def main(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix.lower() not in (".png", ".jpg"):
        raise UserError(f"--out is {arguments.out}; its ending must be .png or .jpg")
    refuse_read_only(arguments.out)
    paths = find_images(arguments.images)
    chosen, data = EncoderChoice.of(arguments), DataChoice.of(arguments)
    source = open_encoder(chosen)
    print(source.in_words())
    split = open_split(data_of(data, source), arguments.split, cache_of(data))
    if arguments.count > len(split.shards):
        raise UserError(f"--count is {arguments.count}, more than the {len(split.shards)} images there are; lower it")
    device, cores = own_device()
    encoder = source.encoder.place(device)
    config = LoaderConfig(size=image_size_of(chosen, source), device=device, threads=cores)
    files = ImageFiles(paths)
    embeddings, places = [], []
    with torch.inference_mode():
        for views, of in central_views_of_files(files, config, batch=arguments.batch):
            embeddings.append(encoder(views))
            places += of
    if places:
        bank = extract(encoder, split, config, batch=arguments.batch)
        cosines, found = (part.cpu() for part in nearest(bank.features, torch.cat(embeddings), arguments.count))
        # Where there are no labels, neighbours are known by what they are called in the tars.
        labels = split.shards.samples["label"].tolist()
        names = [split.shards.class_name(label) for label in labels] if split.shards.classes else keys(split)
        for place, ids, of_row in zip(places, found.tolist(), cosines.tolist(), strict=True):
            alike = ", ".join(f"{names[sample]} {cosine:.3f}" for sample, cosine in zip(ids, of_row, strict=True))
            print(f"{paths[place]}: {alike}")
        drawn = [paths[place] for place in places[:_LINES]]
        save(grid(drawn, split, found[:_LINES], cosines[:_LINES], names), arguments.out, "--out")
        some = f", the first {_LINES} on the grid" if len(places) > _LINES else ""
        print(f"{len(places)} queries against {len(split.shards):,} images{some}: {arguments.out}")
    refuse_failures(files.failures, paths)


def grid(
    queries: list[Path], split: Split, found: torch.Tensor, cosines: torch.Tensor, names: list[str]
) -> PIL.Image.Image:
    """A line per query: itself, then its neighbours. found, cosines: [queries, count]."""
    width = (1 + found.shape[1]) * _SIDE + _QUERY_GAP
    result = PIL.Image.new("RGB", (width, _TITLE + len(queries) * (_SIDE + _CAPTION)), "white")
    pen = PIL.ImageDraw.Draw(result)
    known = any(query.parent.name in names for query in queries)
    pen.text((4, 4), "query", fill="black", font=font())
    pen.text((_SIDE + _QUERY_GAP + 4, 4), "most similar first", fill="black", font=font())
    if known:
        pen.text((_SIDE + _QUERY_GAP + 150, 4), "same class", fill=SAME_CLASS, font=font())
        pen.text((_SIDE + _QUERY_GAP + 230, 4), "another class (x)", fill=OTHER_CLASS, font=font())
    reader = SampleReader(split)
    for line, (query, ids, of_row) in enumerate(zip(queries, found.numpy(), cosines.tolist(), strict=True)):
        reader.expect(np.unique(split.shards.samples["shard"][ids]).tolist(), [])
        own = query.parent.name if query.parent.name in names else None
        captions = [printable(query.name)]
        for sample, cosine in zip(ids, of_row, strict=True):
            mark = "x " if own not in (None, names[sample]) else ""
            captions.append(f"{mark}{names[sample]}\n{cosine:.3f}")
        for column, data in enumerate((_upright(query), *reader.read(ids)[0])):
            picture = rgb(data.tobytes())
            picture.thumbnail((_SIDE - 4 * _FRAME, _SIDE - 4 * _FRAME))
            x, y = column * _SIDE + (_QUERY_GAP if column else 0), _TITLE + line * (_SIDE + _CAPTION)
            at = x + (_SIDE - picture.width) // 2, y + (_SIDE - picture.height) // 2
            if column and own is not None:
                color = SAME_CLASS if names[ids[column - 1]] == own else OTHER_CLASS
                right, lower = at[0] + picture.width, at[1] + picture.height
                frame = at[0] - _FRAME, at[1] - _FRAME, right + _FRAME - 1, lower + _FRAME - 1
                pen.rectangle(frame, outline=color, width=_FRAME)
            result.paste(picture, at)
            words = "\n".join(part[:26] for part in captions[column].split("\n"))
            pen.multiline_text((x + 4, y + _SIDE), lettered(words), fill="black", font=font())
    reader.close()
    return result


def _upright(path: Path) -> Encoded:
    return ImageFiles([path]).read(np.array([0]))[0][0]


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
