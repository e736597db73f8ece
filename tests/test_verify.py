"""Verification finds every damage: any flipped bit, any cut, any missing file."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simclr_dali.shards.manifest import load_split, member_name
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from simclr_dali.shards.verify import verify
from tests.conftest import assert_sentence, run_command


@pytest.fixture(scope="module")
def small(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of which few, small pictures make each damage cheap to try."""
    folder = tmp_path_factory.mktemp("verify")
    for number, path in enumerate(sorted((pictures / "val").rglob("*.jpg"))[:16]):
        target = folder / "set" / "train" / f"class{number % 3}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target.with_stem(f"{number}"))
    pack(folder / "set", folder / "packed", Options(samples_per_shard=6))
    return folder / "packed"


def test_a_sound_set_is_sound(small: Path) -> None:
    assert verify(small, full=False) == [] and verify(small, full=True) == []
    done = run_command("verify", small, "--full")
    assert done.returncode == 0 and "is sound" in done.stdout


@given(data=st.data())
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_flipped_bit_and_every_cut_is_found(small: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in small.rglob("*") if path.is_file())))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        damaged = bytearray(whole[:at])
    try:
        path.write_bytes(damaged)
        assert verify(small, full=True), f"{path.name} byte {at} of {len(whole)}"
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("pattern", ["manifest.json", "samples.npy", "*.tar", "*.idx"])
def test_a_missing_file_is_named_also_by_the_fast_check(pattern: str, small: Path) -> None:
    path = sorted((small / "train").glob(pattern))[0]
    hidden = path.rename(small / "hidden")
    try:
        damages = verify(small, full=False)
        assert damages and path.name in damages[0]
    finally:
        hidden.rename(path)


def test_a_damaged_image_is_named_by_tar_and_member(small: Path) -> None:
    shards = load_split(small, "train")
    row = shards.samples[3]
    path = shards.folder / shards.shards[row["shard"]].name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[int(row["offset"]) + 100] ^= 8
    try:
        path.write_bytes(damaged)
        done = run_command("verify", small, "--full")
    finally:
        path.write_bytes(whole)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert path.name in done.stdout and "00000003_" in done.stdout and "sample 3" in done.stdout


