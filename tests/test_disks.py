"""Pictures as they lie on people's disks: splits by any name, ImageNet in its many forms, no labels, many bits."""

from pathlib import Path

import pytest

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from simclr_dali.shards.sources.class_list import read_classes
from simclr_dali.shards.sources.find import of_split
from simclr_dali.shards.verify import verify
from tests.conftest import assert_sentence, run_command, tree
from tests.drawn import (
    class_folders,
    encoded,
    labels,
    left_out,
    put,
    put_tar,
    report,
    samples,
    stored,
)

IDS = ("n01440764", "n01443537")


def flat_val(root: Path) -> Path:
    class_folders(root, {"train": 4}, IDS)
    for number in range(1, 5):
        put(root / f"val/ILSVRC2012_val_{number:08d}.JPEG")
    return root


def solution(bom: str = "") -> bytes:
    rows = [f"ILSVRC2012_val_{number:08d},{IDS[number % 2]} 1 2 3 4 " for number in range(1, 5)]
    return (bom + "\r\n".join(["ImageId,PredictionString", *rows]) + "\r\n").encode()


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_flat_validation_pictures_take_their_labels_from_kaggles_table(bom: str, tmp_path: Path) -> None:
    put(flat_val(tmp_path / "in") / "LOC_val_solution.csv", solution(bom))
    pack(tmp_path / "in", tmp_path / "out")
    shards = load_split(tmp_path / "out", "val")
    assert labels(tmp_path / "out", "val") == [IDS[0]] * 2 + [IDS[1]] * 2 and shards.classes == IDS
    second = put(tmp_path / "x", (tmp_path / "in/val/ILSVRC2012_val_00000002.JPEG").read_bytes()).read_bytes()
    assert shards.samples["label"][stored(tmp_path / "out", "val").index(second)] == 0


@pytest.mark.parametrize("given", [".", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_tree_is_taken_from_wherever_it_is_pointed_at(given: str, tmp_path: Path) -> None:
    root = tmp_path / "kaggle"
    flat_val(root / "ILSVRC/Data/CLS-LOC")
    put(root / "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG")
    put(root / "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml", b"<x/>")
    put(root / "LOC_val_solution.csv", solution())
    pack(root / given, tmp_path / "out")
    assert len(labels(tmp_path / "out", "train")) == 8 and len(set(labels(tmp_path / "out", "val"))) == 2
    assert left_out(tmp_path / "out")[of_split("test")] == 1
    pack(root / given, tmp_path / "out", Options(split="test"))
    assert labels(tmp_path / "out", "test") == [""]


def test_flat_validation_pictures_without_labels_are_one_sentence_and_leave_nothing(tmp_path: Path) -> None:
    flat_val(tmp_path / "in")
    done = run_command("pack", tmp_path / "in", tmp_path / "out")
    assert_sentence(done, "no labels", "ILSVRC2012_devkit_t12.tar.gz", "LOC_val_solution.csv", "--split train")
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]
    for number in range(1, 5):  # what the devkit's script does
        flat = tmp_path / f"in/val/ILSVRC2012_val_{number:08d}.JPEG"
        put(tmp_path / "in/val" / IDS[number % 2] / flat.name, flat.read_bytes())
        flat.unlink()
    pack(tmp_path / "in", tmp_path / "out")
    assert len(labels(tmp_path / "out", "val")) == 4


def test_pictures_that_the_table_does_not_name_are_lost(tmp_path: Path) -> None:
    put(flat_val(tmp_path / "in") / "LOC_val_solution.csv", solution())
    put(tmp_path / "in/val/ILSVRC2012_val_00000009.JPEG")
    with pytest.raises(UserError, match=r"1 no label in LOC_val_solution\.csv"):
        pack(tmp_path / "in", tmp_path / "out")
    put(tmp_path / "in/LOC_val_solution.csv", b"ImageId,PredictionString\nILSVRC2012_val_00000001\n")
    with pytest.raises(UserError, match="line 2 is"):
        pack(tmp_path / "in", tmp_path / "out")


def test_an_empty_split_is_one_sentence(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 4})
    (tmp_path / "in/val").mkdir()
    done = run_command("pack", tmp_path / "in", tmp_path / "out")
    assert_sentence(done, "in/val holds no pictures")
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]


