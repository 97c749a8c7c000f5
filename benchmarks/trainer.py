"""Throughput of launch/train.py beside mmdet's own train_detector, and what checkpoints and --resume cost.

    python -m benchmarks.trainer                      about 6 minutes on two cores
    python -m benchmarks.trainer --only throughput    or: workers, checkpoints
    python -m benchmarks.trainer --save FOLDER        the figures as JSON too

The built-in data and config, two ranks, one micro-batch of 4 images a rank and update, no evaluation, AdamW in fp32; real
launches by the ``deepspeed`` command. They train in turns (see ``turns``): a ratio compares two turns of the same round, and
the median, least and largest ratio of the rounds are given. Times are rank 0's, of whole updates with their data; the CPU
time of its process says more on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from agvm_ds.demo.data import ensure
from benchmarks import trainer_clock as clock
from benchmarks.machine import save
from benchmarks.turns import ROOT, Launch, Turns, launched, take_turns

RANKS, IMAGES = 2, 4
"""Ranks, and images of a rank in an update."""
MMDET = "mmdet train_detector"
AGVM_STAGE = 2
Update = dict[str, Any]
Row = dict[str, Any]
Tables = dict[str, list[Row]]
"""By title."""


@dataclass(frozen=True)
class Bench:
    """How much is measured, and a folder for the launches, which goes away."""

    folder: Path
    stages: Sequence[int]
    rounds: int
    updates: int
    """Of a turn, and from checkpoint to checkpoint."""

    def command(
        self, stage: int | None, agvm: bool = False, bare: bool = False, changes: str = ""
    ) -> tuple[list[str], Path]:
        """The words after ``deepspeed``, and the launch's folder.

        stage: None is mmdet's own trainer; bare: a DeepSpeed engine in mmdet's trainer. changes: lines of the config.
        """
        place = Path(tempfile.mkdtemp(dir=self.folder))
        config = place / "demo.py"  # config.py is what a run writes there
        config.write_text(
            f"_base_ = {str(ROOT / 'agvm_ds/demo/faster_rcnn_digits.py')!r}\n"
            f"data = dict(samples_per_gpu={IMAGES})\ncheckpoint_config = None\nrunner = dict(max_epochs=1000)\n"
            'custom_imports = dict(imports=["benchmarks.trainer_clock"], allow_failed_imports=False)\n'
            f'custom_hooks = [dict(type="TrainerClock", file={str(place / "clock")!r}, priority="VERY_LOW")]\n{changes}'
        )
        words = [str(config), "--work-dir", str(place), "--seed", "0"]
        if stage is None:
            return ["benchmarks/mmdet_trainer.py", *words], place
        settings = json.loads((ROOT / f"ds_configs/{'agvm' if agvm else 'baseline'}_zero{stage}.json").read_text())
        settings["train_batch_size"] = IMAGES * RANKS
        if agvm:
            settings["agvm"] |= {"start_step": 0, "interval": 10, "estimator": "pairwise"}
        if bare:
            settings |= {"gradient_clipping": 10, "zero_allow_untested_optimizer": True}
        (place / "deepspeed.json").write_text(json.dumps(settings))
        words += ["--deepspeed_config", str(place / "deepspeed.json")]
        if bare:
            return ["benchmarks/mmdet_trainer.py", *words], place
        return ["launch/train.py", *words, "--no-validate"], place


# Throughput


def throughput(bench: Bench) -> Tables:
    """mmdet; every ZeRO stage without AGVM, by launch/train.py and bare; stage 2 with AGVM; where the time of each went.

    A stage at a time, each time beside mmdet's: a launch that waits keeps its memory, 1.7 GB.
    """
    tables: Tables = {"Images per second": [], "Where the time of an update goes, ms": []}
    for stage in bench.stages:
        bare, ours = f"bare DeepSpeed, ZeRO {stage}", f"launch/train.py, ZeRO {stage}"
        commands = {MMDET: bench.command(None), bare: bench.command(stage, bare=True), ours: bench.command(stage)}
        if stage == AGVM_STAGE:
            commands[f"{ours}, AGVM"] = bench.command(stage, agvm=True)
        turns, launches = take_turns(commands, RANKS, bench.rounds, bench.updates)
        for title, rows in zip(tables, (speeds(turns, launches), phases(turns)), strict=True):
            tables[title] += rows[bool(tables[title]) :]  # mmdet's row of the first stage stands for all
    alone = median(launch.notes["stop_asked"] for launch in launches if "stop_asked" in launch.notes)
    update = median(mean(map(seconds, turn)) for turn in turns[ours])
    return tables | {f"stop_asked, alone ({ours})": [{"us": alone * 1e6, "% of an update": 100 * alone / update}]}


def with_workers(bench: Bench) -> Tables:
    """With two persistent data workers a rank: what of an update is waiting for data."""
    options = "data.update(workers_per_gpu=2, persistent_workers=True)\n"
    commands = {MMDET: bench.command(None, changes=options)}
    for stage in bench.stages[:1]:
        commands[f"launch/train.py, ZeRO {stage}"] = bench.command(stage, changes=options)
    turns, launches = take_turns(commands, RANKS, bench.rounds, bench.updates)
    rows = speeds(turns, launches)
    for row, phase in zip(rows, phases(turns), strict=True):
        row["waiting for data, ms"] = phase[clock.DATA]
        row["% of the update"] = 100 * phase[clock.DATA] / phase["update"]
    return {"Two persistent data workers a rank": rows}


def seconds(update: Update) -> float:
    """How long it took."""
    return float(update["end"] - update["start"])


def speeds(turns: Turns, launches: Sequence[Launch]) -> list[Row]:
    """A row a launch: its rate, and the ratios to mmdet's and to the bare engine's of its stage in the same round."""
    rates = {name: [IMAGES * RANKS / mean(map(seconds, turn)) for turn in rounds] for name, rounds in turns.items()}
    cpu = {name: median(mean(update["cpu"] for update in turn) for turn in rounds) for name, rounds in turns.items()}
    rows = []
    for launch in launches:
        ratios = against(rates, launch.name, MMDET)
        stage = launch.name.partition("ZeRO ")[2][:1]
        to_bare = against(rates, launch.name, f"bare DeepSpeed, ZeRO {stage}")
        rows.append(
            {
                "trainer": launch.name,
                "images/s": median(rates[launch.name]),
                "of mmdet's": median(ratios),
                "least": min(ratios),
                "largest": max(ratios),
                "of bare DeepSpeed's": median(to_bare) if to_bare else "",
                "CPU ms an update": 1e3 * cpu[launch.name],
                "first loss": launch.updates[0]["loss"],
                "start, s": launch.updates[0]["start"] - launch.started,
            }
        )
    return rows


def against(rates: Mapping[str, Sequence[float]], mine: str, other: str) -> list[float]:
    """The ratio of each round; none when the other did not train."""
    return [one / two for one, two in zip(rates[mine], rates[other], strict=True)] if other in rates else []


def phases(turns: Turns) -> list[Row]:
    """A row a launch: milliseconds of an update by phase, the median of the rounds' means."""
    order = [clock.DATA, clock.DEVICE, clock.FORWARD, clock.LOSSES, clock.CHECKS, clock.BACKWARD, clock.ENGINE]
    order += [clock.REDUCTION, clock.STEP, clock.AGVM, clock.STOP, clock.HOOKS_OF_RUN, clock.REST]
    rows = []
    for name, rounds in turns.items():
        row: Row = {"trainer": name, "update": 1e3 * median(mean(map(seconds, turn)) for turn in rounds)}
        for phase in order:
            row[phase] = 1e3 * median(mean(u["spent"].get(phase, 0.0) for u in turn) for turn in rounds)
        rows.append(row)
    return rows


