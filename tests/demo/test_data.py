"""The built-in data set: what is in it, and that it is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agvm_ds.demo import data, painting

TRAIN, VAL = 24, 8


def digest(root: Path) -> dict[str, str]:
    """Name of each file under ``root`` -> hash of its bytes."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def coco(root: Path, split: str) -> dict[str, Any]:
    return json.loads((root / "annotations" / f"{split}.json").read_text())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.ensure(tmp_path_factory.mktemp("data") / "digits", TRAIN, VAL)


def test_the_same_settings_give_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    again = data.ensure(tmp_path / "elsewhere", TRAIN, VAL)
    assert digest(again) == digest(digits)
    assert len(digest(digits)) == 2 * (TRAIN + VAL) + 5


def test_another_seed_gives_other_pictures(digits: Path, tmp_path: Path) -> None:
    other = data.ensure(tmp_path / "digits", TRAIN, VAL, seed=1)
    for split in data.SPLITS:
        glyphs, corners = (
            [[each[key] for each in coco(root, split)[part]] for root in (digits, other)]
            for part, key in (("annotations", "glyph"), ("images", "corner"))
        )
        assert glyphs[0] != glyphs[1] and corners[0] != corners[1]


def test_a_smaller_split_is_the_beginning_of_a_larger_one(digits: Path, tmp_path: Path) -> None:
    small = digest(data.ensure(tmp_path / "digits", 5, 2))
    pictures = {name: value for name, value in small.items() if name.endswith(".png")}
    assert len(pictures) == 2 * 7
    assert pictures.items() <= digest(digits).items()


def test_train_and_val_share_no_glyph_and_no_pixel_of_a_photograph(tmp_path: Path) -> None:
    sources = painting.load_sources(0)
    scenes = {s: [painting.paint(np.random.default_rng(i), sources, s) for i in range(150)] for s in data.SPLITS}
    glyphs = {split: {digit["glyph"] for scene in scenes[split] for digit in scene.digits} for split in scenes}
    assert not glyphs["train"] & glyphs["val"]
    covered = {split: np.zeros((2, 427, 640), dtype=bool) for split in scenes}
    for split, made in scenes.items():
        for scene in made:
            x, y = scene.origin["corner"]
            covered[split][scene.origin["photo"], y : y + 96, x : x + 96] = True
    assert not (covered["train"] & covered["val"]).any()
    assert {digit["category_id"] for scene in scenes["val"] for digit in scene.digits} == set(range(1, 11))


def test_every_picture_has_one_to_six_digits_with_tight_boxes(digits: Path) -> None:
    from pycocotools import mask as masks

    for split, count in (("train", TRAIN), ("val", VAL)):
        content = coco(digits, split)
        assert [image["id"] for image in content["images"]] == list(range(1, count + 1))
        held = [sum(a["image_id"] == i for a in content["annotations"]) for i in range(1, count + 1)]
        assert min(held) >= 1 and max(held) <= painting.MAX_DIGITS
        for annotation in content["annotations"]:
            pixels = masks.decode(masks.merge(masks.frPyObjects(annotation["segmentation"], 96, 96)))
            rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width, y + height) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert annotation["area"] == pixels.sum()
            assert min(x, y) >= 0 and max(x + width, y + height) <= 96


def test_digits_do_not_touch_and_boxes_hardly_overlap(digits: Path) -> None:
    from pycocotools import mask as masks

    content = coco(digits, "train")
    for image in content["images"]:
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        covers = sum(masks.decode(masks.merge(masks.frPyObjects(a["segmentation"], 96, 96))).astype(int) for a in found)
        assert covers.max() == 1
        for i, a in enumerate(found):
            for b in found[i + 1 :]:
                assert painting._overlap(a["bbox"], b["bbox"]) <= painting.MAX_OVERLAP


