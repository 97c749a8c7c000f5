"""When to measure, the moving average, and the state: what ``engine.agvm`` is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from agvm_ds.bases import preconditioned
from agvm_ds.config import AGVMConfig, ConfigError
from agvm_ds.estimators import Estimate, estimator_of
from agvm_ds.groups import MODULE, NAME, PARAMS
from agvm_ds.optimizer import AGVM, Owned
from agvm_ds.shards import Shards
from agvm_ds.variance import factor_bounds, moving_average, variance_ratio

logger = logging.getLogger("agvm_ds")

STATE_VERSION = 1

_FROZEN = (
    "DeepSpeed goes on stepping them (momentum, weight decay, in stage 3 their last gradient); restart with them frozen"
)
_THAWED = (
    "parameters that were frozen at the start have been thawed: DeepSpeed does not step them, nor does AGVM measure them; "
    "restart with them trainable"
)


@dataclass(frozen=True)
class Measure:
    """What one measured update has found, by module; nan: undefined in this update."""

    update: int
    variances: dict[str, float]
    noise_scales: dict[str, float]
    ratios: dict[str, float]
    scale_factors: dict[str, float]
    noises: dict[str, float]
    signals: dict[str, float]
    """Whose ratio is the noise scale: see agvm_ds.variance.noise_and_signal."""


class Controller:
    """Decides which updates are measured, keeps the scale factors, and hands them to the optimizer.

    ``scale_factors``: module -> mu, 1 before its first measure. ``variances``: module -> Phi of the last measure, nan
    before the first or when undefined. ``noise_scales``: module -> B in images. ``steps``: updates seen.
    ``rates``: module -> learning rate of its first group in the last update; ``effective_rates``: with its scale factor.
    ``listeners`` are called on every rank with each Measure whose update was applied.
    """

    def __init__(self, config: AGVMConfig, optimizer: AGVM, shards: Shards) -> None:
        self.config = config
        self.optimizer = optimizer
        self.shards = shards
        self.modules = optimizer.modules
        # Kept here: DeepSpeed's load puts the checkpoint's group dicts, names included, in place of this run's.
        self.groups = [str(group[NAME]) for group in optimizer.param_groups]
        self.anchor = config.anchor
        self.scale_factors = dict.fromkeys(self.modules, 1.0)
        self.variances = dict.fromkeys(self.modules, math.nan)
        self.noise_scales = dict.fromkeys(self.modules, math.nan)
        self.rates: dict[str, Any] = optimizer.rates
        self._applied: Mapping[str, float] = {}
        self.steps = 0
        self.measured = 0
        self.listeners: list[Callable[[Measure], None]] = []
        self._said: set[str] = set()
        self._estimator = estimator_of(config, self.preconditioned, shards)
        owned = {id(owned.parameter) for owned in optimizer.owned}
        self._frozen = [p for p in shards.engine.module.parameters() if id(p) not in owned and not p.requires_grad]
        self._observing = self._paused = self._broken = False
        self._micro_batches = 0
        self._seen: set[int] = set()
        """Of ``optimizer.owned``, those that have had a gradient in this update on this rank."""
        self._hooks = [owned.parameter.register_hook(self._hook(i, owned)) for i, owned in enumerate(optimizer.owned)]
        self.expect(0)

    @property
    def preconditioned(self) -> bool:
        """Whether the variance is that of the gradient as an Adam sees it."""
        return self.config.precondition == "auto" and preconditioned(self.optimizer.base)

    # While gradients appear

    def _hook(self, index: int, owned: Owned) -> Callable[[torch.Tensor], None]:
        """A gradient hook: it fires once a backward, however often the parameter was used in the forward."""
        seen = -1

        def hook(gradient: torch.Tensor) -> None:
            nonlocal seen
            if not self._observing:
                return
            if seen == self.shards.engine.micro_steps:
                raise RuntimeError(
                    f"AGVM: a parameter of module {owned.module}, shape {tuple(gradient.shape)}, got two gradients in one "
                    "micro-batch. A module used in several reentrant checkpoints, or two backward calls before "
                    "engine.step(), cannot be measured: use checkpointing with use_reentrant=False, and one backward a "
                    "micro-batch"
                )
            seen = self.shards.engine.micro_steps
            self._seen.add(index)
            self._estimator.observe(index, gradient)

        return hook

    def end_micro_batch(self) -> None:
        """A backward is over, and DeepSpeed about to reduce what it has left."""
        if self._observing:
            self._estimator.end_micro_batch()
            self._micro_batches += 1

    def break_off(self) -> None:
        """A backward has failed (out of memory). Whoever catches that may go on; this update is not measured then."""
        if self._observing:
            self._observing, self._broken = False, True

    def let_go(self) -> None:
        """Take the gradient hooks off: the model may be given to another engine."""
        self._observing = False
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def expect(self, t: int) -> None:
        """Get ready for the micro-batches of update t."""
        self._observing = self.config.measured(t) and not self._paused and bool(self._hooks)
        self._micro_batches, self._broken = 0, False
        self._seen.clear()
        if self._observing:
            self._tell_frozen(t)
            self._estimator.start()

    @contextmanager
    def paused(self, t: int) -> Iterator[None]:
        """Updates within, from t on, are not measured; afterwards the next update is the engine's."""
        self._paused = True
        self.resume_at(t)
        try:
            yield
        finally:
            self._paused = False
            self.resume_at(int(self.shards.engine.global_steps))

    # At the accumulation boundary

    def measure(self, t: int) -> Measure | None:
        """The statistics of update t and the scale factors that follow; None when t is not measured, or unusable."""
        if self._paused or not self.config.measured(t):
            return None
        sums = self._sums(t)
        self._estimator.release()
        if sums is None:
            return None
        if not self._estimator.usable(sums):
            self._warn(f"update {t}: gradients, or their squares, are not finite; no scale factor changes")
            return None
        return self._judge(t, dict(zip(self.modules, self._estimator.estimates(sums), strict=True)))

    def _sums(self, t: int) -> torch.Tensor | None:
        """The estimator's numbers of all ranks; None, and a warning, where some rank has not seen the whole update.

        One all-reduce, and in an update in which something is missing somewhere two more.
        """
        if self._broken:
            self._estimator.refuse_broken_backward()
        partial = self._micro_batches != self.shards.accumulation or self._broken
        unseen = self.shards.stale and len(self._seen) < len(self.optimizer.owned)
        sums, missing = self._added_up(self._estimator.local_sums(), [partial or unseen])
        if missing == [0]:
            return sums
        flags = [partial, *(index in self._seen for index in range(len(self.optimizer.owned)))]
        _, (partial_ranks, *seen) = self._added_up(sums.new_zeros(0), flags)
        if partial_ranks:
            here = f"{self._micro_batches} micro-batches of {self.shards.accumulation} on rank {self.shards.rank}"
            others = f"{partial_ranks} of {self.shards.ranks} ranks have not seen all of it"
            self._warn_once(f"update {t}: not measured: {others} ({here})", about="partial")
            return None
        absent = {index for index, ranks in enumerate(seen) if not ranks} if self.shards.stale else set()
        return self._added_up(self._estimator.local_sums(absent), [])[0] if absent else sums

    def _added_up(self, sums: torch.Tensor, flags: Sequence[bool]) -> tuple[torch.Tensor, list[int]]:
        """Sums over the ranks, on the CPU, and how many ranks have each flag, in one all-reduce."""
        more = torch.tensor(flags, dtype=torch.float64).to(self.shards.engine.device)
        numbers = self.shards.add_up(torch.cat([sums.reshape(-1).to(more.device), more])).cpu()  # the one wait
        split = sums.numel()
        return numbers[:split].view(sums.shape), [int(number) for number in numbers[split:]]

    def _judge(self, t: int, found: Mapping[str, Estimate]) -> Measure:
        """Ratios and new scale factors; a module whose own variance, or the anchor's, is undefined keeps its own."""
        anchor = found[self.anchor].variance
        ratios, factors = dict.fromkeys(self.modules, math.nan), dict(self.scale_factors)
        for name, estimate in found.items():
            if math.isnan(estimate.variance):
                self._tell_undefined(t, name)
            if not math.isnan(anchor + estimate.variance):
                ratios[name] = variance_ratio(anchor, estimate.variance, self.config.eps, self.config.ratio_bounds)
                factors[name] = moving_average(factors[name], ratios[name], self.config.ema_decay)
        variances = {name: estimate.variance for name, estimate in found.items()}
        noise_scales = {name: estimate.noise_scale for name, estimate in found.items()}
        noises = {name: estimate.noise for name, estimate in found.items()}
        signals = {name: estimate.signal for name, estimate in found.items()}
        return Measure(t, variances, noise_scales, ratios, factors, noises, signals)

    def modulation(self, t: int, measure: Measure | None) -> AbstractContextManager[None]:
        """The context in which update t steps: an update that measures steps with its own result already."""
        factors = measure.scale_factors if measure else self.scale_factors
        self.rates = self.optimizer.rates  # now: DeepSpeed's scheduler moves them within the step
        self._applied = factors if self.config.active(t) and self.config.modulate else {}
        return self.optimizer.modulated(self._applied)

    @property
    def effective_rates(self) -> dict[str, float]:
        """Module -> the learning rate that its first parameter group stepped with in the last update."""
        return {name: float(rate) * self._applied.get(name, 1.0) for name, rate in self.rates.items()}

    def finish(self, t: int, measure: Measure | None) -> None:
        """Update t is over; ``measure`` is None when it was not measured, or the step was skipped."""
        self.steps = t + 1
        if measure is not None:
            self.measured += 1
            self.variances, self.noise_scales = measure.variances, measure.noise_scales
            self.scale_factors = measure.scale_factors
            for listener in self.listeners:
                listener(measure)
        self.expect(t + 1)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: the statistics, the counters, and what each module and parameter group was."""
        return {
            "version": STATE_VERSION,
            "estimator": self.config.estimator,
            "anchor": self.anchor,
            "scale_factors": dict(self.scale_factors),
            "variances": dict(self.variances),
            "noise_scales": dict(self.noise_scales),
            "steps": self.steps,
            "measured": self.measured,
            "groups": [_settings(group) for group in self.optimizer.param_groups],
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> list[str]:
        """Take over a state, and return in words what of it could not be kept. Raises ConfigError, with nothing changed.

        strict: it must be of the same modules and parameter groups. Otherwise a module of the same name keeps its numbers,
        any other starts with a scale factor of 1, and the groups' settings stay as they are. Scale factors must be numbers;
        one outside this run's bounds (the state is of a run with wider ones) becomes the nearer bound.
        """
        if state.get("version") != STATE_VERSION:
            raise ConfigError(f"AGVM state of version {state.get('version')}; this release reads {STATE_VERSION}")
        saved = [group[NAME] for group in state["groups"]]
        same = saved == self.groups and list(state["scale_factors"]) == self.modules
        if strict and not same:
            raise ConfigError(
                f"the checkpoint's AGVM groups are {saved}, this run's are {self.groups}: they must agree"
            )
        factors = self._within_bounds(state["scale_factors"])
        if strict:
            for group, settings in zip(self.optimizer.param_groups, state["groups"], strict=True):
                _take(group, settings)
        known = [name for name in self.modules if name in factors]
        for mine, theirs in (
            (self.scale_factors, factors),
            (self.variances, state["variances"]),
            (self.noise_scales, state["noise_scales"]),
        ):
            mine.update({name: theirs[name] for name in known})
        self.measured = int(state["measured"])
        self.resume_at(int(state["steps"]))
        return self._not_kept(state, known)

    def _not_kept(self, state: Mapping[str, Any], known: list[str]) -> list[str]:
        words = []
        if new := [name for name in self.modules if name not in known]:
            words.append(f"modules that the checkpoint does not have start with a scale factor of 1: {', '.join(new)}")
        if gone := [name for name in state["scale_factors"] if name not in known]:
            words.append(f"modules of the checkpoint that this run does not have are left out: {', '.join(gone)}")
        for key, here in (("estimator", self.config.estimator), ("anchor", self.anchor)):
            if state.get(key, here) != here:
                words.append(f"scale factors so far come from {key} {state[key]}; from here on {here}")
        return words

    def _within_bounds(self, saved: Mapping[str, float]) -> dict[str, float]:
        bad = {name: mu for name, mu in saved.items() if not (math.isfinite(mu) and mu > 0)}
        if bad:
            raise ConfigError(f"the AGVM state's scale factors must be finite and above 0; these are not: {bad}")
        low, high = factor_bounds(self.config.ratio_bounds)
        kept = {name: min(max(float(mu), low), high) for name, mu in saved.items()}
        moved = [f"{name} {mu:.6g} -> {kept[name]:.6g}" for name, mu in saved.items() if kept[name] != mu]
        if moved:
            bounds = f"agvm.ratio_bounds = {list(self.config.ratio_bounds)}"
            self._warn(f"scale factors of the checkpoint are put within this run's {bounds}: {', '.join(moved)}")
        return kept

    def resume_at(self, t: int) -> None:
        """The next update is t, whatever was loaded."""
        self.steps = t
        self.expect(t)

    # Words

    def _tell_undefined(self, t: int, name: str) -> None:
        keeps = "no scale factor changes" if name == self.anchor else "its scale factor stays"
        self._warn_once(f"update {t}: module {name} has no gradient to measure; {keeps}", about=f"undefined {name}")

    def _tell_frozen(self, t: int) -> None:
        """What DeepSpeed took at start is what it steps: freezing or thawing a parameter later does not change that."""
        frozen = {owned.module for owned in self.optimizer.owned if not owned.parameter.requires_grad}
        for name in sorted(frozen):
            self._warn_once(
                f"update {t}: parameters of {name} were frozen after the start; {_FROZEN}", f"frozen {name}"
            )
        if any(p.requires_grad for p in self._frozen):
            self._warn_once(f"update {t}: {_THAWED}", "thawed")

    def _warn_once(self, message: str, about: str = "") -> None:
        if (about or message) not in self._said:
            self._said.add(about or message)
            self._warn(f"{message} (said once)")

    def _warn(self, message: str) -> None:
        if self.shards.rank == 0:
            logger.warning("AGVM: %s", message)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters; tensors (a capturable learning rate) as numbers."""
    plain = {key: value for key, value in group.items() if key != PARAMS}
    assert MODULE in plain
    return {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in plain.items()}


def _take(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """What is a tensor here (a capturable learning rate, timm's count of steps) stays that one."""
    for key, value in settings.items():
        if isinstance(here := group.get(key), torch.Tensor):
            here.fill_(value)
        else:
            group[key] = value
