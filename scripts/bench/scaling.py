"""How fast, how long and how large a training is on many GPUs: a model on paper, whose messages are counted.

    python scripts/bench/scaling.py                                  # tables for InfiniBand and Ethernet
    python scripts/bench/scaling.py --batch 4096 --network Ethernet
    python scripts/bench/scaling.py --plot scaling.html              # efficiency by GPUs, one file without a network
    python scripts/bench/scaling.py --json FILE

Nothing here was run on several GPUs. A step of one H200 was measured, links are what their makers say, and the rest is
train/scaling.py, which says what it assumes; what a step sends is counted in real runs of 1, 2 and 4
processes by a test (tests/test_scaling.py), number by number.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import file_to_write, positive_int
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.train.scaling import (
    H200,
    IMAGENET,
    INTERCONNECTS,
    PROTOCOLS,
    STEP_TIME_STD,
    Step,
    Traffic,
    efficiency,
    last_that_pays,
    speedups,
    step_of,
    traffic_of,
)

GPUS = [2**power for power in range(13)]  # 1 to 4,096
BATCHES = [4096, 8192, 16384, 32768, 65536, 131072]
# What others publish of SimCLR with ResNet-50 on ImageNet, 100 epochs: images/s on so many accelerators.
PUBLISHED = {
    "SimCLR paper, 128 TPU v3 cores, 1.5 hours (Chen et al. 2020, section 2.2)": (128, 100 * IMAGENET / (1.5 * 3600)),
    "google-research/simclr, 32 TPU v3, about 6 hours (README.md)": (32, 100 * IMAGENET / (6 * 3600)),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive_int, nargs="+", default=BATCHES, help="global batches")
    parser.add_argument("--gpus", type=positive_int, nargs="+", default=GPUS, help="default: 1, 2, 4 ... 4096")
    parser.add_argument("--network", choices=INTERCONNECTS, nargs="+", default=list(INTERCONNECTS))
    parser.add_argument("--plot", type=file_to_write, metavar="HTML", help="write curves of efficiency")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def resnet50() -> Traffic:
    """What the presets' network sends."""
    from simclr_dali.model.resnet import ResNet
    from simclr_dali.model.simclr import Architecture, build_model

    return traffic_of(build_model(Architecture(ResNet("resnet50", 1.0, "7x7"), (2048, 128)), 0), 128)


def main(given: argparse.Namespace) -> None:
    traffic = resnet50()
    found: dict[str, Any] = {}
    print(assumptions(traffic))
    for name in given.network:
        print(f"\n{INTERCONNECTS[name].name}, {INTERCONNECTS[name].per_node} GPUs a node")
        found[name] = {str(batch): of_batch(name, traffic, batch, given.gpus) for batch in given.batch}
    print("\npublished, beside what this model says of as many H200 on InfiniBand at the same batch of 4,096:")
    for words, (count, rate) in PUBLISHED.items():
        ours = step_of(H200, INTERCONNECTS["InfiniBand"], traffic, count, 4096).images_per_s
        print(f"  {words}: {rate:,.0f} images/s; here {ours:,.0f}")
    print("  VISSL trains on 64 GPUs and mmpretrain on 16 and publish no time.")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    if given.plot:
        given.plot.write_text(plot(traffic, given))


def assumptions(traffic: Traffic) -> str:
    """What the figures stand on, in words."""
    lines = ", ".join(
        f"{links.name}: {links.intra_node / 1e9:.0f} GB/s inside and {links.inter_node / 1e9:.1f} between nodes"
        + (f", {1e6 * links.hop:.0f} us more a hop" if links.hop else "")
        for links in INTERCONNECTS.values()
    )
    small = PROTOCOLS[0]
    return (
        f"measured: {H200.name}, {1e3 * H200.fixed:.1f} ms a step and {1e3 * H200.per_image:.3f} ms an image (224 px, "
        f"bfloat16, compiled), {H200.memory_per_image / 1e6:.0f} MB an image, input {H200.input_rate:,.0f} images/s\n"
        f"assumed: {lines}; a small collective takes {1e6 * small.base:.1f} us and, by InfiniBand, "
        f"{1e6 * small.ring[1]:.1f} a hop of a ring of nodes, {1e6 * small.tree[1]:.1f} of a tree (NCCL 2.28); a step "
        f"varies by {STEP_TIME_STD:.1%} from GPU to GPU; gradients hide behind the backward pass, BatchNorm's messages "
        f"behind nothing\n"
        f"efficiency: against as many GPUs that each train alone at 256 images; presets have 64 lanes, the most "
        f"processes of their runs, and more are set with simclr.lanes before a run begins\n"
        f"counted: {traffic.gradients:,} gradients in {len(traffic.buckets)} buckets, {len(traffic.batchnorms)} "
        f"BatchNorms"
    )


