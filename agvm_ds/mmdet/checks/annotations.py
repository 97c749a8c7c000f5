"""One COCO annotation file, looked through before it is trained on or evaluated: 100,000 annotations in seconds.

What mmdet 2.28 and pycocotools 2.0 do with it, as tried, and what is done here:

| in the file | mmdet | here |
|---|---|---|
| cut short, no JSON, no images / annotations / categories | a traceback, or an empty data set | refused |
| a field that is missing or of another kind | KeyError, TypeError, in training or only in evaluation | refused |
| an image id twice | the last one counts, with the annotations of both | refused |
| an annotation id twice | AssertionError that names none | refused |
| an annotation of an image that is not listed | left out in silence | refused |
| a category that is not listed, or not in the classes | left out in silence | refused; the latter may be allowed |
| a category id or name twice, a class whose absence moves the labels of others | wrong labels in silence | refused |
| categories in another order than the classes | labels in the file's order, names in the classes' | noted |
| a box with NaN, with infinity | left out in silence; trained on, to a loss of NaN | refused |
| a box of negative width or height | left out; a sign of [x1, y1, x2, y2] | refused |
| a box of less than a pixel, of area 0, or wholly outside its image | left out of training | noted |
| a box that reaches over the border | clipped when it is resized | accepted |
| with masks: a polygon of an odd count, too few numbers, none, NaN, or far off | garbage, a crash, no memory | refused |
| with masks: a short polygon behind a good one | adds nothing | noted |
| with masks: RLE of another size, or of more or fewer pixels than its size | memory's garbage, or a crash | refused |
| an image without an annotation | left out of training (unless filter_empty_gt=False) | noted |
| an image of less than 32 pixels | left out of training | noted |
| a class without any annotation | never learnt | noted |
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from pathlib import Path
from typing import Any

from agvm_ds.mmdet.checks.findings import Report
from agvm_ds.mmdet.checks.masks import mask_problem

MIN_SIZE = 32
"""mmdet trains on no image with a shorter side (CocoDataset._filter_imgs)."""
KEYS = ("images", "annotations", "categories")
NUMBERS = (int, float)


@dataclass(frozen=True)
class Use:
    """What a run does with an annotation file."""

    classes: tuple[str, ...]
    trained: bool = True
    """Else evaluated."""
    masks: bool = False
    """Whether segmentations are read."""
    allow_others: bool = False
    """Leave out annotations of categories that are not in the classes."""
    lvis: bool = False
    """The file is LVIS's: its images have a coco_url, its annotations no iscrowd."""


def check_annotations(path: str | Path, use: Use) -> Report:
    """Everything found in a COCO annotation file. It is told, not raised."""
    report = Report(str(path))
    content = _read(Path(path), use, report)
    if content is None:
        return report
    categories = _by_id(content["categories"], "category", report, ("name",))
    images = _by_id(content["images"], "image", report, () if use.lvis else ("file_name",))
    report.images = list(images.values())
    report.annotations = len(content["annotations"])
    names = {key: str(category.get("name")) for key, category in categories.items()}
    _check_classes(names, use, report)
    sizes = dict(_sizes(images, use, report))
    _check_ids(content["annotations"], report)
    counts: Counter[Any] = Counter()
    annotated = set()
    for note in content["annotations"]:
        known, sound = (
            _check_annotation(note, names, sizes, use, report) if isinstance(note, Mapping) else (False, False)
        )
        if known:
            annotated.add(note["image_id"])
        if known and sound:
            counts[names[note["category_id"]]] += 1
    _note_absent(counts, images, annotated, use, report)
    return report


