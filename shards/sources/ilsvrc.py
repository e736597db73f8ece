"""Listing the original archives of ILSVRC 2012, without unpacking them, and labels of its validation pictures.

    ILSVRC2012_img_train.tar        one tar per class, named by WordNet id: n01440764.tar, ...
    ILSVRC2012_img_val.tar          ILSVRC2012_val_00000001.JPEG, ...; labels in the devkit
    ILSVRC2012_devkit_t12.tar.gz    data/meta.mat and data/ILSVRC2012_validation_ground_truth.txt
    LOC_val_solution.csv            Kaggle's labels: ILSVRC2012_val_00000001,n01751748 111 108 230 366

Labels are the places of the WordNet ids in sorted order, as in torchvision's ImageNet; the devkit's own ids
(ILSVRC2012_ID, 1 to 1000) are ordered otherwise.
"""

import csv
import io
import re
import tarfile
from pathlib import Path

from tqdm import tqdm

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.left_out import LeftOut
from simclr_dali.shards.sources.source import Item, Source, time_of
from simclr_dali.shards.tar import list_members
from simclr_dali.shards.walk import is_picture

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SOLUTION = "LOC_val_solution.csv"
CLASS_TAR = re.compile(r"n\d{8}\.tar")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
_WORDNET_ID = re.compile(r"n\d{8}")
_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


def scan_train(root: Path, archive: str = TRAIN) -> Source:
    """List the train archive, ``root/archive``. Raises UserError where it is cut or is not what its name says."""
    path = root / archive
    modified = time_of(path)
    left_out = LeftOut()
    inner = _class_archives(path, left_out)
    classes = [name.removesuffix(".tar") for name, _, _ in inner]
    items = [
        Item(archive, f"{classes[label]}/{picture}", at, size, label, modified)
        for label, (_, offset, length) in enumerate(tqdm(inner, "scan train", disable=None, leave=False))
        for picture, at, size in sorted(list_members(path, left_out, (offset, length)))
        if is_picture(path, picture, left_out, at, size)
    ]
    return Source(root, "train", classes, items, {archive: modified}, left_out)


def classes_of_archive(root: Path) -> list[str]:
    """The classes of the train archive, from the names of what it holds."""
    return [name.removesuffix(".tar") for name, _, _ in _class_archives(root / TRAIN, LeftOut())]


def _class_archives(path: Path, left_out: LeftOut) -> list[tuple[str, int, int]]:
    inner = sorted(list_members(path, left_out))
    for name, _, _ in inner:
        if not CLASS_TAR.fullmatch(name):
            raise UserError(f"{path} holds {name!r}, which is no class archive like n01440764.tar; fetch it again")
    if not inner:
        raise UserError(f"{path} is empty; fetch it again")
    return inner


def scan_val(root: Path, truth_folders: list[Path], archive: str = VAL) -> Source:
    """List the val archive, ``root/archive``, with the labels that lie in one of ``truth_folders``.

    Raises UserError where it is cut, or its labels are missing or do not fit it.
    """
    path = root / archive
    modified = time_of(path)
    found = find_truth(truth_folders)
    if found is None:
        raise UserError(
            f"{root / DEVKIT} is missing, and Kaggle's {SOLUTION} too; one of them holds the labels of {VAL}: fetch "
            f"it, or pack with --split train"
        )
    labels_in, truth = found
    label_of = {name: label for label, name in enumerate(sorted(set(truth.values())))}
    items = []
    left_out = LeftOut()
    for name, offset, length in sorted(list_members(path, left_out)):
        number = number_of(name)
        if number not in truth:
            raise UserError(f"{path} holds {name!r}, for which {labels_in} has no label; fetch both again")
        items.append(Item(archive, name, offset, length, label_of[truth[number]], modified))
    if len(items) != len(truth):
        raise UserError(f"{path} holds {len(items)} pictures, {labels_in} labels {len(truth)}; fetch both again")
    return Source(root, "val", list(label_of), items, {archive: modified}, left_out)


def number_of(name: str) -> int | None:
    """The number in the name of a validation picture, with or without folders and ending; None for other names."""
    match = _VAL_NAME.fullmatch(name.rpartition("/")[2].partition(".")[0])
    return int(match[1]) if match else None


def find_truth(folders: list[Path]) -> tuple[Path, dict[int, str]] | None:
    """What says of each validation picture, by its number, which WordNet id it has; None where nothing does.

    Kaggle's table or the devkit, packed or unpacked, the first that lies in one of ``folders``. Raises UserError where
    it is damaged.
    """
    for folder in folders:
        if (path := folder / SOLUTION).is_file():
            return path, _read_solution(path)
        for name in (DEVKIT, DEVKIT.removesuffix(".tar.gz")):
            if (path := folder / name).exists():
                wordnet_ids, truth = _read_devkit(path)
                return path, {number: wordnet_ids[label] for number, label in enumerate(truth, 1)}
    return None


def _read_solution(path: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    try:
        rows = list(csv.reader(path.read_text("utf-8-sig", "replace").splitlines()))
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from error
    else:
        for number, row in enumerate(rows, 1):
            if not row or (number == 1 and row[0] == "ImageId"):
                continue
            number_of_picture = number_of(row[0].strip())
            wordnet_id = row[1].split(" ")[0] if len(row) > 1 else ""
            if number_of_picture is None or not _WORDNET_ID.fullmatch(wordnet_id):
                raise UserError(
                    f"{path}: line {number} is {','.join(row)[:60]!r}, not a picture and its WordNet id as in "
                    f"ILSVRC2012_val_00000001,n01751748 111 108 230 366; fetch it again"
                )
            found[number_of_picture] = wordnet_id
    return found


def _read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """WordNet id by ILSVRC2012_ID of the classes (not of their hypernyms), and the ID of each validation picture."""
    import scipy.io  # the only reader of MATLAB files here, and slow to import

    try:
        if path.is_dir():
            meta, truth = ((path.parent / name).read_bytes() for name in (_META, _TRUTH))
        else:
            with tarfile.open(path, "r:gz") as devkit:
                meta, truth = (_member(devkit, name) for name in (_META, _TRUTH))
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        wordnet_ids = {
            int(number): str(name) for number, name in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)
        }
        labels = [int(line) for line in truth.split()]
        if not set(labels) <= set(wordnet_ids):
            raise ValueError("its ground truth names classes that its meta.mat does not")
    except Exception as error:  # SciPy has an error of its own for each way in which a file may be damaged
        raise UserError(f"{path} is not the devkit of ILSVRC 2012, or damaged ({error}); fetch it again") from error
    return wordnet_ids, labels


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file in it")
    return file.read()
