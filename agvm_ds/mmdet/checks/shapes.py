"""The shape of an mmdet config: which of its keys are dicts, lists, numbers, looked at before anything takes them apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NEEDED = ("model", "data", "runner", "data.val", "data.test")
"""mmdet's own reading of a config wants the latter two. An old config has total_epochs in the place of a runner."""

KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("model", "data", "runner", "optimizer", "optimizer_config", "optimizer_config.grad_clip"), (dict,)
    ),
    **dict.fromkeys(("lr_config", "momentum_config", "log_config", "checkpoint_config", "evaluation"), (dict,)),
    **dict.fromkeys(("fp16", "auto_scale_lr", "dist_params"), (dict,)),
    **dict.fromkeys(("data.train_dataloader", "data.val_dataloader", "data.test_dataloader"), (dict,)),
    **dict.fromkeys(("data.train", "data.val", "data.test", "custom_hooks"), (dict, list, tuple)),
    **dict.fromkeys(("load_from", "resume_from", "work_dir", "data_root", "model.type", "runner.type"), (str,)),
    **dict.fromkeys(("workflow",), (list, tuple)),
    **dict.fromkeys(("seed",), (int,)),
}
"""Dotted key -> what its value may be, unless it is None."""

LEAST: dict[str, int] = {
    **dict.fromkeys(("data.samples_per_gpu", "data.train_dataloader.samples_per_gpu"), 1),
    **dict.fromkeys(("data.workers_per_gpu", "data.train_dataloader.workers_per_gpu"), 0),
    **dict.fromkeys(("runner.max_epochs", "runner.max_iters", "total_epochs"), 1),
    **dict.fromkeys(("evaluation.interval", "log_config.interval"), 1),
}
"""Dotted key -> the smallest integer it may be."""

_NAMES = {dict: "a dict", list: "a list", tuple: "a tuple", str: "a string", int: "an integer"}


def shape_problems(cfg: Mapping[str, Any]) -> list[str]:
    """What is missing in a config, or of the wrong kind: "key = value: what it must be"."""
    old = "runner" not in cfg and _value(cfg, "total_epochs") is not None
    missing = [key for key in NEEDED if _value(cfg, key) is None and not (old and key == "runner")]
    absent = [f"has no {', '.join(missing)}; is it a complete mmdet 2.x config?"] if missing else []
    return [*absent, *_kinds(cfg), *_numbers(cfg), *_entries(cfg)]


def _value(cfg: Any, key: str, default: Any = None) -> Any:
    """The value of a dotted key; ``default`` where there is none."""
    for part in key.split("."):
        if not hasattr(cfg, "get"):
            return default
        cfg = cfg.get(part, default)
    return cfg


def _kinds(cfg: Mapping[str, Any]) -> Iterator[str]:
    for key, kinds in KINDS.items():
        value = _value(cfg, key)
        if value is not None and not isinstance(value, kinds):
            yield f"{key} = {value!r}: must be {' or '.join(_NAMES[kind] for kind in kinds)}"


def _numbers(cfg: Mapping[str, Any]) -> Iterator[str]:
    for key, least in LEAST.items():
        value = _value(cfg, key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            yield f"{key} = {value!r}: must be an integer of at least {least}"
    old, new = _value(cfg, "total_epochs"), _value(cfg, "runner.max_epochs")
    if None not in (old, _value(cfg, "runner")) and old != new:
        yield f"total_epochs = {old}, and runner.max_epochs = {new}: must be one number; the runner's is enough"
    norm = _value(cfg, "optimizer_config.grad_clip.max_norm", 0)
    if not isinstance(norm, (int, float)) or not norm >= 0:
        yield f"optimizer_config.grad_clip.max_norm = {norm!r}: must be a number of at least 0"


def _entries(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Of lists."""
    hooks = _value(cfg, "custom_hooks")
    for hook in hooks if isinstance(hooks, (list, tuple)) else []:
        if not isinstance(hook, Mapping) or "type" not in hook:
            yield f"custom_hooks: {hook!r} is no dict with a type"
    workflow = _value(cfg, "workflow")
    for phase in workflow if isinstance(workflow, (list, tuple)) else []:
        if not isinstance(phase, (list, tuple)) or len(phase) != 2 or not isinstance(phase[1], int) or phase[1] < 1:
            yield f"workflow: {phase!r} is no (phase, epochs), like ('train', 1)"
