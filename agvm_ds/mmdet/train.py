"""One training run of an mmdet detector under DeepSpeed, with AGVM or without."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import mmcv
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from mmcv import Config
from mmcv.runner import build_runner, load_checkpoint
from mmdet import __version__ as mmdet_version
from mmdet.apis import init_random_seed, set_random_seed
from mmdet.models import build_detector
from mmdet.utils import collect_env, get_root_logger, setup_multi_processes
from torch import nn

import agvm_ds
from agvm_ds.config import ConfigError
from agvm_ds.engine import load_config
from agvm_ds.mmdet import data, optimizer
from agvm_ds.mmdet.configs import DEMO_CONFIG, config_path, read_config
from agvm_ds.mmdet.errors import HostError
from agvm_ds.mmdet.evaluate import plain_detector
from agvm_ds.mmdet.hooks import AGVMLogHook, EngineCheckpointHook, EngineEvalHook, ThroughputHook
from agvm_ds.mmdet.model import EngineModel
from agvm_ds.mmdet.plan import Plan, make_plan
from agvm_ds.mmdet.precision import enable_half
from agvm_ds.mmdet.runner import refuse_nothing_to_resume
from agvm_ds.mmdet.summary import summarize
from agvm_ds.monitor import FILE_NAME, JsonLines


@dataclass(frozen=True)
class TrainOptions:
    """The command line of ``launch/train.py``."""

    deepspeed_config: str
    config: str | None = None
    work_dir: str | None = None
    resume: bool = False
    load_from: str | None = None
    seed: int | None = None
    diff_seed: bool = False
    deterministic: bool = False
    validate: bool = True
    allow_other_categories: bool = False
    cfg_options: dict[str, Any] = field(default_factory=dict)


def train(options: TrainOptions) -> None:
    """Train, evaluate, and leave the work dir complete. Raises ConfigError, before training, for bad input."""
    started = time.perf_counter()
    plan, cfg, work_dir = prepare(options)
    init_distributed()
    if config_path(options.config) == DEMO_CONFIG:
        make_demo_data(cfg)
    data.check_files(cfg)
    logger = open_log(cfg, work_dir)
    seed = settle_seed(options, cfg)
    loaders = data.train_loaders(cfg, plan.batch, options.allow_other_categories)
    detector = make_detector(options, cfg, plan, loaders[0].dataset.CLASSES)
    setup = optimizer.build(detector, cfg, plan)
    engine, *_ = agvm_ds.initialize(
        model=detector, optimizer=setup.optimizer, model_parameters=setup.groups, config=plan.deepspeed
    )
    runner = make_runner(options, cfg, plan, engine, work_dir, seed)
    evaluation = add_evaluation(options, cfg, runner) if options.validate else None
    clock = ThroughputHook()
    runner.register_hook(clock, priority="VERY_HIGH")
    write_effective_configs(cfg, plan, engine, work_dir)
    if options.resume:
        runner.resume_state(len(loaders[0]))
    if engine.agvm is not None and engine.global_rank == 0:
        engine.agvm.listeners.append(JsonLines(work_dir / FILE_NAME, engine.agvm))
    for note in plan.notes:
        logger.info(note)
    runner.run(loaders, [tuple(phase) for phase in cfg.workflow])
    if engine.global_rank == 0:
        summarize(work_dir, evaluation, clock, plan.batch.train, started, engine.agvm is not None)
    comm.barrier()


def prepare(options: TrainOptions) -> tuple[Plan, Config, Path]:
    """All that can be known to be wrong before ranks meet: config, JSON, arithmetic, work dir."""
    deepspeed_config = load_config(options.deepspeed_config)
    cfg = read_config(options.config, options.cfg_options)
    plan = make_plan(deepspeed_config, cfg, int(os.environ.get("WORLD_SIZE", "1")))
    named = options.work_dir or cfg.get("work_dir") or f"work_dirs/{config_path(options.config).stem}"
    cfg.work_dir, work_dir = str(named), Path(named)
    if options.resume:
        refuse_nothing_to_resume(work_dir)
    if options.load_from and not Path(options.load_from).is_file():
        raise ConfigError(f"--load-from: not found: {options.load_from}")
    make_work_dir(work_dir)
    return plan, cfg, work_dir


def make_work_dir(work_dir: Path) -> None:
    """Raise HostError when files cannot be written there."""
    probe = work_dir / f".probe_{os.environ.get('RANK', '0')}"
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise HostError(f"--work-dir {work_dir}: cannot be written: {error.strerror}") from None


def init_distributed() -> None:
    """Join the ranks over the accelerator's backend (gloo without a GPU)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(get_accelerator().communication_backend_name())


def make_demo_data(cfg: Config) -> None:
    """The built-in data set, made once on each host."""
    from agvm_ds.demo.data import ensure

    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            ensure(cfg.data_root)
        except (OSError, ImportError) as error:
            raise HostError(f"the built-in data: {error}") from error
    comm.barrier()


