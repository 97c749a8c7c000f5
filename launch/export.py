"""A checkpoint as one .pth for plain mmdet: python launch/export.py CONFIG CHECKPOINT OUT.pth

CHECKPOINT is a .pth, or a DeepSpeed checkpoint of launch/train.py, of any ZeRO stage and number of ranks.
"""

from __future__ import annotations

from pathlib import Path

from agvm_ds.mmdet.process.commandline import Parser
from agvm_ds.mmdet.process.errors import main_of_rank
from agvm_ds.mmdet.testing.export import ExportOptions, export


def main() -> None:
    """Parse, export, print the file's name."""
    parser = Parser(description=__doc__)
    parser.add_checkpoint()
    parser.add_argument("out", type=Path, metavar="OUT.pth", help="8 digits of its SHA-256 are added to the name")
    parser.add_common()
    options = vars(parser.parse_args())
    options.pop("local_rank")
    print(export(ExportOptions(**options)))


if __name__ == "__main__":
    main_of_rank(main)
