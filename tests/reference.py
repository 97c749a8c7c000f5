"""AGVM written down slowly from its formulas: one process, float64, every micro-gradient kept, no DeepSpeed.

The variances are computed here from their meaning (inner products of all pairs of micro-gradients; the cosine of the means
of two halves), not from the sums that the library uses, so that an error in the algebra cannot hide in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import nn

from tests.toy import MODULES_WITH_AUX, Toy, micro_batch


@dataclass
class Reference:
    """Trains a float64 Toy and records, after every update, scale factors and parameters."""

    ranks: int
    accumulation: int = 1
    rows: int = 4
    estimator: str = "pairwise"
    preconditioned: bool = False
    interval: int = 2
    start: int = 1
    stop: int | None = None
    decay: float = 0.9
    eps: float = 1e-6
    bounds: tuple[float, float] = (0.5, 10.0)
    modulate: bool = True
    max_norm: float = 0.0
    clip_window: tuple[int, int] | None = None
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict = field(default_factory=dict)
    modules: list[str] = field(default_factory=lambda: list(MODULES_WITH_AUX))
    anchor: str = "backbone"

    model: nn.Module = field(default_factory=Toy)

    def __post_init__(self) -> None:
        self.n = self.ranks * self.accumulation
        self.model = self.model.double()
        self.by_module: dict[str, list[nn.Parameter]] = {name: [] for name in [*self.modules, "rest"]}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                module = next((m for m in self.modules if name.startswith(m + ".")), "rest")
                self.by_module[module].append(parameter)
        self.by_module = {name: parameters for name, parameters in self.by_module.items() if parameters}
        groups = [{"params": parameters} for parameters in self.by_module.values()]
        self.optimizer = self.base(groups, **self.options)
        self.mu = dict.fromkeys(self.by_module, 1.0)
        self.phi = dict.fromkeys(self.by_module, math.nan)
        self.noise = dict.fromkeys(self.by_module, math.nan)

    def micro_gradients(self, t: int) -> list[dict[str, torch.Tensor]]:
        """For each micro-batch: module -> its gradient as one float64 vector."""
        result = []
        for k in range(self.n):
            self.model.zero_grad()
            x, y = micro_batch(t, k, self.rows)
            self.model(x.double(), y.double()).backward()
            result.append({name: torch.cat([grad(p).flatten() for p in ps]) for name, ps in self.by_module.items()})
        return result

    def estimate(self, name: str, gradients: list[torch.Tensor]) -> tuple[float, float]:
        """(Phi, B in images) of a module from its micro-gradients; B is the pairwise estimator's only."""
        if not any(bool(g.any()) for g in gradients):
            return math.nan, math.nan
        v, group = self.second_moment(name), self.optimizer.param_groups[list(self.by_module).index(name)]
        if self.estimator == "split":
            halves = self.halves(gradients)
            if self.preconditioned:
                halves = [official(half, v, self.n, group["betas"][1], group["eps"]) for half in halves]
            return 1 - float(torch.cosine_similarity(*halves, dim=0, eps=0.0)), math.nan
        if self.preconditioned:
            gradients = [g / (v.sqrt() + group["eps"]) if bool(v.any()) else g for g in gradients]
        return self.all_pairs(gradients)

    def halves(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Mean gradients of the lower half of the ranks, or of one rank's first half of the steps, and of the rest."""
        a = self.ranks // 2 * self.accumulation if self.ranks > 1 else self.accumulation // 2
        return [sum(part) / len(part) for part in (gradients[:a], gradients[a:])]

    def all_pairs(self, gradients: list[torch.Tensor]) -> tuple[float, float]:
        """The mean over all splits into halves of n / 2, and the noise scale."""
        m = sum(float(g @ g) for g in gradients) / self.n
        pairs = [float(a @ b) for a, b in combinations(gradients, 2)]
        c = sum(pairs) / len(pairs)
        phi = 1 - c / ((2 / self.n) * m + (1 - 2 / self.n) * c)
        return min(max(phi, 0), 2), (self.rows * (m - c) / c if c > 0 else math.inf)

    def second_moment(self, name: str) -> torch.Tensor:
        """The Adams' v of a module as one vector, zeros before the first update."""
        moments = [self.optimizer.state[p].get("exp_avg_sq", torch.zeros_like(p)) for p in self.by_module[name]]
        return torch.cat([moment.detach().flatten() for moment in moments])

    def update(self, t: int) -> None:
        """One update of the global batch."""
        micro = self.micro_gradients(t)
        active = self.start <= t and (self.stop is None or t <= self.stop)
        if active and t % self.interval == 0:
            found = {name: self.estimate(name, [g[name] for g in micro]) for name in self.by_module}
            self.phi = {name: phi for name, (phi, _) in found.items()}
            self.noise = {name: noise for name, (_, noise) in found.items()}
            for name, phi in self.phi.items():
                if not math.isnan(phi + self.phi[self.anchor]):
                    ratio = (self.phi[self.anchor] + self.eps) / (phi + self.eps)
                    r = math.sqrt(min(max(ratio, self.bounds[0]), self.bounds[1]))
                    self.mu[name] = self.decay * self.mu[name] + (1 - self.decay) * r
        mean = {name: sum(g[name] for g in micro) / self.n for name in self.by_module}
        self.step(mean, self.clip(mean, t), self.mu if active and self.modulate else dict.fromkeys(self.mu, 1.0))

    def clip(self, mean: dict[str, torch.Tensor], t: int) -> float:
        """The factor that clipping puts on the global gradient."""
        inside = self.clip_window is None or self.clip_window[0] <= t <= self.clip_window[1]
        if not self.max_norm or not inside:
            return 1.0
        norm = math.sqrt(sum(float(g @ g) for g in mean.values()))
        return min(1.0, self.max_norm / (norm + 1e-6))

    def step(self, mean: dict[str, torch.Tensor], clip: float, mu: dict[str, float]) -> None:
        """Step the base with each module's rate times its factor."""
        for group, (name, parameters) in zip(self.optimizer.param_groups, self.by_module.items(), strict=True):
            group["lr"] = self.options["lr"] * mu[name]
            pieces = mean[name].split([p.numel() for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.grad = (clip * piece).view_as(parameter)
        self.optimizer.step()


class Lion(torch.optim.Optimizer):
    """p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g.  DeepSpeed's CPU kernel takes sign(0) = 1."""

    def __init__(self, params: object, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * self.sign(beta1 * m + (1 - beta1) * p.grad))
                m.mul_(beta2).add_((1 - beta2) * p.grad)

    def sign(self, values: torch.Tensor) -> torch.Tensor:
        return torch.copysign(torch.ones_like(values), values)


class LionOnGPU(Lion):
    """DeepSpeed's kernel for a GPU takes sign(0) = -1."""

    def sign(self, values: torch.Tensor) -> torch.Tensor:
        return torch.where(values > 0, 1.0, -1.0)


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962) as DeepSpeed's kernel has it: the trust ratio is kept within 0.01 .. 10, and multiplies weight
    decay too; the bias correction is the step's, not the moments'.
    """

    def __init__(self, params: object, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                t = state["step"] = state.get("step", 0) + 1
                m = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 1 - beta1)
                v = state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(p.grad**2, 1 - beta2)
                moved = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
                trust = p.norm() / moved.norm() if p.norm() > 0 and moved.norm() > 0 else torch.ones_like(p.norm())
                rate = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
                p.sub_(rate * trust.clamp(0.01, 10) * moved)


class AdamWithoutBiasCorrection(torch.optim.Adam):
    """DeepSpeed's ``bias_correction: false``, with decoupled weight decay."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                v = self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p))
                m.mul_(beta1).add_((1 - beta1) * p.grad)
                v.mul_(beta2).add_((1 - beta2) * p.grad**2)
                p.sub_(lr * (m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p))


def official(half: torch.Tensor, v: torch.Tensor, n: int, beta2: float, eps: float) -> torch.Tensor:
    """The official implementation's preconditioned gradient of a half, which it takes before rescaling by n."""
    raw = half / n
    return torch.where(raw == 0, 0.0, half / ((beta2 * v + (1 - beta2) * raw * raw) ** 0.5 + eps))


def grad(parameter: nn.Parameter) -> torch.Tensor:
    """Its gradient, zeros when it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
