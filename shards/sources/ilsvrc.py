"""Listing the original archives of ILSVRC 2012, without unpacking them.

    ILSVRC2012_img_train.tar        one tar per class, named by WordNet id: n01440764.tar, ...
    ILSVRC2012_img_val.tar          ILSVRC2012_val_00000001.JPEG, ...; labels in the devkit
    ILSVRC2012_devkit_t12.tar.gz    data/meta.mat and data/ILSVRC2012_validation_ground_truth.txt

Labels are the places of the WordNet ids in sorted order, as in torchvision's ImageNet; the devkit's own ids
(ILSVRC2012_ID, 1 to 1000) are ordered otherwise.
"""

import io
import re
import tarfile
from pathlib import Path

from tqdm import tqdm

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.sources.source import Item, Source, time_of
from simclr_dali.shards.tar import list_members

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


def is_here(root: Path) -> bool:
    """Whether ``root`` holds one of the two image archives."""
    return (root / TRAIN).is_file() or (root / VAL).is_file()


def scan(root: Path, splits: tuple[str, ...]) -> list[Source]:
    """List the wanted splits whose archive is there.

    Raises UserError for an archive that is cut or is not what its name says, a missing devkit, and where the
    devkit does not fit the archives.
    """
    found = []
    if "train" in splits and (root / TRAIN).is_file():
        found.append(_scan_train(root))
    if "val" in splits and (root / VAL).is_file():
        found.append(_scan_val(root))
    if len({tuple(source.classes) for source in found}) > 1:
        raise UserError(
            f"{root / TRAIN} holds {len(found[0].classes)} classes and {root / DEVKIT} names {len(found[1].classes)}, "
            f"or others; take the files of one release, or pack with --split train"
        )
    return found


def _scan_train(root: Path) -> Source:
    path = root / TRAIN
    modified = time_of(path)
    inner = sorted(list_members(path))
    for name, _, _ in inner:
        if not re.fullmatch(r"n\d{8}\.tar", name):
            raise UserError(f"{path} holds {name!r}, which is no class archive like n01440764.tar; fetch it again")
    if not inner:
        raise UserError(f"{path} is empty; fetch it again")
    classes = [name.removesuffix(".tar") for name, _, _ in inner]
    items = [
        Item(TRAIN, f"{classes[label]}/{picture}", at, size, label, modified)
        for label, (_, offset, length) in enumerate(tqdm(inner, "scan train", disable=None, leave=False))
        for picture, at, size in sorted(list_members(path, (offset, length)))
    ]
    return Source(root, "train", classes, items, {TRAIN: modified})


def _scan_val(root: Path) -> Source:
    path = root / VAL
    modified = time_of(path)
    wordnet_ids, truth = _read_devkit(root / DEVKIT)
    classes = sorted(wordnet_ids.values())
    label_of = {number: classes.index(wordnet_id) for number, wordnet_id in wordnet_ids.items()}
    items = []
    for name, offset, length in sorted(list_members(path)):
        match = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", name)
        if not match or not 1 <= int(match[1]) <= len(truth):
            raise UserError(f"{path} holds {name!r}, for which {root / DEVKIT} has no label; fetch both again")
        items.append(Item(VAL, name, offset, length, label_of[truth[int(match[1]) - 1]], modified))
    if len(items) != len(truth):
        raise UserError(f"{path} holds {len(items)} pictures, {root / DEVKIT} labels {len(truth)}; fetch both again")
    return Source(root, "val", classes, items, {VAL: modified, DEVKIT: time_of(root / DEVKIT)})


def _read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """WordNet id by ILSVRC2012_ID of the classes (not of their hypernyms), and the ID of each validation picture."""
    import scipy.io  # the only reader of MATLAB files here, and slow to import

    if not path.is_file():
        raise UserError(f"{path} is missing; it holds the labels of {VAL}: fetch it, or pack with --split train")
    try:
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
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not the devkit of ILSVRC 2012, or damaged ({error}); fetch it again") from error
    return wordnet_ids, labels


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file in it")
    return file.read()
