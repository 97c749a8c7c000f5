"""Evaluate a checkpoint over all ranks: deepspeed launch/test.py CONFIG CHECKPOINT"""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from agvm_ds.mmdet.commandline import Parser
from agvm_ds.mmdet.errors import main_of_rank
from agvm_ds.mmdet.test import TestOptions, test


def main() -> None:
    """Parse, evaluate, print the metrics on rank 0."""
    parser = Parser(description=__doc__)
    parser.add_argument("config", help="an mmdet config file, or the name of one that mmdet ships")
    parser.add_argument("checkpoint", help="a .pth, a file or a URL")
    parser.add_argument("--trust-checkpoint", action="store_true", help="as in launch/train.py")
    parser.add_argument("--out", help="write the raw results to this pickle file")
    parser.add_argument(
        "--eval", nargs="+", default=[], metavar="METRIC", help="default: the config's evaluation.metric"
    )
    parser.add_argument("--allow-other-categories", action="store_true", help="as in launch/train.py")
    parser.add_common()
    args = parser.parse_args()
    options = TestOptions(
        config=args.config,
        checkpoint=args.checkpoint,
        trust_checkpoint=args.trust_checkpoint,
        out=args.out,
        metrics=tuple(args.eval),
        allow_other_categories=args.allow_other_categories,
        cfg_options=args.cfg_options,
    )
    metrics = test(options)
    if os.environ.get("RANK", "0") == "0":
        table = Table("metric", "value")
        for name, value in metrics.items():
            table.add_row(name, str(value))
        Console().print(table)


if __name__ == "__main__":
    main_of_rank(main)