def of_batch(name: str, traffic: Traffic, batch: int, counts: list[int]) -> dict[str, Any]:
    """Print a table, and what follows from it; return its figures."""
    links = INTERCONNECTS[name]
    steps = [step_of(H200, links, traffic, count, batch) for count in counts if batch % count == 0]
    if not steps:
        raise UserError(f"none of {', '.join(map(str, counts))} GPUs divide a batch of {batch}; give others by --gpus")
    print(f"\n  batch {batch:,}")
    print("    GPUs   images/s  efficiency   ms/step  200 epochs  800 epochs   GB/GPU  passes  largest beside compute")
    for one in steps:
        share = one.parts[one.limit] / one.seconds
        print(
            f"  {one.gpus:6,} {one.images_per_s:10,.0f} {efficiency(H200, one):10.0%} {1e3 * one.seconds:10.1f} "
            f"{one.hours(200):9.1f} h {one.hours(800):9.1f} h {one.memory / 1e9:8.1f} {one.passes:7}  "
            + (f"{one.limit} {share:.0%}" if share > 0 else "")
        )
    most = max(one.gpus for one in steps)
    pays = last_that_pays(H200, links, traffic, batch, most)
    if 2 * pays > most:
        print(f"    more GPUs pay up to {most:,}, as far as was looked")
        return {"steps": [figures(one) for one in steps], "pays_to": pays}
    helps = speedups(H200, links, traffic, 2 * pays, batch)
    words = ", ".join(f"{cure} {factor:.2f} x" for cure, factor in sorted(helps.items(), key=lambda one: -one[1]))
    print(
        f"    more than {pays:,} GPUs stop paying (twice as many are less than 1.5 x as fast); what helps at "
        f"{2 * pays:,}: {words}"
    )
    return {"steps": [figures(one) for one in steps], "pays_to": pays, "speedups": helps}


def figures(step: Step) -> dict[str, Any]:
    """Of a step, for a file."""
    return {
        "gpus": step.gpus,
        "images_per_s": round(step.images_per_s),
        "efficiency": round(efficiency(H200, step), 3),
        "ms": {name: round(1e3 * seconds, 3) for name, seconds in step.parts.items()},
        "memory_gb": round(step.memory / 1e9, 1),
        "hours_200": round(step.hours(200), 2),
        "hours_800": round(step.hours(800), 2),
    }


def plot(traffic: Traffic, given: argparse.Namespace) -> str:
    """A page with a figure for each network: efficiency by GPUs, a curve a batch; dashed with a cure."""
    from bokeh.embed import file_html
    from bokeh.layouts import column
    from bokeh.models.ranges import Range1d
    from bokeh.palettes import Viridis
    from bokeh.plotting import figure
    from bokeh.resources import INLINE

    drawn = []
    palette = Viridis[max(3, len(given.batch))]
    for name in given.network:
        made = figure(
            width=900, height=420, x_axis_type="log", x_axis_label="GPUs", y_axis_label="efficiency, %",
            title=f"{INTERCONNECTS[name].name}; solid: BatchNorm over all GPUs, dashed: over a node",
            y_range=Range1d(start=0, end=105),
        )  # fmt: skip
        for batch, color in zip(given.batch, palette, strict=False):
            for kind, dash in ((traffic, "solid"), (replace(traffic, batchnorm_group="node"), "dashed")):
                counts = [count for count in given.gpus if batch % count == 0 and count <= batch // 2]
                steps = [step_of(H200, INTERCONNECTS[name], kind, count, batch) for count in counts]
                shares = [100 * efficiency(H200, one) for one in steps]
                made.line(counts, shares, color=color, line_dash=dash, line_width=2, legend_label=f"batch {batch:,}")
        made.legend.location = "bottom_left"
        drawn.append(made)
    return str(file_html(column(*drawn), INLINE, "Scaling, on paper"))


if __name__ == "__main__":
    run_main(lambda: main(parse_arguments()))
