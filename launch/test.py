"""Evaluate a checkpoint over all ranks: deepspeed launch/test.py CONFIG CHECKPOINT"""

from __future__ import annotations

import argparse
import os

from mmcv import DictAction
from rich.console import Console
from rich.table import Table

from agvm_ds.mmdet.errors import main_of_rank
from agvm_ds.mmdet.test import TestOptions, test


def main() -> None:
    """Parse, evaluate, print the metrics on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="an mmdet config file, or the name of one that mmdet ships")
    parser.add_argument("checkpoint", help="a .pth file")
    parser.add_argument("--out", help="write the raw results to this pickle file")
    parser.add_argument(
        "--eval", nargs="+", default=[], metavar="METRIC", help="default: the config's evaluation.metric"
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    metrics = test(TestOptions(args.config, args.checkpoint, args.out, tuple(args.eval), args.cfg_options))
    if os.environ.get("RANK", "0") == "0":
        table = Table("metric", "value")
        for name, value in metrics.items():
            table.add_row(name, str(value))
        Console().print(table)


if __name__ == "__main__":
    main_of_rank(main)
