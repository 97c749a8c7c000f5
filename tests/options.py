"""What a DeepSpeed user may switch on, option by option, each against the dense reference in every stage it has.

``python -m benchmarks.exactness`` prints the table; tests/distributed/test_options.py asserts it.
Two ranks, two accumulation steps. A row either agrees with the reference or is refused, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.lr_schedules import WarmupLR
from torch.optim.lr_scheduler import OneCycleLR

from agvm_ds.bases import REFUSED
from agvm_ds.config import ConfigError
from tests import models
from tests.comparison import FIGURE_BF16, FIGURE_BF16_ADAM, Expected, Worst, compare, expected_of
from tests.engines import OPTIONS, ROWS, Record, ds_config, identical, record, started, update
from tests.launch import ON_GPU, run_ranks
from tests.reference import AdamWithoutBiasCorrection, Lamb, Lion, LionOnGPU, Reference
from tests.toy import Toy, rounded

RANKS, ACCUMULATION, UPDATES = 2, 2, 6
ANY, ZERO, FLAT = (0, 1, 2, 3), (1, 2, 3), (1, 2)


@dataclass(frozen=True)
class Way:
    """What is measured, with which base."""

    base: str
    estimator: str
    bucket: int = 500_000_000

    def __str__(self) -> str:
        return f"{self.base} {self.estimator}{f' bucket {self.bucket}' if self.bucket < 10**6 else ''}"


def both(base: str) -> list[Way]:
    """A base with either estimator."""
    return [Way(base, "pairwise"), Way(base, "split")]


WAYS = (Way("SGD", "split"), Way("AdamW", "pairwise"))
"""AdamW: of the preconditioned gradient. Between them all that reads a shard or reduces to one."""
ALL_WAYS = tuple(
    Way(base, estimator, bucket)
    for base in ("SGD", "AdamW")
    for estimator in ("pairwise", "split")
    for bucket in (500_000_000, 100)
    if (base, estimator) != ("SGD", "pairwise") or bucket > 100
)


@dataclass(frozen=True)
class Base:
    """An optimizer: how the JSON names it, its arguments, and the one of torch that it must agree with."""

    name: str
    params: Mapping[str, Any]
    json_only: Mapping[str, Any] = field(default_factory=dict)
    equal: type[torch.optim.Optimizer] | None = None

    @property
    def reference(self) -> type[torch.optim.Optimizer]:
        """Of the same name unless another is given."""
        return self.equal or getattr(torch.optim, self.name)


ADAM = {"lr": 0.003, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}
LION = {"lr": 0.001, "betas": [0.9, 0.99], "weight_decay": 0.1}
TORCH_ADAM = {"torch_adam": True}
DEEPSPEED_ADAM = Base("Adam", ADAM, equal=torch.optim.AdamW)
"""With decoupled weight decay; FusedAdam on a GPU, CPUAdam with ZeRO-Offload."""
BASES = {
    "SGD": Base("SGD", OPTIONS["SGD"]),
    "AdamW": Base("AdamW", ADAM, TORCH_ADAM),
    "Adam": Base("Adam", ADAM, TORCH_ADAM | {"adam_w_mode": False}),
    "Adagrad": Base("Adagrad", {"lr": 0.01, "initial_accumulator_value": 0.1}),
    "Adadelta": Base("Adadelta", {"lr": 0.5}),
    "Adamax": Base("Adamax", {"lr": 0.003}),
    "ASGD": Base("ASGD", {"lr": 0.01}),
    "NAdam": Base("NAdam", {"lr": 0.003}),
    "RAdam": Base("RAdam", {"lr": 0.003}),
    "RMSprop": Base("RMSprop", {"lr": 0.003, "momentum": 0.5, "centered": True}),
    "FusedAdam": Base("Adam", ADAM | {"bias_correction": False}, equal=AdamWithoutBiasCorrection),
    "CPUAdam": DEEPSPEED_ADAM,
    "Adam on a GPU": DEEPSPEED_ADAM,
    "CPUAdagrad": Base("Adagrad", {"lr": 0.01, "eps": 1e-6}),
    "torch's fused Adam": Base("AdamW", ADAM, TORCH_ADAM | {"fused": True}),
    "Lion on a GPU": Base("Lion", LION, equal=LionOnGPU),
    "Lamb on a GPU": Base("Lamb", ADAM, equal=Lamb),
    "CPULion": Base("Lion", LION, equal=Lion),
}


@dataclass(frozen=True)
class Option:
    """One row of the table."""

    name: str
    stages: Sequence[int] = ZERO
    config: Mapping[str, Any] = field(default_factory=dict)
    """Merged into the DeepSpeed configuration, one level deep."""
    model: Callable[[], Toy] = Toy
    bf16: bool = False
    """Half precision: compared as far as bf16 goes, from weights that it can hold."""
    zero_init: bool = False
    torch_backward: bool = False
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    """The learning-rate schedule that the configuration names; ``client_schedule``: that is handed to DeepSpeed."""
    client_schedule: bool = False
    max_norm: float = 0.0
    clip_window: tuple[int, int] | None = None
    ways: Sequence[Way] = WAYS
    refused: str = ""
    """Words of the refusal; empty: it must agree."""
    note: str = ""

    def allowed(self, way: Way) -> Worst:
        """How far it may be from the reference."""
        if self.bf16:
            return FIGURE_BF16_ADAM if issubclass(BASES[way.base].reference, torch.optim.Adam) else FIGURE_BF16
        return Worst(1e-5, 2e-5, 1e-5, 1e-5)  # variances: see test_reference.test_the_gradient_as_an_adam_sees_it


def zero(**settings: Any) -> dict[str, Any]:
    """Settings of ``zero_optimization``."""
    return {"zero_optimization": settings}


def warmup(optimizer: torch.optim.Optimizer) -> WarmupLR:
    return WarmupLR(optimizer, **WARMUP)


def one_cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, 0.02, total_steps=UPDATES + 1, cycle_momentum=False)


WARMUP = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 4}
CPU = {"device": "cpu"}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
ACCUMULATE_FP32 = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
IMMEDIATE = {"bf16": {"enabled": True, "immediate_grad_update": True}, "data_types": {"grad_accum_dtype": "fp32"}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
NOT_BY_DEEPSPEED = "in stages 2 and 3 DeepSpeed itself crashes or hangs, with AGVM or without"

CONFIGURATIONS = [
    Option("no option", ANY),
    Option("reduce_scatter: false", ZERO, zero(reduce_scatter=False)),
    Option("overlap_comm: true", ZERO, zero(overlap_comm=True)),
    Option("overlap_comm: false", ZERO, zero(overlap_comm=False)),
    Option("contiguous_gradients: false", ZERO, zero(contiguous_gradients=False, overlap_comm=False)),
    Option("contiguous_gradients: false, overlap_comm", ZERO, zero(contiguous_gradients=False, overlap_comm=True)),
    Option("reduce_bucket_size: 100", ZERO, zero(reduce_bucket_size=100)),
    Option("round_robin_gradients: true", FLAT, zero(round_robin_gradients=True)),
    Option("parameter_alignment: true", FLAT, zero(parameter_alignment=True)),
    Option("use_multi_rank_bucket_allreduce: false", FLAT, zero(use_multi_rank_bucket_allreduce=False)),
    Option("sub_group_size: 50", (3,), zero(sub_group_size=50)),
    Option("stage3_param_persistence_threshold: 0", (3,), zero(stage3_param_persistence_threshold=0)),
    Option("stage3_param_persistence_threshold: 1000000", (3,), zero(stage3_param_persistence_threshold=10**6)),
    Option("deepspeed.zero.Init", (3,), zero_init=True),
    Option("offload_optimizer: cpu", ZERO, zero(offload_optimizer=CPU)),
    Option("offload_optimizer: cpu, sub_group_size: 50", (3,), zero(offload_optimizer=CPU, sub_group_size=50)),
    Option("offload_optimizer and offload_param: cpu", (3,), zero(offload_optimizer=CPU, offload_param=CPU)),
    Option("prescale_gradients: true", (0,), {"prescale_gradients": True}),
    Option("gradient_predivide_factor: 2", (0,), {"gradient_predivide_factor": 2.0}),
    Option("gradient_clipping", ANY, max_norm=0.1),
    Option("gradient_clipping, clip_window", ANY, max_norm=0.1, clip_window=(2, 3)),
    Option("scheduler: WarmupLR", ANY, {"scheduler": {"type": "WarmupLR", "params": WARMUP}}, schedule=warmup),
    Option("a torch scheduler (OneCycleLR)", ANY, schedule=one_cycle, client_schedule=True),
    Option(
        "torch-style backward: engine.scale(loss).backward()",
        ZERO,
        torch_backward=True,
        note="DeepSpeed itself refuses it in stage 0",
    ),
]
PRECISIONS = [
    Option("bf16", ANY, BF16, bf16=True),
    Option("bf16, grad_accum_dtype: fp32", ZERO, ACCUMULATE_FP32, bf16=True),
    Option("bf16, grad_accum_dtype: fp32, immediate_grad_update", (1,), IMMEDIATE, bf16=True),
    Option(
        "fp16",
        ZERO,
        FP16,
        bf16=True,
        note="" if ON_GPU else "by a CPU: DeepSpeed's own refusal of fp16 there was switched off for this",
    ),
    Option("fp16, offload_optimizer: cpu", ZERO, FP16 | zero(offload_optimizer=CPU), bf16=True),
    Option("bf16, offload_optimizer: cpu", ZERO, BF16 | zero(offload_optimizer=CPU), bf16=True),
    Option("communication_data_type: bf16", ANY, {"communication_data_type": "bf16"}, bf16=True),
    Option("torch_autocast: bfloat16", ANY, AUTOCAST, bf16=True),
]
MODELS = [
    Option("activation checkpointing, reentrant (mmdet's with_cp)", ANY, model=models.reentrant),
    Option("activation checkpointing, use_reentrant=False", ANY, model=models.saved_tensors),
    Option("deepspeed.checkpointing", ANY, model=models.deepspeed_checkpointing),
    Option("weights tied between modules (the first has them)", ANY, model=models.Tied),
    Option("a gradient not contiguous", ANY, model=models.Transposed),
    Option("a parameter without dimensions (mmcv's Scale)", ANY, model=models.Scalar, max_norm=0.1),
    Option("a parameter without dimensions, bf16", ANY, BF16, model=models.Scalar, max_norm=0.1, bf16=True),
    Option("a gradient exactly zero", ANY, model=models.Zero),
    Option("a gradient on some ranks only", (0, 1), model=models.Sometimes, note=NOT_BY_DEEPSPEED),
]
TORCH_BASES = [
    Option(f"optimizer {name}", ANY, ways=both(name))
    for name in ("Adam", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop")
]
COMPILED_BASES = [
    Option("FusedAdam", ANY, ways=both("FusedAdam")),
    *(
        Option(
            f"DeepSpeed{name}, offload_optimizer: cpu",
            ZERO,
            zero(offload_optimizer=CPU),
            ways=both(name),
        )
        for name in ("CPUAdam", "CPUAdagrad", "CPULion")
    ),
]
"""DeepSpeed compiles each at its first use: 40 to 70 s on a CPU."""


PINNED = zero(offload_optimizer=CPU | {"pin_memory": True})
ON_A_GPU = [
    Option("Adam: DeepSpeed's FusedAdam", ANY, ways=both("Adam on a GPU")),
    Option("AdamW, torch_adam, fused: true", ANY, ways=both("torch's fused Adam")),
    Option("Lion: DeepSpeed's FusedLion", ANY, ways=both("Lion on a GPU")),
    Option(
        "Lamb: DeepSpeed's FusedLamb",
        (0,),
        ways=both("Lamb on a GPU"),
        note="under ZeRO its norms are those of a rank's shard",
    ),
    Option("FusedAdam, bf16", ANY, BF16, bf16=True, ways=both("Adam on a GPU")),
    Option("FusedAdam, fp16", ZERO, FP16, bf16=True, ways=both("Adam on a GPU")),
    Option("CPUAdam, offload_optimizer: cpu, pin_memory", ZERO, PINNED, ways=both("CPUAdam")),
    Option("CPUAdam, offload_optimizer: cpu, pin_memory, fp16", ZERO, FP16 | PINNED, bf16=True, ways=both("CPUAdam")),
]
"""What is another program there than on a CPU, or exists there alone."""


def refusals() -> list[Option]:
    """What is refused, with the words of the reason."""
    offload, one = zero(offload_optimizer=CPU), WAYS[:1]
    rows: list[tuple[str, Sequence[int], dict[str, Any]]] = [
        ("managed_gradient_accumulation", (2,), {"managed_gradient_accumulation": False}),
        ("gradient_allreduce_op", (1,), {"gradient_allreduce_op": "sum"}),
        ("sparse_gradients", (0,), {"sparse_gradients": True}),
        ("zero_optimization.elastic_checkpoint", (1,), zero(elastic_checkpoint=True)),
        ("zero_optimization.zenflow", (2,), zero(offload_optimizer=CPU, zenflow={"topk_ratio": 0.1})),
        ("zero_optimization.zero_quantized_gradients", (3,), zero(zero_quantized_gradients=True)),
        ("zero_optimization.zeropp_loco_param", (3,), zero(zeropp_loco_param={"err_beta": 0.8, "reset_T": 8})),
        ("zero_optimization.zero_hpz_partition_size", (3,), zero(zero_hpz_partition_size=2)),
        ("zero_optimization.mics_shard_size", (3,), zero(mics_shard_size=1)),
        (
            "zero_optimization.offload_optimizer.device",
            (3,),
            zero(offload_optimizer={"device": "nvme", "nvme_path": "."}),
        ),
        ("zero_optimization.offload_optimizer.ratio", (3,), zero(offload_optimizer=CPU | {"ratio": 0.5})),
        (
            "zero_optimization.offload_optimizer.super_offload",
            (3,),
            zero(offload_optimizer=CPU | {"super_offload": True}),
        ),
        ("zero_optimization.offload_param.device", (3,), zero(offload_param={"device": "nvme", "nvme_path": "."})),
        ("bf16.bf16_master_weights_and_grads", (2,), offload | _half("bf16", "bf16_master_weights_and_grads")),
        ("bf16.bf16_optimizer_states", (2,), offload | _half("bf16", "bf16_optimizer_states")),
        ("fp16.fp16_master_weights_and_grads", (2,), offload | _half("fp16", "fp16_master_weights_and_grads")),
        ("compile.deepcompile", (3,), {"compile": {"deepcompile": True}}),
        ("tensor_parallel.autotp_size", (2,), {"tensor_parallel": {"autotp_size": 2}}),
        ("sequence_parallel_size", (2,), {"sequence_parallel_size": 2}),
    ]
    found = [
        Option(_with_value(path, config), stages, config, ways=one, refused=f"{path} = ")
        for path, stages, config in rows
    ]
    for name in REFUSED:
        said = f"{name}': not supported with AGVM"
        found.append(Option(f"optimizer {name}", (1,), {"optimizer": {"type": name}}, ways=one, refused=said))
    found.append(Option("fp16 in stage 0", (0,), FP16, ways=one, refused="fp16.enabled in ZeRO stage 0"))
    channels_last = "parameters not contiguous (channels_last)"
    return [*found, Option(channels_last, ANY, model=models.ChannelsLast, ways=one, refused="is not contiguous")]


def _with_value(path: str, config: Mapping[str, Any]) -> str:
    """``a.b: true``: what the row's configuration has there; for a block the path alone."""
    value: Any = reduce(lambda block, key: block[key], path.split("."), config)
    return path if isinstance(value, Mapping) else f"{path}: {json.dumps(value)}"


