"""When a run is evaluated and which checkpoint is the best, beside mmdet's own hook on the same scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmdet.apis
import pytest
import torch
from mmcv.runner import LogBuffer
from mmdet.core.evaluation.eval_hooks import EvalHook
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.evaluate import Metrics
from agvm_ds.mmdet.hooks import evaluation
from agvm_ds.mmdet.hooks.evaluation import EngineEvalHook

EPOCHS = 6
SCORES = [0.3, 0.5, 0.2, 0.4, 0.5, 0.6]


class Scored(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A data set whose evaluations give what is listed."""

    def __init__(self, key: str, scores: Sequence[float]) -> None:
        self.key, self.left = key, list(scores)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index

    def evaluate(self, results: Any, logger: Any, **options: Any) -> dict[str, float]:
        return {self.key: self.left.pop(0), "bbox_mAP_75": 0.1}


class Runner(SimpleNamespace):
    """As much of a runner as the hooks read; what it saves has no content."""

    def __init__(self, place: Path, meta: dict[str, Any]) -> None:
        super().__init__(work_dir=str(place), meta=meta, rank=0, epoch=0, iter=0, _max_epochs=EPOCHS, _hooks=[])
        self.logger, self.log_buffer, self.model = logging.getLogger("tests"), LogBuffer(), nn.Linear(1, 1)
        place.mkdir(exist_ok=True)

    def save_checkpoint(self, out_dir: str, filename_tmpl: str, create_symlink: bool) -> None:
        assert not create_symlink
        (Path(out_dir) / filename_tmpl).touch()


class Engine(EngineEvalHook):
    """Without ranks and weights."""

    def _measured(self, runner: Any) -> float | None:
        return self.evaluate(runner, [])


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "broadcast_object", lambda value: value)
    monkeypatch.setattr(mmdet.apis, "single_gpu_test", lambda *_, **__: [])


def history(kind: type, place: Path, settings: dict[str, Any], key: str, epochs: Sequence[int], meta: Any) -> list[Any]:
    """For each epoch: was it evaluated, which best checkpoints are there, what is remembered."""
    data = Scored(key, SCORES[epochs[0] :] * 2)
    more = {"detector": None, "engine": SimpleNamespace(global_steps=0)} if kind is Engine else {}
    hook = kind(torch.utils.data.DataLoader(data), by_epoch=True, **settings, **more)
    runner = Runner(place, meta)
    hook.before_run(runner)
    found = []
    for runner.epoch in epochs:
        left = len(data.left)
        hook.before_train_epoch(runner)
        hook.after_train_epoch(runner)
        names = sorted(path.name for path in place.glob("*.pth"))
        best = Path(getattr(hook, "best_ckpt_path", None) or "").name
        found.append((left - len(data.left), names, best, dict(meta.get("hook_msgs", {}))))
    return found


BEST: dict[str, tuple[str, dict[str, Any]]] = {
    "by name": ("bbox_mAP", {"save_best": "bbox_mAP"}),
    "auto": ("bbox_mAP", {"save_best": "auto"}),
    "auto, second set": ("1_bbox_mAP", {"save_best": "auto"}),
    "less": ("error", {"save_best": "error", "rule": "less"}),
    "less by its name": ("val_loss", {"save_best": "val_loss"}),
    "a key that is said to be less": ("miss", {"save_best": "miss", "less_keys": ["miss"], "greater_keys": ["mAP"]}),
}
WHEN: dict[str, dict[str, Any]] = {
    "interval, not at the end": {"interval": 4},
    "dynamic intervals": {"interval": 3, "dynamic_intervals": [(4, 1)]},
    "start": {"start": 2, "interval": 2},
    "before the first epoch": {"start": 0, "interval": 3},
}


def without_places(found: list[Any]) -> list[Any]:
    """What is remembered without the folder, the only thing that may differ."""
    return [(*row[:3], row[3]["best_score"]) for row in found]


