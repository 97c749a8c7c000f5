"""How a global batch is cut: nodes x GPUs x micro-batch x accumulation steps, and the ZeRO stage that goes with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.plan import Batch
from agvm_ds.mmdet.planning.memory import GIB, HEADROOM, Footprint, Needs, needs
from agvm_ds.mmdet.planning.request import Request, Row


@dataclass(frozen=True)
class Base:
    """What the layout must know of the optimizer."""

    moments: int
    """State tensors a parameter."""
    elementwise: bool
    """AGVM reduces an elementwise quantity on a measured update."""


@dataclass(frozen=True)
class Layout:
    """A ZeRO stage, how the batch is cut, and what a rank holds."""

    stage: int
    batch: Batch
    needs: Needs

    def wanted(self, saved: int) -> float:
        """Estimated bytes a GPU, with ``saved`` bytes of activations an image."""
        return self.needs.total + HEADROOM * saved * self.batch.micro


def choose_layout(request: Request, sizes: Footprint, samples: int, base: Base) -> Layout:
    """Cut the batch exactly. Raises ConfigError when it cannot be cut, measured, or held.

    Stage: the one asked for; else 2; or 1, which reduces gradients once an update and not once a micro-batch, where
    that accumulates and 1 holds the same micro-batch; or 3 where 2 holds not even one image.
    Micro-batch: the one asked for; else the largest that divides a GPU's share, leaves AGVM two micro-batches, and is
    estimated to fit ``request.memory``. samples: the config's samples_per_gpu, the limit where activations are not known.
    """
    refuse_batch(request)
    stages = [2, 3] if request.zero_stage is None else [request.zero_stage]
    found = next((cut for stage in stages if (cut := _cut(request, sizes, samples, base, stage))), None)
    if found is None:
        raise ConfigError(_too_large(request, sizes, base, stages[-1]))
    if request.zero_stage is None and found.stage == 2 and found.batch.accumulation > 1:
        once = _cut(request, sizes, samples, base, 1)
        return once if once is not None and once.batch == found.batch else found
    return found


def refuse_batch(request: Request) -> None:
    """Raise ConfigError for a batch that the GPUs cannot share alike, or in which AGVM has nothing to compare."""
    unit = request.ranks * (request.micro or 1)
    if request.batch % unit:
        below = request.batch // unit * unit
        near = ", ".join(str(batch) for batch in (below, below + unit) if batch)
        micro = f" x {request.micro} images a micro-batch" if request.micro else ""
        raise ConfigError(
            f"--batch {request.batch}: does not divide by {request.nodes} nodes x {request.gpus} GPUs a node{micro} = "
            f"{unit}; the nearest that do: {near}"
        )
    if request.ranks == 1 and request.batch == (request.micro or 1):
        raise ConfigError(
            f"--batch {request.batch} on one GPU: an update has n = 1 micro-batch, and AGVM's gradient variance needs at "
            "least 2: use more GPUs, a larger --batch, or a smaller --micro"
        )
    if request.micro is None and request.memory is None:
        raise ConfigError("neither --memory nor --micro is given: name the GiB a GPU has, or the micro-batch")


def _cut(request: Request, sizes: Footprint, samples: int, base: Base, stage: int) -> Layout | None:
    held = needs(sizes, stage, request.nodes, request.gpus, base.moments, base.elementwise)
    share = request.batch // request.ranks
    for micro in [request.micro] if request.micro else _divisors(share, share // 2 if request.ranks == 1 else share):
        cut = Layout(stage, Batch(request.batch, micro, share // micro, request.ranks), held)
        if request.micro or _fits(request, sizes, samples, cut):
            return cut
    return None


def _divisors(share: int, most: int) -> Iterator[int]:
    return (micro for micro in range(most, 0, -1) if share % micro == 0)


def _fits(request: Request, sizes: Footprint, samples: int, cut: Layout) -> bool:
    memory = (request.memory or 0) * GIB
    if sizes.saved is None:
        return cut.batch.micro <= samples and cut.needs.total <= memory
    return cut.wanted(sizes.saved) <= memory


def _too_large(request: Request, sizes: Footprint, base: Base, stage: int) -> str:
    held = needs(sizes, stage, request.nodes, request.gpus, base.moments, base.elementwise).total
    image = "" if sizes.saved is None else f", one image {HEADROOM} x {sizes.saved / GIB:.1f} GiB"
    return (
        f"--memory {request.memory:g}: estimated too small for one image a GPU in ZeRO stage {stage}: weights, optimizer and "
        f"buffers take {held / GIB:.1f} GiB{image}; smaller images or activation checkpointing (with_cp) in the config, more "
        "memory, or --micro 1, which does not ask the estimate"
    )


def batch_rows(request: Request, layout: Layout, samples: int) -> Iterator[Row]:
    """Batch, micro-batch, accumulation, n and the stage."""
    batch = layout.batch
    yield Row(
        "global batch",
        str(batch.train),
        f"{request.nodes} x {request.gpus} GPUs x {batch.micro} x {batch.accumulation}",
    )
    if request.micro:
        why = "--micro"
    elif request.memory is not None:
        why = f"the largest divisor of {batch.train} / {batch.ranks} that is estimated to fit --memory {request.memory:g} GiB"
    yield Row("micro-batch", f"{batch.micro} images", f"{why}; the config's samples_per_gpu is {samples}")
    yield Row("accumulation steps", str(batch.accumulation), "batch / (GPUs x micro-batch)")
    n = batch.ranks * batch.accumulation
    yield Row("micro-batches an update", f"n = {n}", "GPUs x accumulation steps; AGVM needs at least 2")
    yield Row("ZeRO stage", str(layout.stage), _why_stage(request, layout))


def _why_stage(request: Request, layout: Layout) -> str:
    if request.zero_stage is not None:
        return "--zero-stage"
    return {
        1: "it accumulates: 1 reduces gradients once an update, 2 once a micro-batch",
        2: "one reduction an update in any case" if layout.batch.accumulation == 1 else "1 holds a smaller micro-batch",
        3: "2 is estimated not to hold one image",
    }[layout.stage]


def memory_rows(request: Request, sizes: Footprint, layout: Layout) -> Iterator[Row]:
    """What a GPU is estimated to need, part by part. Estimates: no GPU was asked."""
    held = layout.needs
    million = f"{sizes.parameters / 1e6:.1f} M parameters, {sizes.trainable / 1e6:.1f} M trained"
    yield Row(
        "weights, gradients, optimizer", _gib(held.states), f"fp32, {million}: agvm_ds/mmdet/planning/memory.py's table"
    )
    if held.deepspeed is not None:
        yield Row(
            "the same, by DeepSpeed",
            _gib(held.deepspeed),
            "its estimator, for 16-bit training with Adam; the larger counts",
        )
    yield Row("DeepSpeed's reduction buffer", _gib(held.bucket), "zero_optimization.reduce_bucket_size = 5e8 x 4 bytes")
    yield Row(
        "AGVM, on a measured update", _gib(held.agvm), "pairwise: nothing; with Adam one bucket and one gradient shard"
    )
    if sizes.saved is None:
        yield Row("activations", "not estimated", f"{sizes.note}: run one update and look before you rely on it")
        return
    yield Row("activations an image", _gib(sizes.saved), sizes.note)
    wanted = layout.wanted(sizes.saved)
    over = request.memory is not None and wanted > request.memory * GIB
    sum_ = f"{held.total / GIB:.1f} + {HEADROOM} x {sizes.saved / GIB:.2f} x {layout.batch.micro}"
    rule = f"{sum_}; {HEADROOM}: heads, losses, work space"
    yield Row(
        "memory a GPU, estimated", _gib(wanted), f"MORE THAN --memory {request.memory:g}: {rule}" if over else rule
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
