"""Runs that begin with weights, layers of the projector, odd file names, and a user without a home folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_dali.model.pretrained import open_pretrained
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture, build_model
from simclr_dali.pipeline.cache import Cache
from simclr_dali.shards.errors import UserError
from simclr_dali.train.initial_weights import take_weights
from tests.conftest import ROOT, assert_sentence, run_command
from tests.runs import environment, metrics, pretrain, tiny_config

ODD_NAME = b"caf\xe9 \xff.jpg".decode("utf-8", "surrogateescape")


def test_a_run_begins_with_the_weights_of_another(trained: Path, packed: Path, tmp_path: Path) -> None:
    begin = ["--set", f"simclr.init_from={trained}", "--set", "simclr.epochs=3", "--stop-after-steps", 2]
    done = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", *begin)
    assert done.returncode == 0 and f"begins with encoder and projector of {trained}" in done.stdout, done.stderr
    fresh = pretrain(tiny_config(tmp_path), packed, tmp_path / "fresh", "--stop-after-steps", 2)
    assert fresh.returncode == 0
    assert metrics(tmp_path / "run")[0]["loss"] < metrics(tmp_path / "fresh")[0]["loss"]
    again = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", *begin)
    assert again.returncode == 0 and "begins with" not in again.stdout and "going on from step 2" in again.stdout
    state = open_pretrained(tmp_path / "run").run_state
    assert state is not None and state["config"]["simclr"]["init_from"] == str(trained)
    assert state["begun_with"]["sha256"] == open_pretrained(trained).sha256
    assert_sentence(run_command("knn", "--ckpt", tmp_path / "run", "--untrained"), "began with the weights of")


def test_a_run_that_begins_with_tuned_weights_is_not_called_pretrained(run: Path, packed: Path, tmp_path: Path) -> None:
    words = ["--fraction", 1, "--train-batch", 16, "--epochs", 1, "--out", tmp_path]
    assert run_command("finetune", "--ckpt", run, *words).returncode == 0
    tuned = tmp_path / "finetune-1.pt"
    begin = ["--set", f"simclr.init_from={tuned}", "--stop-after-steps", 1]
    done = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", *begin)
    assert done.returncode == 0 and "learned from labels (finetune-1)" in done.stdout, done.stderr
    again = pretrain(tiny_config(tmp_path), packed, tmp_path / "run", *begin)
    assert again.returncode == 0 and open_pretrained(tmp_path / "run").tuned == "finetune-1"


def test_weights_of_a_run_are_taken_whole_and_others_as_far_as_they_go(trained: Path, tmp_path: Path) -> None:
    source = open_pretrained(trained)
    same = build_model(source.architecture, seed=5)
    assert "encoder and projector" in take_weights(same, str(trained))[0]
    assert source.run_state is not None
    for key, value in same.state_dict().items():
        assert torch.equal(value, source.run_state["model"][key])
    wider = build_model(Architecture(source.architecture.encoder, (64, 16)), seed=5)
    before = {key: value.clone() for key, value in wider.projector.state_dict().items()}
    assert "with the encoder of" in take_weights(wider, str(trained))[0]
    assert all(torch.equal(value, before[key]) for key, value in wider.projector.state_dict().items())
    torch.save(ResNet("resnet18", 1.0, "7x7").build().state_dict(), tmp_path / "a.pth")
    plain = build_model(Architecture(ResNet("resnet18", 1.0, "7x7"), (8, 4)), seed=5)
    assert "(torchvision)" in take_weights(plain, str(tmp_path / "a.pth"))[0]
    with pytest.raises(UserError, match=r"which holds resnet18.* change one of them"):
        take_weights(same, str(tmp_path / "a.pth"))
    with pytest.raises(UserError, match="does not exist"):
        take_weights(same, str(tmp_path / "nothing.pth"))


def test_layers_of_the_projector_are_written(trained: Path, tmp_path: Path) -> None:
    for layer in ("encoder", "projector", "projector.1"):
        done = run_command("extract", "--ckpt", trained, "--layer", layer, "--out", tmp_path / f"{layer}.npy")
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / f"{layer}.ids.json").read_text())["layer"] == layer
    found = {layer: np.load(tmp_path / f"{layer}.npy") for layer in ("encoder", "projector", "projector.1")}
    source = open_pretrained(trained)
    model = build_model(source.architecture, 0)
    assert source.run_state is not None
    model.load_state_dict(source.run_state["model"])
    projector = model.eval().projector
    with torch.no_grad():
        pooled = torch.from_numpy(found["encoder"])
        np.testing.assert_allclose(found["projector"], projector(pooled).numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["projector.1"], projector[:3](pooled).numpy(), rtol=1e-4, atol=1e-5)
    assert found["projector"].shape[1] == 16 and found["projector.1"].shape[1] == 32
    done = run_command("extract", "--ckpt", trained, "--layer", "projector.2", "--out", tmp_path / "x.npy")
    assert_sentence(done, "has 1 hidden layer,")
    torch.save(ResNet("resnet18", 1.0, "7x7").build().state_dict(), tmp_path / "a.pth")
    done = run_command("extract", "--ckpt", tmp_path / "a.pth", "--layer", "projector", "--out", tmp_path / "x.npy")
    assert_sentence(done, "holds no projector")


def test_names_that_are_no_text_lose_no_result(run: Path, pictures: Path, packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(next((pictures / "val").rglob("*.jpg")), folder / ODD_NAME)
    assert run_command("linear", "--ckpt", run).returncode == 0
    predicted = run_command("predict", "--ckpt", run, folder)
    assert predicted.returncode == 0 and "caf\\udce9 \\udcff.jpg" in predicted.stdout, predicted.stderr
    done = run_command("predict", "--ckpt", run, "--json", folder)
    assert json.loads(done.stdout)[0]["image"].endswith(ODD_NAME), done.stderr
    done = run_command("nearest", folder, "--ckpt", run, "--data", packed, "--count", 1, "--out", tmp_path / "a.png")
    assert done.returncode == 0 and (tmp_path / "a.png").is_file(), done.stderr
    done = run_command("extract", "--ckpt", run, folder, "--out", tmp_path / "a.npy")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a.ids.json").read_text())["ids"][0].endswith(ODD_NAME)


def test_a_cache_without_a_home_matters_only_for_remote_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from simclr_dali.pipeline.remote import open_split

    monkeypatch.setattr(Path, "expanduser", _homeless)
    cache = Cache.at("~/.cache/simclr-dali", 1)
    with pytest.raises(UserError, match="home folder that nobody knows"):
        open_split("http://127.0.0.1:9/x", "train", cache)


def _homeless(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root may become another user")
def test_a_user_without_a_home_works_on_local_data(packed: Path, tmp_path: Path) -> None:
    reader = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    if subprocess.run([*reader, "test", "-r", packed / "train/manifest.json"], check=False).returncode:
        pytest.skip("another user cannot read the temporary folder")
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest", "popen")):
            folder.chmod(folder.stat().st_mode | 0o055)
    words = [ROOT / "train/pretrain.py", "--config", tiny_config(tmp_path), "--data", packed, "--run", tmp_path / "run"]
    alone = {key: value for key, value in environment().items() if key not in ("HOME", "XDG_CACHE_HOME", "USER")}
    done = subprocess.run(
        [*map(str, [*reader, sys.executable, *words, "--stop-after-steps", 1])],
        env={**alone, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["show", "views"])
def test_class_names_that_are_no_text_are_drawn(name: str, pictures: Path, tmp_path: Path) -> None:
    from simclr_dali.shards.pack import pack

    folder = tmp_path / "in/train" / b"caf\xe9".decode("utf-8", "surrogateescape")
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted((pictures / "val").rglob("*.jpg"))[:16]):
        shutil.copy(path, folder / f"{number}.jpg")
    pack(tmp_path / "in", tmp_path / "out")
    option = "--pictures" if name == "show" else "--out"
    done = run_command(name, tmp_path / "out", option, tmp_path / "a.png")
    assert done.returncode == 0 and (tmp_path / "a.png").is_file(), done.stderr