def test_the_train_archive_unpacked_once_is_one_tar_a_class(tmp_path: Path) -> None:
    for name in IDS:
        put_tar(tmp_path / f"in/train/{name}.tar", {f"{name}_{number}.JPEG": encoded() for number in range(4)})
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == [IDS[0]] * 4 + [IDS[1]] * 4
    put(tmp_path / f"in/train/{IDS[0]}/{IDS[0]}_0.JPEG")  # unpacked half-way, and its archive kept
    with pytest.raises(UserError, match=r"3 of 8 pictures would be left out \(3 in a class archive and not in its"):
        pack(tmp_path / "in", tmp_path / "half")
    pack(tmp_path / "in", tmp_path / "half", max_bad=40)
    assert labels(tmp_path / "half", "train") == [IDS[0]] + [IDS[1]] * 4
    assert left_out(tmp_path / "half")["class archive beside its folder"] == 1


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation", "VAL"])
@pytest.mark.parametrize("tars", [False, True])
def test_splits_have_any_usual_name(name: str, tars: bool, tmp_path: Path) -> None:
    if tars:
        put_tar(tmp_path / "in/set-training-0.tar", samples(6))
        put_tar(tmp_path / f"in/set-{name}-0.tar", samples(4))
    else:
        class_folders(tmp_path / "in", {"training": 3, name: 2})
    pack(tmp_path / "in", tmp_path / "out")
    assert [len(labels(tmp_path / "out", split)) for split in ("train", "val")] == [6, 4]


