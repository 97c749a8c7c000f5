"""Look through the data of a config, and for room on the disk, before training: launch/check_data.py CONFIG [--decode]"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from agvm_ds.mmdet.checks.data_check import SPLITS, Checked, check_data
from agvm_ds.mmdet.checks.disk import too_little_room
from agvm_ds.mmdet.checks.images import decode_all
from agvm_ds.mmdet.configs import read_config, work_dir_of
from agvm_ds.mmdet.process.commandline import Parser
from agvm_ds.mmdet.process.errors import EXIT_BAD_INPUT, main_of_rank


def main() -> None:
    """Parse, check, print; exit with 2 when there is something that a run would refuse."""
    parser = Parser(description=__doc__)
    parser.add_argument("config", help="an mmdet config file, or the name of one that mmdet ships")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="default: all three")
    parser.add_argument("--decode", action="store_true", help="decode every image too, and compare its size")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that decode (default %(default)s)"
    )
    parser.add_argument("--allow-other-categories", action="store_true", help="as in launch/train.py")
    parser.add_argument("--work-dir", type=Path, help="as in launch/train.py: is there room for the run's checkpoints?")
    parser.add_common()
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: must be at least 1")
    cfg = read_config(args.config, args.cfg_options)
    checked = check_data(cfg, args.splits, args.allow_other_categories)
    if args.decode:
        decode(checked, args.workers)
    show(checked, too_little_room(cfg, work_dir_of(cfg, args.config, args.work_dir)), Console(markup=False))
    if checked.lines():
        sys.exit(EXIT_BAD_INPUT)


def decode(checked: Checked, workers: int) -> None:
    """Decode the images of all sources, each file's once."""
    sources = {id(source.report): source for source in checked.sources if source.report is not None}
    with Progress() as progress:
        task = progress.add_task("decoding images", total=sum(len(source.images) for source in sources.values()))
        for source in sources.values():
            kind = source.loader.get("color_type", "color")
            decode_all(source.images, kind, source.report, workers, lambda: progress.advance(task))  # type: ignore[arg-type]


def show(checked: Checked, room: str | None, console: Console) -> None:
    """The tables of what was looked through and of what was found."""
    table = Table("data set", Column("annotation file", overflow="fold"), "images", "annotations", "classes seen")
    for source in checked.sources:
        found = source.report
        counts = ["not checked: read by other means than CocoDataset's"]
        if found is not None and source.use is not None:
            seen = f"{found.seen} of {len(source.use.classes)}"
            counts = [str(len(found.images)), str(found.annotations), seen]
        table.add_row(source.where, str(source.file), *counts)
    console.print(table)
    findings = Table("", Column("what and where", overflow="fold"), show_lines=True)
    for kind, noted in (("refused", False), ("noted", True)):
        for line in checked.lines(noted):
            findings.add_row(kind, line)
    if room is not None:
        findings.add_row("warning", room)
    console.print(
        findings if findings.row_count else "nothing found: the data are in order, and there is room for checkpoints"
    )


if __name__ == "__main__":
    main_of_rank(main)
