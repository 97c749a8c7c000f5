"""Image files: whether they are there, whether they can be decoded, and which one it was when a run stops at one.

What mmcv 1.7 with OpenCV 5 makes of a file, as tried:

| file | read as | here |
|---|---|---|
| missing | FileNotFoundError | refused at start |
| of no bytes | an error of OpenCV's that names no file | refused at start |
| truncated (JPEG, progressive JPEG, PNG), or no image at all | None | named by ``--decode``, and by a run that meets it |
| a JPEG damaged in the middle | whole, with wrong pixels; libjpeg warns on the terminal, no reader refuses it | not found |
| grey, palette, with alpha, CMYK | 8-bit BGR, CMYK by its colours, alpha dropped | accepted |
| 16 bits, grey or in colour | 8-bit BGR, the upper bits | accepted |
| turned by its EXIF orientation | turned, so of another size than an annotation file may say | ``--decode`` compares |
| of another size than in the annotation file | boxes and masks in other places than the objects | ``--decode`` refuses |

Reading every image takes minutes, so at start only names and sizes of files are looked at.
"""

from __future__ import annotations

import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import cv2
import mmcv
from mmdet.datasets.pipelines import Compose

from agvm_ds.mmdet.checks.findings import Report
from agvm_ds.mmdet.checks.image_names import wrapped
from agvm_ds.mmdet.process import errors

AT_ONCE = 32
"""Files of which a size is asked for at a time: a file system on the network answers each after a while."""
UNREADABLE = "image that cannot be decoded: truncated, or no image"


class Image(NamedTuple):
    """An image file and the size that its annotation file gives."""

    path: str
    width: int
    height: int


class ImageError(errors.HostError):
    """A run came to an image that its data pipeline cannot take."""

    def __init__(self, message: str) -> None:
        # A DataLoader makes a worker's exception anew, with its whole traceback as the message.
        super().__init__(message.rpartition(f"{__name__}.ImageError: ")[2].strip())


class NamingCompose(Compose):  # type: ignore[misc]
    """A data set's pipeline that names the image it stops at."""

    def __call__(self, data: dict[str, Any]) -> Any:
        """Raise ImageError for whatever goes wrong."""
        folder, info = data.get("img_prefix") or "", data.get("img_info")  # before the steps, which may change them
        try:
            return super().__call__(data)
        except Exception as error:  # a pipeline is any code
            if not isinstance(info, Mapping):
                raise  # a data set of its own kind
            raise ImageError(_said(os.path.join(folder, str(info.get("filename"))), error)) from error


def _said(path: str, error: Exception) -> str:
    if os.path.exists(path) and (found := decode_problem(Image(path, 0, 0))) and found[0] == UNREADABLE:
        return f"{path}: {UNREADABLE} (launch/check_data.py CONFIG --decode finds all of them)"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{path}: the data pipeline stops at it: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"


def name_images(data: Any) -> Any:
    """A data set whose pipelines name the image they stop at, wrappers (repeat, concat) included."""
    for part in wrapped(data):
        name_images(part)
    if type(getattr(data, "pipeline", None)) is Compose:
        data.pipeline = NamingCompose(data.pipeline.transforms)
    return data


def check_files(images: Iterable[Image], report: Report) -> None:
    """Note in the report which files are missing or of no bytes."""
    folders = defaultdict(list)
    for image in images:
        folders[os.path.dirname(image.path)].append(image.path)
    for folder, paths in folders.items():
        sizes = _sizes(folder)
        for path in paths:
            size = sizes.get(os.path.basename(path))
            if not size:
                report.refuse("image file not found" if size is None else "image file of no bytes", path)


def _sizes(folder: str) -> dict[str, int]:
    """Name -> bytes of the files in a folder; nothing when it is not there."""
    if not os.path.isdir(folder or "."):
        return {}
    with os.scandir(folder or ".") as entries:
        files = [entry for entry in entries if entry.is_file()]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = pool.map(_sizes_of, [files[k::AT_ONCE] for k in range(AT_ONCE)])
        return {name: size for part in parts for name, size in part}


def _sizes_of(files: Sequence[os.DirEntry[str]]) -> list[tuple[str, int]]:
    return [(file.name, file.stat().st_size) for file in files]


def decode_all(images: list[Image], color_type: str, report: Report, workers: int, advance: Callable[[], None]) -> None:
    """Decode every image as a run would, in ``workers`` processes, and put what is wrong in the report."""
    with ProcessPoolExecutor(workers) as pool:
        problems = pool.map(partial(decode_problem, color_type=color_type), images, chunksize=16)
        for image, problem in zip(images, problems, strict=True):
            if problem is not None:
                report.refuse(problem[0], f"{image.path}{problem[1]}")
            advance()


def decode_problem(image: Image, color_type: str = "color") -> tuple[str, str] | None:
    """(what is wrong with an image, details) or None. A width of 0 is not compared."""
    try:
        pixels = mmcv.imread(image.path, flag=color_type)
    except (OSError, cv2.error):
        pixels = None
    if pixels is None:
        return UNREADABLE, ""
    height, width = pixels.shape[:2]
    if not image.width or (width, height) == (image.width, image.height):
        return None
    turned = ", as its EXIF orientation turns it" if (height, width) == (image.width, image.height) else ""
    return "image of another size than its annotation file says", (
        f" ({width} x {height}{turned}; the file says {image.width} x {image.height})"
    )
