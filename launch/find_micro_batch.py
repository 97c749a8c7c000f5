"""The largest micro-batch that fits: python launch/find_micro_batch.py CONFIG --deepspeed_config X.json [--num_gpus N]

Makes dry runs of launch/train.py over DeepSpeed's launcher, with 1, 2, 4, ... images a micro-batch and then between. The
images are the first of the data: leave some memory for larger ones. It writes nothing.
"""

from __future__ import annotations

import signal
import sys

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.fitting import find
from agvm_ds.mmdet.process.commandline import Parser, positive
from agvm_ds.mmdet.process.errors import main_of_rank


def main() -> None:
    """Parse, try, tell."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("config", help="as launch/train.py's")
    add("--deepspeed_config", required=True, metavar="X.json", help="its batch sizes are set aside")
    add("--num_gpus", type=positive, help="of this host (default: all)")
    add("--hostfile", help="as DeepSpeed's launcher has it")
    add("--master_port", type=positive, help="as DeepSpeed's launcher has it: another than a running training's")
    add("--most", type=positive, default=256, help="images (default %(default)s)")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the mmdet config")
    args = parser.parse_args()
    launcher = ["deepspeed"]
    for name in ("num_gpus", "hostfile", "master_port"):
        if (value := getattr(args, name)) is not None:
            launcher += [f"--{name}", str(value)]
    arguments = [args.config, *(["--cfg-options", *args.cfg_options] if args.cfg_options else [])]
    try:
        found = find(launcher, arguments, args.deepspeed_config, args.most, lambda text: print(text, flush=True))
    except KeyboardInterrupt:  # which the launcher has too, and ends its ranks
        sys.exit(128 + signal.SIGINT)
    if not found:
        raise ConfigError(
            "one image a micro-batch does not fit: a higher ZeRO stage, ZeRO-Offload, activation checkpointing (with_cp in "
            "the backbone's config) or smaller images need less"
        )
    least = "or more: --most ends the search" if found == args.most else "the largest that fits"
    print(f"{found} images a micro-batch: {least}", file=sys.stdout)


if __name__ == "__main__":
    main_of_rank(main)
