"""How the memory estimate of launch/plan.py compares with the training memory that mmdet's model zoo publishes.

    python -m benchmarks.zoo_memory      about 15 minutes on one core

For each config that mmdet ships with a published "Training Memory (GB)" and trains in fp32: (published - weights, gradients,
optimizer) / (images a GPU x estimated activations). HEADROOM in agvm_ds/mmdet/planning/memory.py must reach the 90 %
quantile. The published figures are those of mmdet's authors, on V100s in ZeRO-less data parallelism, with older torch.
"""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Iterator
from pathlib import Path

import mmdet
import yaml  # type: ignore[import-untyped]

from agvm_ds.bases import base_from_json
from agvm_ds.config import ConfigError
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.planning.memory import GIB, HEADROOM, footprint, moments_of, needs

ZOO = Path(mmdet.__file__).parent / ".mim" / "configs"


def published() -> Iterator[tuple[str, float]]:
    """(config, GiB) of mmdet's metafiles."""
    for file in sorted(ZOO.glob("*/metafile.yml")):
        content = yaml.safe_load(file.read_text())
        for model in (content.get("Models") if isinstance(content, dict) else content) or []:
            memory = (model.get("Metadata") or {}).get("Training Memory (GB)")
            if memory is not None:
                yield model["Config"].removeprefix("configs/").removesuffix(".py"), float(memory)


def ratio(name: str, memory: float) -> float | str:
    """Published over estimated activations, or why there is none."""
    try:
        cfg = read_config(name)
        if cfg.get("fp16"):
            return "fp16"
        sizes = footprint(cfg)
        options = {key: value for key, value in cfg.optimizer.items() if key in ("lr", "momentum")}
        moments = moments_of(base_from_json({"optimizer": {"type": cfg.optimizer.type}})[0], options)
    except ConfigError as error:
        return f"not built: {str(error).splitlines()[0]}"
    if sizes.saved is None:
        return sizes.note
    states = needs(sizes, 0, 1, 1, moments, False).total
    return (memory * GIB - states) / (cfg.data.train_dataloader.get("samples_per_gpu", 2) * sizes.saved)


def main() -> None:
    """Compare and print."""
    values = []
    for name, memory in published():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = ratio(name, memory)
        print(f"{name}: {found:.2f}" if isinstance(found, float) else f"{name}: left out: {found}", flush=True)
        values += [found] if isinstance(found, float) else []
    tenths = statistics.quantiles(values, n=10)
    within = sum(value <= HEADROOM for value in values) / len(values)
    print(f"{len(values)} configs: median {tenths[4]:.2f}, 90 % {tenths[8]:.2f}, largest {max(values):.1f}")
    print(f"HEADROOM {HEADROOM}: enough for {within:.0%}")


if __name__ == "__main__":
    main()