def test_test_is_packed_on_request_only(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 3, "test": 2})
    pack(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out/test").exists()
    pack(tmp_path / "in", tmp_path / "out", Options(split="test"))
    assert len(labels(tmp_path / "out", "test")) == 4 and verify(tmp_path / "out", full=True) == []


@pytest.mark.parametrize("name", ["train_val-0.tar", "trainval.tar", "val-of-training-3.tar"])
def test_a_tar_that_names_two_splits_is_refused(name: str, tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train-0.tar", samples(2))
    put_tar(tmp_path / "in" / name, samples(2))
    with pytest.raises(UserError, match="names two splits"):
        pack(tmp_path / "in", tmp_path / "out")


def test_a_tar_that_names_no_split_is_counted(tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train-0.tar", samples(2))
    put_tar(tmp_path / "in/extra-0.tar", samples(2))
    pack(tmp_path / "in", tmp_path / "out")
    assert left_out(tmp_path / "out") == {"beside the splits": 1}


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2, "val": 2, "validation": 2})
    with pytest.raises(UserError, match="'val' and 'validation' for val"):
        pack(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("named", [False, True])
def test_one_split_may_be_tars_and_the_other_folders(named: bool, tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"val": 2}, ["bee", "ant"])
    put_tar(tmp_path / "in/train/0.tar", samples(4))
    if named:
        put(tmp_path / "in/train/classes.txt", b"bee\nant\n")
        pack(tmp_path / "in", tmp_path / "out")
        assert load_split(tmp_path / "out", "val").classes == ("bee", "ant")
        assert labels(tmp_path / "out", "train") == labels(tmp_path / "out", "val")
    else:
        with pytest.raises(UserError, match=r"'ant', which train does not have.*classes\.txt"):
            pack(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    ["\ufeffcat\r\ndog\r\n", "cat\rdog\r", "cat\ndog\n\n\n", "cat \n dog", "\ufeffcat\ndog".encode("utf-16-le")],
)
def test_class_lists_of_any_editor(text: str | bytes, tmp_path: Path) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    assert read_classes(put(tmp_path / "classes.txt", data)) == ["cat", "dog"]
    put_tar(tmp_path / "in/train/a.tar", samples(4))
    put(tmp_path / "in/classes.txt", data)
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == ["cat"] * 2 + ["dog"] * 2


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"cat\n\ndog\n", "line 2 is blank"),
        (b"cat\ndog\ncat\n", "'cat' on lines 1 and 3"),
        ("caf\u00e9\n".encode("latin-1"), "no UTF-8 text"),
        (b"\n\n", "is empty"),
        (b"cat\n", "names 1 class, but a picture has label 1"),
    ],
)
def test_class_lists_that_cannot_be_meant_are_one_sentence(data: bytes, sentence: str, tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/a.tar", samples(4))
    put(tmp_path / "in/classes.txt", data)
    with pytest.raises(UserError, match=sentence):
        pack(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("labels_of", [("20231050", "20231053"), ("dog", "cat"), ("9", "7")])
def test_labels_may_be_lines_of_the_class_list(labels_of: tuple[str, str], tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(4):
        members |= {f"{number}.jpg": encoded(), f"{number}.cls": labels_of[number % 2].encode()}
    put_tar(tmp_path / "in/train/a.tar", members)
    put(tmp_path / "in/classes.txt", "\n".join(labels_of).encode())
    pack(tmp_path / "in", tmp_path / "out")
    assert labels(tmp_path / "out", "train") == sorted([labels_of[0]] * 2 + [labels_of[1]] * 2)


@pytest.mark.parametrize("label", [b"20231050", b"999999999999"])
def test_ids_without_a_class_list_are_refused(label: bytes, tmp_path: Path) -> None:
    put_tar(tmp_path / "in/train/a.tar", {**samples(2), "x.jpg": encoded(), "x.cls": label})
    with pytest.raises(UserError, match=r"with only 3 different ones, as ids do; write classes\.txt"):
        pack(tmp_path / "in", tmp_path / "out")


def unlabelled(root: Path, kind: str) -> Path:
    """Six pictures without labels."""
    members: dict[str, bytes] = {}
    for number in range(6):
        places = {"flat": f"train/{number}.jpg", "tree": f"roll {number % 2}/day {number % 3}/{number}.jpg"}
        if kind in places:
            put(root / places[kind])
        members |= {f"{number:09d}.jpg": encoded(), f"{number:09d}.txt": b"a picture", f"{number:09d}.json": b"{}"}
    if kind == "img2dataset":
        put_tar(root / "train/00000.tar", members)
        put(root / "train/00000.parquet", b"PAR1")
    elif kind == "tars":
        put_tar(root / "00000.tar", members)
    return root


@pytest.mark.parametrize("kind", ["flat", "tree", "img2dataset", "tars"])
def test_pictures_without_labels_are_packed(kind: str, tmp_path: Path) -> None:
    done = run_command("pack", unlabelled(tmp_path / "in", kind), tmp_path / "out", "--workers", 1)
    assert done.returncode == 0 and "6 train images without labels" in done.stdout, done.stderr
    shards = load_split(tmp_path / "out", "train")
    assert shards.classes == () and shards.samples["label"].tolist() == [-1] * 6
    assert verify(tmp_path / "out", full=True) == []
    shown = run_command("show", tmp_path / "out", "--pictures", tmp_path / "sheet.png")
    assert shown.returncode == 0 and "without labels" in shown.stdout, shown.stderr
    pack(tmp_path / "out", tmp_path / "again", Options(seed=3))
    assert load_split(tmp_path / "again", "train").classes == ()


@pytest.mark.parametrize("given", [".", "..", "../in/train/..", "in/"])
def test_a_source_may_be_given_relatively(given: str, tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2})
    place = {".": "in", "..": "in/train", "../in/train/..": "in", "in/": "."}[given]
    done = run_command("pack", given, "--workers", 1, cwd=tmp_path / place)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "in-shards"]
    assert len(labels(tmp_path / "in-shards", "train")) == 4


def test_a_target_inside_of_the_source_does_not_belong_to_it(tmp_path: Path) -> None:
    unlabelled(tmp_path / "in", "tree")
    for _ in range(2):
        pack(tmp_path / "in", tmp_path / "in/shards")
    assert len(labels(tmp_path / "in/shards", "train")) == 6 and left_out(tmp_path / "in/shards") == {}


def test_equal_pictures_are_counted_and_named(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 3, "val": 2})
    first = (tmp_path / "in/train/ant/0.jpg").read_bytes()
    for name in ("val/ant/9.jpg", "train/bee/8.jpg"):
        put(tmp_path / "in" / name, first)
    second = (tmp_path / "in/train/bee/1.jpg").read_bytes()
    put(tmp_path / "in/train/ant/7.jpg", second)
    put(tmp_path / "in/val/bee/6.jpg", put(tmp_path / "in/val/bee/5.jpg").read_bytes())
    done = run_command("pack", tmp_path / "in", tmp_path / "out", "--workers", 1)
    assert "1 group in two splits, 1 group in two classes, 1 group twice in one class" in done.stdout, done.stderr
    groups = report(tmp_path / "out")["equal_images"]["groups"]
    named = [sorted(f"{one['class']} {one['name']}" for one in group["images"]) for group in groups]
    assert sorted(named) == [
        ["ant train/ant/0.jpg", "ant val/ant/9.jpg", "bee train/bee/8.jpg"],
        ["ant train/ant/7.jpg", "bee train/bee/1.jpg"],
        ["bee val/bee/5.jpg", "bee val/bee/6.jpg"],
    ]


