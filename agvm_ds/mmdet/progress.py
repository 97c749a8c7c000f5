"""What somebody at a terminal sees of a run: what it waits for at the start, then a bar. Elsewhere there are plain lines."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mmcv.runner import HOOKS, Hook
from mmdet.utils import get_root_logger
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

SOON = 1.0
"""Seconds; what took longer has its duration said."""


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on rank 0 what is being done before it is, and afterwards how long that took if it took long."""
    began = time.monotonic()
    _say(f"{what} ...")
    yield
    if (taken := time.monotonic() - began) > SOON:
        _say(f"{what}: done in {taken:.1f} s")


def _say(text: str) -> None:
    """By the log when it is open; the steps before are not in the work dir, which a mistake must leave as it was."""
    if os.environ.get("RANK", "0") != "0":
        return
    log = logging.getLogger("agvm_ds")
    if log.handlers:
        log.info(text)
    else:
        print(text, file=sys.stderr, flush=True)


def at_terminal(rank: int) -> bool:
    """Whether somebody looks at what this rank writes."""
    return rank == 0 and sys.stderr.isatty()


def counted(batches: Iterable[Any], total: int, what: str, rank: int) -> Iterable[Any]:
    """The batches, with a bar at a terminal while they are gone through."""
    return tqdm(batches, what, total, leave=False, unit="batch", dynamic_ncols=True) if at_terminal(rank) else batches


@HOOKS.register_module()
class ProgressHook(Hook):
    """A bar over the run's updates, below mmcv's log lines, at a terminal; a context, which takes the bar away at its end."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Any = None

    def before_run(self, runner: Any) -> None:
        """Where a resumed run goes on, the bar does."""
        if not at_terminal(runner.rank):
            return
        total = runner.max_iters or runner.max_epochs * runner.updates_per_epoch
        self._bar = self._stack.enter_context(
            tqdm(total=total, initial=runner.iter, unit="update", dynamic_ncols=True, smoothing=0.05)
        )
        logs = [get_root_logger(), logging.getLogger("agvm_ds")]
        self._stack.enter_context(logging_redirect_tqdm(logs))

    def after_train_iter(self, runner: Any) -> None:
        """One more."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{runner.outputs['log_vars'].get('loss', 0.0):.3f}", refresh=False)
            self._bar.update()

    def __enter__(self) -> ProgressHook:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()
