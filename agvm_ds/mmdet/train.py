"""One training run of an mmdet detector under DeepSpeed, with AGVM or without."""

from __future__ import annotations

import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmcv
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from mmcv import Config
from mmcv.runner import HOOKS, build_runner
from mmdet import __version__ as mmdet_version
from mmdet.datasets import NumClassCheckHook
from mmdet.utils import get_root_logger
from torch import nn

import agvm_ds
from agvm_ds.checkpoints import Placed
from agvm_ds.config import ConfigError
from agvm_ds.deepspeed_json import load_config
from agvm_ds.health import schedule_warnings
from agvm_ds.mmdet import data, optimizer, rehearsal, session
from agvm_ds.mmdet import runner as runners
from agvm_ds.mmdet.checkpointing import Saving, fit_storage, refuse_nothing_to_resume, saved_seed
from agvm_ds.mmdet.checks.data_check import check_on_hosts
from agvm_ds.mmdet.configs import blamed, config_path, detector_of, listed, read_config, work_dir_of
from agvm_ds.mmdet.detector.model import EngineModel, put_on
from agvm_ds.mmdet.detector.nonfinite import KEY, NumberWatch
from agvm_ds.mmdet.detector.precision import enable_half
from agvm_ds.mmdet.detector.pretrained import init_weights, provide
from agvm_ds.mmdet.detector.sync_bn import settle_sync_bn
from agvm_ds.mmdet.detector.weights import keep_unrounded, load_weights
from agvm_ds.mmdet.evaluate import plain_detector
from agvm_ds.mmdet.hooks.custom import engine_hook, engine_hooks
from agvm_ds.mmdet.hooks.evaluation import EngineEvalHook
from agvm_ds.mmdet.hooks.log import AGVMLogHook, ThroughputHook
from agvm_ds.mmdet.limits import refuse_detector, refuse_unsupported
from agvm_ds.mmdet.plan import Plan, make_plan
from agvm_ds.mmdet.process.errors import HostError, tell_lost
from agvm_ds.mmdet.process.outputs import make_folder
from agvm_ds.mmdet.process.signals import RankWatch, shield_workers
from agvm_ds.mmdet.progress import ProgressHook, waiting
from agvm_ds.mmdet.recipe import recipe_of
from agvm_ds.mmdet.record import write_record
from agvm_ds.mmdet.rehearsal import warm_up_updates
from agvm_ds.mmdet.summary import summarize
from agvm_ds.monitor import FILE_NAME, JsonLines, keep_before


@dataclass(frozen=True)
class TrainOptions:
    """The command line of ``launch/train.py``."""

    deepspeed_config: str
    config: str | None = None
    work_dir: str | None = None
    resume: bool = False
    allow_older: bool = False
    keep: int | None = None
    load_from: str | None = None
    trust_checkpoint: bool = False
    seed: int | None = None
    diff_seed: bool = False
    deterministic: bool = False
    validate: bool = True
    auto_scale_lr: bool = False
    allow_other_categories: bool = False
    revert_sync_bn: bool = False
    dry_run: bool = False
    """Build all, make one update, print what the run would be, and write nothing."""
    cfg_options: dict[str, Any] = field(default_factory=dict)


def train(options: TrainOptions) -> None:
    """Train, evaluate, and leave the work dir complete. Raises ConfigError, before training, for bad input."""
    started = time.perf_counter()
    session.init_distributed()
    watch = RankWatch(tell_lost)
    with watch.naming_the_dead():
        with session.agreeing():
            plan, cfg, work_dir = prepare(options)
        with nullcontext() if options.dry_run else session.alone_in(work_dir):
            run(options, plan, cfg, work_dir, watch, started)


