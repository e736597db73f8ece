"""Weights that are known by their names: fetched from a server, checked, kept; and what they predict."""

import hashlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scripts.draw_pictures import draw_picture
from simclr_dali import load, predict
from simclr_dali.eval.arguments import EncoderChoice
from simclr_dali.eval.evaluation import open_encoder, origin, result_folder
from simclr_dali.eval.protocols import protocol_name
from simclr_dali.model import published
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.pretrained import open_pretrained
from simclr_dali.model.vision import imagenet_classes, torchvision
from simclr_dali.shards.errors import UserError
from simclr_dali.train.config_file import load_config
from tests.conftest import ROOT, run_python

ENCODER, LINEAR = "simclr_resnet50_16xb256-coslr-200e_in1k", "resnet50_simclr-200e-pre_8xb512-linear-coslr-90e_in1k"


@dataclass
class Server:
    """What it was asked for, and what it answers."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut: int = 0
    """So many answers end in their middle."""
    refuse: int = 0
    """So many are 503."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    state = Server()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            data = state.files.get(self.path)
            if state.refuse:
                state.refuse -= 1
                self.send_error(503)
            elif data is None:
                self.send_error(404)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if state.cut else data)
                state.cut = max(0, state.cut - 1)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv(published.URL_VARIABLE, f"http://127.0.0.1:{http.server_port}/simclr/")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(published, "_PAUSE", 0.01)
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet50().eval()


def publish(server: Server, monkeypatch: pytest.MonkeyPatch, name: str, network: nn.Module) -> bytes:
    """mmpretrain's layout, under a name with the digits of the file, as its publisher gives it."""
    state = {}
    for key, value in network.state_dict().items():
        if not key.startswith("fc."):
            state[f"backbone.{key}"] = value
        elif name == LINEAR:
            state[f"head.{key}"] = value
    if name == ENCODER:
        state |= {"neck.fc0.weight": torch.zeros(8, 2048), "neck.bn0.weight": torch.ones(8)}
    path = Path(published.WEIGHTS[name].path)
    buffer = io.BytesIO()
    torch.save({"meta": {"epoch": 90}, "state_dict": state}, buffer)
    data = buffer.getvalue()
    digits = hashlib.sha256(data).hexdigest()[:8]
    where = f"{path.parent}/{path.name.rpartition('-')[0]}-{digits}.pth"
    monkeypatch.setitem(published.WEIGHTS, name, published.Published(where))
    server.files[f"/simclr/{where}"] = data
    return data


def test_the_addresses_are_those_of_the_publisher() -> None:
    """configs/simclr/README.md of mmpretrain, and where download.openmmlab.com has what it names."""
    assert published.PUBLISHER == "https://download.openmmlab.com/mmselfsup/1.x/simclr"
    folder = "simclr_resnet50_16xb256-coslr-{}e_in1k/"
    linear = "resnet50_linear-8xb512-coslr-90e_in1k/resnet50_linear-8xb512-coslr-90e_in1k_20220825-"
    expected = {
        "simclr_resnet50_16xb256-coslr-200e_in1k": folder.format(200)
        + "simclr_resnet50_16xb256-coslr-200e_in1k_20220825-4d9cce50.pth",
        "simclr_resnet50_16xb256-coslr-800e_in1k": folder.format(800)
        + "simclr_resnet50_16xb256-coslr-800e_in1k_20220825-85fcc4de.pth",
        "resnet50_simclr-200e-pre_8xb512-linear-coslr-90e_in1k": f"{folder.format(200)}{linear}f12c0457.pth",
        "resnet50_simclr-800e-pre_8xb512-linear-coslr-90e_in1k": f"{folder.format(800)}{linear}b80ae1e5.pth",
    }
    assert {name: found.path for name, found in published.WEIGHTS.items()} == expected
    assert [found.sha256_prefix for found in published.WEIGHTS.values()] == [
        published.WEIGHTS[name].path[-12:-4] for name in published.WEIGHTS
    ]


