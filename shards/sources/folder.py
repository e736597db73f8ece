"""Listing a folder of pictures: ``<class>/*`` with labels, or any tree of pictures without.

A class is a folder directly below the split, with all pictures in and under it (as torchvision's ImageFolder takes
them), or a class archive of ILSVRC, ``n01440764.tar``. Pictures that lie directly in a split without classes have no
labels, but for the validation pictures of ILSVRC, whose labels are looked up (ilsvrc.find_truth).
"""

from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.left_out import LeftOut
from simclr_dali.shards.sources import ilsvrc
from simclr_dali.shards.sources.source import UNLABELLED, Item, Source, folders_in, tars_in, time_of
from simclr_dali.shards.tar import list_members
from simclr_dali.shards.walk import is_called_like_a_picture, is_picture, pictures_below, walk

NO_LABEL = "no label"


def class_names(folder: Path, exclude: frozenset[Path] = frozenset()) -> list[str]:
    """The sorted names of the classes in the folder of a split."""
    return sorted(
        {path.name for path in folders_in(folder) if path not in exclude} | {path.stem for path in class_tars(folder)}
    )


def class_tars(folder: Path) -> list[Path]:
    """The class archives of ILSVRC that lie in a folder."""
    return [path for path in tars_in(folder) if ilsvrc.CLASS_TAR.fullmatch(path.name)]


@dataclass
class _Files:
    """What lies in the folder of a split: pictures by class, those of no class, and class archives."""

    of_class: dict[str, list[Item]]
    loose: list[Item] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    watched: dict[str, int] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)


def scan(root: Path, split: str, folder: str, truth_folders: list[Path], exclude: frozenset[Path]) -> Source:
    """List ``root/folder`` as ``split``; classes are sorted by name, as torchvision's.

    truth_folders: where labels of ILSVRC's validation pictures are looked for. Raises UserError where there are no
    pictures, or a class has none.
    """
    files = _list_files(root, split, folder, exclude)
    classes = sorted(files.of_class)
    if not any(files.of_class.values()) and files.loose:
        return _scan_flat(root, split, files, truth_folders)
    left_out = f" (left out in it: {files.left_out})" if files.left_out.counts else ""
    if not any(files.of_class.values()):
        raise UserError(
            f"{root / folder} holds no pictures{left_out}; expected {root / folder}/<class>/*.jpg, or remove it"
        )
    for name in classes:
        if not files.of_class[name]:
            raise UserError(
                f"class folder {root / folder / name} holds no picture; add some or remove it"
                + (f" (left out in all of {split}: {files.left_out})" if left_out else "")
            )
    for item in files.loose:
        files.left_out.add(NO_LABEL, item.name, lost=True)
    items = [item._replace(label=label) for label, name in enumerate(classes) for item in files.of_class[name]]
    return Source(root, split, classes, items, files.watched, files.left_out)


def scan_tree(root: Path, split: str, exclude: frozenset[Path]) -> Source | None:
    """All pictures in and under ``root``, without labels; None where there are none."""
    left_out, watched = LeftOut(), dict[str, int]()
    found = pictures_below(root, left_out, watched=watched, exclude=exclude)
    items = [
        Item(path, path, 0, size, UNLABELLED, modified)
        for path, size, modified in tqdm(found, f"scan {split}", unit=" images", disable=None, leave=False)
    ]
    return Source(root, split, [], items, watched, left_out) if items else None


def _list_files(root: Path, split: str, folder: str, exclude: frozenset[Path]) -> _Files:
    files = _Files({name: [] for name in class_names(root / folder, exclude)})
    listed = walk(root, files.left_out, below=folder, watched=files.watched, exclude=exclude)
    for path, size, modified in tqdm(listed, f"scan {split}", unit=" files", disable=None, leave=False):
        name, slash, _ = path.removeprefix(f"{folder}/").partition("/")
        if not slash and ilsvrc.CLASS_TAR.fullmatch(name):
            files.tars.append(path)
        elif is_picture(root / path, path, files.left_out):
            item = Item(path, path, 0, size, UNLABELLED, modified)
            if slash:
                files.of_class.setdefault(name, []).append(item)
            else:
                files.loose.append(item)
    for path in tqdm(files.tars, f"scan {split}", unit=" archives", disable=None, leave=False):
        name = Path(path).stem
        if files.of_class[name]:
            _count_not_unpacked(root, path, files.of_class[name], files.left_out)
        else:
            files.of_class[name] += _class_archive(root, path, name, files)
    return files


def _count_not_unpacked(root: Path, path: str, unpacked: list[Item], left_out: LeftOut) -> None:
    """Count a class archive beside its folder, and what it holds and the folder does not, which is lost."""
    left_out.add("class archive beside its folder", path)
    there = {item.name.rpartition("/")[2] for item in unpacked}
    for member, _, _ in list_members(root / path, LeftOut()):
        if member.rpartition("/")[2] not in there and is_called_like_a_picture(member):
            left_out.add("in a class archive and not in its folder", f"{path}: {member}", lost=True)


def _class_archive(root: Path, path: str, name: str, files: _Files) -> list[Item]:
    modified = files.watched[path] = time_of(root / path)
    return [
        Item(path, f"{name}/{member}", offset, length, UNLABELLED, modified)
        for member, offset, length in sorted(list_members(root / path, files.left_out))
        if is_picture(root / path, member, files.left_out, offset, length)
    ]


def _scan_flat(root: Path, split: str, files: _Files, truth_folders: list[Path]) -> Source:
    numbers = [ilsvrc.number_of(item.name) for item in files.loose]
    found = ilsvrc.find_truth(truth_folders) if any(number is not None for number in numbers) else None
    if found is None:
        return Source(root, split, [], files.loose, files.watched, files.left_out)
    path, truth = found
    known = [None if number is None else truth.get(number) for number in numbers]
    classes = sorted({name for name in known if name is not None})
    label_of = {name: label for label, name in enumerate(classes)}
    items = []
    for item, name in zip(files.loose, known, strict=True):
        if name is None:
            files.left_out.add(f"{NO_LABEL} in {path.name}", item.name, lost=True)
        else:
            items.append(item._replace(label=label_of[name]))
    if not items:
        raise UserError(f"{path} has a label for none of the {len(known)} pictures of {split}; fetch it again")
    return Source(root, split, classes, items, files.watched, files.left_out)
