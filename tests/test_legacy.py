"""What version 0.1 left on disks is read, gone on from and compared by this one.

tests/legacy holds what the last commit of 0.1 wrote: six steps of the tiny run on drawn pictures, an encoder of two
channels, with its linear.pt, and the encoder as safetensors.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from simclr_dali import load
from simclr_dali.eval.inference import open_classifier
from simclr_dali.model import checkpoint, migrations
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import ENCODERS
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.train.config import Config
from simclr_dali.train.config_file import load_config
from simclr_dali.train.resume import refuse_other_settings
from simclr_dali.train.simclr_block import Simclr
from tests.runs import metrics, pretrain

LEGACY = Path(__file__).parent / "legacy"
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def old_run(tmp_path: Path, train_split: ShardSet) -> Path:
    """The run, as if it had been trained on the pictures of the tests: JPEGs drawn elsewhere may have other bytes."""
    folder = tmp_path / "run/checkpoints/step-00000006"
    folder.mkdir(parents=True)
    state = torch.load(LEGACY / "state.pt", weights_only=True)
    state["manifest"] = train_split.fingerprint
    torch.save(state, folder / "state.pt")
    described = json.loads((LEGACY / "checkpoint.json").read_text())
    assert "for_good" in described and state["config"]["simclr"]["ring"] is False
    described["sha256"] = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps({**described, "for_good": True}))
    return tmp_path / "run"


def config() -> Config:
    return load_config(str(LEGACY / "config.json"), [], data="d")


@pytest.mark.launch
def test_a_run_of_the_version_before_goes_on(old_run: Path, packed: Path) -> None:
    done = pretrain(LEGACY / "config.json", packed, old_run, "--set", "simclr.keep_checkpoints=1")
    assert done.returncode == 0 and "going on from step 6" in done.stdout, done.stderr
    assert [line["step"] for line in metrics(old_run)] == list(range(6, 30))
    # What it kept forever stays, and what it was made with still counts.
    assert (old_run / "checkpoints/step-00000006").is_dir() and (old_run / "finished.json").is_file()
    other = pretrain(LEGACY / "config.json", packed, old_run, "--set", "simclr.temperature=0.2")
    assert other.returncode == 2 and "simclr.temperature = 0.1" in other.stderr


class _GrownSimclr(Simclr):
    added: int = 3


class _GrownConfig(Config):
    simclr: _GrownSimclr


def test_a_field_that_is_added_has_its_default_in_every_older_checkpoint(old_run: Path) -> None:
    found = checkpoint.load(old_run)
    grown = _GrownConfig.model_validate(config().model_dump(mode="json"))
    refuse_other_settings(old_run, found, grown)
    changed = grown.model_copy(update={"simclr": grown.simclr.model_copy(update={"added": 4})})
    with pytest.raises(UserError, match=r"simclr\.added = 3, this command gives 4"):
        refuse_other_settings(old_run, found, changed)


def test_a_field_that_is_removed_is_named_in_one_place(old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checkpoint.load(old_run)
    found.state["config"]["simclr"]["gone"] = 7
    with pytest.raises(CheckpointError, match=r"does not read.*gone"):
        refuse_other_settings(old_run, found, config())
    monkeypatch.setitem(migrations.REMOVED, "simclr.gone", "it said nothing")
    refuse_other_settings(old_run, found, config())
    with pytest.raises(UserError, match=r"simclr\.gone is 7, which there is no more \(it said nothing\)"):
        load_config(str(LEGACY / "config.json"), ["simclr.gone=7"], data="d")


@dataclass(frozen=True)
class _GrownResNet(ResNet):
    added: int = 1


@pytest.mark.parametrize("kind", [ResNet, _GrownResNet])
def test_checkpoints_classifiers_and_exports_give_the_same_encoder(
    kind: type[ResNet], old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also once the description of an encoder has got a field."""
    monkeypatch.setitem(ENCODERS, "resnet18", kind)
    shutil.copy(LEGACY / "encoder.safetensors", tmp_path / "exported.safetensors")
    encoders = [load(old_run), load(LEGACY / "linear.pt"), load(tmp_path / "exported.safetensors")]
    with torch.no_grad():
        features = [encoder(IMAGES) for encoder in encoders]
    assert features[0].shape == (3, 16) and features[0].abs().max() > 0
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])
    assert open_classifier(LEGACY / "linear.pt").about["protocol"] == "fast"
