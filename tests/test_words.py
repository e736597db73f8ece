"""What is said where something is missing or misspelt: the next command is to work."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from simclr_dali.model.process import print_now
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from simclr_dali.shards.wording import counted, of_classes, size_text
from simclr_dali.train.config_file import load_config
from simclr_dali.train.job import build_order
from tests.conftest import ROOT, assert_sentence, run_command
from tests.drawn import class_folders, put
from tests.runs import tiny_config


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("simclr.epoch", "'simclr.epochs'"),
        ("epochs", "'simclr.epochs'"),
        ("gradient_accumulation_steps", "'train_micro_batch_size_per_gpu'"),
        ("simclr.temprature", "'simclr.temperature'"),
        ("temperature", "'simclr.temperature'"),
        ("train_batch", "'train_batch_size'"),
        ("optimizer.params.learning_rate", "'optimizer.params.lr'"),
        ("simclr.workers", "'simclr.loader_threads'"),
    ],
)
def test_an_unknown_key_names_the_one_that_is_meant(key: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"unknown key '{re.escape(key)}'.*{re.escape(meant)}"):
        load_config(str(tiny_config(tmp_path)), [f"{key}=1"], "data", "run")


def test_a_preset_on_a_small_set_names_all_that_must_change(packed: Path) -> None:
    config = load_config("ds_lars.json", [], str(packed), "run")
    with pytest.raises(UserError, match="does not fit the 240 images of the data set; give: --set") as caught:
        build_order(config, load_split(packed, "train"))
    words = re.findall(r"--set (\S+)", str(caught.value))
    fitting = load_config("ds_lars.json", words, str(packed), "run")
    assert build_order(fitting, load_split(packed, "train")).steps_per_epoch > 1 and len(words) == 3


def test_a_smaller_batch_names_lanes_and_rate_in_one_go() -> None:
    with pytest.raises(UserError, match=r'set simclr\.lanes to 16 and optimizer\.params\.lr to "auto"'):
        load_config("ds_lars.json", ["train_batch_size=48"], "data", "run")
    load_config("ds_lars.json", ["train_batch_size=48", "simclr.lanes=16", "optimizer.params.lr=auto"], "data", "run")


def test_another_optimizer_than_the_bases_is_taken_whole(tmp_path: Path) -> None:
    block = '{"type": "AdamW", "params": {"lr": 0.001}}'
    path = put(tmp_path / "mine.json", f'{{"base": "ds_lars.json", "optimizer": {block}, '
               '"simclr": {"lr_rule": "none"}}'.encode())  # fmt: skip
    config = load_config(str(path), [], "data", "run")
    assert config.optimizer.type == "AdamW" and config.optimizer.params.lr == 0.001


def test_numbers_of_neighbours_that_are_too_many_are_left_out(trained: Path, packed: Path, tmp_path: Path) -> None:
    pack_small = tmp_path / "small"
    pack(class_folders(tmp_path / "in", {"train": 20, "val": 4}), pack_small)
    done = run_command("knn", "--ckpt", trained, "--data", pack_small, "--out", tmp_path / "out")
    assert done.returncode == 0 and "k 20 only: train has 40 images" in done.stdout, done.stderr
    assert "kNN, k 20: top-1" in done.stdout and "top-5" not in done.stdout  # of two classes
    assert '"top5": null' in (tmp_path / "out/knn.json").read_text()
    assert_sentence(run_command("knn", "--ckpt", trained, "--data", pack_small, "--k", 200), "--k 200 is more than")


def test_an_unpacked_folder_is_told_how_to_be_packed(trained: Path, tmp_path: Path) -> None:
    pictures = class_folders(tmp_path / "in", {"train": 2, "val": 2})
    for words in (["knn", "--ckpt", trained], ["extract", "--ckpt", trained, "--out", tmp_path / "x.npy"]):
        done = run_command(*words, "--data", pictures)
        assert_sentence(done, f"scripts/make_shards.sh {pictures}, and give {pictures}-shards")
    assert_sentence(run_command("knn", "--ckpt", trained, "--data", tmp_path / "nowhere"), "does not exist")


def test_a_set_without_val_is_told_how_to_get_one(trained: Path, tmp_path: Path) -> None:
    pictures = class_folders(tmp_path / "in", {"train": 2, "val": 2})
    pack(pictures, tmp_path / "packed", Options(split="train"))
    done = run_command("linear", "--ckpt", trained, "--data", tmp_path / "packed")
    assert_sentence(done, "only train", f"scripts/make_shards.sh IMAGES {tmp_path / 'packed'} --split val")


def test_one_is_not_many() -> None:
    assert counted(1, "image") == "1 image" and counted(2000, "image") == "2,000 images"
    assert of_classes(1) == "of 1 class" and of_classes(0) == "without labels"
    assert size_text(1234) == "1.23 kB" and size_text(5_600_000) == "5.6 MB" and size_text(1.5e11) == "150 GB"


def test_a_small_set_is_described_in_units_that_say_something(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 1}, ["only"])
    done = run_command("pack", tmp_path / "in", tmp_path / "out", "--dry-run")
    assert "1 image of 1 class" in done.stdout and "0.000 GB" not in done.stdout and "in 1 shard of" in done.stdout


def test_a_line_does_not_stick_to_the_progress(capsys: pytest.CaptureFixture[str]) -> None:
    print_now("first")
    capsys.readouterr()
    print_now("\r\033[Kepoch 1", end="")
    print_now("\r\033[Kepoch 2", end="")
    print_now("kNN 50 %")
    print_now("\r\033[Kepoch 3", end="")
    print_now("done")
    assert capsys.readouterr().out == "\r\033[Kepoch 1\r\033[Kepoch 2\nkNN 50 %\n\r\033[Kepoch 3\ndone\n"


def test_the_quickstarts_help_installs_nothing(tmp_path: Path) -> None:
    """Even a Python without any package answers."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".package").symlink_to(ROOT / ".package")
    for name in ("quickstart.sh", "quickstart.py"):
        (tmp_path / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    (tmp_path / "scripts/quickstart.sh").chmod(0o755)
    plain = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [tmp_path / "scripts/quickstart.sh", "--help"], capture_output=True, text=True, env=plain, check=False
    )
    assert done.returncode == 0 and "usage: quickstart.sh" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".package", "scripts"]


def test_results_that_cannot_be_written_are_told_before_anything_is_computed(
    trained: Path, packed: Path, tmp_path: Path
) -> None:
    """The pictures of val are damaged, so whoever computes first meets that first."""
    damaged = shutil.copytree(packed, tmp_path / "damaged")
    tar = next((damaged / "val").glob("*.tar"))
    tar.write_bytes(bytes(byte ^ 255 for byte in tar.read_bytes()))
    put(tmp_path / "file", b"in the way")
    words = ["--ckpt", trained, "--data", damaged, "--out", tmp_path / "file" / "out"]
    done = run_command("linear", *words)
    assert_sentence(done, "cannot write", "out/linear.json")
    picture = next((packed / "train").iterdir())
    done = run_command("nearest", picture, *words[:4], "--out", tmp_path / "file/a.png")
    assert_sentence(done, "cannot write", "a.png")