# Checkpoints


LARGER = """
model = dict(
    backbone=dict(depth=50, base_channels=64, norm_cfg=dict(num_groups=32)),
    neck=dict(in_channels=[256, 512, 1024]),
    roi_head=dict(bbox_head=dict(fc_out_channels=1024)),
)
"""
"""A detector of 11 million parameters: the demo's, with three stages of a ResNet-50."""


def checkpoints(bench: Bench) -> Tables:
    """Runs with AGVM that save every few updates and are killed after three checkpoints; then resumed."""
    tables: Tables = {"A checkpoint": [], "--resume": []}
    for detector, changes in (("demo", ""), ("11 million parameters", LARGER)):
        for title, rows in saved_and_resumed(bench, changes).items():
            tables[title] += [{"detector": detector, **row} for row in rows]
    return tables


def saved_and_resumed(bench: Bench, changes: str) -> Tables:
    """The same of one detector."""
    last = 3 * bench.updates
    changes += f"checkpoint_config = dict(by_epoch=False, interval={bench.updates}, max_keep_ckpts=2)\n"
    words, place = bench.command(AGVM_STAGE, agvm=True, changes=changes)
    with launched("saving", words, place, RANKS) as first:
        first.wait(last + 3)
    size = sum(path.stat().st_size for path in (place / f"deepspeed/iter_{last}").iterdir())
    (place / "clock").unlink()
    with launched("resumed", [*words, "--resume"], place, RANKS) as resumed:
        resumed.wait(1)
    update = median(seconds(one) for one in first.updates[3:] if clock.STATE not in one["spent"])
    saving = [one["spent"] for one in first.updates if clock.STATE in one["spent"]]
    phases = clock.STATE_FILES, clock.DIGESTS, clock.DISK, clock.STATE, clock.WEIGHTS
    resume = {phase: resumed.notes["before"][phase] for phase in (clock.DIGESTS, clock.LOAD, clock.RESUME)}
    resume[f"data of {last} updates of the epoch, read again"] = resumed.updates[0]["spent"][clock.DATA]
    saved = {phase: median(spent.get(phase, 0.0) for spent in saving) for phase in phases}
    return {"A checkpoint": parts(saved, update, size), "--resume": parts(resume, update, size)}


