"""Which folder and which tars of a source belong to which split, by their names."""

import re
from pathlib import Path

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.sources.source import SPLITS, folders_in, tars_in

# What people call the splits; VOC's "trainval" is both.
WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate"),
    "test": ("test", "testing"),
}
_BOTH = {"trainval": ("train", "val"), "traintest": ("train", "test"), "valtest": ("val", "test")}
# Kaggle's archive of ILSVRC 2012, from wherever somebody points into it.
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of ``split`` in ``root``, by any usual name in any case. Raises UserError where there are two.

    One that leads to nothing is an error too: it is a disk that is not mounted."""
    for path in root.iterdir():
        if path.name.lower() in WORDS[split] and path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to nothing; mend or remove it")
    found = [path for path in folders_in(root) if path.name.lower() in WORDS[split]]
    if len(found) > 1:
        raise UserError(f"{root} has the folders {found[0].name!r} and {found[1].name!r} for {split}; keep one of them")
    return found[0] if found else None


def split_tars(root: Path, split: str) -> list[Path]:
    """The tars in ``root`` that are named after ``split``. Raises UserError where a name holds two splits."""
    found = []
    for path in tars_in(root):
        named = splits_in_name(path)
        if len(named) > 1:
            raise UserError(
                f"{path} names two splits; rename it, so that its name holds only one of {', '.join(SPLITS)}"
            )
        if named == [split]:
            found.append(path)
    return found


def splits_in_name(path: Path) -> list[str]:
    """The splits that the name of an archive holds as words."""
    words = re.findall("[a-z]+", path.stem.lower())
    return [split for split in SPLITS if any(word in WORDS[split] or split in _BOTH.get(word, ()) for word in words)]


def data_folder(root: Path) -> Path:
    """``root``, or the folder of Kaggle's ILSVRC tree below it in which train and val lie."""
    return next((root / inside for inside in _KAGGLE if (root / inside).is_dir()), root)
