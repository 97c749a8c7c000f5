"""Every recipe of configs/, run: its own files through launch/train.py, shrunk to two updates on two ranks of this machine.

    python -m benchmarks.recipes [NAME ...]      a table; NAME: mask_rcnn_r50_512.agvm, or its beginning

Shrunk are the data (the built-in digits, labelled as COCO's first classes), the image size, the backbone's width and depth,
the batch, the run's length, and AGVM's windows with it. SyncBN is BN without a GPU, and no pretrained weights are read. The
losses say nothing of the recipe; that it runs and measures every module does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shrunk import MICRO, RANKS, WORK_DIR, make_data, trained

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
AGVM = {"start_step": 1, "interval": 1, "clip_window": [0, 1]}
"""Of two updates the second is measured."""

RESNET = {
    "model.backbone.depth": 18,
    "model.backbone.base_channels": 16,
    "model.backbone.init_cfg": None,
    "model.neck.in_channels": "[16,32,64,128]",
}
SWIN = {
    "model.backbone.depths": "[1,1,1,1]",
    "model.backbone.embed_dims": 24,
    "model.backbone.num_heads": "[1,2,4,8]",
    "model.backbone.init_cfg": None,
    "model.neck.in_channels": "[24,48,96,192]",
}
# panopticapi, which mmdet's own reader of panoptic annotations needs, is not on the package index: a semantic map instead.
PANOPTIC = {"data.train.type": "CocoDataset", "data.train.pipeline.1.type": "LoadAnnotations"}


@dataclass(frozen=True)
class Recipe:
    """A DeepSpeed JSON of configs/, ``<config>.<agvm or baseline>.json``, and the mmdet config beside it."""

    json_file: Path

    @property
    def name(self) -> str:
        """As in mask_rcnn_r50_512.agvm."""
        return self.json_file.stem

    @property
    def config(self) -> Path:
        """The mmdet config."""
        return self.json_file.with_name(self.name.partition(".")[0] + ".py")

    def settings(self) -> dict[str, Any]:
        """The JSON."""
        return dict(json.loads(self.json_file.read_text()))

    def shrunk(self) -> dict[str, Any]:
        """The JSON for two updates on two ranks."""
        settings = self.settings() | {"train_batch_size": RANKS * MICRO, "train_micro_batch_size_per_gpu": MICRO}
        if "agvm" in settings:
            settings["agvm"] = settings["agvm"] | AGVM
        return settings

    def options(self, data: Path) -> dict[str, Any]:
        """The ``--cfg-options`` that shrink the config."""
        panoptic = PANOPTIC | {"data.train.seg_prefix": data / "semantic"} if "panoptic" in self.name else {}
        return {
            **(SWIN if "swin" in self.name else RESNET),
            **panoptic,
            "data.train.ann_file": data / "train.json",
            "data.train.img_prefix": data / "digits/train",
            "data.train.pipeline.2.img_scale": "(96,96)",
            "data.workers_per_gpu": 0,
            "lr_config.warmup_iters": 1,
            "log_config.interval": 1,
            "runner.max_epochs": 1,
            "checkpoint_config": None,
        }

    def arguments(self, place: Path, data: Path) -> list[str]:
        """The command line after launch/train.py, its JSON written to ``place``."""
        place.mkdir(parents=True, exist_ok=True)
        (place / "ds.json").write_text(json.dumps(self.shrunk()))
        words = [str(self.config), "--deepspeed_config", str(place / "ds.json"), "--work-dir", str(place / WORK_DIR)]
        words += ["--seed", "0", "--no-validate", "--revert-sync-bn", "--cfg-options"]
        return words + [f"{key}={value}" for key, value in self.options(data).items()]


def recipes() -> list[Recipe]:
    """Of every JSON in configs/."""
    return [Recipe(path) for path in sorted(CONFIGS.glob("*.json"))]


def main() -> None:
    """Run them one after another; exit with 1 when one did not train or measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the beginnings of some recipes' names (default: all)")
    names = tuple(parser.parse_args().names)
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    chosen = [recipe for recipe in recipes() if not names or recipe.name.startswith(names)]
    if not chosen:
        parser.error(f"{', '.join(names)}: no recipe begins so; there are {', '.join(r.name for r in recipes())}")
    print("| recipe | updates | loss | modules with a variance | seconds | reason if not |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder) / "data")
        reasons = [_row(recipe, Path(folder), data) for recipe in chosen]
    sys.exit(any(reasons))


def _row(recipe: Recipe, folder: Path, data: Path) -> str:
    """Run a recipe and print its row; why it did not train or measure, or nothing."""
    place = folder / recipe.name
    run = trained(recipe.arguments(place, data), place, "agvm" in recipe.settings())
    loss = ", ".join(f"{loss:.3g}" for loss in run.losses)
    row = recipe.name, len(run.losses), loss, ", ".join(run.variances) or "-", f"{run.seconds:.0f}", run.reason
    print(f"| {' | '.join(map(str, row))} |", flush=True)
    return run.reason


if __name__ == "__main__":
    main()