def parts(spent: Mapping[str, float], update: float, size: int) -> list[Row]:
    """A row a part and one of all, in seconds, updates' worth and percent. size: of the state, in bytes."""
    whole = sum(spent.values())
    return [
        {"part": part, "MiB": size / 2**20, "ms": 1e3 * value, "updates": value / update, "%": 100 * value / whole}
        for part, value in [*spent.items(), ("all", whole)]
    ]


# The command

PARTS: dict[str, Callable[[Bench], Tables]] = {
    "throughput": throughput,
    "workers": with_workers,
    "checkpoints": checkpoints,
}


def markdown(title: str, rows: Sequence[Row]) -> str:
    """A table."""
    lines: list[Iterable[str]] = [rows[0], ["---"] * len(rows[0]), *(map(shown, row.values()) for row in rows)]
    return "\n".join([f"\n**{title}**\n", *(f"| {' | '.join(line)} |" for line in lines)])


def shown(value: Any) -> str:
    """Three digits of a number."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, save; return the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="may be given several times")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each launch (default %(default)s)")
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="ZeRO stages")
    parser.add_argument(
        "--updates", type=int, default=10, help="of a turn, and from checkpoint to checkpoint (default %(default)s)"
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="trainer.json is written there")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # launches that are stopped would be left
    ensure(ROOT / "data/digits")
    rows: list[Row] = []
    said = []
    for name in args.only or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), args.stages, args.rounds, args.updates)
            found = PARTS[name](bench)
        for title, table in found.items():
            said.append(markdown(title, table))
            print(said[-1], flush=True)
            rows += [{"table": title, **row} for row in table]
    save(args.save, "trainer", rows)
    return "\n".join(said)


if __name__ == "__main__":
    main()
