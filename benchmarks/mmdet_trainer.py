"""mmdet's own ``train_detector(distributed=True)`` without a GPU: what tools/train.py of mmdet 2.28 does, over gloo.

    deepspeed --num_gpus 2 benchmarks/mmdet_trainer.py CONFIG --work-dir W --seed 0
    deepspeed --num_gpus 2 benchmarks/mmdet_trainer.py CONFIG --work-dir W --seed 0 --deepspeed_config X.json

mmdet and mmcv need three changes for it, all here: ``init_dist`` divides by the number of GPUs, so the group is made by
torch; ``build_ddp`` refuses a CPU; and MMDistributedDataParallel opens DataContainers only for a GPU.

With a DeepSpeed JSON, a bare DeepSpeed engine takes the place of MMDistributedDataParallel and of mmcv's OptimizerHook: what
DeepSpeed itself costs.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import deepspeed
import torch
from mmcv import Config
from mmcv.parallel import MMDistributedDataParallel
from mmcv.parallel.scatter_gather import scatter_kwargs
from mmcv.runner import HOOKS, Hook
from mmdet.apis import init_random_seed, set_random_seed, train_detector
from mmdet.apis import train as mmdet_train
from mmdet.datasets import build_dataset
from mmdet.models import build_detector
from mmdet.utils import get_root_logger, setup_multi_processes
from torch import nn

CPU = -1
"""mmcv's number of it among the GPUs."""


class CPUDistributedDataParallel(MMDistributedDataParallel):  # type: ignore[misc]
    """MMDistributedDataParallel that opens DataContainers on a CPU as it does for a GPU."""

    def train_step(self, *inputs: Any, **kwargs: Any) -> Any:
        """As it is, of the opened batch."""
        opened, options = self.to_cpu(inputs, kwargs)
        return super().train_step(*opened[0], **options[0])

    def to_cpu(self, inputs: Any, kwargs: Any) -> Any:
        """What ``scatter`` is for a GPU."""
        return scatter_kwargs(inputs, kwargs, [CPU], dim=self.dim)


def build_ddp(model: Any, device: str, device_ids: Any, **options: Any) -> CPUDistributedDataParallel:
    """mmdet.utils.build_ddp for a CPU."""
    return CPUDistributedDataParallel(model, **options)


class BareModel(nn.Module):
    """A DeepSpeed engine as mmcv's runner calls it."""

    engine: Any = None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def train_step(self, data: Any, optimizer: Any) -> dict[str, Any]:
        """As BaseDetector.train_step, through the engine."""
        _, opened = self.to_cpu((), data)
        loss, log_vars = self.module._parse_losses(self.engine(**opened[0]))  # type: ignore[operator]
        return {"loss": loss, "log_vars": log_vars, "num_samples": len(opened[0]["img_metas"])}

    def to_cpu(self, inputs: Any, kwargs: Any) -> Any:
        """What ``scatter`` is for a GPU."""
        return scatter_kwargs(inputs, kwargs, [CPU])


@HOOKS.register_module()
class BareEngineHook(Hook):
    """In the place of mmcv's OptimizerHook."""

    def __init__(self, config: str) -> None:
        self.config = config

    def before_run(self, runner: Any) -> None:
        """The engine needs the optimizer, which train_detector makes late."""
        engine, *_ = deepspeed.initialize(
            model=runner.model.module, optimizer=runner.optimizer, config=self.config, dist_init_required=False
        )
        object.__setattr__(runner.model, "engine", engine)

    def after_train_iter(self, runner: Any) -> None:
        """Backward and update."""
        runner.model.engine.backward(runner.outputs["loss"])
        runner.model.engine.step()


def build_bare(model: Any, device: str, device_ids: Any, **options: Any) -> BareModel:
    """mmdet.utils.build_ddp for DeepSpeed."""
    return BareModel(model)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--work-dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deepspeed_config")
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    torch.distributed.init_process_group("gloo")
    mmdet_train.build_ddp = build_bare if args.deepspeed_config else build_ddp
    cfg = Config.fromfile(args.config)
    if args.deepspeed_config:
        deepspeed.init_distributed("gloo")
        cfg.optimizer_config = dict(type="BareEngineHook", config=args.deepspeed_config)
    setup_multi_processes(cfg)
    cfg.work_dir, cfg.device, cfg.gpu_ids = args.work_dir, "cpu", range(torch.distributed.get_world_size())
    timestamp = time.strftime("%Y%m%d_%H%M%S", time.localtime())
    get_root_logger(f"{args.work_dir}/{timestamp}.log", cfg.log_level)
    cfg.seed = init_random_seed(args.seed, "cpu")
    set_random_seed(cfg.seed)
    detector = build_detector(cfg.model, train_cfg=cfg.get("train_cfg"), test_cfg=cfg.get("test_cfg"))
    detector.init_weights()
    data = build_dataset(cfg.data.train)
    detector.CLASSES = data.CLASSES
    train_detector(detector, data, cfg, distributed=True, validate=False, timestamp=timestamp, meta={"seed": cfg.seed})


if __name__ == "__main__":
    main()
