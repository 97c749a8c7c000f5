"""How a launch ends when something is wrong with what the user gave: one message, a non-zero exit everywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from agvm_ds.config import ConfigError

EXIT_BAD_INPUT = 2


class HostError(ConfigError):
    """A mistake that only one host may see (a missing file, a folder that cannot be written)."""


def main_of_rank(main: Callable[[], None]) -> None:
    """Run ``main``; a ConfigError is told once for the launch (a HostError once a host), and every rank exits with 2."""
    try:
        main()
    except ConfigError as error:
        first = os.environ.get("RANK", "0") == "0"
        if first or (isinstance(error, HostError) and os.environ.get("LOCAL_RANK") == "0"):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
