"""The commands as functions: what they give is what the files say, what they raise is the command's sentence."""

import json
from pathlib import Path

import pytest

from simclr_dali import pack, pretrain, probe
from simclr_dali.shards.errors import UserError
from tests.runs import TINY, metrics

pytestmark = pytest.mark.launch


def test_pictures_become_a_number_in_three_calls(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packed = pack(pictures, tmp_path / "packed", samples_per_shard=40)
    assert packed.images == {"train": 240, "val": 48} and len(packed.classes) == 12
    run = tmp_path / "run"
    stopped = pretrain(TINY, data=packed.folder, run=run, stop_after_steps=3)
    assert (stopped.finished, stopped.steps) == (False, 3)
    trained = pretrain(TINY, data=packed.folder, run=run, settings={"simclr.log_every": 5})
    assert trained.finished and trained.steps == 30 and trained.images_per_s > 0
    assert trained.metrics == metrics(run)[-1]
    found = probe(run)
    assert found.protocol == "fast" and found.images == 48 and set(found.per_class) == set(packed.classes)
    assert found.top1_interval[0] <= found.top1 <= found.top1_interval[1] and found.top1 <= (found.top5 or 0)
    before = probe(run, untrained=True, out=tmp_path / "before")
    assert before.result["untrained"] and (tmp_path / "before").is_dir()
    assert capfd.readouterr() == ("", "")


def test_what_a_command_refuses_is_raised_with_its_sentence(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        pack(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"simclr\.epochs is 0"):
        pretrain(TINY, data=packed, run=tmp_path / "run", settings={"simclr.epochs": 0})
    with pytest.raises(UserError, match="does not exist"):
        probe(tmp_path / "run")


def test_a_training_may_be_heard(packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(TINY))
    pretrain(path, data=packed, run=tmp_path / "run", stop_after_steps=2, verbose=True)
    assert "the first loss is" in capfd.readouterr().out
