"""Image files: what mmcv reads of each kind, and a run that stops at one names it, from a worker process too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset, ConcatDataset, RepeatDataset
from PIL import Image as Picture
from torch.utils.data import DataLoader

from agvm_ds.mmdet.checks.findings import Report
from agvm_ds.mmdet.checks.images import (
    UNREADABLE,
    Image,
    ImageError,
    check_files,
    decode_all,
    decode_problem,
    name_images,
)
from tests.mmdet import coco

WIDTH, HEIGHT = 80, 60
GREY = np.tile(np.arange(0, 240, 3, dtype=np.uint8), (HEIGHT, 1))
COLOUR = np.stack([GREY, GREY // 2, 255 - GREY], -1)


def turned() -> Picture.Exif:
    exif = Picture.Exif()
    exif[0x112] = 6
    return exif


ACCEPTED: dict[str, Callable[[Path], Any]] = {
    "grey.jpg": lambda path: Picture.fromarray(GREY).save(path),
    "cmyk.jpg": lambda path: Picture.fromarray(COLOUR).convert("CMYK").save(path, quality=95),
    "palette.png": lambda path: Picture.fromarray(COLOUR).convert("P").save(path),
    "alpha.png": lambda path: Picture.fromarray(COLOUR).convert("RGBA").save(path),
    "grey16.png": lambda path: Picture.fromarray(GREY.astype(np.uint16) * 257).save(path),
    "colour16.png": lambda path: cv2.imwrite(str(path), COLOUR[..., ::-1].astype(np.uint16) * 257),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_kind_of_image_is_read_as_eight_bits_of_colour(name: str, tmp_path: Path) -> None:
    import mmcv

    ACCEPTED[name](tmp_path / name)
    pixels = mmcv.imread(str(tmp_path / name))
    assert pixels.dtype == np.uint8 and pixels.shape == (HEIGHT, WIDTH, 3)
    expected = np.repeat(GREY[..., None], 3, -1) if name.startswith("grey") else COLOUR[..., ::-1]
    assert np.abs(pixels.astype(int) - expected).mean() < (20 if name == "palette.png" else 3)
    assert decode_problem(Image(str(tmp_path / name), WIDTH, HEIGHT)) is None


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("form", [("a.png", {}), ("a.jpg", {}), ("p.jpg", {"progressive": True})])
def test_a_truncated_image_is_never_read_in_part(
    form: tuple[str, dict[str, Any]], share: float, tmp_path: Path
) -> None:
    path = tmp_path / form[0]
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Picture.fromarray(noise).save(path, **form[1])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert decode_problem(Image(str(path), 300, 200)) == (UNREADABLE, "")


@pytest.mark.parametrize("content", [None, b"", b"hello there"])
def test_what_is_no_image_is_unreadable(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    assert decode_problem(Image(str(path), 1, 1)) == (UNREADABLE, "")


def test_sizes_are_compared_as_a_run_reads_them(tmp_path: Path) -> None:
    path = str(tmp_path / "turned.jpg")
    Picture.fromarray(COLOUR).save(path, exif=turned())
    assert decode_problem(Image(path, HEIGHT, WIDTH)) is None
    problem = decode_problem(Image(path, WIDTH, HEIGHT))
    assert problem is not None and "60 x 80, as its EXIF orientation turns it; the file says 80 x 60" in problem[1]
    assert decode_problem(Image(path, WIDTH, HEIGHT), "unchanged") is None


def test_files_are_looked_for_by_folder(tmp_path: Path) -> None:
    coco.write(tmp_path)
    (tmp_path / "images/2.png").write_bytes(b"")
    report, folder = Report("a.json"), tmp_path / "images"
    names = ["1.png", "2.png", "4.png", "no/1.png"]
    check_files([Image(str(folder / name), 1, 1) for name in names], report)
    assert report.refused == {
        "image file of no bytes": [str(folder / "2.png")],
        "image file not found": [str(folder / "4.png"), str(folder / "no/1.png")],
    }


def test_all_images_are_decoded_in_processes(tmp_path: Path) -> None:
    coco.write(tmp_path)
    path = tmp_path / "images/2.png"
    path.write_bytes(path.read_bytes()[:500])
    report, done = Report("a.json"), []
    images = [Image(str(tmp_path / f"images/{number}.png"), 64, 48 + number // 3) for number in (1, 2, 3)]
    decode_all(images, "color", report, 2, lambda: done.append(1))
    assert len(done) == 3
    assert report.refused[UNREADABLE] == [str(path)]
    assert (
        "(64 x 48; the file says 64 x 49)" in report.refused["image of another size than its annotation file says"][0]
    )


STEPS = [{"type": "LoadImageFromFile"}, {"type": "Collect", "keys": ["img"], "meta_keys": ["filename"]}]


def data_set(place: Path, steps: list[dict[str, Any]]) -> CocoDataset:
    return CocoDataset(str(place / "train.json"), steps, classes=coco.CLASSES, img_prefix=str(place / "images"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_stops_at_an_image_names_it(workers: int, tmp_path: Path) -> None:
    coco.write(tmp_path)
    path = tmp_path / "images/2.png"
    path.write_bytes(path.read_bytes()[:500])
    data = name_images(ConcatDataset([RepeatDataset(data_set(tmp_path, STEPS), 2)]))
    with pytest.raises(ImageError) as caught:
        list(DataLoader(data, num_workers=workers, collate_fn=len))
    assert str(caught.value).startswith(f"{path}: {UNREADABLE}") and "Traceback" not in str(caught.value)


def test_a_data_set_of_its_own_kind_is_left_to_itself(tmp_path: Path) -> None:
    coco.write(tmp_path)
    data = name_images(data_set(tmp_path, [{"type": "Collect", "keys": ["frames"], "meta_keys": []}]))
    assert set(data.pipeline({"frames": [1, 2]})) == {"img_metas", "frames"}
    with pytest.raises(KeyError, match="frames"):
        data.pipeline({})


def test_a_mistake_of_the_pipeline_is_told_with_its_place(tmp_path: Path) -> None:
    coco.write(tmp_path)
    data = name_images(data_set(tmp_path, [STEPS[0], {"type": "Collect", "keys": ["gt_boxes"], "meta_keys": []}]))
    with pytest.raises(ImageError, match=r"1.png: the data pipeline stops at it: KeyError: 'gt_boxes' \(.*py:\d+\)"):
        data[0]