def run(options: TrainOptions, plan: Plan, cfg: Config, work_dir: Path, watch: RankWatch, started: float) -> None:
    """A run whose ranks have met."""
    with waiting("looking through the data sets"):
        session.make_demo_data(options.config, cfg)
        plan.notes += check_on_hosts(cfg, splits_read(options, cfg), options.allow_other_categories)
    # DeepSpeed's autotuner takes a run for failed when the word "error" is in it, which compiler flags (-Werror) have.
    tuned = (plan.deepspeed.get("autotuning") or {}).get("enabled", False)
    logger = session.open_log(cfg, None if options.dry_run else work_dir, environment=not tuned)
    asked = options.seed if options.seed is not None else cfg.get("seed")
    asked = saved_seed(work_dir) if options.resume and asked is None else asked
    seed = session.settle_seed(cfg, asked, options.diff_seed, options.deterministic)
    loaders = data.phase_loaders(cfg, plan.batch)
    for phase_loader in loaders:
        shield_workers(phase_loader)
    loader = loaders[[phase for phase, _ in cfg.workflow].index("train")]
    with waiting("building the detector and its first weights"):
        detector = make_detector(cfg, plan, loader.dataset.CLASSES, options)
    check_num_classes(cfg, detector, loader)
    refuse_detector(detector, plan)
    setup = optimizer.build(detector, cfg, plan)
    # Before ZeRO cuts the parameters.
    modules = list(rehearsal.module_rows(detector, setup.groups)) if options.dry_run else []
    unrounded = keep_unrounded(detector) if plan.half else {}
    saving = Saving(Placed.of(detector, setup.groups), unrounded, recipe_of(cfg, plan), kept(cfg))
    if options.dry_run:
        plan.deepspeed = rehearsal.without_monitors(plan.deepspeed)
    else:
        plan.notes += fit_storage(plan.deepspeed, work_dir)
    put_on(detector, get_accelerator().current_device_name())
    with waiting(f"DeepSpeed takes the detector (ZeRO stage {stage_of(plan)}; it may compile kernels the first time)"):
        engine, *_ = agvm_ds.initialize(
            model=detector, optimizer=setup.optimizer, model_parameters=setup.groups, config=plan.deepspeed
        )
    published = plain_detector(cfg, engine.device) if "val" in splits_read(options, cfg) else None
    model = EngineModel(engine, NumberWatch(engine, cfg.get(KEY, 0), loader.dataset), watch, published)
    runner = make_runner(options, cfg, plan, model, seed, saving, watch)
    if cfg.runner.type == "EpochBasedRunner":
        runner.updates_per_epoch = len(loader)
    evaluation = add_evaluation(options, cfg, runner) if options.validate else None
    clock = ThroughputHook(plan.batch.train)
    runner.register_hook(clock, priority="VERY_HIGH")
    updates = runner.max_iters or runner.max_epochs * len(loader)
    if plan.agvm is not None:
        for warning in schedule_warnings(plan.agvm, updates, warm_up_updates(cfg, len(loader))):
            logger.warning(warning)
    for note in plan.notes:
        logger.info(note)
    if options.dry_run:
        rehearsal.rehearse(cfg, plan, runner, loader, modules, updates)
        return
    if options.resume:
        runner.resume_state(loader, options.allow_older)
    else:
        runner.set_earlier_aside()
    write_record(cfg, plan, runner, updates, options.resume)
    if engine.global_rank == 0:
        if engine.agvm is not None:
            engine.agvm.listeners.append(JsonLines(work_dir / FILE_NAME, engine.agvm))
        else:
            keep_before(work_dir / FILE_NAME, engine.global_steps)
    logger.info("waiting for the first update and its data ...")
    with ProgressHook() as progress:
        runner.register_hook(progress, priority="VERY_LOW")
        runner.run(loaders, [tuple(phase) for phase in cfg.workflow])
    if engine.global_rank == 0:
        summarize(work_dir, evaluation, clock, started, engine.agvm is not None)
    comm.barrier()


def stage_of(plan: Plan) -> int:
    """The ZeRO stage that the JSON asks for."""
    return int((plan.deepspeed.get("zero_optimization") or {}).get("stage", 0))


def prepare(options: TrainOptions) -> tuple[Plan, Config, Path]:
    """All that a rank can know to be wrong by itself: config, JSON, arithmetic, work dir."""
    deepspeed_config = load_config(options.deepspeed_config)
    cfg = read_config(options.config, options.cfg_options)
    plan = make_plan(deepspeed_config, cfg, int(os.environ.get("WORLD_SIZE", "1")), options.auto_scale_lr)
    refuse_unsupported(cfg, plan)
    work_dir = work_dir_of(cfg, options.config, options.work_dir)
    cfg.work_dir = str(work_dir)
    seed = options.seed if options.seed is not None else cfg.get("seed")
    if seed is not None and not 0 <= seed < 2**32:
        raise ConfigError(f"seed = {seed}: must be 0 to 2**32 - 1")
    if options.validate and "evaluation" in cfg and cfg.evaluation is None:
        raise ConfigError("evaluation = None: to train without evaluations use --no-validate")
    if options.resume and options.dry_run:
        raise ConfigError("--dry-run shows a run from its beginning: leave out --resume")
    if options.resume:
        refuse_nothing_to_resume(work_dir)
    if options.keep is not None:
        cfg.checkpoint_config = {**(cfg.get("checkpoint_config") or {}), "max_keep_ckpts": options.keep}
    cfg.load_from = options.load_from or cfg.get("load_from")
    if cfg.load_from and not options.resume and "://" not in cfg.load_from and not Path(cfg.load_from).is_file():
        raise HostError(f"{'--load-from' if options.load_from else 'load_from'}: not found: {cfg.load_from}")
    if not options.dry_run:
        make_folder("--work-dir", work_dir)
    return plan, cfg, work_dir


