"""What ``launch/plan.py`` is asked, and the row in which it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """The command line of ``launch/plan.py``: see its help. None: what the rules of agvm_ds.mmdet choose."""

    config: str
    nodes: int
    gpus: int
    """A node."""
    batch: int
    """Images in an update."""
    memory: float | None = None
    """GiB a GPU."""
    micro: int | None = None
    scaling: str | None = None
    """A key of scaling.RULES."""
    zero_stage: int | None = None
    images: int | None = None
    base_batch: int | None = None
    """Images for which the config's learning rate is meant."""
    cfg_options: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """One a GPU."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Row:
    """One figure, and the rule or source that it comes from."""

    figure: str
    value: str
    rule: str
