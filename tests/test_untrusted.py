"""Files from strangers: refused, or harmless."""

import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import UnusableError, prepare
from simclr_dali.shards.manifest import MANIFEST, TABLE, load_split, seal, unseal
from simclr_dali.shards.pack import pack
from tests.conftest import tree


def jpeg(size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.effect_noise(size, 50).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def declaring(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/../../escaped", "C:\\escaped"])
def test_members_that_point_outside_are_packed_under_tame_names(name: str, tmp_path: Path) -> None:
    source = tmp_path / "in" / "source"
    source.mkdir(parents=True)
    with tarfile.open(source / "train-000000.tar", "w") as tar:
        for number in range(2):
            for ending, content in (("jpg", jpeg()), ("cls", b"0")):
                member = tarfile.TarInfo(f"{name}{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    before = tree(tmp_path)
    pack(source, tmp_path / "in/out")
    added = set(tree(tmp_path)) - set(before)
    assert added and all(path.startswith("in/out/") for path in added)
    assert not Path("/tmp/escaped0.jpg").exists()
    for packed in (tmp_path / "in/out").rglob("*.tar"):
        with tarfile.open(packed) as tar:
            assert all("/" not in key and ".." not in key and "\\" not in key for key in tar.getnames())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files_are_not_followed(kind: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    source = tmp_path / "source"
    source.mkdir()
    with tarfile.open(source / "train-000000.tar", "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = kind, str(tmp_path / "secret.jpg")
        tar.addfile(link)
        label = tarfile.TarInfo("a.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"0"))
    with pytest.raises(UserError, match=r"hold no samples .*label without a picture"):
        pack(source, tmp_path / "out")


@pytest.mark.parametrize("size", [(65_500, 65_500), (65_500, 2_000)])
def test_a_small_file_that_declares_a_huge_picture_is_not_decoded(size: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match=f"{size[0]} x {size[1]} pixels, more than"):
        prepare(declaring(*size))
    folder = tmp_path / "in/train/a"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg() if number else declaring(*size))
    pack(tmp_path / "in", tmp_path / "out", max_bad=50)
    left_out = json.loads((tmp_path / "out/report.json").read_text())
    assert "pixels, more than" in json.dumps(left_out)
    assert len(load_split(tmp_path / "out", "train")) == 2


def packed_by_a_stranger(tmp_path: Path) -> Path:
    folder = tmp_path / "in/train/a"
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(jpeg())
    pack(tmp_path / "in", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["../../in/secret", "/etc/passwd", "..", "", "a/b.tar"])
def test_a_manifest_whose_shards_lie_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    out = packed_by_a_stranger(tmp_path)
    manifest = unseal((out / "train" / MANIFEST).read_bytes())
    manifest["shards"][0]["name"] = name
    (out / "train" / MANIFEST).write_bytes(seal(manifest))
    with pytest.raises(UserError, match="outside of the folder"):
        load_split(out, "train")


def with_table(out: Path, table: bytes) -> None:
    """Put another table into a set, with a manifest that vouches for it."""
    (out / "train" / TABLE).write_bytes(table)
    manifest = unseal((out / "train" / MANIFEST).read_bytes())
    manifest["samples_sha256"] = hashlib.sha256(table).hexdigest()
    (out / "train" / MANIFEST).write_bytes(seal(manifest))


def as_file(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_a_table_with_a_huge_picture_is_refused(tmp_path: Path) -> None:
    out = packed_by_a_stranger(tmp_path)
    samples = load_split(out, "train").samples.copy()
    samples["width"][1] = samples["height"][1] = 60_000
    with_table(out, as_file(samples))
    with pytest.raises(UserError, match=r"sample 1 has 3,600,000,000 pixels"):
        load_split(out, "train")


def test_a_table_that_names_shards_that_are_not_there_is_refused(tmp_path: Path) -> None:
    out = packed_by_a_stranger(tmp_path)
    samples = load_split(out, "train").samples.copy()
    samples["shard"][1] = 7
    with_table(out, as_file(samples))
    with pytest.raises(UserError, match="names shards or sizes that cannot be"):
        load_split(out, "train")


@pytest.mark.parametrize("content", ["pickle", "numbers", "text", "empty", "archive"])
def test_a_table_that_is_none_is_refused_and_not_unpickled(content: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "executed"), "w")

    out = packed_by_a_stranger(tmp_path)
    archive = io.BytesIO()
    np.savez(archive, np.zeros(2))
    tables = {
        "pickle": as_file(np.array([Bomb()], object)),
        "numbers": as_file(np.zeros(2)),
        "text": b"hello",
        "empty": b"",
        "archive": archive.getvalue(),
    }
    with_table(out, tables[content])
    with pytest.raises(UserError, match=r"no table of samples|other columns"):
        load_split(out, "train")
    assert not (tmp_path / "executed").exists()