def kept(cfg: Config) -> int | None:
    """How many checkpoints stay; None: all."""
    most = (cfg.get("checkpoint_config") or {}).get("max_keep_ckpts", -1)
    return int(most) if most > 0 else None


def splits_read(options: TrainOptions, cfg: Config) -> list[str]:
    """Which of the config's data sets this run reads."""
    validates = options.validate or any(phase == "val" for phase, _ in cfg.workflow)
    return ["train", "val"] if validates else ["train"]


def make_detector(cfg: Config, plan: Plan, classes: Any, options: TrainOptions) -> nn.Module:
    """The detector with its first weights, before DeepSpeed takes it. A resume brings its own after that."""
    detector = detector_of(cfg)
    plan.notes += settle_sync_bn(detector, options.revert_sync_bn)
    quiet = logging.getLogger("mmcv")
    level = quiet.level
    quiet.setLevel(logging.WARNING)  # a line a parameter otherwise
    init_weights(detector, options.trust_checkpoint)
    quiet.setLevel(level)
    detector.CLASSES = classes
    if cfg.load_from and not options.resume:
        provide({cfg.load_from: "load_from"})
        load_weights(detector, cfg.load_from, get_root_logger(), options.trust_checkpoint)
    if plan.computes:
        enable_half(detector, plan.computes)
    return detector


def check_num_classes(cfg: Config, detector: nn.Module, loader: Any) -> None:
    """NumClassCheckHook's own check, where the config has it, before anything is trained."""
    if any(hook["type"] == "NumClassCheckHook" for hook in listed(cfg.get("custom_hooks"))):
        with blamed("num_classes in the model, or classes of the data"):
            NumClassCheckHook().before_train_epoch(
                SimpleNamespace(model=detector, data_loader=loader, logger=get_root_logger())
            )


def make_runner(
    options: TrainOptions, cfg: Config, plan: Plan, model: EngineModel, seed: int, saving: Saving, watch: RankWatch
) -> Any:
    """mmcv's runner with the config's hooks; the engine takes the place of the optimizer hook."""
    kind, engine = cfg.runner.type, model.engine
    for group in engine.basic_optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # before a resume brings the rate of its update
    meta = {
        "config": cfg.pretty_text,
        "seed": seed,
        "exp_name": config_path(options.config).name,
        "mmdet_version": mmdet_version,
    }
    runner = build_runner(
        {**cfg.runner, "type": runners.ENGINE_RUNNERS[kind].__name__},
        default_args={
            "model": model,
            "optimizer": engine.basic_optimizer,
            "work_dir": None if options.dry_run else cfg.work_dir,  # which the runner makes
            "logger": get_root_logger(),
            "meta": meta,
            "batch": plan.batch,
            "saving": saving,
            "watch": watch,
        },
    )
    runner.timestamp = cfg.timestamp
    with blamed("lr_config, log_config, momentum_config, checkpoint_config or custom_hooks"):
        # DeepSpeed's engine.step() is the optimizer hook
        runner.register_training_hooks(
            cfg.get("lr_config"), None, None, cfg.get("log_config"), cfg.get("momentum_config")
        )
        if cfg.get("checkpoint_config"):
            settings = {"by_epoch": kind == "EpochBasedRunner", "type": "CheckpointHook", **cfg.checkpoint_config}
            runner.register_hook(mmcv.build_from_cfg(engine_hook(settings), HOOKS), priority="NORMAL")
        runner.register_hook(AGVMLogHook(engine), priority="NORMAL")
        runner.register_custom_hooks(engine_hooks(cfg.get("custom_hooks")))  # after the others, as mmcv has them
    if kind == "EpochBasedRunner":
        runner.register_hook(mmcv.runner.DistSamplerSeedHook())
    return runner


def add_evaluation(options: TrainOptions, cfg: Config, runner: Any) -> EngineEvalHook:
    """mmdet's evaluation, as the config's ``evaluation`` says."""
    settings = {**cfg.get("evaluation", {}), "by_epoch": cfg.runner.type != "IterBasedRunner"}
    loader = data.test_loader(cfg, "val")
    shield_workers(loader)
    with blamed("evaluation"):
        hook = EngineEvalHook(loader, **settings, detector=runner.model.published, engine=runner.engine)
    runner.register_hook(hook, priority="LOW")
    return hook