def open_log(cfg: Config, work_dir: Path) -> logging.Logger:
    """mmdet's logger: rank 0 writes text to the terminal and ``<time>.log``; AGVM's words go to the same places."""
    cfg.timestamp = time.strftime("%Y%m%d_%H%M%S", time.localtime())
    logger = get_root_logger(str(work_dir / f"{cfg.timestamp}.log"), cfg.get("log_level", "INFO"))
    own = logging.getLogger("agvm_ds")
    own.handlers, own.propagate = logger.handlers, False
    setup_multi_processes(cfg)
    if comm.get_rank() == 0:
        logger.info("Environment:\n%s", "\n".join(f"{key}: {value}" for key, value in collect_env().items()))
    return logger  # type: ignore[no-any-return]


def settle_seed(options: TrainOptions, cfg: Config) -> int:
    """Seed this rank as mmdet's tools do: one seed for all ranks unless ``--diff-seed``."""
    device = get_accelerator().device_name()
    seed = int(init_random_seed(options.seed if options.seed is not None else cfg.get("seed"), device))
    mine = seed + comm.get_rank() if options.diff_seed else seed
    set_random_seed(mine, deterministic=options.deterministic)
    cfg.seed = seed  # the samplers' seed must be the same on all ranks
    get_root_logger().info("seed %d%s", seed, ", plus the rank" if options.diff_seed else "")
    return seed


def make_detector(options: TrainOptions, cfg: Config, plan: Plan, classes: Any) -> nn.Module:
    """The detector with its first weights, before DeepSpeed takes it."""
    detector = build_detector(cfg.model, train_cfg=cfg.get("train_cfg"), test_cfg=cfg.get("test_cfg"))
    on_cpu = get_accelerator().device_name() == "cpu"
    if on_cpu and any(isinstance(module, nn.SyncBatchNorm) for module in detector.modules()):
        raise ConfigError("the detector has SyncBN, which needs a GPU; on a CPU set norm_cfg.type to BN or GN")
    quiet = logging.getLogger("mmcv")
    level = quiet.level
    quiet.setLevel(logging.WARNING)  # a line a parameter otherwise
    detector.init_weights()
    quiet.setLevel(level)
    detector.CLASSES = classes
    if options.load_from:
        load_checkpoint(detector, options.load_from, map_location="cpu", logger=get_root_logger())
    if plan.half:
        enable_half(detector, plan.half)
    return detector


def make_runner(options: TrainOptions, cfg: Config, plan: Plan, engine: Any, work_dir: Path, seed: int) -> Any:
    """mmcv's runner with the config's hooks; the engine takes the place of the optimizer hook."""
    kind = cfg.runner.type
    if kind not in ("EpochBasedRunner", "IterBasedRunner"):
        raise ConfigError(f"runner.type = {kind}: allowed: EpochBasedRunner, IterBasedRunner")
    for group in engine.basic_optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # before a resume brings the rate of its update
    meta = {
        "config": cfg.pretty_text,
        "seed": seed,
        "exp_name": config_path(options.config).name,
        "mmdet_version": mmdet_version,
    }
    runner = build_runner(
        {**cfg.runner, "type": kind.replace("Runner", "EngineRunner")},
        default_args={
            "model": EngineModel(engine),
            "optimizer": engine.basic_optimizer,
            "work_dir": str(work_dir),
            "logger": get_root_logger(),
            "meta": meta,
        },
    )
    runner.timestamp = cfg.timestamp
    runner.register_training_hooks(
        cfg.get("lr_config"),
        None,  # DeepSpeed's engine.step() is the optimizer hook
        None,
        cfg.get("log_config"),
        cfg.get("momentum_config"),
        custom_hooks_config=cfg.get("custom_hooks"),
    )
    if cfg.get("checkpoint_config"):
        runner.register_hook(EngineCheckpointHook(**cfg.checkpoint_config), priority="NORMAL")
    runner.register_hook(AGVMLogHook(engine), priority="NORMAL")
    if kind == "EpochBasedRunner":
        runner.register_hook(mmcv.runner.DistSamplerSeedHook())
    return runner


def add_evaluation(options: TrainOptions, cfg: Config, runner: Any) -> EngineEvalHook:
    """mmdet's evaluation, as the config's ``evaluation`` says."""
    settings = {**cfg.get("evaluation", {}), "by_epoch": cfg.runner.type != "IterBasedRunner"}
    detector = plain_detector(cfg, runner.engine.device)
    loader = data.test_loader(cfg, "val", options.allow_other_categories)
    hook = EngineEvalHook(loader, **settings, detector=detector, engine=runner.engine)
    runner.register_hook(hook, priority="LOW")
    return hook


def write_effective_configs(cfg: Config, plan: Plan, engine: Any, work_dir: Path) -> None:
    """What this run really does: ``config.py`` (mmdet) and ``deepspeed.json`` in the work dir."""
    if engine.global_rank != 0:
        return
    effective = dict(plan.deepspeed)
    if engine.agvm is not None:
        effective["agvm"] = {**engine.agvm.config.model_dump(mode="json"), "modules": engine.agvm.modules}
    (work_dir / "deepspeed.json").write_text(json.dumps(effective, indent=2) + "\n")
    cfg.dump(str(work_dir / "config.py"))
