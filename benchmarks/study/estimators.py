"""Pairwise against split at fixed weights: how far each is from the gradient variance that very many micro-batches give.

Gradients of 1,000 micro-batches are taken once; all that both estimators need of any choice of n of them is in their inner
products, module by module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv import Config
from mmcv.parallel import collate
from mmcv.runner import load_checkpoint
from mmdet.datasets import build_dataset
from numpy.typing import NDArray
from rich.progress import track

from agvm_ds.groups import MODULE, PARAMS, param_groups
from agvm_ds.mmdet.configs import detector_of, read_config
from agvm_ds.mmdet.detector.model import to_device
from agvm_ds.mmdet.detector.modules import modules_of
from agvm_ds.variance import pairwise_variance, split_variance
from benchmarks.study.launch import DETECTORS
from benchmarks.study.protocol import MICRO

Array = NDArray[np.float64]

GRADIENTS, DRAWS = 1000, 2000
COUNTS = (4, 8, 16, 32)
"""Micro-batches in an update."""
EPOCHS = (1, 4, 8)
"""After which the weights are taken."""
COLUMNS = 4096
"""Elements of all gradients that are multiplied in float64 at once."""


def inner_products(weights: Path, gradients: int = GRADIENTS) -> dict[str, Array]:
    """module -> (gradients, gradients): inner products of the gradients of so many micro-batches, at these weights."""
    cfg = read_config(str(DETECTORS["BN"]))
    detector: Any = detector_of(cfg)
    load_checkpoint(detector, str(weights), map_location="cpu")
    detector.train()
    members = {group[MODULE]: group[PARAMS] for group in param_groups(detector, modules_of(detector))}
    rows = {name: np.empty((gradients, sum(p.numel() for p in some)), np.float32) for name, some in members.items()}
    for number, data in enumerate(track(micro_batches(cfg, gradients), weights.name, gradients)):
        detector.zero_grad()
        detector.train_step(data, None)["loss"].backward()
        for name, some in members.items():
            rows[name][number] = torch.cat([p.grad.reshape(-1) for p in some]).numpy()
    return {name: gram(values) for name, values in rows.items()}


def micro_batches(cfg: Config, count: int) -> Iterator[dict[str, Any]]:
    """``count`` micro-batches, each of MICRO training images drawn at random."""
    images = build_dataset(cfg.data.train)
    random = np.random.default_rng(0)
    torch.manual_seed(0)  # the heads' samplers
    np.random.seed(0)
    for _ in range(count):
        drawn = random.choice(len(images), MICRO, replace=False)
        yield to_device(collate([images[int(index)] for index in drawn], samples_per_gpu=MICRO), "cpu")


def gram(rows: NDArray[np.float32]) -> Array:
    """(k, elements) -> (k, k), added up in float64."""
    result = np.zeros((len(rows), len(rows)))
    for start in range(0, rows.shape[1], COLUMNS):
        part = rows[:, start : start + COLUMNS].astype(np.float64)
        result += part @ part.T
    return result


def estimates(products: Array, members: NDArray[np.int64]) -> tuple[float, float]:
    """(pairwise, split) of the update whose micro-batches are these; split's halves are the first and the last."""
    some = products[np.ix_(members, members)]
    n, half = len(members), len(members) // 2
    aa, bb, ab = some[:half, :half].mean(), some[half:, half:].mean(), some[:half, half:].mean()
    return pairwise_variance(float(np.trace(some)), float(some.mean()), n), split_variance(ab, aa, bb)


def true_variance(products: Array, n: int) -> float:
    """What an update of n micro-batches has in expectation, by the mean moments of all that there are."""
    count = len(products)
    m = float(np.trace(products)) / count
    c = (float(products.sum()) - m * count) / (count * (count - 1))
    return pairwise_variance(n * m, (m + (n - 1) * c) / n, n)


def compare(products: Mapping[str, Array], draws: int = DRAWS) -> list[dict[str, Any]]:
    """A row a module and n: the true variance; bias and spread of both; split's mean squared error over pairwise's."""
    random = np.random.default_rng(1)
    rows = []
    for n in COUNTS:
        count = len(next(iter(products.values())))
        drawn = [random.choice(count, n, replace=False) for _ in range(draws)]
        for name, matrix in products.items():
            truth = true_variance(matrix, n)
            errors = np.array([estimates(matrix, some) for some in drawn]) - truth
            bias, spread = errors.mean(0), errors.std(0)
            squares = (errors**2).mean(0)
            rows.append(
                {
                    "module": name,
                    "n": n,
                    "variance": truth,
                    "bias": dict(zip(("pairwise", "split"), bias.tolist(), strict=True)),
                    "spread": dict(zip(("pairwise", "split"), spread.tolist(), strict=True)),
                    "fewer": float(squares[1] / squares[0]),
                }
            )
    return rows