@pytest.mark.parametrize("name", BEST)
def test_the_best_checkpoint_is_mmdets(name: str, tmp_path: Path) -> None:
    key, settings = BEST[name]
    found = history(Engine, tmp_path / "here", settings, key, range(EPOCHS), {})
    expected = history(EvalHook, tmp_path / "mmdet", settings, key, range(EPOCHS), {})
    assert without_places(found) == without_places(expected)
    assert len(found[-1][1]) == 1, "the one before is removed"


def test_rank_0_alone_removes_the_best_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that remove one file are a race."""
    scores = iter([Metrics({"bbox_mAP": 0.1}), Metrics({"bbox_mAP": 0.2})])
    monkeypatch.setattr(evaluation, "broadcast_object", lambda value: next(scores))
    loader: Any = torch.utils.data.DataLoader(Scored("bbox_mAP", []))
    hook = Engine(loader, save_best="bbox_mAP", detector=nn.Identity(), engine=SimpleNamespace(global_steps=0))
    runner = Runner(tmp_path / "other", {})
    runner.rank = 1
    hook.before_run(runner)
    for runner.epoch in range(2):
        hook.after_train_epoch(runner)
    assert runner.meta["hook_msgs"]["best_score"] == 0.2
    assert [path.name for path in sorted(tmp_path.glob("other/*"))] == [f"best_bbox_mAP_epoch_{n}.pth" for n in (1, 2)]


@pytest.mark.parametrize("key", ["auto", "bbox_AP"])
def test_an_evaluation_without_detections_has_no_score_yet(key: str, tmp_path: Path) -> None:
    """Its zeros have the names of COCO's, which are not those of every data set, nor all of COCO's."""
    data = Scored("bbox_AP", [0.3])
    evaluations = iter([{}, {"bbox_AP": 0.3}])
    data.evaluate = lambda *_, **__: next(evaluations)  # type: ignore[method-assign]
    loader: Any = torch.utils.data.DataLoader(data)
    hook = Engine(
        loader,
        save_best=key,
        rule="greater",
        metric="bbox",
        detector=nn.Identity(),
        engine=SimpleNamespace(global_steps=0),
    )
    runner = Runner(tmp_path / "run", {})
    hook.before_run(runner)
    hook.after_train_epoch(runner)
    assert not list(tmp_path.glob("run/*.pth")) and runner.log_buffer.output["bbox_mAP"] == 0
    runner.epoch = 1
    hook.after_train_epoch(runner)
    assert [path.name for path in tmp_path.glob("run/*.pth")] == ["best_bbox_AP_epoch_2.pth"]


def test_a_resumed_run_remembers_the_best(tmp_path: Path) -> None:
    """Saved in epoch 2; the two epochs after it score less, and only the last one is better."""
    meta: dict[str, Any] = {}
    history(Engine, tmp_path / "here", {"save_best": "bbox_mAP"}, "bbox_mAP", [0, 1], meta)
    found = history(Engine, tmp_path / "here", {"save_best": "bbox_mAP"}, "bbox_mAP", [2, 3, 4, 5], meta)
    assert [row[1] for row in found] == [["best_bbox_mAP_epoch_2.pth"]] * 3 + [["best_bbox_mAP_epoch_6.pth"]]


@pytest.mark.parametrize("name", WHEN)
def test_epochs_are_evaluated_as_in_mmdet_and_the_last_one_always(name: str, tmp_path: Path) -> None:
    found = [row[0] for row in history(Engine, tmp_path / "here", WHEN[name], "bbox_mAP", range(EPOCHS), {})]
    expected = [row[0] for row in history(EvalHook, tmp_path / "mmdet", WHEN[name], "bbox_mAP", range(EPOCHS), {})]
    assert found[:-1] == expected[:-1]
    assert found[-1] == 1


def test_a_best_that_is_no_metric_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_best = 'bbox_mAP_s': the metrics are bbox_mAP, bbox_mAP_75"):
        history(Engine, tmp_path / "here", {"save_best": "bbox_mAP_s"}, "bbox_mAP", [0], {})
