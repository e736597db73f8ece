"""The loss curve of a fixed tiny run, bit for bit.

A change that should not touch the numbers must leave tests/golden/curve.json as it is. One that should, rewrites it:
python -m tests.test_curve, and says why in its commit.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TIMEOUT
from tests.runs import environment, metrics, tiny_config

GOLDEN = Path(__file__).parent / "golden" / "curve.json"
STEPS = 12
# Another processor or library rounds otherwise, and training amplifies that: only the first steps can be compared.
STEPS_ELSEWHERE, TOLERANCE_ELSEWHERE = 4, 1e-3


def machine() -> dict[str, str]:
    """What the bits of a CPU run depend on, besides our code."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    packages = ("torch", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "numpy", "Pillow", "deepspeed")
    # Virtual machines share a name and differ in the instructions that compute.
    known = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    vector = " ".join(sorted(flag for flag in known.split() if flag.startswith(("sse", "avx", "amx", "fma", "f16c"))))
    return {"processor": model, "vector": vector, **{name: importlib.metadata.version(name) for name in packages}}


def curve(folder: Path) -> list[dict[str, Any]]:
    """Metrics of STEPS steps of the tiny configuration on one core."""
    from scripts.draw_pictures import draw_set
    from simclr_dali.shards.pack import pack
    from simclr_dali.shards.plan import Options

    draw_set(folder / "pictures", train_per_class=20, val_per_class=4)
    pack(folder / "pictures", folder / "packed", Options(samples_per_shard=40))
    core = min(os.sched_getaffinity(0))
    arguments = ["--config", tiny_config(folder), "--data", folder / "packed", "--run", folder / "run"]
    words = [sys.executable, ROOT / "train/pretrain.py", *arguments, "--stop-after-steps", STEPS]
    subprocess.run(
        [str(word) for word in words],
        check=True,
        capture_output=True,
        timeout=TIMEOUT,
        env=environment(),
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    return metrics(folder / "run")


@pytest.mark.launch
def test_the_loss_curve_is_bit_identical(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    lines = curve(tmp_path)
    if golden["machine"] == machine():
        assert lines == golden["metrics"]
    else:
        for line, expected in list(zip(lines, golden["metrics"], strict=True))[:STEPS_ELSEWHERE]:
            assert line["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE_ELSEWHERE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps({"machine": machine(), "metrics": curve(Path(folder))}, indent=1) + "\n")
