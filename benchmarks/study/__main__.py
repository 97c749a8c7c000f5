"""The study's commands.

    python -m benchmarks.study run        train what is left, two runs at a time; a line each in docs/study/runs.jsonl
    python -m benchmarks.study left       what is known to be left
    python -m benchmarks.study estimators pairwise against split at fixed weights (needs runs' weights in work_dirs/study)
    python -m benchmarks.study report     the tables and figures of docs/study.md, from the lines

``run`` may be interrupted at any moment: the next one goes on with the epoch in which each run was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.machine import save
from benchmarks.study import estimators, lines, report
from benchmarks.study.launch import ROOT, NotRun, make_data, train
from benchmarks.study.plan import FAILED, Cell, Line, Study
from benchmarks.study.protocol import CENTRAL_BATCH, Run

WORK_DIRS = ROOT / "work_dirs/study"


def run_all(at_once: int, until: float, folder: Path = WORK_DIRS) -> int:
    """Train what is left, ``at_once`` at a time, beginning none after ``until`` (time.monotonic()); how many failed."""
    commit = _commit()
    make_data()
    tried: set[str] = set()
    failed = 0
    with ThreadPoolExecutor(at_once) as pool:
        running: dict[Future[Line], Run] = {}
        while True:
            left = [run for run in Study(lines.read()).to_do() if run.key not in tried]
            while left and len(running) < at_once and time.monotonic() < until:
                run = left.pop(0)
                tried.add(run.key)
                running[pool.submit(train, run, folder, commit)] = run
            if not running:
                return failed
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(ended)
                failed += _told(ended, len(left) + len(running))


def _told(ended: Future[Line], left: int) -> bool:
    """Keep a run's line and say so; whether it failed."""
    try:
        line = ended.result()
    except NotRun as reason:
        print(reason, flush=True)
        return False
    lines.append(line)
    scores = ", ".join(f"{name} {line[name]:.3f}" for name in ("choose", "report") if name in line)
    print(f"{line['key']}: {line['status']} in {line['seconds']} s; {scores}; {left} known to be left", flush=True)
    return bool(line["status"] == FAILED)


def _commit() -> str:
    """The commit that is checked out; "+" after it when something was changed since."""
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    code = ["agvm_ds", "benchmarks", "launch"]
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], cwd=ROOT, check=False).returncode
    return head + "+" * bool(changed)


def compare_estimators(folder: Path = WORK_DIRS) -> None:
    """At the weights of plain SGD at the ablation's batch, its chosen rate: docs/study/estimators.json."""
    chosen = Study(lines.read()).chosen(Cell("SGD", "plain", CENTRAL_BATCH))
    if chosen is None:
        raise SystemExit(
            f"error: plain SGD at batch {CENTRAL_BATCH} has no chosen rate yet: python -m benchmarks.study run"
        )
    rows = []
    for epoch in estimators.EPOCHS:
        products = estimators.inner_products(folder / chosen.key / f"work/epoch_{epoch}.pth")
        rows += [{"epoch": epoch, **row} for row in estimators.compare(products)]
    save(lines.FOLDER, "estimators", rows)


def main() -> None:
    """One of the commands."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="run | left | estimators | report")
    run = commands.add_parser("run", help="train what is left")
    run.add_argument("--at-once", type=int, default=2, metavar="N", help="runs at a time (default %(default)s)")
    run.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no run after so many (default: no limit)"
    )
    run.set_defaults(do=lambda args: sys.exit(run_all(args.at_once, time.monotonic() + 60 * args.minutes) > 0))
    left = commands.add_parser("left", help="what is known to be left")
    left.set_defaults(do=lambda args: print("\n".join(run.key for run in Study(lines.read()).to_do())))
    compared = commands.add_parser("estimators", help="pairwise against split")
    compared.set_defaults(do=lambda args: compare_estimators())
    reported = commands.add_parser("report", help="the tables and figures of docs/study.md")
    reported.set_defaults(do=lambda args: report.write())
    args = parser.parse_args()
    do: Callable[[argparse.Namespace], None] = args.do
    do(args)


if __name__ == "__main__":
    main()
