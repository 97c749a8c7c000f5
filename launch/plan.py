"""From GPUs to a batch: python launch/plan.py CONFIG --nodes 4 --gpus 8 --memory 80 --batch 512 [--write X.json]

Prints each figure of the run with its rule, the DeepSpeed JSON, and the command that trains with both. It needs no GPU.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.planning.proposal import Proposal, propose
from agvm_ds.mmdet.planning.request import Request
from agvm_ds.mmdet.planning.scaling import RULES
from agvm_ds.mmdet.process.commandline import Parser, positive
from agvm_ds.mmdet.process.errors import main_of_rank


def main() -> None:
    """Parse, settle, print, write."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("config", help="an mmdet config file, or the name of one that mmdet ships")
    add("--nodes", type=positive, required=True)
    add("--gpus", type=positive, required=True, help="of each node")
    add("--batch", type=positive, required=True, help="images in an update, over all GPUs")
    add(
        "--memory",
        type=float,
        help="GiB a GPU: the micro-batch is the largest estimated to fit; or name it with --micro",
    )
    add("--micro", type=positive, help="images of a micro-batch; the estimate is then only shown")
    add(
        "--scaling", choices=RULES, help="default: the published rate, else linear-sqrt for SGD and sqrt for the others"
    )
    add("--zero-stage", type=int, choices=range(4), help="default: 2; 1 when accumulating; 3 when 2 does not fit")
    add("--images", type=positive, help="of the training set (default: counted where its annotation file is)")
    add("--base-batch", type=positive, help="images the config's rate is for (default: auto_scale_lr.base_batch_size)")
    add("--write", metavar="X.json", type=Path, help="write the JSON there, over what is there")
    parser.add_common()
    options = vars(parser.parse_args())
    options.pop("local_rank")
    file = options.pop("write")
    if options["memory"] is not None and not 0 < options["memory"] < float("inf"):
        parser.error(f"--memory {options['memory']}: must be more than 0 GiB")
    proposal = propose(Request(**options))
    if file is not None:
        write(file, proposal.text)
    show(proposal, str(file or "X.json"), Console(markup=False))


def write(file: Path, text: str) -> None:
    """Write the JSON; its folder must be there."""
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigError(f"--write {file}: {error.strerror}") from None


def show(proposal: Proposal, file: str, console: Console) -> None:
    """The table, the JSON, the command."""
    table = Table(*(Column(name, overflow="fold") for name in ("figure", "value", "rule or source")))
    for row in proposal.rows:
        table.add_row(row.figure, row.value, row.rule)
    console.print(table)
    print(f"\n{file}:\n{proposal.text}\n{proposal.command(file)}")


if __name__ == "__main__":
    main_of_rank(main)