def _half(block: str, key: str) -> dict[str, Any]:
    return {block: {"enabled": True, key: True}}


def configuration(option: Option, stage: int, way: Way) -> dict[str, Any]:
    """The DeepSpeed configuration of a run."""
    block = {"interval": 2, "start_step": 1, "ema_decay": 0.9, "estimator": way.estimator}
    block |= {"reduce_bucket_size": way.bucket, "clip_window": option.clip_window}
    config = ds_config(stage, ACCUMULATION, agvm=block, gradient_clipping=option.max_norm)
    base = BASES[way.base]
    config["optimizer"] = {"type": base.name, "params": {**base_options(option, way), **base.json_only}}
    for key, value in option.config.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, Mapping) else value
    return config


def base_options(option: Option, way: Way) -> dict[str, Any]:
    """The base's arguments; no weight decay in bf16, see test_reference.test_bf16_agrees_as_far_as_bf16_goes."""
    return {**BASES[way.base].params, **({"weight_decay": 0.0} if option.bf16 else {})}


def model_of(option: Option, config: Mapping[str, Any] | None = None) -> Toy:
    """The model of a row; partitioned from the start with a configuration and ``zero_init``."""
    if option.zero_init and config is not None:
        right = option.model()
        with deepspeed.zero.Init(config_dict_or_path=dict(config)):
            model = option.model()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.load_state_dict(right.state_dict())  # a GPU draws other random weights
        return model
    return rounded(option.model()) if option.bf16 else option.model()


