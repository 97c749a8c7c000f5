"""What docs/study.md fixes, as numbers and rules: batches, methods, learning rates, seeds, AGVM's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

IMAGES = 2048
SET = 512
"""Images in each validation set: one to choose by, one to report."""
EPOCHS = 8
MICRO = 8
"""Images in a micro-batch: two at a batch of 16, for a variance needs two."""
BATCHES = (16, 32, 64, 128)
BASE_BATCH = 16
CENTRAL_BATCH = 64
"""Where every method is trained, the ablation too; its number of updates and its rates are the second series'."""
SEEDS = (1, 2, 3, 4)
"""Reported; rates are chosen with seed 0."""
FEWER_SEEDS = (1, 2)
"""Of the second series and of the ablation."""
CHOOSING_SEED = 0

WARM_UP, START, STEPS = 0.125, 0.15, (0.75, 0.875)
"""Shares of the run: warm-up, AGVM's start, and where the rate falls to a tenth (officially 460, 560 of 3664)."""
PAPER_UPDATES, PAPER_INTERVAL, PAPER_DECAY = 3664, 10, 0.97
"""Official recipe at batch 512: 16 epochs of COCO."""

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "SGD": {"type": "SGD", "momentum": 0.9, "weight_decay": 1e-4},
    "AdamW": {"type": "AdamW", "betas": (0.9, 0.99), "weight_decay": 0.05},
    "LAMB": {"type": "Lamb", "betas": (0.9, 0.99), "weight_decay": 0.05},
    "LARS": {"type": "Lars", "momentum": 0.9, "weight_decay": 1e-4},
}
FIRST_RATES = {"SGD": 0.02, "AdamW": 0.002, "LAMB": 0.005, "LARS": 0.5}
"""Where the search for plain's rate at a batch of 16 begins."""
SCALING = {"SGD": 0.0}
"""Powers of the batch that a rate grows with, where it is not the square root: SGD diverged at twice its best rate at 16."""
MOST_RATES = 7
"""Tried for a method at a batch."""

METHODS = ("plain", "pairwise", "fixed", "split")
"""``fixed``: the base with each module's rate multiplied by AGVM's mean scale factor (pairwise, same base and batch)."""
METHODS_AT = {64: METHODS, 16: METHODS[:2], 32: METHODS[:1]}
"""Batch -> what is reported at it after EPOCHS, in the study's order; plain's rate is searched at every batch."""
METHODS_AT_EQUAL_UPDATES = METHODS[:3]
"""At every batch."""
METHODS_HALFWAY = METHODS[:2]
"""At the central batch also with rates between two of the search's."""
MODULATED = ("SGD", "AdamW")
"""Bases of every method."""
LAYERWISE = {"SGD": "LARS", "AdamW": "LAMB"}
"""Base -> the optimizer that has its momenta, and a rate of its own for each tensor."""
ALONE = tuple(sorted(LAYERWISE.values()))
"""Bases that are methods by themselves."""
BATCHES_ALONE = (16, 64)
"""At which those are trained."""

ABLATION: tuple[Mapping[str, Any], ...] = (
    {},
    {"ema_decay": 0.0},
    {"ema_decay": 0.5},
    {"ema_decay": 0.99},
    {"interval": 5},
    {"anchor": "neck"},
    {"anchor": "roi_head"},
    {"ratio_bounds": [0.25, 4.0]},
    {"ratio_bounds": [0.1, 100.0]},
)
"""The first changes nothing: the ablation had another machine than the runs that it was compared with."""

OTHER_NORM = "GN"
"""What the backbone has of series ``causes`` in the place of BatchNorm."""
POWER = 3
"""Of AGVM's mean scale factors as multipliers, of series ``causes``: as if modules were less alike."""


@dataclass(frozen=True)
class Run:
    """One training."""

    series: str
    """``epochs``: EPOCHS at every batch; ``updates``: as many as at CENTRAL_BATCH; ``halfway``: EPOCHS with a rate between
    two of those searched; ``causes``: a guess why AGVM does no more; ``again``: what that is compared with, on its machine;
    ``ablation``: one AGVM setting changed."""
    base: str
    method: str
    batch: int
    rate: float
    seed: int
    multipliers: Mapping[str, float] = field(default_factory=dict)
    """Module -> what its rate is multiplied by, of method ``fixed``."""
    changed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the ``agvm`` block, of series ``ablation``."""
    norm: str = "BN"
    """The backbone's layers of normalization; or OTHER_NORM."""

    @property
    def key(self) -> str:
        """Unique in the study, and a folder's name."""
        more = "".join(f"-{name}={value}" for name, value in self.changed.items()).replace(" ", "")
        return f"{self.series}-{self.base}-{self.method}-{self.batch}-{self.rate:.5g}-{self.seed}{more}"

    @property
    def epochs(self) -> int:
        """At equal updates a larger batch has more."""
        return EPOCHS if self.series != "updates" else max(EPOCHS * self.batch // CENTRAL_BATCH, 1)

    @property
    def updates(self) -> int:
        """In all."""
        return self.epochs * IMAGES // self.batch

    def with_(self, **changes: Any) -> Run:
        """This run with other values."""
        return replace(self, **changes)

    def record(self) -> dict[str, Any]:
        """As in a line of runs.jsonl."""
        return asdict(self)


def interval(updates: int) -> int:
    """The paper's interval as a share of the run, at least 1."""
    return max(round(updates * PAPER_INTERVAL / PAPER_UPDATES), 1)


def ema_decay(updates: int) -> float:
    """Such that the average remembers the same share of the run as the paper's: 10 / 0.03 of 3664 updates, 9 %."""
    memory = PAPER_INTERVAL / (1 - PAPER_DECAY) / PAPER_UPDATES
    return round(1 - interval(updates) / (memory * updates), 4)


def agvm_block(run: Run) -> dict[str, Any]:
    """Of every run: what does not modulate measures all the same (``modulate: false``), pairwise."""
    acts = run.method in ("pairwise", "split")
    return {
        "enabled": True,
        "modulate": acts,
        "estimator": "split" if run.method == "split" else "pairwise",
        "interval": interval(run.updates),
        "ema_decay": ema_decay(run.updates),
        "start_step": round(START * run.updates) if acts else 0,
        **run.changed,
    }


def scaled(base: str, best: float, batch: int) -> float:
    """Where the search for plain's rate at another batch begins: by the square-root rule, SGD's unscaled; ``best``: at 16."""
    return best * (batch / BASE_BATCH) ** SCALING.get(base, 0.5)