def test_boxes_lie_where_the_pixels_of_the_picture_differ_from_the_photograph(digits: Path) -> None:
    from PIL import Image

    photos = painting.load_sources(0).photos
    content = coco(digits, "val")
    for image in content["images"]:
        x, y = image["corner"]
        pixels = np.asarray(Image.open(digits / "val" / image["file_name"]))
        changed = (pixels != photos[image["photo"]][y : y + 96, x : x + 96]).any(axis=2)
        boxes = np.zeros((96, 96), dtype=bool)
        for left, top, width, height in [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]]:
            boxes[top : top + height, left : left + width] = True
            assert changed[top : top + height, left : left + width].any()
        assert not (changed & ~boxes).any()


def test_panoptic_segments_are_the_instances_and_the_rest_of_the_photograph(digits: Path) -> None:
    """Every pixel is of one segment, and what the files say of a segment is what its pixels say."""
    from PIL import Image
    from pycocotools import mask as masks

    for split in data.SPLITS:
        instances, panoptic = coco(digits, split), coco(digits, f"panoptic_{split}")
        assert panoptic["images"] == instances["images"]
        assert [(c["name"], c["isthing"]) for c in panoptic["categories"]] == [
            *((name, 1) for name in data.CLASSES),
            ("photograph", 0),
        ]
        for image, entry in zip(panoptic["images"], panoptic["annotations"], strict=True):
            assert (entry["image_id"], entry["file_name"]) == (image["id"], image["file_name"])
            colors = np.asarray(Image.open(digits / f"panoptic_{split}" / entry["file_name"])).astype(int)
            ids = colors @ [1, 256, 65536]
            photograph, *things = entry["segments_info"]
            assert set(np.unique(ids)) == {segment["id"] for segment in entry["segments_info"]}
            assert photograph["category_id"] == 11 and (ids == photograph["id"]).sum() == photograph["area"]
            own = [a for a in instances["annotations"] if a["image_id"] == image["id"]]
            for annotation, thing in zip(own, things, strict=True):
                pixels = masks.decode(masks.merge(masks.frPyObjects(annotation["segmentation"], 96, 96)))
                assert ((ids == thing["id"]) == pixels).all()
                same = ("category_id", "bbox", "area", "iscrowd")
                assert [thing[key] for key in same] == [annotation[key] for key in same]


@pytest.mark.parametrize("density", [0.4, 0.6, 0.9])
def test_outlines_are_exactly_the_mask(density: float) -> None:
    """Random masks have all there is: holes in holes, pixels that touch at a corner, parts of one pixel."""
    from pycocotools import mask as masks

    rng = np.random.default_rng(0)
    for _ in range(150):
        mask = rng.random(tuple(rng.integers(1, 12, 2))) < density
        if mask.any():
            loops = painting.outlines(mask)
            polygons = [[float(c) for point in loop for c in point] for loop in loops]
            found = masks.decode(masks.merge(masks.frPyObjects(polygons, *mask.shape)))
            assert (found == mask).all()
            assert sum(painting._signed_area(loop) for loop in loops) == mask.sum()  # no polygon covers another


def test_pixels_that_touch_at_a_corner_have_an_outline_each() -> None:
    assert painting.outlines(np.eye(2, dtype=bool)) == [
        [(0, 0), (1, 0), (1, 1), (0, 1)],
        [(1, 1), (2, 1), (2, 2), (1, 2)],
    ]


def test_mmdet_reads_it_with_masks(digits: Path) -> None:
    from mmdet.datasets import build_dataset

    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}]
    dataset = build_dataset(
        {
            "type": "CocoDataset",
            "ann_file": str(digits / "annotations" / "train.json"),
            "img_prefix": str(digits / "train"),
            "classes": data.CLASSES,
            "pipeline": pipeline,
        }
    )
    assert len(dataset) == TRAIN
    for i in range(TRAIN):
        item = dataset[i]
        masks = item["gt_masks"].to_ndarray()
        assert item["img"].shape == (96, 96, 3)
        assert len(masks) == len(item["gt_bboxes"]) == len(item["gt_labels"]) > 0
        for mask, box in zip(masks, item["gt_bboxes"], strict=True):
            columns = np.flatnonzero(mask.any(axis=0))
            assert (columns[0], columns[-1] + 1) == (box[0], box[2])