def train(option: Option, stage: int, way: Way) -> list[Record] | str:
    """In a rank: what is seen after each update, or the words of the refusal."""
    config = configuration(option, stage, way)
    client = {"lr_scheduler": option.schedule} if option.client_schedule else {}
    try:
        with fp16_by_a_cpu("fp16" in config), started(config, model_of(option, config), **client) as engine:
            records = []
            for t in range(UPDATES):
                update(engine, t, torch_backward=option.torch_backward)
                records.append(record(engine))
            return records
    except ConfigError as error:
        return str(error)


@contextmanager
def fp16_by_a_cpu(wanted: bool = True) -> Iterator[None]:
    """torch computes in fp16 on a CPU too; DeepSpeed refuses it there."""
    with pytest.MonkeyPatch.context() as patch:
        if wanted and not ON_GPU:
            patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
        yield


Run = tuple[Option, int, Way]


def train_all(runs: Sequence[Run]) -> list[list[Record] | str]:
    """In a rank: one run after another."""
    return [train(*run) for run in runs]


def reference_of(option: Option, way: Way) -> list[Expected]:
    """The dense reference's run of a row."""
    options, base = base_options(option, way), BASES[way.base].reference
    options.pop("bias_correction", None)
    reference = Reference(
        RANKS,
        ACCUMULATION,
        rows=ROWS,
        estimator=way.estimator,
        preconditioned=issubclass(base, torch.optim.Adam),
        base=base,
        options=options,
        max_norm=option.max_norm,
        clip_window=option.clip_window,
        model=model_of(option),
    )
    return expected_of(reference, UPDATES, rates_of(option, options["lr"]))


