"""Hooks that autograd runs in other streams of an accelerator do their shared work in one; stand-ins for the streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from agvm_ds.estimators import base


class Stream:
    """Remembers whom it has waited for."""

    def __init__(self) -> None:
        self.waited_for: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited_for.append(other)


class Accelerator:
    """As much of DeepSpeed's as is asked."""

    def __init__(self, current: Stream, synchronous: bool) -> None:
        self.current, self.synchronous = current, synchronous

    def resolves_data_dependency(self) -> bool:
        return self.synchronous

    def current_stream(self) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.mark.parametrize("synchronous", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_work_is_done_in_the_one_stream_once_the_gradient_is_there(
    synchronous: bool, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Stream(), Stream()
    accelerator = Accelerator(one if same else other, synchronous)
    monkeypatch.setattr(base, "get_accelerator", lambda: accelerator)
    kept: list[Stream] = []
    gradient: Any = SimpleNamespace(record_stream=kept.append)
    here = accelerator.current
    with base.in_stream(one, gradient):
        assert accelerator.current is (here if synchronous else one)
    changes = not synchronous and not same
    assert accelerator.current is here
    assert (one.waited_for, kept) == (([other], [one]) if changes else ([], []))
