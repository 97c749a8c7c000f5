"""A panoptic data set's results: measured as the paper says, and written as its own files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmdet.core import INSTANCE_OFFSET
from mmdet.datasets import build_dataset

from agvm_ds.config import ConfigError
from agvm_ds.demo.data import ensure
from agvm_ds.mmdet.configs import DEMO_CONFIG, read_config
from agvm_ds.mmdet.testing.result_files import refuse_places, refuse_unformatted, write_formatted

PANOPTIC = str(DEMO_CONFIG.with_name("panoptic_fpn_digits.py"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    digits = ensure(tmp_path_factory.mktemp("data") / "digits", train=1, val=6)
    cfg = read_config(PANOPTIC, {"data_root": f"{digits}/"})
    return build_dataset(cfg.data.test, {"test_mode": True})


def truth(dataset: Any) -> list[dict[str, Any]]:
    """The annotations as a detector's results."""
    found = []
    for index, info in enumerate(dataset.data_infos):
        colors = cv2.imread(str(Path(dataset.seg_prefix) / info["segm_file"]))[..., ::-1].astype(int)
        ids, result = colors @ [1, 256, 65536], np.zeros(colors.shape[:2], int)
        for number, segment in enumerate(dataset.get_ann_info(index)["masks"], 1):
            instance = number if segment["is_thing"] else 0
            result[ids == segment["id"]] = segment["category"] + INSTANCE_OFFSET * instance
        found.append({"pan_results": result})
    return found


def test_the_truth_has_a_quality_of_100_and_a_wrong_label_costs_what_the_paper_says(dataset: Any) -> None:
    """A thing of category a that is called b is a miss of a and a false alarm of b."""
    results = truth(dataset)
    perfect = dataset.evaluate(results, metric="PQ", nproc=1)
    assert {perfect[key] for key in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st")} == {100.0}
    labels = [np.unique(result["pan_results"]) for result in results]
    counts = Counter(int(label % INSTANCE_OFFSET) for found in labels for label in found if label != 10)
    wrong = int(labels[0][-1])
    a, b = wrong % INSTANCE_OFFSET, next(label for label in counts if label != wrong % INSTANCE_OFFSET)
    pan = results[0]["pan_results"]
    pan[pan == wrong] += b - a
    quality = dict.fromkeys(counts, 1.0) | {a: (counts[a] - 1) / (counts[a] - 0.5), b: counts[b] / (counts[b] + 0.5)}
    found = dataset.evaluate(results, metric="PQ", nproc=1)
    assert found["PQ_th"] == pytest.approx(100 * sum(quality.values()) / len(quality))
    assert found["PQ_st"] == 100.0


def test_its_files_are_a_json_and_a_folder_of_images(dataset: Any, tmp_path: Path) -> None:
    written = write_formatted(tmp_path / "sent", dataset, truth(dataset))
    assert written == [tmp_path / "panoptic", tmp_path / "sent.panoptic.json"]
    assert sorted(tmp_path.iterdir()) == written
    entries = json.loads(written[1].read_text())["annotations"]
    assert [entry["file_name"] for entry in entries] == sorted(path.name for path in written[0].iterdir())
    cfg = read_config(PANOPTIC)
    refuse_unformatted(cfg)
    with pytest.raises(ConfigError, match="panoptic images go into .*, which is there: remove it first"):
        refuse_places(cfg, None, None, tmp_path / "sent")


def test_a_format_that_fails_half_way_leaves_nothing(dataset: Any, tmp_path: Path) -> None:
    results = truth(dataset)
    results[4]["pan_results"] = None
    with pytest.raises(TypeError):
        write_formatted(tmp_path / "sent", dataset, results)
    assert list(tmp_path.iterdir()) == []