def test_a_complete_data_set_is_left_alone(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_write", lambda *_: pytest.fail("made again"))
    assert data.ensure(str(digits), TRAIN, VAL) == digits


def test_an_interrupted_make_leaves_nothing_and_is_redone(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "digits"
    with monkeypatch.context() as patch:
        patch.setattr(data, "paint", interrupt_after(TRAIN + 2))
        with pytest.raises(KeyboardInterrupt):
            data.ensure(root, TRAIN, VAL)
    assert list(tmp_path.iterdir()) == []
    assert digest(data.ensure(root, TRAIN, VAL)) == digest(digits)


def interrupt_after(pictures: int) -> Any:
    left = iter(range(pictures))
    real = data.paint

    def paint(*args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    return paint


def test_what_a_killed_make_left_is_cleared_when_it_is_old(digits: Path, tmp_path: Path) -> None:
    root = tmp_path / "digits"
    old, fresh = (tmp_path / f"{data._draft_prefix(root)}{name}" for name in ("old", "fresh"))
    for draft in (old, fresh):
        (draft / "train").mkdir(parents=True)
    long_ago = time.time() - data.STALE_SECONDS - 10
    os.utime(old, (long_ago, long_ago))
    assert digest(data.ensure(root, TRAIN, VAL)) == digest(digits)
    assert not old.exists() and fresh.exists()


def test_two_processes_that_make_it_at_once_both_end_well(digits: Path, tmp_path: Path) -> None:
    root = tmp_path / "digits"
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    racers = [context.Process(target=race, args=(root, start)) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert digest(root) == digest(digits)
    assert list(tmp_path.iterdir()) == [root]


def race(root: Path, start: Any) -> None:
    publish = data._publish

    def publish_together(*args: Any) -> None:
        start.wait(60)  # all have found nothing and made their own
        publish(*args)

    data._publish = publish_together
    data.ensure(root, TRAIN, VAL)


def test_nothing_is_ever_overwritten(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(digits)
    monkeypatch.setattr(data, "_write", lambda *_: pytest.fail("made before it was refused"))
    with pytest.raises(FileExistsError, match=r"another or a damaged data set.*\"train\": 24.*choose another folder"):
        data.ensure(digits, TRAIN + 1, VAL)
    assert digest(digits) == before
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="something else"):
        data.ensure(tmp_path, TRAIN, VAL)
    with pytest.raises(FileExistsError, match="something else"):
        data.ensure(tmp_path / "mine.txt", TRAIN, VAL)


def test_a_data_set_of_an_earlier_version_is_told_apart(tmp_path: Path) -> None:
    earlier = {"format": "agvm_ds digits", "version": 1, "train": 3, "val": 1, "seed": 0}
    (tmp_path / "dataset.json").write_text(json.dumps(earlier, indent=2))
    with pytest.raises(FileExistsError, match=r"of another version of agvm_ds.*remove it or choose another folder"):
        data.ensure(tmp_path, 3, 1)


def test_a_lost_picture_is_noticed(tmp_path: Path) -> None:
    root = data.ensure(tmp_path / "digits", 3, 1)
    (root / "train" / "000002.png").unlink()
    with pytest.raises(FileExistsError, match="damaged"):
        data.ensure(root, 3, 1)


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"seed": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least"):
        data.ensure(tmp_path / "digits", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_without_scikit_learn_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'agvm_ds\[demo\]'"):
        data.ensure(tmp_path / "digits", 1, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_command_makes_it_and_tells_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agvm_ds.demo.data", str(tmp_path / "digits"), "--train", "2", "--val", "1"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert data._is_complete(tmp_path / "digits", {**data.FORMAT, "train": 2, "val": 1, "seed": 0})
    refused = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error:") and "Traceback" not in refused.stderr