def _read(path: Path, use: Use, report: Report) -> dict[str, Any] | None:
    """The file's object when it has the three lists."""
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        cut = ", where the file ends: it is cut short" if error.pos >= len(error.doc.rstrip()) else ""
        report.refuse(f"not JSON: {error.msg}, line {error.lineno}, column {error.colno}{cut}")
        return None
    except (OSError, RecursionError, UnicodeDecodeError) as error:
        report.refuse(f"cannot be read as JSON: {error}")
        return None
    if not isinstance(content, dict):
        report.refuse(f"not a COCO file: must be an object with {', '.join(KEYS)}, not a {type(content).__name__}")
        return None
    if not use.trained and not content.get("annotations", []):
        report.note("has no annotations to evaluate against: every metric will be -1")
        return {**content, "annotations": []} if content.get("images") and content.get("categories") else None
    missing = [key for key in KEYS if not isinstance(content.get(key), list)]
    empty = [key for key in KEYS if key not in missing and not content[key]]
    if missing or empty:
        said = "has no list of" if missing else "has an empty list of"
        report.refuse(f"not a COCO file to train on or evaluate: {said} {', '.join(missing or empty)}")
        return None
    return content


def _by_id(entries: list[Any], kind: str, report: Report, required: Iterable[str]) -> dict[Any, Mapping[str, Any]]:
    """id -> entry of the images or the categories that have what they must."""
    found: dict[Any, Mapping[str, Any]] = {}
    for position, entry in enumerate(entries):
        key = entry.get("id") if isinstance(entry, Mapping) else None
        where = f"{kind} {key!r}" if key is not None else f"{kind} at position {position}"
        if not isinstance(key, (int, str)):
            report.refuse(f"{kind} without an id that is a number or a string", where)
        elif key in found:
            report.refuse(f"{kind} id twice", where)
        else:
            for name in required:
                if not isinstance(entry.get(name), str) or not entry[name]:
                    report.refuse(f"{kind} without a {name}", where)
            found[key] = entry
    return found


def _sizes(images: Mapping[Any, Mapping[str, Any]], use: Use, report: Report) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Image id -> (width, height); one that has no good size counts as without bounds, so that it is told once."""
    for key, image in images.items():
        size: tuple[Any, Any] = (image.get("width"), image.get("height"))
        if not all(isinstance(side, NUMBERS) and 0 < side < inf and side == int(side) for side in size):
            report.refuse("image whose width or height is no whole number above 0", f"image {key!r} ({size})")
            yield key, (2**31, 2**31)
            continue
        if use.trained and min(size) < MIN_SIZE:
            report.note(f"image of less than {MIN_SIZE} pixels, which mmdet does not train on", f"image {key!r}")
        yield key, (int(size[0]), int(size[1]))


def _check_classes(names: Mapping[Any, str], use: Use, report: Report) -> None:
    """mmdet numbers labels in the order of the file's categories, those that are in the classes."""
    ours = [name for name in names.values() if name in use.classes]
    twice = [name for name, times in Counter(ours).items() if times > 1]
    report.labels = {name: label for label, name in enumerate(ours)}
    absent = [name for name in use.classes if name not in report.labels]
    if twice:
        report.refuse("category name twice", ", ".join(map(repr, twice)))
    elif not ours:
        report.refuse(f"none of its categories is in the classes {use.classes}: it has {tuple(names.values())}")
    elif absent and ours != list(use.classes[: len(ours)]):
        moved = next(name for name, wanted in zip(ours, use.classes, strict=False) if name != wanted)
        report.refuse(
            f"the file lists no category {', '.join(map(repr, absent))} of the classes, which moves the labels of others: "
            f"{moved!r} would be trained and evaluated as class {use.classes[report.labels[moved]]!r}; list every class "
            "in categories, or correct `classes` in the data config"
        )
    elif any(
        report.labels[left] > report.labels[right] for left, right in pairwise(n for n in use.classes if n in ours)
    ):
        report.note(
            "categories in another order than `classes`: mmdet labels by the file's order, so names are mixed up"
        )


