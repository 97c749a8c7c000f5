"""Results drawn into their images, a file each, with mmdet's own drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from deepspeed import comm
from torch import nn

from agvm_ds.mmdet.process.outputs import written_whole

PROPOSALS = 20
"""How many of an RPN's are drawn; all would cover the image."""


class Drawing:
    """Draws this rank's share of the images into a folder, under the names that the data set has for them."""

    def __init__(self, folder: Path, threshold: float, detector: nn.Module, data: Any) -> None:
        self.folder = folder
        self.threshold = threshold
        self.detector = detector
        self.images = len(data)
        self.palette = getattr(data, "PALETTE", None)
        self._drawn = 0

    def __call__(self, metas: Sequence[Mapping[str, Any]], results: Sequence[Any]) -> None:
        """Draw a batch; every batch of the share must come, in the order of the sampler, which deals images out in turn."""
        for meta, result in zip(metas, results, strict=True):
            place = self._drawn * comm.get_world_size() + comm.get_rank()
            self._drawn += 1
            if place < self.images:  # the sampler repeats images to fill the last turn
                self._write(meta["ori_filename"], self.draw(meta["filename"], result))

    def draw(self, image: str, result: Any) -> Any:
        """(height, width, 3) uint8, BGR."""
        if isinstance(result, np.ndarray):
            return mmcv.imshow_bboxes(mmcv.imread(image), result, colors="green", top_k=PROPOSALS, show=False)
        colors = {f"{part}_color": self.palette for part in ("bbox", "text", "mask")}
        return self.detector.show_result(image, result, score_thr=self.threshold, **colors)  # type: ignore[operator]

    def _write(self, name: str, drawn: Any) -> None:
        within = [part for part in Path(name).parts if part not in ("/", "..")]  # never outside of the folder
        path = self.folder.joinpath(*within)
        if not cv2.haveImageWriter(path.name):
            path = path.with_name(f"{path.name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(cv2.imencode(path.suffix, drawn)[1].tobytes())