def test_every_damage_of_a_tar_is_named(small: Path) -> None:
    """Two images, the label of a third sample, the header of another's label, padding, and the index."""
    shards = load_split(small, "train")
    path = shards.folder / shards.shards[0].name
    rows = [row for row in shards.samples if row["shard"] == 0]
    whole, index = path.read_bytes(), path.with_suffix(".idx").read_bytes()
    padded = next(i for i, row in enumerate(rows) if i not in (0, 1, 2, 3) and row["length"] % 512)
    ends = [int(row["offset"]) + -(-int(row["length"]) // 512) * 512 for row in rows]
    places = [
        int(rows[0]["offset"]) + 50,
        int(rows[1]["offset"]) + 60,
        ends[2] + 512,  # the label itself
        ends[3] + 130,  # its header
        ends[padded] - 1,
        int(rows[0]["offset"]) - 300,  # a header's last bytes
    ]
    damaged = bytearray(whole)
    for place in places:
        damaged[place] ^= 1
    try:
        path.write_bytes(damaged)
        path.with_suffix(".idx").write_bytes(index.replace(b"cls", b"cla", 1))
        damages = verify(small, full=True)
    finally:
        path.write_bytes(whole)
        path.with_suffix(".idx").write_bytes(index)
    wanted = [
        ("sample 0,", "its bytes are damaged"),
        ("sample 1,", "its bytes are damaged"),
        ("sample 2,", "its label,"),
        ("sample 3,", "its label's header"),
        (f"sample {padded},", "its padding"),
        ("header of sample 0", "is damaged"),
        ("index", "line 2"),
    ]
    for words in wanted:
        assert any(all(word in line for word in words) for line in damages), (words, damages)
    assert len(damages) == len(wanted)


def test_damages_of_several_tars_and_of_several_lines_of_an_index_are_all_named(small: Path) -> None:
    """A tar is cut; of another, two lines of the index, and header and label of the sample that one of them names."""
    train = load_split(small, "train")
    cut = train.folder / train.shards[-1].name
    first = train.folder / train.shards[0].name
    assert cut != first
    row = next(row for row in train.samples if row["shard"] == 0)
    kept = {path: path.read_bytes() for path in (cut, first, first.with_suffix(".idx"))}
    with first.open("rb") as tar:
        train_key = str(member_name(tar, int(row["offset"]), int(row["length"]))).removesuffix(".jpg")
    label = int(row["offset"]) + -(-int(row["length"]) // 512) * 512 + 512
    try:
        cut.write_bytes(kept[cut][:1000])
        damaged = bytearray(kept[first])
        damaged[int(row["offset"]) - 300] ^= 1
        damaged[label] ^= 1
        first.write_bytes(damaged)
        lines = kept[first.with_suffix(".idx")].split(b"\n")
        lines[1], lines[3] = b"x", b"x"
        first.with_suffix(".idx").write_bytes(b"\n".join(lines))
        damages = verify(small, full=True)
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
    wanted = [
        (str(cut), "has 1000 bytes"),
        (str(first), "header of sample 0"),
        (str(first), f"{train_key}.jpg: its label,"),
        ("index", "line 2"),
        ("index", "line 4"),
    ]
    for words in wanted:
        assert any(all(word in line for word in words) for line in damages), (words, damages)
    assert len(damages) == len(wanted)


def test_of_names_that_differ_the_odd_one_is_damaged(small: Path) -> None:
    """Image header, label header and index name a sample; whichever is alone is named, and no sound neighbour."""
    shards = load_split(small, "train")
    path = shards.folder / shards.shards[0].name
    index = path.with_suffix(".idx")
    row = next(row for row in shards.samples if row["shard"] == 0)
    label_header = int(row["offset"]) + -(-int(row["length"]) // 512) * 512
    whole, lines = path.read_bytes(), index.read_bytes().split(b"\n")
    words = lines[1].split(b" ")
    renamed = b"\n".join([lines[0], b" ".join([*words[:3], b"9" + words[3][1:], *words[4:]]), *lines[2:]])
    image_header = int(row["offset"]) - 512

    def swapped(at: int) -> bytes:
        """Two letters of the name change places, which the header's checksum does not see."""
        name = bytearray(whole)
        other = next(place for place in range(at, at + 100) if whole[place] != whole[at])
        name[at], name[other] = name[other], name[at]
        return bytes(name)

    def broken(*at: int) -> bytes:
        return bytes(byte ^ (place in at) for place, byte in enumerate(whole))

    cases = [
        (swapped(image_header), index.read_bytes(), ["its header,"]),
        (swapped(label_header), index.read_bytes(), ["its label's header,"]),
        (broken(image_header + 130), renamed, ["header of sample 0", "line 2"]),
        (broken(image_header + 130, label_header + 130), b"", ["header of sample 0", "its label's header", "index"]),
        (whole[:1000], renamed.replace(b"cls", b"cla", 1), ["has 1000 bytes", "line 2"]),
    ]
    kept = index.read_bytes()
    for tar, idx, wanted in cases:
        try:
            path.write_bytes(tar)
            index.write_bytes(idx)
            damages = verify(small, full=True)
        finally:
            path.write_bytes(whole)
            index.write_bytes(kept)
        assert len(damages) == len(wanted), damages
        assert all(any(words in line for line in damages) for words in wanted), damages


def test_an_image_that_does_not_decode_is_found_though_every_hash_fits(small: Path, tmp_path: Path) -> None:
    """What another packer, or one with --decoder none, let through."""
    folder = tmp_path / "set" / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(3):
        shutil.copy(next(small.parent.rglob("set/train/*/0.jpg")), folder / f"{number}.jpg")
    whole = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(whole[: len(whole) // 2])
    pack(tmp_path / "set", tmp_path / "out", Options(decoder="none"))
    assert verify(tmp_path / "out", full=False) == []
    damages = verify(tmp_path / "out", full=True)
    assert len(damages) == 1 and "does not decode" in damages[0] and "_1.jpg" in damages[0]
    assert verify(tmp_path / "out", full=True, decoder="none") == []


def test_a_folder_that_is_no_set_is_a_mistake(tmp_path: Path) -> None:
    assert_sentence(run_command("verify", tmp_path), "no packed split")