def _check_ids(notes: list[Any], report: Report) -> None:
    for position, note in enumerate(notes):
        if not isinstance(note, Mapping) or not isinstance(note.get("id"), (int, str)):
            report.refuse("annotation without an id that is a number or a string", f"annotation at position {position}")
    ids = Counter(note["id"] for note in notes if isinstance(note, Mapping) and isinstance(note.get("id"), (int, str)))
    if len(ids) < len(notes):
        for key, times in ids.items():
            if times > 1:
                report.refuse("annotation id twice", f"annotation {key!r}")


def _check_annotation(
    note: Mapping[str, Any], names: Mapping[Any, str], sizes: Mapping[Any, tuple[int, int]], use: Use, report: Report
) -> tuple[bool, bool]:
    """(whether it is of the classes, whether it makes an object in training)."""
    where = f"annotation {note.get('id')!r}"
    missing = [key for key in ("image_id", "category_id", "bbox", "area") if key not in note]
    if not use.trained and not use.lvis and "iscrowd" not in note:
        missing.append("iscrowd (which pycocotools evaluates)")
    if missing:
        report.refuse(f"annotation without {', '.join(missing)}", where)
        return False, False
    if not _is_listed(note["image_id"], sizes):
        report.refuse("annotation of an image that the file does not list", f"{where} (image_id {note['image_id']!r})")
        return False, False
    width, height = sizes[note["image_id"]]
    known = _check_category(note, names, use, report, where)
    sound = _check_box(note, width, height, report, where)
    if use.masks and not (use.trained and note.get("iscrowd")):
        problem = mask_problem(note.get("segmentation"), width, height)
        if problem is not None:
            (report.refuse if problem.refused else report.note)(problem.what, where)
    return known, sound and not note.get("iscrowd") and not note.get("ignore")


def _is_listed(key: Any, listed: Mapping[Any, Any]) -> bool:
    return isinstance(key, (int, str)) and key in listed


def _check_category(note: Mapping[str, Any], names: Mapping[Any, str], use: Use, report: Report, where: str) -> bool:
    key = note["category_id"]
    if not _is_listed(key, names):
        report.refuse("annotation of a category that the file does not list", f"{where} (category_id {key!r})")
        return False
    if names[key] in use.classes:
        return True
    if not use.allow_others:
        report.refuse(
            f"annotation of category {names[key]!r}, which is not in the classes {use.classes} (correct the file or "
            "`classes` in the data config, or pass --allow-other-categories to leave such annotations out)",
            f"{where} (category_id {key!r})",
        )
    return False


def _check_box(note: Mapping[str, Any], width: int, height: int, report: Report, where: str) -> bool:
    box, area = note["bbox"], note["area"]
    if not isinstance(area, NUMBERS) or not isfinite(area):
        report.refuse("area that is no finite number", f"{where} ({area!r})")
        return False
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(number, NUMBERS) for number in box):
        report.refuse("box that is not four numbers [x, y, width, height]", f"{where} ({box!r:.80})")
        return False
    if not all(map(isfinite, box)):
        report.refuse("box with NaN or infinity", f"{where} ({box})")
        return False
    x, y, w, h = box
    if w < 0 or h < 0:
        report.refuse(
            "box of negative width or height (a box is [x, y, width, height], not two corners)", f"{where} ({box})"
        )
        return False
    if w < 1 or h < 1 or area <= 0:
        report.note("box of less than a pixel, or of area 0, which mmdet does not train on", where)
        return False
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        report.note("box wholly outside its image, which mmdet does not train on", f"{where} ({box})")
        return False
    return True


def _note_absent(
    counts: Counter[Any], images: Mapping[Any, Any], annotated: set[Any], use: Use, report: Report
) -> None:
    report.seen = sum(1 for name in use.classes if counts[name])
    for name in report.labels:
        if not counts[name]:
            report.note("class without any annotation", repr(name))
    if use.trained and not counts:
        report.refuse("no annotation is left to train on")
    for key in images:
        if use.trained and key not in annotated:
            report.note("image without an annotation, not trained on unless filter_empty_gt=False", f"image {key!r}")
