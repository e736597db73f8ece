"""Which values the weights of others take: told by the layout, or by the caller, said in a line and kept in results."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from simclr_dali import load
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.pretrained import open_pretrained
from simclr_dali.model.resnet import ResNet
from tests.conftest import assert_sentence, run_command
from tests.test_foreign import prefixed, settled, torchvision_resnet

LEVELS = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CIFAR = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])


def column(values: Any) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)


def sthalles(model: nn.Module) -> dict[str, Any]:
    """models/resnet_simclr.py: the projector takes the place of fc; run.py saves state_dict, arch, epoch, optimizer."""
    head = {"backbone.fc.0.weight": torch.zeros(512, 512), "backbone.fc.0.bias": torch.zeros(512),
            "backbone.fc.2.weight": torch.zeros(128, 512), "backbone.fc.2.bias": torch.zeros(128)}  # fmt: skip
    return {"epoch": 100, "arch": "resnet18", "state_dict": {**prefixed(model, "backbone."), **head}}


def spijkervet(model: nn.Module) -> dict[str, Any]:
    """simclr/simclr.py: Linear, ReLU, Linear without biases or BatchNorm; the plain state_dict is saved."""
    head = {"projector.0.weight": torch.zeros(512, 512), "projector.2.weight": torch.zeros(64, 512)}
    return {**prefixed(model, "encoder."), **head}


@pytest.mark.parametrize(
    ("save", "layout"),
    [(sthalles, "sthalles/SimCLR"), (spijkervet, "Spijkervet/SimCLR")],
    ids=["sthalles", "spijkervet"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_trainers_without_normalisation_are_known(save: Any, layout: str, wrapped: bool, tmp_path: Path) -> None:
    model = torchvision_resnet()
    saved = save(model)
    if wrapped:  # by nn.DataParallel
        inner = saved.get("state_dict", saved)
        renamed = {f"module.{key}": value for key, value in inner.items()}
        saved = {**saved, "state_dict": renamed} if "state_dict" in saved else renamed
    torch.save(saved, tmp_path / "theirs.pth")
    found = open_pretrained(tmp_path / "theirs.pth")
    assert found.layout == layout and found.encoder.unit_range
    with torch.no_grad():
        torch.testing.assert_close(found.encoder(LEVELS), model(LEVELS / 255), rtol=1e-4, atol=1e-4)
    assert open_pretrained(tmp_path / "theirs.pth", unit_range=False).encoder.unit_range is False


def test_our_own_keys_outside_of_a_run_are_still_ours(tmp_path: Path) -> None:
    encoder = settled(ResNet("resnet18", 1.0, "7x7").build())
    bn = {"projector.1.running_mean": torch.zeros(8), "projector.0.weight": torch.zeros(8, 512)}
    torch.save({**prefixed(encoder, "encoder."), **bn, "projector.2.weight": torch.zeros(1)}, tmp_path / "ours.pth")
    found = open_pretrained(tmp_path / "ours.pth")
    assert found.layout == "simclr-dali" and not found.encoder.unit_range


def test_other_statistics_on_request(tmp_path: Path) -> None:
    model = torchvision_resnet()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    encoder = open_pretrained(tmp_path / "a.pth", mean=CIFAR[0], std=CIFAR[1]).encoder
    normalised = (LEVELS / 255 - column([0.485, 0.456, 0.406])) / column([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model((LEVELS / 255 - column(CIFAR[0])) / column(CIFAR[1]))
        torch.testing.assert_close(encoder(LEVELS), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(encoder(normalised), expected, rtol=1e-3, atol=1e-3)
    assert encoder.conventions()["mean"] == CIFAR[0] and "0.4914" in encoder.input_range()
    assert "mean" not in load(tmp_path / "a.pth").conventions()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"mean": [0.5, 0.5], "std": CIFAR[1]}, "mean is .* three numbers"),
        ({"mean": CIFAR[0], "std": [0.5, 0.0, 0.5]}, "std is .* above 0"),
        ({"mean": [0.5, 0.5, float("nan")], "std": CIFAR[1]}, "mean is .* three numbers"),
        ({"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}, r"mean is .* in 0\.\.1"),
        ({"mean": CIFAR[0]}, "given alone"),
        ({"mean": CIFAR[0], "std": CIFAR[1], "unit_range": True}, "only one can hold"),
    ],
)
def test_statistics_that_cannot_be_are_refused(given: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    torch.save(torchvision_resnet().state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=sentence):
        load(tmp_path / "a.pth", **given)


@pytest.mark.parametrize("name", ["resnet50d", "resnet18d", "resnet34d", "resnetv2_50d"])
def test_deep_stems_are_called_that(name: str, tmp_path: Path) -> None:
    torch.save(timm.create_model(name).state_dict(), tmp_path / "a.pth")
    sentence = "no ResNet of a known layout" if name == "resnetv2_50d" else "deep stem"
    with pytest.raises(CheckpointError, match=sentence):
        load(tmp_path / "a.pth")


def test_every_command_says_what_it_found_and_assumes(packed: Path, pictures: Path, tmp_path: Path) -> None:
    torch.save(sthalles(torchvision_resnet()), tmp_path / "theirs.pth")
    picture = next((pictures / "val").rglob("*.jpg"))
    ckpt = ["--ckpt", tmp_path / "theirs.pth", "--image-size", 32]
    data = ["--data", packed]
    for words in (
        ["knn", *ckpt, *data, "--k", 1, "--out", tmp_path],
        ["extract", *ckpt, picture, "--out", tmp_path / "a.npy"],
        ["nearest", picture, *ckpt, *data, "--count", 1, "--out", tmp_path / "a.png"],
        ["export", *ckpt, "--format", "safetensors", "--out", tmp_path / "a.safetensors"],
    ):
        done = run_command(*words)
        assert done.returncode == 0, done.stderr
        assert "resnet18" in done.stdout and "layout of sthalles/SimCLR, takes values in 0..1" in done.stdout
    for name in ("knn.json", "a.ids.json"):
        found = json.loads((tmp_path / name).read_text())
        assert (found["layout"], found["unit_range"], found["input"]) == ("sthalles/SimCLR", True, "values in 0..1")
    cifar = ["--mean", *CIFAR[0], "--std", *CIFAR[1], "--no-unit-range"]
    done = run_command("extract", *ckpt, *cifar, picture, "--out", tmp_path / "b.npy")
    assert "takes values normalised by mean 0.4914 0.4822 0.4465 and std" in done.stdout, done.stderr
    assert json.loads((tmp_path / "b.ids.json").read_text())["std"] == CIFAR[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", "1000000000"),
        ("conventions", '{"stem_padding": 1000000000}'),
        ("conventions", '{"unit_range": "false"}'),
        ("conventions", '{"mean": [0, 0, "x"]}'),
        ("step", '"many"'),
    ],
)
def test_metadata_that_cannot_be_is_named(key: str, value: str, tmp_path: Path) -> None:
    weights = settled(ResNet("resnet18", 1.0, "7x7").build()).state_dict()
    about = {"architecture": '{"name": "resnet18", "width": 1.0, "stem": "7x7", "selective_kernels": false, '
             '"projector": []}', "checkpoint_sha256": '"x"'}  # fmt: skip
    safetensors.torch.save_file(weights, tmp_path / "a.safetensors", {**about, "format": "pt, by another program"})
    load(tmp_path / "a.safetensors")
    safetensors.torch.save_file(weights, tmp_path / "a.safetensors", {**about, key: value})
    with pytest.raises(CheckpointError, match=key if key != "conventions" else "stem_padding|unit_range|mean"):
        load(tmp_path / "a.safetensors")


def test_a_wrong_range_is_one_sentence(tmp_path: Path) -> None:
    torch.save(torchvision_resnet().state_dict(), tmp_path / "a.pth")
    words = ["extract", "--ckpt", tmp_path / "a.pth", "x.jpg", "--out", tmp_path / "a.npy", "--std", 0, 1, 1]
    assert_sentence(run_command(*words, "--mean", 0, 0, 0), "std is", "above 0")
