"""Files of other trainers, with whatever they keep beside their weights: read without running anything of it."""

import argparse
import collections
import functools
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightly.models.modules import SimCLRProjectionHead
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor, nn

from simclr_dali import load
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.pretrained import open_pretrained
from simclr_dali.model.untrusted import _load_plainly
from tests.test_foreign import IMAGES, same_features, torchvision_resnet


class Called:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Listed(list[int]):
    pass


class Slotted:
    __slots__ = ("inside",)

    def __init__(self) -> None:
        self.inside = 3


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
def test_code_inside_a_file_does_not_run(old_format: bool, tmp_path: Path) -> None:
    ran, victim = tmp_path / "it-ran", tmp_path / "victim"
    victim.mkdir()
    strange = [
        Called(shutil.rmtree, str(victim)), Called(os.system, f"touch {ran}"), Called(eval, f"open({str(ran)!r}, 'w')"),
        Called(getattr, dict, "get"), Called(setattr, torch._utils._rebuild_tensor_v2, "changed", 3),
        functools.partial(max, 1), collections.deque([1, 2]), collections.defaultdict(list, a=[1]), Listed([1]),
        Slotted(), {1, 2}, np.float64(0.3), np.arange(3), np.random.default_rng(0), Path("x"), torch.float16,
    ]  # fmt: skip
    model = torchvision_resnet()
    torch.save(
        {"callbacks": strange, "state_dict": model.state_dict()},
        tmp_path / "weights.ckpt",
        _use_new_zipfile_serialization=not old_format,
    )
    with torch.no_grad():
        assert same_features(load(tmp_path / "weights.ckpt"), model(IMAGES))
    assert victim.is_dir() and not ran.exists() and not hasattr(torch._utils._rebuild_tensor_v2, "changed")


class Scripted(nn.Module):
    """A TorchScript program that prints when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        print("it ran")
        self.weight, self.training = state  # type: ignore[assignment]


def test_a_program_is_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.jit.script(Scripted()).save(str(tmp_path / "weights.pt"))
    capfd.readouterr()
    with pytest.raises(CheckpointError, match="TorchScript program"):
        load(tmp_path / "weights.pt")
    with tarfile.open(tmp_path / "old.pt", "w") as tar:
        tar.add(tmp_path / "weights.pt", "storages")
    with pytest.raises(CheckpointError, match="is a tar"):
        load(tmp_path / "old.pt")
    assert "it ran" not in capfd.readouterr().out
    torch.jit.load(str(tmp_path / "weights.pt"))  # it would have
    assert "it ran" in capfd.readouterr().out


def test_weights_in_containers_of_other_kinds_are_found(tmp_path: Path) -> None:
    model = torchvision_resnet()
    for parameter in model.parameters():
        parameter.note = "mine"  # pickles as a parameter with state
    state = collections.defaultdict(list, model.state_dict(keep_vars=True))
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    with torch.no_grad():
        assert same_features(load(tmp_path / "weights.pth"), model(IMAGES))


def test_a_file_cannot_change_what_rebuilds_tensors(tmp_path: Path) -> None:
    """GLOBAL and BUILD without a call between: state for a function itself."""
    text = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\x00\x00\x00nameX\x04\x00\x00\x00evilsb."
    _load_plainly(io.BytesIO(text))
    assert not hasattr(torch._utils._rebuild_tensor_v2, "name")


@pytest.mark.launch
def test_a_checkpoint_of_lightning_itself(tmp_path: Path) -> None:
    """lightly's example as its users train it, with hyper-parameters and callbacks of every kind."""
    import pytorch_lightning

    class SimCLR(pytorch_lightning.LightningModule):
        def __init__(self, config: argparse.Namespace, where: Path) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.backbone = nn.Sequential(*list(torchvision_resnet().children())[:-1])
            self.projection_head = SimCLRProjectionHead(512, 512, 128)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss: Tensor = self.projection_head(self.backbone(batch).flatten(1)).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [{"scheduler": CosineWarmupScheduler(optimizer, 2, 10), "interval": "step"}]

    model = SimCLR(argparse.Namespace(lr=0.3, schedule=functools.partial(max, 1)), tmp_path)
    callback = pytorch_lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, monitor="loss", save_last=True)
    trainer = pytorch_lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback], default_root_dir=tmp_path,
    )  # fmt: skip
    pictures: Any = torch.randn(8, 3, 32, 32)
    trainer.fit(model, torch.utils.data.DataLoader(pictures, batch_size=4))
    found = open_pretrained(tmp_path / "last.ckpt")
    assert found.layout == "lightly" and found.architecture.encoder.name == "resnet18"
    model.eval()
    with torch.no_grad():
        assert same_features(found.encoder, model.backbone(IMAGES).flatten(1))


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_a_cut_file_is_a_sentence(size: int, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torchvision_resnet().state_dict(), buffer)
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(buffer.getvalue()[:size])
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name)
