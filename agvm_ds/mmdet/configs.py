"""Finding and reading the mmdet config of a run."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmdet
from mmcv import Config
from mmdet.models import build_detector
from mmdet.utils import compat_cfg, replace_cfg_vals, update_data_root
from torch import nn

import agvm_ds.demo
from agvm_ds.config import ConfigError
from agvm_ds.mmdet.checks.shapes import shape_problems

DEMO_CONFIG = Path(agvm_ds.demo.__file__).parent / "faster_rcnn_digits.py"
"""The config of the built-in data, used when none is named."""


def read_config(name: str | None, options: Mapping[str, Any] | None = None) -> Config:
    """The mmdet config of a run, with ``--cfg-options`` merged and mmdet's older spellings translated.

    name: None for the built-in demo, a file, or the name of a config that mmdet ships, with or without its folder.
    Raises ConfigError when there is none (with near names), or it cannot be read.
    """
    path = config_path(name)
    try:
        cfg = replace_cfg_vals(Config.fromfile(str(path)))
        update_data_root(cfg)
        move_data(cfg, (options or {}).get("data_root"))
        _merge(cfg, dict(options or {}))
        if problems := shape_problems(cfg):
            raise ConfigError("\n  ".join([f"config {path}:", *problems]))
        return compat_cfg(cfg)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a config is Python code and may raise anything
        # mmcv raises a bare ImportError for what custom_imports names
        reason = str(error) or error.__context__ or ""
        raise ConfigError(f"config {path}: {type(error).__name__}: {reason}") from error


def _merge(cfg: Config, options: dict[str, Any]) -> None:
    try:
        cfg.merge_from_dict(options)
    except Exception as error:  # mmcv goes down the keys without looking
        words = " ".join(f"{key}={value}" for key, value in options.items())
        raise ConfigError(
            f"--cfg-options {words}: one of them has no place in the config: {type(error).__name__}: {error}"
        ) from error


BUILDING = (AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What mmdet and mmcv raise for a config that they cannot build. RuntimeError: a package that a data set needs is missing."""


@contextmanager
def blamed(part: str) -> Iterator[None]:
    """What mmdet or mmcv raise while they build this part of a config is a mistake in it: a ConfigError that names it."""
    try:
        yield
    except ConfigError:
        raise
    except BUILDING as error:
        raise ConfigError(f"{part}: cannot be built: {type(error).__name__}: {error}") from error


def listed(custom_hooks: Any) -> list[Any]:
    """mmcv allows one alone without a list."""
    if not custom_hooks:
        return []
    return list(custom_hooks) if isinstance(custom_hooks, (list, tuple)) else [custom_hooks]


def rebuilding(cfg: Config) -> Iterator[str]:
    """What is wrong when mmdet's tools would give the detector's convolutions other dilations than the config's model has."""
    if any(hook.get("type") == "RFSearchHook" for hook in listed(cfg.get("custom_hooks"))):
        yield "custom_hooks: RFSearchHook trains and tests another network than the config's model: that is not done here"


def detector_of(cfg: Config) -> nn.Module:
    """A config's detector, with the weights that its layers are made with. Raises ConfigError when it cannot be built."""
    for problem in rebuilding(cfg):
        raise ConfigError(problem)
    with blamed("model"):
        return build_detector(cfg.model, train_cfg=cfg.get("train_cfg"), test_cfg=cfg.get("test_cfg"))


def move_data(cfg: Config, root: str | None) -> None:
    """``data_root`` changed on the command line: what the file put under the old root is looked for under the new one."""
    old = cfg.get("data_root")
    if root is None or not old:
        return
    cfg.data = moved(cfg.data, old.rstrip("/") + "/", root.rstrip("/") + "/")


def moved(node: Any, old: str, new: str) -> Any:
    """A config's block with one folder for another at the beginning of its texts."""
    if isinstance(node, dict):
        return {key: moved(value, old, new) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(moved(item, old, new) for item in node)
    return new + node.removeprefix(old) if isinstance(node, str) and node.startswith(old) else node


def config_path(name: str | None) -> Path:
    """The file of a config: see read_config."""
    if name is None:
        return DEMO_CONFIG
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    wanted = name.removesuffix(".py")
    fitting = [path for key, path in shipped.items() if key == wanted or key.rpartition("/")[2] == wanted]
    if len(fitting) == 1:
        return fitting[0]
    near = difflib.get_close_matches(wanted.rpartition("/")[2], [key.rpartition("/")[2] for key in shipped], 5, 0.5)
    hint = f"; mmdet {mmdet.__version__} ships, for example: {', '.join(near)}" if near else ""
    raise ConfigError(f"config not found: {name} is neither a file nor the name of a config that mmdet ships{hint}")


def work_dir_of(cfg: Config, name: str | None, asked: str | Path | None) -> Path:
    """The work dir of a run: the one asked for, the config's, or one of the config's name."""
    return Path(asked or cfg.get("work_dir") or f"work_dirs/{config_path(name).stem}")


def is_demo(name: str | None) -> bool:
    """Whether a config is one of those of the built-in data."""
    return config_path(name).resolve().parent == DEMO_CONFIG.resolve().parent


def shipped_configs() -> dict[str, Path]:
    """ "folder/name" -> file, for every config that the installed mmdet ships."""
    package = Path(mmdet.__file__).parent
    root = next((place for place in (package / ".mim" / "configs", package.parent / "configs") if place.is_dir()), None)
    if root is None:
        return {}
    files = (path for path in root.rglob("*.py") if "_base_" not in path.parts)
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(files)}
