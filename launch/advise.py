"""How large a batch pays, by what a run has measured: python launch/advise.py WORK_DIR [--batches 64 128 256 512]"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.process.commandline import Parser, positive
from agvm_ds.mmdet.process.errors import main_of_rank
from agvm_ds.report.advice import BATCHES, advise
from agvm_ds.report.page import advice_words
from agvm_ds.report.runs import read_run


def main() -> None:
    """Parse, read, print."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("work_dir", type=Path, help="of a launch/train.py that measured with the pairwise estimator")
    add("--batches", nargs="+", type=positive, default=list(BATCHES), metavar="B", help="default: %(default)s")
    add("--part", type=float, default=0.5, help="share of the run, counted from its end (default %(default)s)")
    args = parser.parse_args()
    if not 0 < args.part <= 1:
        parser.error(f"--part {args.part}: must be above 0 and at most 1")
    run = read_run(args.work_dir)
    if run.measures is None:
        raise ConfigError(f"{args.work_dir}: nothing was measured (yet): its DeepSpeed JSON must have an agvm block")
    try:
        words = advice_words(advise(run.measures, run.batch, args.batches, args.part))
    except ValueError as error:
        raise ConfigError(f"{args.work_dir}: {error}") from None
    console = Console(markup=False)
    console.print(f"{words['measures']} measures at batch {words['batch']}; {words['limits']} limits")
    for head, rows in (
        (("module", "critical batch size, images", "95 %"), words["critical"]),
        (("batch", "times fewer updates", "95 %", "of the images well used"), words["speedups"]),
    ):
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("by the noise-scale model (arXiv 1812.06162): where to look, not a result; see docs/concepts.md")


if __name__ == "__main__":
    main_of_rank(main)
