"""Annotation files: what mmdet handles by itself is noted, as it handles it; long lists are cut; and it takes seconds.

What is refused is in mistakes.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmdet.datasets import CocoDataset

from agvm_ds.mmdet.checks.annotations import Use, check_annotations
from agvm_ds.mmdet.checks.findings import LISTED, Report
from tests.mmdet import coco
from tests.mmdet.coco import first, first_image

SECONDS = 10.0
"""Of one processor, for 100,000 annotations, 92 MB: measured 3, 2.3 of them json's own."""


def looked_through(place: Path, change: Callable[[dict[str, Any]], Any], **use: Any) -> Report:
    coco.write(place, change)
    return check_annotations(place / "train.json", Use(coco.CLASSES, **use))


def trained_on(place: Path) -> list[tuple[int, int]]:
    """(image id, boxes) of what mmdet trains on."""
    data = CocoDataset(str(place / "train.json"), [], classes=coco.CLASSES, img_prefix=str(place / "images"))
    return [(data.img_ids[i], len(data.get_ann_info(i)["bboxes"])) for i in range(len(data))]


HANDLED: dict[str, tuple[Callable[[dict[str, Any]], Any], str, list[tuple[int, int]]]] = {
    "good": (lambda data: None, "", [(1, 2), (2, 2), (3, 2)]),
    "zero width": (first(bbox=[5, 5, 0, 9]), "less than a pixel, or of area 0", [(1, 1), (2, 2), (3, 2)]),
    "area 0": (first(area=0), "less than a pixel, or of area 0", [(1, 1), (2, 2), (3, 2)]),
    "outside": (first(bbox=[200, 5, 9, 9]), "wholly outside its image", [(1, 1), (2, 2), (3, 2)]),
    "over the border": (first(bbox=[-5, 5, 100, 100]), "", [(1, 2), (2, 2), (3, 2)]),
    "crowd": (first(iscrowd=1), "", [(1, 1), (2, 2), (3, 2)]),
    "ignored": (first(ignore=1), "", [(1, 1), (2, 2), (3, 2)]),
    "no object": (
        lambda data: data["images"].append({"id": 4, "file_name": "3.png", "width": 64, "height": 48}),
        "image without an annotation",
        [(1, 2), (2, 2), (3, 2)],
    ),
    "small image": (first_image(width=20), "image of less than 32 pixels", [(2, 2), (3, 2)]),
    "class never seen": (
        lambda data: [note.update(category_id=1) for note in data["annotations"]],
        "class without any annotation: 'dog'",
        [(1, 2), (2, 2), (3, 2)],
    ),
    "other order": (lambda data: data["categories"].reverse(), "categories in another order", [(1, 2), (2, 2), (3, 2)]),
}


@pytest.mark.parametrize("name", HANDLED)
def test_what_mmdet_handles_is_noted_as_it_handles_it(name: str, tmp_path: Path) -> None:
    change, noted, trained = HANDLED[name]
    report = looked_through(tmp_path, change)
    assert report.lines() == []
    assert noted in "\n".join(report.lines(noted=True))
    assert bool(noted) == bool(report.noted)
    assert trained_on(tmp_path) == trained


def test_an_infinite_box_would_be_trained_on(tmp_path: Path) -> None:
    """Why it is refused: mmdet's own filters let it through."""
    report = looked_through(tmp_path, first(bbox=[5, 5, float("inf"), 9]))
    assert "NaN" in report.lines()[0]
    assert trained_on(tmp_path) == [(1, 2), (2, 2), (3, 2)]


def test_segmentations_are_looked_at_only_where_masks_are_read(tmp_path: Path) -> None:
    broken = first(segmentation=[[1, 1]])
    assert looked_through(tmp_path, broken).lines() == []
    assert "polygon of less than 6" in looked_through(tmp_path, broken, masks=True).lines()[0]
    crowd = first(segmentation=[[1, 1]], iscrowd=1)
    assert looked_through(tmp_path, crowd, masks=True).lines() == []  # not trained on
    assert looked_through(tmp_path, crowd, masks=True, trained=False).lines()


def test_other_categories_may_be_left_out_but_never_unknown_ones(tmp_path: Path) -> None:
    def other(data: dict[str, Any]) -> None:
        data["categories"].append({"id": 3, "name": "cow"})
        data["annotations"][0]["category_id"] = 3

    assert looked_through(tmp_path, other).refused
    assert not looked_through(tmp_path, other, allow_others=True).refused
    assert looked_through(tmp_path, first(category_id=9), allow_others=True).refused


def test_a_file_without_annotations_can_be_tested_on(tmp_path: Path) -> None:
    """COCO's own test-dev has none."""
    report = looked_through(tmp_path, lambda data: data.pop("annotations"), trained=False)
    assert not report.refused
    assert "every metric will be -1" in report.lines(noted=True)[0]


def test_lvis_names_no_files_and_no_crowds(tmp_path: Path) -> None:
    def lvis(data: dict[str, Any]) -> None:
        for image in data["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
        for note in data["annotations"]:
            del note["iscrowd"]

    assert looked_through(tmp_path, lvis, trained=False).refused
    assert not looked_through(tmp_path, lvis, trained=False, lvis=True).refused


def test_the_first_places_are_told_and_all_are_counted(tmp_path: Path) -> None:
    def many(data: dict[str, Any]) -> None:
        data["annotations"] += [{**data["annotations"][0], "id": 100 + i, "bbox": [1, 2]} for i in range(40)]

    (line,) = looked_through(tmp_path, many).lines()
    assert line.count("annotation 1") == LISTED
    assert line.endswith("and 30 more (40 in all)")


def test_a_hundred_thousand_annotations_take_seconds(tmp_path: Path) -> None:
    outline = [float(number) + 0.25 for number in range(40)]
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(15_000)]
    notes = [
        {"id": i, "image_id": i % 15_000, "category_id": i % 2, "iscrowd": 0, "bbox": [1.5, 2.5, 30.25, 40.5]}
        | {"area": 100.5, "segmentation": [outline] * 2}
        for i in range(100_000)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(coco.CLASSES)]
    path = tmp_path / "large.json"
    path.write_text(json.dumps({"images": images, "annotations": notes, "categories": categories}))
    begun = time.process_time()
    report = check_annotations(path, Use(coco.CLASSES, masks=True))
    assert time.process_time() - begun < SECONDS
    assert (report.refused, report.noted, report.annotations) == ({}, {}, 100_000)
