"""One page of one or several runs: python launch/report.py WORK_DIR [WORK_DIR ...] [--out FOLDER]

Writes FOLDER/index.html, which holds everything, and its pictures as PNGs. It needs no GPU and no launcher.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.process.commandline import Parser
from agvm_ds.mmdet.process.errors import main_of_rank
from agvm_ds.report.page import write_page
from agvm_ds.report.runs import read_runs


def main() -> None:
    """Parse, read, write."""
    parser = Parser(description=__doc__)
    parser.add_argument("work_dirs", nargs="+", type=Path, metavar="WORK_DIR", help="of launch/train.py")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the first WORK_DIR/report")
    args = parser.parse_args()
    runs = read_runs(args.work_dirs)
    made = f"Made {time.strftime('%Y-%m-%d')} by agvm_ds {version('agvm_ds')}."
    try:
        page = write_page(runs, args.out or args.work_dirs[0] / "report", made)
    except OSError as error:
        raise ConfigError(f"--out: {error.filename}: {error.strerror}") from None
    print(page)


if __name__ == "__main__":
    main_of_rank(main)