@torch.no_grad()
def test_weights_come_once_and_are_those_that_were_published(
    server: Server, network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(server, monkeypatch, ENCODER, network)
    server.refuse, server.cut = 1, 1  # the third attempt succeeds
    encoder = load(ENCODER)
    assert len(server.asked) == 3
    image = draw_picture("rings", np.random.default_rng(0), (300, 240))
    views = encoder.views(image)
    network.fc, head = nn.Identity(), network.fc
    expected = network(views)
    network.fc = head
    assert torch.allclose(encoder(image), expected, atol=1e-4) and views.shape[2:] == (224, 224)
    again = open_pretrained(Path(ENCODER))
    assert len(server.asked) == 3  # kept
    assert again.layout == "mmpretrain" and result_folder(again) == Path("runs") / ENCODER
    assert origin(open_encoder(EncoderChoice(Path(ENCODER))), 224)["published"] == ENCODER
    kept = tmp_path / "torch/hub/checkpoints" / published.WEIGHTS[ENCODER].file
    kept.write_bytes(kept.read_bytes()[:-5])  # damaged since
    load(ENCODER)
    assert len(server.asked) == 4 and hashlib.sha256(kept.read_bytes()).hexdigest().startswith(kept.stem[-8:])
    assert sorted(path.suffix for path in kept.parent.iterdir()) == [".lock", ".pth"]
    with pytest.raises(CheckpointError, match="no classifier"):
        predict(ENCODER, image)


@torch.no_grad()
def test_a_name_and_a_picture_give_class_and_score(
    server: Server, network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    publish(server, monkeypatch, LINEAR, network)
    draw_picture("rings", np.random.default_rng(0), (300, 240)).save("bird.JPEG", quality=95)
    found = predict(LINEAR, "bird.JPEG")
    scores = network(load(LINEAR).views("bird.JPEG")).softmax(1)[0]
    assert found.label == int(scores.argmax()) and found.score == pytest.approx(float(scores.max()), rel=1e-3)
    assert found.name == imagenet_classes()[found.label]
    done = run_python(ROOT / "eval/predict.py", "--ckpt", kept_file(LINEAR, tmp_path), "bird.JPEG", cwd=tmp_path)
    assert done.stdout.split()[0] == "bird.JPEG" and found.name.split()[0] in done.stdout, done.stderr


def kept_file(name: str, home: Path) -> Path:
    return home / "torch/hub/checkpoints" / published.WEIGHTS[name].file


def test_other_bytes_than_were_published_are_never_used(
    server: Server, network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    data = publish(server, monkeypatch, ENCODER, network)
    (where,) = server.files
    server.files[where] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(CheckpointError, match=r"another file, or cut off.*invalid hash value.*SIMCLR_DALI_WEIGHTS_URL"):
        load(ENCODER)
    server.files[where], server.cut = data, 99
    with pytest.raises(CheckpointError, match="another file, or cut off"):
        load(ENCODER)
    server.files.clear()
    before = len(server.asked)
    with pytest.raises(CheckpointError, match="404"):
        load(ENCODER)
    assert len(server.asked) == before + 1  # it will not be there the second time
    for wrong in ("/data/mirror", "host/simclr", "http://with space/"):
        monkeypatch.setenv(published.URL_VARIABLE, wrong)
        with pytest.raises(CheckpointError, match=r"no address|does not answer"):
            load(ENCODER)
    monkeypatch.setenv(published.URL_VARIABLE, "http://127.0.0.1:9/simclr")
    with pytest.raises(CheckpointError, match="does not answer"):
        load(ENCODER)
    assert [path.suffix for path in kept_file(ENCODER, tmp_path).parent.iterdir()] == [".lock"]


def test_a_path_of_that_name_is_the_path(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torchvision.models.resnet18().state_dict(), ENCODER)
    assert load(ENCODER).width == 512 and not server.asked
    with pytest.raises(CheckpointError, match=rf"does not exist.*{ENCODER}"):
        load("simclr_resnet50_16xb256-coslr-300e_in1k")


def test_their_configs_are_our_presets(tmp_path: Path) -> None:
    ours = load_config("ds_lars.json", [], data="d")
    for name in (ENCODER, f"{ENCODER}.py", f"configs/simclr/{ENCODER}.py"):
        assert load_config(name, [], data="d") == ours
    (tmp_path / f"{ENCODER}.py").write_text("lr = 99")  # which is not what the preset has
    with pytest.raises(UserError, match=r"not read here.*ds_lars\.json"):
        load_config(str(tmp_path / f"{ENCODER}.py"), [], data="d")
    (tmp_path / ENCODER).write_text('{"base": "ds_lars.json", "simclr": {"epochs": 7, "warmup_epochs": 1}}')
    assert load_config(str(tmp_path / ENCODER), [], data="d").simclr.epochs == 7
    longer = load_config("simclr_resnet50_16xb256-coslr-800e_in1k", [], data="d")
    assert longer.simclr.epochs == 800 and longer.train_batch_size == 4096
    with pytest.raises(UserError, match="neither a file nor a preset"):
        load_config("simclr_resnet50_16xb256-coslr-300e_in1k.py", [], data="d")
    assert protocol_name("configs/simclr/benchmarks/resnet50_8xb512-linear-coslr-90e_in1k.py") == "mmpretrain-lars-90e"
    assert protocol_name("fast") == "fast" and protocol_name("other") == "other"
