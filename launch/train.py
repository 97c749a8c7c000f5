"""Train any mmdet 2.x detector under DeepSpeed: deepspeed launch/train.py [CONFIG] --deepspeed_config ds_configs/X.json"""

from __future__ import annotations

import argparse

import deepspeed

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.process.commandline import Parser, positive
from agvm_ds.mmdet.process.errors import main_of_rank
from agvm_ds.mmdet.train import TrainOptions, train


def parser() -> argparse.ArgumentParser:
    """The command line; DeepSpeed's launcher adds --local_rank."""
    result = Parser(description=__doc__)
    add = result.add_argument
    add(
        "config",
        nargs="?",
        help="an mmdet config file, or the name of one that mmdet ships (default: the built-in demo)",
    )
    add("--work-dir", help="where everything is written (default: work_dirs/<name of the config>)")
    add("--resume", action="store_true", help="continue from the newest DeepSpeed checkpoint in the work dir")
    add(
        "--allow-older",
        action="store_true",
        help="with --resume: when the newest is damaged, from the newest that is not",
    )
    add("--keep", type=positive, metavar="N", help="checkpoints that stay (default: the config's max_keep_ckpts)")
    add("--load-from", metavar="X.pth", help="weights to start from: a file or a URL (default: the config's load_from)")
    add("--trust-checkpoint", action="store_true", help="read a .pth that holds more than data; it can run code")
    add("--seed", type=int, help="default: the config's, or a random one")
    add("--diff-seed", action="store_true", help="add the rank to the seed")
    add("--deterministic", action="store_true", help="deterministic cuDNN")
    add("--no-validate", action="store_true", help="no evaluation while training")
    add(
        "--allow-other-categories",
        action="store_true",
        help="leave out annotations of categories not in the classes (looked for in COCO data sets only)",
    )
    add("--revert-sync-bn", action="store_true", help="train with BN where the config has SyncBN, which needs a GPU")
    add(
        "--dry-run",
        action="store_true",
        help="build all, make one update, print modules, schedule and memory; write nothing",
    )
    add("--auto-scale-lr", action="store_true", help="the config's rate x global batch / auto_scale_lr.base_batch_size")
    result.add_common()
    return deepspeed.add_config_arguments(result)  # type: ignore[no-any-return]


def main() -> None:
    """Parse and train."""
    args = parser().parse_args()
    if not args.deepspeed_config:
        raise ConfigError(
            "--deepspeed_config is missing: name a DeepSpeed JSON, for example ds_configs/agvm_zero2.json"
        )
    train(
        TrainOptions(
            deepspeed_config=args.deepspeed_config,
            config=args.config,
            work_dir=args.work_dir,
            resume=args.resume,
            allow_older=args.allow_older,
            keep=args.keep,
            load_from=args.load_from,
            trust_checkpoint=args.trust_checkpoint,
            seed=args.seed,
            diff_seed=args.diff_seed,
            deterministic=args.deterministic,
            validate=not args.no_validate,
            auto_scale_lr=args.auto_scale_lr,
            allow_other_categories=args.allow_other_categories,
            revert_sync_bn=args.revert_sync_bn,
            dry_run=args.dry_run,
            cfg_options=args.cfg_options,
        )
    )


if __name__ == "__main__":
    main_of_rank(main)
