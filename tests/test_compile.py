"""The compiled network: one graph, made once, with the numbers of the network as it is."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from simclr_dali.model.ntxent import NTXent
from simclr_dali.model.process import Process
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture, build_model
from simclr_dali.train.compilation import Backend, compile_network, resolved
from simclr_dali.train.simclr_block import Simclr
from simclr_dali.train.step import train_step
from tests.conftest import ROOT, run_python
from tests.runs import environment, metrics, pretrain, tiny_config
from tests.test_step import PlainEngine

CPU = torch.device("cpu")
ALONE = Process(0, 1, 1, CPU, 1)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch itself does
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def counted() -> tuple[int, int]:
    """Graphs that were made, and graph breaks."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_auto_compiles_on_a_gpu_only() -> None:
    assert Simclr().compile == "auto"
    assert resolved("auto", CPU) == "no" and resolved("auto", torch.device("cuda", 0)) == "inductor"
    assert resolved("max-autotune-no-cudagraphs", CPU) == "max-autotune-no-cudagraphs"


@pytest.mark.parametrize(
    "encoder",
    [
        ResNet("resnet18", 0.25, "7x7"),
        ResNet("resnet18", 0.25, "3x3"),
        ResNet("resnet50", 0.25, "7x7"),
        ResNet("resnet50", 0.25, "7x7", selective_kernels=True),
    ],
    ids=str,
)
def test_the_forward_pass_is_one_graph(encoder: ResNet) -> None:
    model = build_model(Architecture(encoder, (16, 8)), 0)
    explained = torch._dynamo.explain(model)(torch.randn(4, 3, 64, 64))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.parametrize("passes", [1, 3])
def test_nothing_is_compiled_again_over_steps_checks_and_loaded_states(
    passes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A graph for the pass with gradient, and with several micro-batches one for the pass without."""
    model = build_model(Architecture(ResNet("resnet18", 0.25, "7x7"), (16, 8)), 0)
    monkeypatch.setattr(Backend, "__call__", lambda self, graph, inputs: graph)
    compile_network(model, "inductor", tmp_path, ALONE)
    engine = PlainEngine(model, passes)
    parts = [torch.randn(8, 3, 32, 32) for _ in range(passes)]
    engine.module.train()
    for _ in range(3):
        for _ in range(2):
            train_step(engine, parts, NTXent(0.1))
        model.encoder.eval()
        with torch.no_grad():
            model.encoder(parts[0])
        model.encoder.train()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        engine.optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    assert counted() == (1 if passes == 1 else 2, 0)


@pytest.mark.launch
def test_a_compiled_run_resumes_to_the_bit_and_compiles_once(packed: Path, tmp_path: Path) -> None:
    """With a check of nearest neighbours between the epochs. The numbers are those of the network as it is."""
    config, cache = tiny_config(tmp_path), tmp_path / "cache"
    compiled = [
        "--set", "simclr.compile=inductor", "--set", f"simclr.cache={cache}", "--set", "simclr.deterministic=true",
        "--set", "simclr.knn_every_epochs=1",
    ]  # fmt: skip
    arguments = ["--config", config, "--data", packed, "--run"]
    env = {**environment(), "TORCH_LOGS": "recompiles,graph_breaks"}
    for run, steps in (("stopped", 7), ("stopped", 11), ("whole", 18)):
        words = [*arguments, tmp_path / run, *compiled, "--stop-after-steps", steps]
        done = run_python(ROOT / "train/pretrain.py", *words, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("compiled in") == 1 and str(cache / "compiled") in done.stdout
        assert "ecompil" not in done.stderr and "raph break" not in done.stderr, done.stderr
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole") and len(metrics(tmp_path / "whole")) == 18
    plain = pretrain(config, packed, tmp_path / "plain", "--stop-after-steps", 5)
    assert plain.returncode == 0, plain.stderr
    for ours, theirs in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "plain"), strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.launch
def test_without_a_compiler_a_run_goes_on_uncompiled(packed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    env = {**environment(), "CXX": str(tmp_path / "no-compiler")}
    words = ["--config", config, "--data", packed, "--run", tmp_path / "without", "--stop-after-steps", 3]
    wanted = ["--set", "simclr.compile=inductor", "--set", f"simclr.cache={tmp_path / 'cache'}"]
    done = run_python(ROOT / "train/pretrain.py", *words, *wanted, env=env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("warning: rank 0 computes without compiling") == 1 and "no-compiler" in done.stderr
    assert pretrain(config, packed, tmp_path / "plain", "--stop-after-steps", 3).returncode == 0
    assert metrics(tmp_path / "without") == metrics(tmp_path / "plain")
    # How it is computed may change; it is said where rounding changes.
    done = run_python(ROOT / "train/pretrain.py", *words, "--set", "simclr.deterministic=true", env=env)
    assert done.returncode == 0, done.stderr
    assert "simclr.deterministic was false until step 3 and is true now" in done.stdout
    assert "simclr.compile was" not in done.stdout  # nothing was compiled before


@pytest.mark.launch
def test_a_folder_that_cannot_keep_what_is_compiled_is_named(packed: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("a file where a folder should be")
    words = ["--config", tiny_config(tmp_path), "--data", packed, "--run", tmp_path / "run", "--stop-after-steps", 1]
    wanted = ["--set", "simclr.compile=inductor", "--set", f"simclr.cache={blocked}"]
    env = {**environment(), "CXX": str(tmp_path / "no-compiler")}  # which is soon found out
    done = run_python(ROOT / "train/pretrain.py", *words, *wanted, env=env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"warning: {blocked}/compiled cannot keep what is compiled (Not a directory)" in done.stderr


def test_who_meets_a_graph_that_another_compiles_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graph = torch.fx.symbolic_trace(torch.nn.ReLU())
    events: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def compiles(name: str, *, slowly: bool) -> None:
        with Backend("inductor", tmp_path, ALONE)._one_compiles(graph, [torch.ones(3)]):
            events.append(f"{name} begins")
            if slowly:
                inside.set()
                leave.wait(60)
            events.append(f"{name} ends")

    first = threading.Thread(target=compiles, args=("first",), kwargs={"slowly": True})
    first.start()
    assert inside.wait(60)
    others = [threading.Thread(target=compiles, args=(name,), kwargs={"slowly": False}) for name in ("a", "b")]
    for other in others:
        other.start()
    others[0].join(0.5)
    assert events == ["first begins"]
    leave.set()
    for thread in (first, *others):
        thread.join(60)
    assert events[:2] == ["first begins", "first ends"] and len(events) == 6
