"""A part of train held out of it, so that a choice can be made without looking at val.

    python scripts/bench/hold_out.py FOLDER OUT

Every --every-th picture of each class of FOLDER/train, by name, is linked into OUT/val, the others into OUT/train;
FOLDER/val is not looked at. OUT is packed like any folder.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import positive_int
from simclr_dali.shards.errors import UserError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with train/CLASS/pictures")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument("--every", type=positive_int, default=10, metavar="N", help="hold out one of N (default: 10)")
    given = parser.parse_args()
    train, held_out = hold_out(given.folder, given.out, given.every)
    print(f"{train:,} pictures in {given.out / 'train'}, {held_out:,} held out in {given.out / 'val'}")


def hold_out(folder: Path, out: Path, every: int) -> tuple[int, int]:
    """Link ``folder``'s train into two splits of ``out``; returns how many pictures each of them has.

    Raises UserError where ``out`` exists, or ``folder`` has no train with classes of pictures.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder, or remove it")
    classes = sorted(path for path in (folder / "train").glob("*") if path.is_dir())
    counts = {"train": 0, "val": 0}
    for number, picture in ((at, path) for one in classes for at, path in enumerate(sorted(one.iterdir()))):
        split = "val" if number % every == 0 else "train"
        link = out / split / picture.parent.name / picture.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(picture.resolve())
        counts[split] += 1
    if not all(counts.values()):
        raise UserError(f"{folder} has no train/CLASS folders with enough pictures; name the folder above train")
    return counts["train"], counts["val"]


if __name__ == "__main__":
    run_main(main)