def test_a_split_is_added_to_a_packed_set(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 4, "val": 2, "test": 1})
    put(tmp_path / "in/val/ant/9.jpg", (tmp_path / "in/train/ant/0.jpg").read_bytes())
    pack(tmp_path / "in", tmp_path / "whole")
    pack(tmp_path / "in", tmp_path / "out", Options(split="train"))
    train = {name: digest for name, digest in tree(tmp_path / "out").items() if name.startswith("train/")}
    done = run_command("pack", tmp_path / "in", tmp_path / "out", "--split", "val", "--workers", 1)
    assert done.returncode == 0 and "1 group in two splits" in done.stdout, done.stderr
    assert train.items() <= tree(tmp_path / "out").items() and not (tmp_path / "out.partial").exists()
    assert verify(tmp_path / "out", full=True) == []
    whole, parts = tree(tmp_path / "whole"), tree(tmp_path / "out")
    assert whole.keys() == parts.keys()
    assert {name for name in whole if whole[name] != parts[name]} <= {"report.json"}
    for words in (["--split", "val"], [], ["--split", "train"]):
        done = run_command("pack", tmp_path / "in", tmp_path / "out", *words)
        assert "nothing to do" in done.stdout, done.stderr
    assert_sentence(run_command("pack", tmp_path / "in", tmp_path / "out", "--split", "test", "--seed", 1), "--seed")


def test_a_split_that_does_not_fit_is_not_added(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 4})
    pack(tmp_path / "in", tmp_path / "out")
    class_folders(tmp_path / "other", {"val": 2}, ["ant", "cow"])
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match="'cow', which train does not have"):
        pack(tmp_path / "other", tmp_path / "out", Options(split="val"))
    assert tree(tmp_path / "out") == before and not (tmp_path / "out.partial").exists()


def test_a_stop_between_the_last_renames_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path / "in", {"train": 4, "val": 2})
    pack(tmp_path / "in", tmp_path / "out", Options(split="train"))

    def stopped(partial: Path, out: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("simclr_dali.shards.claim._take_report", stopped)
        pack(tmp_path / "in", tmp_path / "out", Options(split="val"))
    assert "val" not in report(tmp_path / "out") and (tmp_path / "out.partial").exists()
    pack(tmp_path / "in", tmp_path / "out", Options(split="val"))
    assert "val" in report(tmp_path / "out") and not (tmp_path / "out.partial").exists()
    assert verify(tmp_path / "out", full=True) == []
