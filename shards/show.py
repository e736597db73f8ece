"""Say what is in a packed data set, and draw a sheet of its pictures.

    simclr-dali show /data/imagenet-shards
    simclr-dali show /data/imagenet-shards --pictures sheet.png --split val

Of each split it says how many images, classes and shards there are, and how large they are; and what packing changed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw

from simclr_dali.shards.command_line import parser_of, positive_int
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.shards.image import rgb
from simclr_dali.shards.lettering import font, lettered
from simclr_dali.shards.manifest import ShardSet, load_split, unseal
from simclr_dali.shards.sources.source import SPLITS
from simclr_dali.shards.wording import counted, size_text

THUMBNAIL = 128  # pixels, both sides
CAPTION = 14  # pixels below each picture
_BAR = 40  # characters of the longest bar of a histogram


def summary(shards: ShardSet) -> list[str]:
    """Lines that describe a split: counts, classes, sizes of shards and pictures."""
    rows, sizes = shards.samples, np.array([shard.bytes for shard in shards.shards])
    in_shard = shards.shard_sizes()
    short = np.minimum(rows["width"], rows["height"])
    return [
        f"{shards.split}: {counted(len(rows), 'image')}, {size_text(sizes.sum())} in {counted(len(sizes), 'shard')} "
        f"({_range(*(f'{count:,}' for count in (min(in_shard), max(in_shard))))} images, "
        f"{_range(size_text(sizes.min()), size_text(sizes.max()))})",
        _class_line(shards),
        "  short side, pixels",
        *histogram(short, [0, 64, 128, 192, 224, 256, 320, 384, 512, 768, 1024, 2048]),
        "  encoded size, kB",
        *histogram(rows["length"] / 1000, [0, 5, 10, 20, 50, 100, 150, 200, 500, 1000, 5000]),
    ]


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _class_line(shards: ShardSet) -> str:
    if not shards.classes:
        return "  without labels"
    of_class = np.bincount(shards.samples["label"], minlength=len(shards.classes))
    few, many = int(of_class.argmin()), int(of_class.argmax())
    if of_class[few] == of_class[many]:
        return f"  {counted(len(shards.classes), 'class', 'classes')}, {counted(int(of_class[few]), 'image')} each"
    return (
        f"  {counted(len(shards.classes), 'class', 'classes')}, from {counted(int(of_class[few]), 'image')} "
        f"({shards.classes[few]}) to {of_class[many]:,} ({shards.classes[many]})"
    )


def histogram(values: npt.NDArray[Any], edges: list[int]) -> list[str]:
    """A line per bin that is not empty: its edges, how many values lie in [from, to), and a bar."""
    bounds = [*edges, np.inf]
    counts = np.histogram(values, bounds)[0]
    longest = max(1, counts.max())
    return [
        f"    {start:>5} .. {end:<5.0f} {count:>10,}  {'#' * -(-_BAR * int(count) // int(longest))}"
        for start, end, count in zip(bounds[:-1], bounds[1:], counts, strict=True)
        if count
    ]


def sheet(shards: ShardSet, columns: int, lines: int) -> PIL.Image.Image:
    """Pictures spread evenly over the split in storage order, with the name of each one's class."""
    count = min(columns * lines, len(shards))
    result = PIL.Image.new("RGB", (columns * THUMBNAIL, -(-count // columns) * (THUMBNAIL + CAPTION)), "white")
    pen = PIL.ImageDraw.Draw(result)
    for place, sample in enumerate(np.linspace(0, len(shards) - 1, count).round().astype(int)):
        row = shards.samples[sample]
        with (shards.folder / shards.shards[row["shard"]].name).open("rb") as tar:
            tar.seek(int(row["offset"]))
            encoded = tar.read(int(row["length"]))
        try:
            small = rgb(encoded)
        except OSError as error:
            raise UserError(
                f"{shards.where(int(sample))} cannot be decoded ({error}); run simclr-dali verify"
            ) from error
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        x, y = place % columns * THUMBNAIL, place // columns * (THUMBNAIL + CAPTION)
        result.paste(small, (x + (THUMBNAIL - small.width) // 2, y + (THUMBNAIL - small.height) // 2))
        pen.text((x + 2, y + THUMBNAIL), lettered(shards.class_name(int(row["label"]))[:20]), fill="black", font=font())
    return result


def save(picture: PIL.Image.Image, path: Path, option: str) -> None:
    """Write a sheet to the file that the command line's ``option`` names. Raises UserError where that cannot be."""
    with refusals_named(path):
        try:
            picture.save(path)
        except ValueError as error:
            raise UserError(f"{option} is {path}; its ending must be .png or .jpg") from error


def _report_lines(data: Path) -> list[str]:
    path = data / "report.json"
    try:
        report = unseal(path.read_bytes())
        return [
            f"{split}: {len(notes['converted']):,} images encoded anew, {notes['resized']:,} made smaller, "
            f"{len(notes['left_out']) + sum(one['count'] for one in notes.get('not_packed', ())):,} left out while "
            f"packing (see {path})"
            for split, notes in report.items()
            if split in SPLITS
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); run simclr-dali verify {data}") from error


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path, metavar="DIR", help="It is a folder made by scripts/make_shards.sh.")
    parser.add_argument("--pictures", type=Path, metavar="OUT.png", help="Write a sheet of pictures.")
    parser.add_argument("--split", choices=SPLITS, help="Draw this split (default: the first there is).")
    parser.add_argument("--columns", type=positive_int, default=10, metavar="N", help="Draw N in a line (default: 10).")
    parser.add_argument("--lines", type=positive_int, default=10, metavar="N", help="Draw N lines (default: 10).")
    given = parser.parse_args()
    names = [split for split in SPLITS if (given.data / split).exists()]
    if not names or (given.split and given.split not in names):
        wanted = given.split or " or ".join(SPLITS)
        raise UserError(f"{given.data} holds no packed split {wanted}; give the folder made by scripts/make_shards.sh")
    splits = {name: load_split(given.data, name) for name in names}
    for shards in splits.values():
        print("\n".join(summary(shards)))
    print("\n".join(_report_lines(given.data)))
    if given.pictures:
        picture = sheet(splits[given.split or names[0]], given.columns, given.lines)
        save(picture, given.pictures, "--pictures")
        print(f"pictures: {given.pictures}")


if __name__ == "__main__":
    run_main(main)
