"""Evaluate a checkpoint over all ranks: deepspeed launch/test.py CONFIG CHECKPOINT

CHECKPOINT is a .pth, or a DeepSpeed checkpoint of launch/train.py, of any ZeRO stage and number of ranks.
"""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agvm_ds.mmdet.process.commandline import Parser
from agvm_ds.mmdet.process.errors import main_of_rank
from agvm_ds.mmdet.testing.test import TestOptions, test


def main() -> None:
    """Parse, evaluate, print the metrics on rank 0."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    parser.add_checkpoint()
    measures = parser.add_mutually_exclusive_group()
    measures.add_argument(
        "--eval",
        nargs="+",
        default=[],
        metavar="METRIC",
        dest="metrics",
        help="bbox, segm, proposal, PQ, or what else the data set measures (default: the config's evaluation.metric)",
    )
    measures.add_argument(
        "--format-only", type=Path, metavar="PREFIX", help="no metrics; the data set's own result files, PREFIX.*"
    )
    add("--out", type=Path, metavar="X.pkl", help="write the raw results, a pickle")
    add("--json", type=Path, metavar="X.json", help="write the metrics")
    add("--show-dir", type=Path, metavar="DIR", help="draw the results into their images, a file each")
    add("--show-score-thr", type=float, default=0.3, metavar="T", help="lowest score drawn (default %(default)s)")
    add("--allow-other-categories", action="store_true", help="as in launch/train.py")
    parser.add_common()
    options = vars(parser.parse_args())
    options.pop("local_rank")
    metrics = test(TestOptions(**{**options, "metrics": tuple(options["metrics"])}))
    if metrics and os.environ.get("RANK", "0") == "0":
        table = Table("metric", "value")
        for name, value in metrics.items():
            table.add_row(name, str(value))
        Console(markup=False).print(table)


if __name__ == "__main__":
    main_of_rank(main)
