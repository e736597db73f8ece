"""Files made to do harm: they are refused, or read for the weights they hold, and do nothing else."""

import io
import pickle
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from simclr_dali import load
from simclr_dali.model import checkpoint
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.untrusted import read_tensors
from tests.test_foreign import torchvision_resnet


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def tensor(key: str, numel: int, size: int, view: bytes = b"N") -> bytes:
    """A pickled call of _rebuild_tensor_v2 on storage ``key`` of torch's older format."""
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel) + view + b"tQ"
    )
    words = storage + number(0) + number(size) + b"\x85" + number(1) + b"\x85" + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + words + b"tR"


def older_format(items: dict[str, bytes], storages: dict[str, bytes]) -> bytes:
    body = b"\x80\x02}" + b"".join(text(key) + value + b"s" for key, value in items.items()) + b"."
    head, system = pickle.dumps(MAGIC_NUMBER, 2) + pickle.dumps(PROTOCOL_VERSION, 2), {"little_endian": True}
    contents = b"".join(struct.pack("<q", len(data) // 4) + data for data in storages.values())
    return head + pickle.dumps(system, 2) + body + pickle.dumps(list(storages), 2) + contents


def archive(body: bytes) -> bytes:
    """torch's format, of one pickle and no storage."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    writer.write_record("data.pkl", body, len(body))
    writer.write_end_of_file()
    return buffer.getvalue()


def test_the_builders_here_build_what_torch_reads() -> None:
    data = older_format({"a": tensor("0", 2, 2)}, {"0": struct.pack("<2f", 3, 4)})
    assert torch.load(io.BytesIO(data), weights_only=True)["a"].tolist() == [3, 4]
    assert read_tensors(Path("a.pth"), data)["a"].tolist() == [3, 4]
    assert torch.load(io.BytesIO(archive(b"\x80\x02}K\x01K\x02s.")), weights_only=True) == {1: 2}


def test_no_file_is_written(tmp_path: Path) -> None:
    """torch saves a patch where the source of a pickled class has changed, if the class asks for it."""
    model, target = torchvision_resnet(), tmp_path / "written"
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer, _use_new_zipfile_serialization=False)
    rest = io.BytesIO(buffer.getvalue())
    for _ in range(3):
        pickle.load(rest)
    place = rest.tell() + 2  # after the protocol of the main pickle
    function = b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("dump_patches") + b"\x88s}" + text("__name__")
    function += text(str(target)) + b"s\x86b"
    reference = b"(" + text("module") + function + text("source.py") + text("a line\n") + b"tQ0"
    crafted = buffer.getvalue()[:place] + reference + buffer.getvalue()[place:]
    (tmp_path / "weights.pth").write_bytes(crafted)
    assert torch.equal(load(tmp_path / "weights.pth").conv1.weight, model.conv1.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_no_tensor_lies_outside_of_its_storage(tmp_path: Path) -> None:
    """A view of a storage that a larger tensor moves elsewhere: torch would write the file's bytes to the old place."""
    many = 1 << 14
    view = b"(" + text("v") + number(0) + number(many) + b"t"
    items = {"view": tensor("0", many, 4, view), "all": tensor("0", many, 1 << 20)}
    data = older_format(items, {"v": b"A" * 4 * many})
    for name, opened in (("weights.pth", load), ("state.pt", checkpoint.load)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=name):
            opened(tmp_path / name)
    assert checkpoint.plain_values(data) is None


def test_small_files_take_little_memory(tmp_path: Path) -> None:
    far = archive(b"\x80\x02}r" + struct.pack("<I", 20_000_000) + b".")  # a place in the unpickler's table
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="no tensors"):
            read_tensors(tmp_path / "far.pth", far)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    # One number, repeated as all weights of a large network.
    state = {key: torch.ones(()).expand(value.shape) for key, value in torchvision_resnet().state_dict().items()}
    torch.save(state, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"repeats numbers in conv1\.weight"):
        load(tmp_path / "wide.pth")


def test_dicts_inside_each_other_come_to_an_end(tmp_path: Path) -> None:
    body = b"\x80\x02}q\x00"
    for level in range(60):  # each holds the one before it twice
        inner = b"h" + bytes([level])
        body += b"}" + text("a") + inner + b"s" + text("b") + inner + b"sq" + bytes([level + 1])
    with pytest.raises(CheckpointError, match="no tensors"):
        read_tensors(tmp_path / "twice.pth", archive(body + b"."))
    with pytest.raises(CheckpointError, match="no tensors"):
        read_tensors(tmp_path / "itself.pth", archive(b"\x80\x02}q\x00" + text("a") + b"h\x00s."))


@pytest.mark.parametrize("named", [{}, 3, {"name": "resnet18"}, None])
def test_a_state_without_an_architecture_is_a_sentence(named: object, tmp_path: Path) -> None:
    torch.save({"step": 1, "architecture": named, "model": {}, "image_size": 32}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt does not name an architecture"):
        load(tmp_path / "state.pt")
