"""What the command lines of ``launch/`` have in common: mistakes are ConfigErrors, told once for the launch."""

from __future__ import annotations

import argparse
from typing import Any

from mmcv import DictAction

from agvm_ds.config import ConfigError


class Parser(argparse.ArgumentParser):
    """Tells a mistake once for the launch, not once a rank; its description keeps its lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise ConfigError with the usage."""
        raise ConfigError(f"{message}\n{self.format_usage().rstrip()}")

    def add_checkpoint(self) -> None:
        """Add ``CONFIG CHECKPOINT`` and ``--trust-checkpoint``."""
        self.add_argument("config", help="an mmdet config file, or the name of one that mmdet ships")
        self.add_argument("checkpoint", help="a .pth (a file or a URL), WORK_DIR/deepspeed, or a folder in it")
        self.add_argument("--trust-checkpoint", action="store_true", help="as in launch/train.py")

    def add_common(self) -> None:
        """Add ``--cfg-options`` and what DeepSpeed's launcher passes."""
        self.add_argument(
            "--cfg-options",
            nargs="+",
            action=CfgOptions,
            default={},
            metavar="KEY=VALUE",
            help="changes to the mmdet config",
        )
        self.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


class CfgOptions(DictAction):  # type: ignore[misc]
    """mmcv's KEY=VALUE pairs; a word without "=" is a mistake of the command line."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """Raise ArgumentError for what is no pair, or has unbalanced brackets."""
        odd = [value for value in values if "=" not in value]
        if odd:
            raise argparse.ArgumentError(self, f"{odd[0]!r} is not KEY=VALUE")
        try:
            super().__call__(parser, namespace, values, option)
        except (AssertionError, ValueError) as error:
            raise argparse.ArgumentError(self, str(error)) from None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer of at least 1")
    return value
