"""A program of launch/ started by hand."""

from __future__ import annotations

import importlib.util

import pytest

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.session import init_distributed


def test_without_a_launcher_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would look for MPI, and end in an ImportError where mpi4py is not installed."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not started by a launcher"):
        init_distributed()
