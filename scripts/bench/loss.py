"""Time and memory of NT-Xent, forward and backward, against others, all in one run on the same embeddings.

    pip install -c scripts/constraints.txt -e '.[bench]'     # the rivals; without them their rows are left out
    python scripts/bench/loss.py --json FILE
    python scripts/bench/loss.py --device gpu --pairs 4096 16384 32768 131072

Each round runs every contender as a process of its own, one after the other: it makes two views of --pairs images as
embeddings of width 128, computes loss and gradient once to warm up, and then over and over for --seconds; its time is
the median. Its memory is the highest that the process (on a GPU: torch's allocator) held above what it held before.
A contender that runs out of memory (on the CPU: more than --limit-gb) says so. Figures are medians over the rounds with
the extremes; ratios rival/ours are taken within a round. All have to agree on the value of the loss.

    ours          model/ntxent.py
    full matrix   the similarity of all rows with all, as most small trainers write it
    lightly       lightly.loss.NTXentLoss
    pml           pytorch-metric-learning: SelfSupervisedLoss(NTXentLoss)
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import file_to_write, positive_int
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument(
        "--pairs",
        type=positive_int,
        nargs="+",
        default=[256, 1024, 4096, 16384],
        help="images (default: 256 1024 4096 16384)",
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="default: 5")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring a contender a round (default: 2)")
    parser.add_argument(
        "--limit-gb", type=float, default=16.0, help="memory a contender may take on the CPU (default: 16)"
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch
import torch.nn.functional as F
from torch import Tensor

import simclr_dali.model.vision  # noqa: F401  (lightly imports torchvision, which beside a CPU torch needs this first)
from scripts.bench.figures import extremes, machine, spread
from simclr_dali.model.ntxent import nt_xent

WIDTH, TEMPERATURE = 128, 0.1
PACKAGES = ("torch", "lightly", "pytorch-metric-learning")
NO_MEMORY = 77  # exit code

Loss = Callable[[Tensor, Tensor], Tensor]


def ours() -> Loss:
    return lambda first, second: nt_xent(torch.cat([first, second]), TEMPERATURE).loss


def full_matrix() -> Loss:
    def loss(first: Tensor, second: Tensor) -> Tensor:
        z = F.normalize(torch.cat([first, second]), dim=1)
        logits = z @ z.T / TEMPERATURE
        logits.fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(first)))

    return loss


def lightly() -> Loss:
    from lightly.loss import NTXentLoss

    loss: Loss = NTXentLoss(temperature=TEMPERATURE)
    return loss


def pml() -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    loss: Loss = SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE))
    return loss


# Name -> maker of the loss, and the module that must be installed for it.
CONTENDERS: dict[str, tuple[Callable[[], Loss], str]] = {
    "ours": (ours, "torch"),
    "full matrix": (full_matrix, "torch"),
    "lightly": (lightly, "lightly"),
    "pml": (pml, "pytorch_metric_learning"),
}


def main(given: argparse.Namespace) -> None:
    if given.device == "gpu" and not torch.cuda.is_available():
        raise UserError("--device is gpu, but torch sees none; leave it out to measure on the CPU")
    if given.contender:
        try:
            print(json.dumps(run_alone(given)))
        except (MemoryError, RuntimeError) as error:
            # On the CPU torch has no error of its own for it.
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(
                error
            ):
                raise
            sys.exit(NO_MEMORY)
        return
    names = [name for name, (_, module) in CONTENDERS.items() if importlib.util.find_spec(module)]
    for name in CONTENDERS.keys() - set(names):
        print(f"{name} is not installed, so its row is left out: pip install -e '.[bench]'", file=sys.stderr)
    results: dict[str, Any] = {}
    on = machine(given.device, PACKAGES)
    print(f"{on['machine']}, {on['cores']} cores, width {WIDTH}, {given.rounds} rounds")
    print(f"{'pairs':>7}  {'':12} {'ms':>26} {'MB':>24} {'rival / ours':>22}")
    for pairs in given.pairs:
        runs: dict[str, list[dict[str, float]] | None] = {name: [] for name in names}  # None: out of memory
        for _ in range(given.rounds):
            for name, row in runs.items():
                found = measure(given, name, pairs) if row is not None else None
                runs[name] = None if row is None or found is None else [*row, found]
        results[str(pairs)] = report(pairs, runs)
        if given.json:
            limits = {} if given.device == "gpu" else {"limit_gb": given.limit_gb}
            figures = {"pairs": results, "rounds": given.rounds, **limits, **on}
            given.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(given: argparse.Namespace, name: str, pairs: int) -> dict[str, float] | None:
    """One measurement in a process of its own; None where memory did not suffice."""
    words: list[Any] = [
        sys.executable, __file__, "--contender", name, "--pairs", pairs, "--device", given.device,
        "--seconds", given.seconds, "--limit-gb", given.limit_gb,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode in (NO_MEMORY, -9):
        return None
    if done.returncode:
        raise UserError(f"{name} failed at {pairs} pairs: {done.stderr[-1500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_alone(given: argparse.Namespace) -> dict[str, float]:
    device = torch.device("cuda" if given.device == "gpu" else "cpu")
    loss = CONTENDERS[given.contender][0]()
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(given.pairs[0], WIDTH, generator=generator)
    views = [first, first + 0.5 * torch.randn(first.shape, generator=generator)]
    leaves = [view.to(device).requires_grad_() for view in views]
    if device.type == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (int(given.limit_gb * 1e9),) * 2)

    def once() -> float:
        started = time.perf_counter()
        value = loss(*leaves)
        torch.autograd.grad(value, leaves)
        if device.type == "cuda":
            torch.cuda.synchronize()
        values.append(float(value))
        return time.perf_counter() - started

    values: list[float] = []
    before = held(device)
    once()
    megabytes = (highest(device) - before) / 1e6
    times: list[float] = []
    while not times or sum(times) < given.seconds:
        times.append(once())
    return {"ms": 1e3 * statistics.median(times), "megabytes": megabytes, "loss": values[0]}


def held(device: torch.device) -> int:
    """Bytes in use now, from where :func:`highest` counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def highest(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def report(pairs: int, runs: dict[str, list[dict[str, float]] | None]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    base = runs["ours"]
    for name, row in runs.items():
        if row is None:
            print(f"{pairs:7}  {name:12} {'out of memory':>26}")
            figures[name] = "out of memory"
            continue
        times, megabytes = [run["ms"] for run in row], [run["megabytes"] for run in row]
        figures[name] = {"ms": extremes(times), "megabytes": extremes(megabytes)}
        against = ""
        if base is not None and name != "ours":
            if abs(row[0]["loss"] - base[0]["loss"]) > 1e-4 * row[0]["loss"]:
                raise UserError(f"{name} has another loss: {row[0]['loss']}, ours is {base[0]['loss']}")
            ratios = [theirs["ms"] / ours["ms"] for theirs, ours in zip(row, base, strict=True)]
            figures[name]["x ours"] = extremes(ratios)
            against = spread(ratios, 2)
        print(f"{pairs:7}  {name:12} {spread(times, 1):>26} {spread(megabytes, 0):>24} {against:>22}")
    return figures


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