def rates_of(option: Option, lr: float) -> list[float]:
    """The learning rate of each update under the option's schedule."""
    if option.schedule is None:
        return []
    plain = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler, rates = option.schedule(plain), []
    for _ in range(UPDATES):
        rates.append(plain.param_groups[0]["lr"])
        scheduler.step()
    return rates


def runs_of(options: Sequence[Option], ways: Sequence[Way] = WAYS) -> list[Run]:
    """Every stage of every row, each way; a row that has ways of its own keeps them."""
    return [
        (option, stage, way)
        for option in options
        for stage in option.stages
        for way in (ways if option.ways is WAYS else option.ways)
    ]


Key = tuple[str, int, str]


def judge(runs: Sequence[Run], place: Path) -> dict[Key, Worst | str]:
    """(row, stage, way) -> its largest differences, or the words of its refusal. Ranks are started once."""
    one, other = run_ranks(train_all, RANKS, place, runs, timeout=800)
    references: dict[tuple[str, Way], list[Expected]] = {}
    found: dict[Key, Worst | str] = {}
    for (option, stage, way), seen, twin in zip(runs, one, other, strict=True):
        assert identical(seen, twin), f"{option.name}, stage {stage}, {way}: the ranks disagree"
        if not isinstance(seen, str):
            if (option.name, way) not in references:
                references[option.name, way] = reference_of(option, way)
            found[key_of(option, stage, way)] = compare(seen, references[option.name, way])
        else:
            found[key_of(option, stage, way)] = seen
    return found


def key_of(option: Option, stage: int, way: Way) -> Key:
    """By which a run is found in what ``judge`` returns."""
    return option.name, stage, str(way)
