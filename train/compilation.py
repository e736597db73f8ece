"""torch.compile for the network of a run: by which settings, where the result is kept, and what if it cannot be."""

import contextlib
import copy
import fcntl
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from simclr_dali.model.process import Process, print_now, print_rank_0
from simclr_dali.model.simclr import SimCLR

# What simclr.compile may name, and what inductor is set to for it (torch/_inductor/config.py). The second and third
# search for faster kernels on the device at hand, which takes minutes.
SETTINGS: dict[str, dict[str, Any]] = {
    "inductor": {},
    "coordinate-descent-tuning": {"coordinate_descent_tuning": True},
    "max-autotune-no-cudagraphs": {"max_autotune": True, "coordinate_descent_tuning": True},
}


def resolved(compile: str, device: torch.device) -> str:
    """What ``simclr.compile`` means on ``device``: "no", or one of SETTINGS."""
    if compile != "auto":
        return compile
    return "inductor" if device.type == "cuda" else "no"


def compile_network(model: SimCLR, setting: str, folder: Path, process: Process) -> "Backend":
    """Have ``model``'s forward and backward pass compiled when it first runs; keys and hooks stay as they are.

    One graph. With several processes two, so that gradients of the second leave while the first's backward pass runs
    (model.encoder.Encoder.early). ``folder`` keeps what was compiled, unless TORCHINDUCTOR_CACHE_DIR names another.
    What is returned says later whether it could be done.
    """
    backend = Backend(setting, folder, process)
    if process.world == 1:
        model.compile(backend=backend, dynamic=False)
    else:
        for part in ("early", "late"):
            setattr(model, part, torch.compile(getattr(model, part), backend=backend, dynamic=False))
    return backend


class Backend:
    """Inductor, for torch.compile. Says what it does, and leaves a graph as it is where it cannot be compiled."""

    def __init__(self, setting: str, folder: Path, process: Process) -> None:
        self._setting, self._process = setting, process
        self.folder = _keep_in(folder)
        self.failed, self._begun = False, False

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import RestartAnalysis, SkipFrame

        if self.failed:
            return graph
        if not self._begun:
            print_rank_0(
                self._process,
                f"compiling the network ({self._setting}), which takes about a minute the first time; {self.folder} "
                "keeps it for later starts, and a signal to stop waits for it",
            )
        self._begun = True
        started = time.monotonic()
        as_it_is = copy.deepcopy(graph)  # the compiler changes what it is given
        try:
            compiled = self._compile(graph, inputs)
        except (RestartAnalysis, SkipFrame):  # with which torch's tracer is told to try otherwise
            raise
        except Exception as error:  # whatever a compiler, its driver or its files lack
            self.failed = True
            print_now(
                f"warning: rank {self._process.rank} computes without compiling, which is slower: {_reason(error)}; "
                'mend that, or set simclr.compile to "no"',
                file=sys.stderr,
            )
            return as_it_is
        print_rank_0(self._process, f"compiled in {time.monotonic() - started:.0f} s")
        return compiled

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._functorch import config as functorch
        from torch._inductor import config as inductor
        from torch._inductor.compile_fx import compile_fx

        patches = dict(SETTINGS[self._setting])
        if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
            inductor.compile_threads = min(inductor.compile_threads or 1, self._process.cores)
        # The backward pass is compiled at once too, so that its failure is known here.
        with functorch.patch(force_non_lazy_backward_lowering=True), self._one_compiles(graph, inputs):
            compiled: Any = compile_fx(graph, inputs, config_patches=patches)
            return compiled

    @contextlib.contextmanager
    def _one_compiles(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Iterator[None]:
        """Whoever is first compiles; the others of a machine wait, and then find it in the folder, all at once.

        GPUs of different index share nothing there (pytorch#108971), so their ranks do not wait for each other.
        """
        device = self._process.device
        shapes = [(tuple(x.shape), str(x.dtype)) if isinstance(x, torch.Tensor) else str(x) for x in inputs]
        name = repr((graph.code, shapes, torch.is_grad_enabled(), self._setting, str(device), torch.__version__))
        lock = self.folder / "locks" / hashlib.sha256(name.encode()).hexdigest()[:32]
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # a disk that cannot lock costs the others time, and nothing else
                lock.parent.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(lock.open("a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    fcntl.flock(file, fcntl.LOCK_SH)
            yield


def _keep_in(folder: Path) -> Path:
    """Where inductor keeps what it compiles: ``folder``, unless the environment names another."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named in (None, default_cache_dir()):  # which torch itself writes there, and a restart of the machine empties
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())
    kept_in = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    try:
        kept_in.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=kept_in):
            return kept_in
    except OSError as error:
        print_now(
            f"warning: {kept_in} cannot keep what is compiled ({error.strerror}); it goes to {default_cache_dir()}",
            file=sys.stderr,
        )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = default_cache_dir()
    return Path(default_cache_dir())


def _reason(error: Exception) -> str:
    """The first sentence of what was raised, without the addresses and hints that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"
