"""The ``agvm`` block of a DeepSpeed configuration: its keys, their defaults and ranges, and what is said about mistakes.

The block is the only thing that switches AGVM on. It is read here and nowhere else; neither deepspeed nor mmdet is
imported, so a bad block is refused before anything heavy starts.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ValidationInfo

BLOCK = "agvm"

Name = Annotated[StrictStr, Field(min_length=1)]
Step = Annotated[StrictInt, Field(ge=0)]


class ConfigError(ValueError):
    """A mistake in what the user wrote: the message says what is wrong, where, and what is allowed."""


def _refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("agvm", "{message}", {"message": message})


class AGVMConfig(BaseModel):
    """The keys of the ``agvm`` block (AGVM paper, arXiv 2210.11078, sections 3.2 and 3.3; all steps count updates from 0)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    enabled: StrictBool = True
    """``false`` is plain DeepSpeed, bit for bit."""
    modulate: StrictBool = True
    """``false`` measures and logs, and trains as plain DeepSpeed: the scale factors are not applied."""
    anchor: Name = "backbone"
    """The module that the others are measured against; its learning rate never changes."""
    modules: list[Name] | dict[Name, list[Name]] | None = None
    """``null``: the model's top-level children; a list of dotted names; or name -> list of dotted prefixes."""
    estimator: Literal["pairwise", "split"] = "pairwise"
    """How the gradient variance is estimated: the mean over all splits of the micro-batches, or one split (the paper's)."""
    precondition: Literal["auto", "none"] = "auto"
    """``auto``: the variance of the preconditioned gradient for the Adam family; ``none``: of the gradient itself."""
    interval: Annotated[StrictInt, Field(ge=1)] = 10
    """Updates from one measure to the next."""
    start_step: Step = 0
    """First update that is measured and modulated."""
    stop_step: Step | None = None
    """Last update that is measured and modulated; ``null``: to the end."""
    ema_decay: Annotated[StrictFloat, Field(ge=0, le=1)] = 0.97
    """Weight of the old scale factor when a new ratio comes in."""
    ratio_bounds: tuple[StrictFloat, StrictFloat] = (0.5, 10.0)
    """[low, high] of the ratio of variances, before its square root; 0 < low <= 1 <= high."""
    eps: Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)] = 1e-6
    """Added to both variances of a ratio."""
    reduce_bucket_size: Annotated[StrictInt, Field(ge=1)] = 500_000_000
    """Elements that are reduced to their owners at once, where the estimator needs an elementwise sum."""
    clip_window: tuple[Step, Step] | None = None
    """[a, b] limits DeepSpeed's ``gradient_clipping`` to updates a <= t <= b; ``null``: every update."""

    @field_validator("reduce_bucket_size", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        """DeepSpeed users write 5e8."""
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("modules")
    @classmethod
    def _some_modules(cls, value: list[str] | dict[str, list[str]] | None) -> list[str] | dict[str, list[str]] | None:
        if value is not None and not value:
            raise _refuse("no module is named; allowed: null, a list of names, or name -> list of prefixes")
        if isinstance(value, dict) and (empty := [name for name, prefixes in value.items() if not prefixes]):
            raise _refuse(f"no prefix is given for {', '.join(empty)}")
        if isinstance(value, list) and len(set(value)) != len(value):
            raise _refuse("a name is given twice")
        return value

    @field_validator("stop_step")
    @classmethod
    def _stop_after_start(cls, value: int | None, info: ValidationInfo) -> int | None:
        start = info.data.get("start_step")
        if value is not None and start is not None and value < start:
            raise _refuse(f"stops before it starts; allowed: null or >= start_step = {start}")
        return value

    @field_validator("ratio_bounds")
    @classmethod
    def _bounds_around_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0 < low <= 1 <= high < math.inf:
            raise _refuse("must be [low, high], finite, with 0 < low <= 1 <= high (the anchor's own ratio is 1)")
        return value

    @field_validator("clip_window")
    @classmethod
    def _window_in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise _refuse("must be [first, last] with first <= last")
        return value

    def active(self, t: int) -> bool:
        """Whether update ``t`` (from 0) is between ``start_step`` and ``stop_step``: modulated, and measured at intervals."""
        return self.start_step <= t and (self.stop_step is None or t <= self.stop_step)

    def measured(self, t: int) -> bool:
        """Whether the gradient variance is estimated in update ``t``."""
        return self.active(t) and t % self.interval == 0

    def measures(self, updates: int) -> list[int]:
        """The measured updates of a run of so many."""
        return [t for t in range(self.start_step, updates) if self.measured(t)]

    @property
    def memory(self) -> float:
        """How many measures the moving average remembers."""
        return 1 / (1 - self.ema_decay) if self.ema_decay < 1 else math.inf

    def clips(self, t: int) -> bool:
        """Whether DeepSpeed's ``gradient_clipping`` acts in update ``t``."""
        return self.clip_window is None or self.clip_window[0] <= t <= self.clip_window[1]


def read_block(deepspeed_config: Mapping[str, Any]) -> AGVMConfig | None:
    """The ``agvm`` block of a DeepSpeed configuration, or None when it has none or ``"enabled": false``.

    A block that is switched off is checked all the same. Raises ConfigError with all mistakes together.
    """
    block = deepspeed_config.get(BLOCK)
    if block is None:
        return None
    if not isinstance(block, Mapping):
        raise ConfigError(f'{BLOCK}: must be an object like {{"enabled": true}}, not {block!r}')
    try:
        config = AGVMConfig.model_validate(dict(block))
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    # Without the key DeepSpeed 0.19 clips to norm 1.
    if config.enabled and config.clip_window is not None and deepspeed_config.get("gradient_clipping", 1.0) == 0:
        raise ConfigError(f"{BLOCK}.clip_window: limits gradient_clipping, which is 0 in this configuration")
    return config if config.enabled else None


def _describe(error: ValidationError) -> str:
    """One line a mistake: the key's full path, the value, what is allowed."""
    lines = {_describe_one(details): None for details in error.errors()}
    head = f'the "{BLOCK}" block has {len(lines)} mistake{"s" if len(lines) > 1 else ""}:'
    return "\n  ".join([head, *lines])


def _describe_one(details: ErrorDetails) -> str:
    key = str(details["loc"][0])
    path = f"{BLOCK}.{key}"
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, AGVMConfig.model_fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(AGVMConfig.model_fields)}"
        return f"{path}: unknown key; {hint}"
    if key == "modules" and details["type"] != "agvm":
        return f"{path}: must be null, a list of names, or an object name -> list of prefixes"
    value = details["input"]
    return f"{path} = {value!r}: {details['msg'][0].lower()}{details['msg'][1:]}"
