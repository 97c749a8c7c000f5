"""A small data set in COCO's format, made on the spot: handwritten digits pasted on crops of photographs.

    ROOT/train/000001.png ...     96 x 96, RGB
    ROOT/val/000001.png ...
    ROOT/annotations/train.json   COCO: images, annotations (bbox, polygons, area), categories "0" to "9"
    ROOT/annotations/val.json
    ROOT/panoptic_train/000001.png ...    COCO's panoptic format, see agvm_ds.demo.panoptic
    ROOT/panoptic_val/000001.png ...
    ROOT/annotations/panoptic_train.json
    ROOT/annotations/panoptic_val.json
    ROOT/dataset.json             the settings it was made with; a folder without it was not made here

Glyphs and photographs come with scikit-learn. Train and val share no glyph and no pixel of a photograph. The same
settings give the same bytes, and a smaller split is the beginning of a larger one.

    python -m agvm_ds.demo.data ROOT
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agvm_ds.demo.painting import SIZE, Sources, load_sources, paint
from agvm_ds.demo.panoptic import id_image, segments_info

CLASSES = tuple("0123456789")
STUFF = "photograph"
STUFF_ID = len(CLASSES) + 1
"""Its category's id in the panoptic files."""
SPLITS = ("train", "val")
MANIFEST = "dataset.json"
FORMAT = {"format": "agvm_ds digits", "version": 2}
"""Of version 1 is a data set without panoptic annotations."""
STALE_SECONDS = 3600
"""Age at which a draft folder is taken for one that a killed run left behind."""


def ensure(root: str | Path, train: int = 2048, val: int = 256, seed: int = 0) -> Path:
    """Make the data set in folder ``root`` unless it is there already; return ``root``.

    ``train`` and ``val`` are numbers of images, ``seed`` any integer from 0. The folder appears complete or not at all,
    also when several processes make it at once.

    Raises FileExistsError if ``root`` holds anything else, a data set of other settings included: nothing is ever
    overwritten. Raises ImportError without scikit-learn.
    """
    return _ensure(Path(root), train, val, seed, lambda: None)


def _ensure(root: Path, train: int, val: int, seed: int, advance: Callable[[], None]) -> Path:
    if train < 1 or val < 1 or seed < 0:
        raise ValueError(f"train = {train}, val = {val}, seed = {seed}: at least 1, 1 and 0 are needed")
    manifest: dict[str, Any] = {**FORMAT, "train": train, "val": val, "seed": seed}
    place = root.resolve()
    if _is_complete(place, manifest):
        return root
    _refuse_other(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_drafts(place)
    draft = place.with_name(f"{_draft_prefix(place)}{uuid.uuid4().hex}")
    try:
        _write(draft, manifest, advance)
        _publish(draft, place, manifest)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def _is_complete(root: Path, manifest: dict[str, Any]) -> bool:
    """Whether ``root`` was made with exactly these settings and still has its annotation files and all its images."""
    try:
        same = json.loads((root / MANIFEST).read_text()) == manifest
    except (OSError, ValueError):
        return False
    return same and all(
        (root / "annotations" / f"{name}.json").is_file()
        and sum(1 for _ in (root / name).glob("*.png")) == manifest[split]
        for split in SPLITS
        for name in (split, panoptic(split))
    )


def panoptic(split: str) -> str:
    """What the folder and the file of a split's panoptic annotations are called."""
    return f"panoptic_{split}"


def _refuse_other(root: Path) -> None:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    held = "something else"
    if (root / MANIFEST).is_file():
        text = (root / MANIFEST).read_text()
        older = f'"format": "{FORMAT["format"]}"' in text and f'"version": {FORMAT["version"]}' not in text
        kind = "a data set of another version of agvm_ds" if older else "another or a damaged data set"
        held = f"{kind}, {' '.join(text.split())}"
    raise FileExistsError(f"{root} holds {held}: remove it or choose another folder")


def _draft_prefix(root: Path) -> str:
    return f".{root.name}.draft-"


def _remove_stale_drafts(root: Path) -> None:
    for draft in root.parent.glob(f"{_draft_prefix(root)}*"):
        with suppress(FileNotFoundError):  # another process may clear up too
            if time.time() - draft.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, root: Path, manifest: dict[str, Any]) -> None:
    """Rename the finished draft to ``root``, or leave the equal one that another process was first with."""
    try:
        os.rename(draft, root)
    except OSError:
        if not _is_complete(root, manifest):
            _refuse_other(root)
            raise


def _write(folder: Path, manifest: dict[str, Any], advance: Callable[[], None]) -> None:
    """Write the whole data set into the new ``folder``, the manifest last."""
    sources = load_sources(manifest["seed"])
    (folder / "annotations").mkdir(parents=True)
    for split in SPLITS:
        for name, coco in _write_split(folder, sources, split, manifest, advance).items():
            (folder / "annotations" / f"{name}.json").write_text(json.dumps(coco, separators=(",", ":")) + "\n")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _write_split(
    root: Path, sources: Sources, split: str, manifest: dict[str, Any], advance: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Write one split's PNGs; return its COCO dicts, by name."""
    folders = [root / split, root / panoptic(split)]
    for folder in folders:
        folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    segments: list[dict[str, Any]] = []
    for number in range(1, manifest[split] + 1):
        rng = np.random.default_rng([manifest["seed"], SPLITS.index(split), number])
        scene = paint(rng, sources, split)
        name = f"{number:06}.png"
        for folder, pixels in zip(folders, (scene.pixels, id_image(scene)), strict=True):
            Image.fromarray(pixels).save(folder / name)
        images.append({"id": number, "file_name": name, "height": SIZE, "width": SIZE, **scene.origin})
        for digit in scene.digits:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **digit})
        segments.append({"image_id": number, "file_name": name, "segments_info": segments_info(scene, STUFF_ID)})
        advance()
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    kinds = [{**category, "isthing": 1} for category in categories] + [{"id": STUFF_ID, "name": STUFF, "isthing": 0}]
    about = {"info": {"description": FORMAT["format"]}, "images": images}
    return {
        split: {**about, "annotations": annotations, "categories": categories},
        panoptic(split): {**about, "annotations": segments, "categories": kinds},
    }


def main() -> None:
    """Make the data set with a progress bar."""
    from rich.progress import Progress

    parser = argparse.ArgumentParser(prog="python -m agvm_ds.demo.data", description="Make the built-in data set.")
    parser.add_argument("root", type=Path, help="the folder to make")
    parser.add_argument("--train", type=int, default=2048, help="training images (default %(default)s)")
    parser.add_argument("--val", type=int, default=256, help="validation images (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    args = parser.parse_args()
    try:
        with Progress() as progress:
            task = progress.add_task("painting digits", total=args.train + args.val)
            _ensure(args.root, args.train, args.val, args.seed, lambda: progress.advance(task))
            progress.update(task, completed=args.train + args.val)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.root}: {args.train} training and {args.val} validation images")


if __name__ == "__main__":
    main()
