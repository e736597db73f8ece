"""The trainer as a user runs it: numbers of processes, stopping and going on, mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_dali.model import checkpoint
from simclr_dali.shards.manifest import load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from tests.conftest import assert_sentence
from tests.runs import launch, metrics, pretrain, tiny_config

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny run by one process under the launcher."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = launch(1, tiny_config(folder), packed, folder / "run")
    assert done.returncode == 0, done.stderr
    assert "each view meets 30 negatives" in done.stdout and "ETA" in done.stdout
    assert "LARS, peak lr 0.01875 (0.3 B/256)" in done.stdout
    assert "chance is ln(31) = 3.434" in done.stdout
    return folder / "run"


def test_a_run_folder_holds_what_it_should(undisturbed: Path) -> None:
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(30))
    assert [line["epoch"] for line in lines] == [0] * 15 + [1] * 15
    assert set(lines[0]) == {
        "step", "epoch", "lr", "loss", "positive", "hardest_negative", "top1", "alignment", "uniformity",
        "gradient_norm",
    }  # fmt: skip
    for line in lines:
        assert line["alignment"] == 2 - 2 * line["positive"] and line["uniformity"] < 0
        assert -1 <= line["positive"] <= 1 and -1 <= line["hardest_negative"] <= 1
    assert lines[0]["lr"] == 0 and max(line["lr"] for line in lines) == pytest.approx(0.01875)
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["simclr"]["temperature"] == 0.1 and config["optimizer"]["params"]["lr"] == 0.01875
    speed = [json.loads(line) for line in (undisturbed / "speed.jsonl").read_text().splitlines()]
    assert all(line["images_per_s"] > 0 and 0 <= line["wait_share"] <= 1 for line in speed)
    assert json.loads((undisturbed / "finished.json").read_text())["steps"] == 30
    kept = sorted(path.name for path in (undisturbed / "checkpoints").glob("step-*"))
    assert kept == ["step-00000020", "step-00000030"]


def test_two_processes_give_the_losses_of_one(undisturbed: Path, packed: Path, tmp_path: Path) -> None:
    done = launch(2, tiny_config(tmp_path), packed, tmp_path / "run", "--stop-after-steps", 5)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(undisturbed)[:5], metrics(tmp_path / "run"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["lr"] == one["lr"]


def test_a_cpu_computes_in_bfloat16_when_it_is_told_to(undisturbed: Path, packed: Path, tmp_path: Path) -> None:
    """Nearly the losses of float32, in other bits; weights and what is saved stay float32."""
    words = ["--set", "torch_autocast.enabled=true", "--set", "torch_autocast.on_cpu=true", "--stop-after-steps", 4]
    done = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    pairs = zip(metrics(tmp_path / "run"), metrics(undisturbed), strict=False)
    ours, expected = zip(*((one["loss"], other["loss"]) for one, other in pairs), strict=True)
    assert ours == pytest.approx(expected, rel=0.02) and ours != expected
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None
    weights = [value for value in found.state["model"].values() if value.is_floating_point()]
    assert weights and all(value.dtype == torch.float32 for value in weights)


def test_a_stopped_run_goes_on_bit_for_bit(undisturbed: Path, packed: Path, tmp_path: Path) -> None:
    """Also with other threads, intervals and checkpoints, which must not reach a number."""
    config = tiny_config(tmp_path)
    other = ["--set", "simclr.loader_threads=1", "--set", "simclr.log_every=3", "--set", "simclr.checkpoint_every=4"]
    for words in (["--stop-after-steps", 7], [*other, "--stop-after-steps", 12], []):
        done = pretrain(config, packed, tmp_path / "run", *words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()
    ours, theirs = (checkpoint.load(run).state for run in (tmp_path / "run", undisturbed))
    assert ours["step"] == theirs["step"] == 30
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    momenta = [[state["momentum_buffer"] for state in state["optimizer"]["state"].values()] for state in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    again = pretrain(config, packed, tmp_path / "run")
    assert again.returncode == 0 and "is finished" in again.stdout


def test_lines_past_the_checkpoint_are_written_once(packed: Path, tmp_path: Path) -> None:
    """A kill leaves lines of steps that the next run repeats, and perhaps half a line."""
    config = tiny_config(tmp_path)
    assert pretrain(config, packed, tmp_path / "run", "--stop-after-steps", 6).returncode == 0
    path = tmp_path / "run/metrics.jsonl"
    before = path.read_text()
    path.write_text(before + '{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    assert pretrain(config, packed, tmp_path / "run", "--stop-after-steps", 2).returncode == 0
    assert path.read_text().startswith(before)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(8))


def test_gradient_caching_runs_with_the_whole_batch_as_negatives(packed: Path, tmp_path: Path) -> None:
    words = ["--set", "train_micro_batch_size_per_gpu=4", "--stop-after-steps", 3]
    done = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert "(1 x 4 x 4)" in done.stdout and "30 negatives" in done.stdout


def mistake(name: str, packed: Path, tmp_path: Path) -> tuple[Any, ...]:
    """Config, data and words of a command that cannot work, and what its sentence must have."""
    config = tiny_config(tmp_path)
    forced = ["--set", "simclr.lr_rule=none"]
    return {
        "no config": (tmp_path / "none.json", packed, [], ["none.json", "ds_lars.json"]),
        "unknown key": (config, packed, ["--set", "simclr.temprature=0.1"], ["simclr.temprature"]),
        "no data": (config, tmp_path / "nowhere", [], ["nowhere", "make_shards.sh"]),
        "batch too large": (config, packed, ["--set", "train_batch_size=512", *forced], ["512", "240"]),
    }[name]


@pytest.mark.parametrize("name", ["no config", "unknown key", "no data", "batch too large"])
def test_mistakes_are_one_sentence_and_leave_nothing(name: str, packed: Path, tmp_path: Path) -> None:
    config, data, words, expected = mistake(name, packed, tmp_path)
    assert_sentence(pretrain(config, data, tmp_path / "run", *words), *expected)
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_share_the_batch_are_refused_under_the_launcher(packed: Path, tmp_path: Path) -> None:
    done = launch(3, tiny_config(tmp_path), packed, tmp_path / "run")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(errors) == 1 and "3 processes do not divide the 4 lanes" in errors[0]
    assert not (tmp_path / "run").exists()


def test_other_settings_or_data_do_not_go_on(undisturbed: Path, pictures: Path, packed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    before = (undisturbed / "metrics.jsonl").read_text()
    done = pretrain(config, packed, undisturbed, "--set", "simclr.temperature=0.2")
    assert_sentence(done, "simclr.temperature = 0.1", "0.2")
    pack(pictures, tmp_path / "other", Options(samples_per_shard=40, seed=1))
    assert_sentence(pretrain(config, tmp_path / "other", undisturbed), "another data set")
    assert (undisturbed / "metrics.jsonl").read_text() == before


def test_a_damaged_checkpoint_is_named(packed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert pretrain(config, packed, tmp_path / "run", "--stop-after-steps", 1).returncode == 0
    state = tmp_path / "run/checkpoints/step-00000001/state.pt"
    state.write_bytes(state.read_bytes()[:-10])
    assert_sentence(pretrain(config, packed, tmp_path / "run"), "step-00000001", "damaged")


@pytest.mark.parametrize("place", [0, -1])
def test_a_damaged_shard_is_refused_by_all_ranks_together(place: int, odd_pictures: Path, tmp_path: Path) -> None:
    pack(odd_pictures, tmp_path / "packed", Options(samples_per_shard=10))
    split = load_split(tmp_path / "packed", "train")
    damaged = split.folder / split.shards[split.samples["shard"][place]].name
    with damaged.open("r+b") as tar:
        tar.seek(int(split.samples["offset"][place]) - 500)
        tar.write(b"?")
    done = launch(2, tiny_config(tmp_path), tmp_path / "packed", tmp_path / "run")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(errors) == 1 and damaged.name in errors[0] and "simclr-dali verify --full" in errors[0]
    assert not (tmp_path / "run").exists()
