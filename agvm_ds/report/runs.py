"""One run as its work dir tells it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agvm_ds.config import ConfigError
from agvm_ds.monitor import FILE_NAME
from agvm_ds.report.measures import Measures, read_measures

RUN_FILE, JSON_FILE, CONFIG_FILE = "run.json", "deepspeed.json", "config.py"
RUN_FILES = (RUN_FILE, JSON_FILE, CONFIG_FILE, FILE_NAME)
"""What a run leaves about itself beside its log; the last with AGVM alone."""
LOG = ".log.json"
"""How mmcv's logs end, after their time."""
NO_METRICS = ("mode", "epoch", "iter", "lr", "update", "memory")


@dataclass(frozen=True)
class Run:
    """``record``: run.json; ``deepspeed``: deepspeed.json; ``config``: the text of config.py.

    ``train`` and ``val`` are the log's lines of these modes by update, of a resumed run each update's last.
    """

    name: str
    record: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    config: str
    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    val: dict[int, dict[str, Any]] = field(default_factory=dict)
    measures: Measures | None = None
    saved: int = 0
    """Updates in its newest checkpoint."""

    @property
    def batch(self) -> int:
        """Images in an update."""
        return int(self.record["batch"])

    @property
    def done(self) -> int:
        """Updates, as the last word of it has them: mmcv logs no interval that an epoch cuts off."""
        measured = self.measures.updates if self.measures is not None else []
        return max([self.saved, *self.train, *self.val, *(update + 1 for update in measured[-1:])])

    @property
    def metric(self) -> str | None:
        """The first of the metrics that it was evaluated by: bbox_mAP, PQ, mAP, ..."""
        lines = list(self.val.values())
        names = [key for key in (lines[-1] if lines else {}) if key not in NO_METRICS and not key.endswith("copypaste")]
        preferred = [key for key in names if key.endswith("mAP")] + [key for key in names if key == "PQ"]
        return next(iter(preferred or names), None)

    def curve(self, key: str, mode: str = "train") -> tuple[list[int], list[float]]:
        """(updates, values) of a log entry, where it is a number."""
        lines = self.train if mode == "train" else self.val
        found = [
            (update, line[key]) for update, line in sorted(lines.items()) if isinstance(line.get(key), (int, float))
        ]
        return [update for update, _ in found], [float(value) for _, value in found]

    def words(self) -> dict[str, str]:
        """What tells runs apart, and how they ended: column -> text."""
        block = self.deepspeed.get("agvm") or {}
        agvm = "off"
        if block.get("enabled"):
            agvm = f"{block['estimator']}, every {block['interval']}" + (
                "" if block.get("modulate", True) else ", watching"
            )
        optimizer = (self.deepspeed.get("optimizer") or {}).get("type") or _optimizer(self.config)
        _, rates = self.curve("lr")
        metric = self.metric
        scores = self.curve(metric, "val")[1] if metric else []
        _, losses = self.curve("loss")
        _, speeds = self.curve("images/s")
        return {
            "run": self.name,
            "batch": str(self.batch),
            "ranks": str(self.record["ranks"]),
            "optimizer": optimizer,
            "highest lr": f"{max(rates):.4g}" if rates else "-",
            "AGVM": agvm,
            "ZeRO": str((self.deepspeed.get("zero_optimization") or {}).get("stage", 0)),
            "updates": f"{self.done} of {self.record['updates']}",
            "last loss": f"{losses[-1]:.3f}" if losses else "-",
            "last score": f"{scores[-1]:.3f} {metric}" if scores else "-",
            "best score": f"{max(scores):.3f}" if scores else "-",
            "images/s": f"{sorted(speeds)[len(speeds) // 2]:.1f}" if speeds else "-",
        }


def _optimizer(config: str) -> str:
    """The type that an mmdet config's text names in its ``optimizer``."""
    _, found, rest = config.partition("optimizer = dict(")
    _, _, named = rest.partition("type='")
    return named.partition("'")[0] if found else "-"


def read_runs(work_dirs: Sequence[Path]) -> list[Run]:
    """Read work dirs; those of one name are called by so much more of their paths as tells them apart.

    Raises ConfigError when one is none of ``launch/train.py``.
    """
    paths, parts = [place.resolve().parts for place in work_dirs], 1
    while len({path[-parts:] for path in paths}) < len(set(paths)):
        parts += 1
    return [
        replace(read_run(place), name="/".join(path[-parts:])) for place, path in zip(work_dirs, paths, strict=True)
    ]


def read_run(work_dir: Path) -> Run:
    """Read a work dir of ``launch/train.py``. Raises ConfigError when it is none."""
    missing = [name for name in (RUN_FILE, JSON_FILE, CONFIG_FILE) if not (work_dir / name).is_file()]
    if missing:
        raise ConfigError(f"{work_dir}: not a work dir of launch/train.py: {', '.join(missing)} not there")
    record, block = (_object(work_dir / name) for name in (RUN_FILE, JSON_FILE))
    lines = list(_log_lines(work_dir, record.get("logs")))
    per_epoch = record["updates_per_epoch"]
    return Run(
        name=work_dir.resolve().name,
        record=record,
        deepspeed=block,
        config=(work_dir / CONFIG_FILE).read_text(encoding="utf-8"),
        train={_update(line, per_epoch): line for line in lines if line.get("mode") == "train"},
        val={int(line["update"]): line for line in lines if line.get("mode") == "val" and "update" in line},
        measures=read_measures(work_dir / FILE_NAME) if (block.get("agvm") or {}).get("enabled") else None,
        saved=_saved(work_dir / "deepspeed"),
    )


def _saved(checkpoints: Path) -> int:
    """Updates in the newest checkpoint; 0 where there is none, or none that can be read."""
    try:
        newest = (checkpoints / "latest").read_text().strip()
        return int(json.loads((checkpoints / newest / "manifest.json").read_text())["update"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _object(file: Path) -> dict[str, Any]:
    """A JSON object that launch/train.py wrote. Raises ConfigError for anything else."""
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: not as launch/train.py wrote it: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: not as launch/train.py wrote it: must be an object")
    return found


def _update(line: Mapping[str, Any], per_epoch: int | None) -> int:
    """How many updates there had been when a line of training was written."""
    before = 0 if per_epoch is None else (int(line["epoch"]) - 1) * per_epoch
    return before + int(line["iter"])


def _log_lines(work_dir: Path, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Of the run's logs, the oldest first; a line that a killed run left unfinished is passed over.

    names: of its logs, for another run's may be there too; None: all.
    """
    for file in sorted(work_dir.glob(f"*{LOG}")):
        if names is not None and file.name.removesuffix(LOG) not in names:
            continue
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line
