"""What an update of an mmdet detector takes of a GPU's memory, beside what launch/plan.py estimates.

    DS_ACCELERATOR=cuda python -m benchmarks.peaks      a minute on one GPU

Each config on random images of its pipeline's largest size, two a micro-batch, one rank, two accumulation steps, in ZeRO
stage 2 with SGD and AGVM measuring every update, in fp32. Measured: the peak of torch's allocator over three updates.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.planning.memory import GIB, HEADROOM, footprint, image_size, needs
from benchmarks.machine import save
from benchmarks.workloads import ds_config, engine_of, random_images, update
from tests.launch import ON_GPU, run_ranks

CONFIGS = (
    "faster_rcnn_r50_fpn_1x_coco",
    "faster_rcnn_r101_fpn_1x_coco",
    "faster_rcnn_x101_64x4d_fpn_1x_coco",
    "cascade_rcnn_r50_fpn_1x_coco",
    "retinanet_r50_fpn_1x_coco",
    "fcos_r50_caffe_fpn_gn-head_1x_coco",
    "atss_r50_fpn_1x_coco",
    "gfl_r50_fpn_1x_coco",
)
STAGE, MICRO, UPDATES = 2, 2, 3


class Peak(NamedTuple):
    """GiB: activations an image and the whole, both by the estimate, and what was measured."""

    saved: float
    estimated: float
    measured: float


def peaks() -> list[Peak]:
    """In a rank: one config after another."""
    return [_peak(name) for name in CONFIGS]


def _peak(name: str) -> Peak:
    cfg = read_config(name)
    sizes, size = footprint(cfg), image_size(cfg)
    if sizes.saved is None or size is None:
        raise LookupError(f"{name}: {sizes.note}")
    work = random_images(name, micro=MICRO, size=size)
    block = {"interval": 1, "start_step": 0}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with engine_of(work, ds_config(work, STAGE, "SGD", block, gradient_accumulation_steps=2)) as engine:
        for t in range(UPDATES):
            update(engine, work, t)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    states = needs(sizes, STAGE, 1, 1, 1, False).total
    return Peak(sizes.saved / GIB, (states + HEADROOM * sizes.saved * MICRO) / GIB, peak / GIB)


def table(found: Mapping[str, Peak]) -> str:
    """Markdown: a line a config."""
    lines = ["| config | activations an image | estimated | measured | measured / estimated |", "|---|---|---|---|---|"]
    for name, (saved, estimated, peak) in found.items():
        lines.append(f"| {name} | {saved:.2f} GiB | {estimated:.2f} GiB | {peak:.2f} GiB | {peak / estimated:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, save; return the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peaks", description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="peaks.json is written there")
    args = parser.parse_args(arguments)
    if not ON_GPU:
        parser.error("needs a GPU, and DS_ACCELERATOR=cuda")
    with tempfile.TemporaryDirectory() as place:
        found = dict(zip(CONFIGS, run_ranks(peaks, 1, Path(place), timeout=900)[0], strict=True))
    save(args.save, "peaks", [{"config": name, **peak._asdict()} for name, peak in found.items()])
    text = table(found)
    print(text)
    return text


if __name__ == "__main__":
    main()
