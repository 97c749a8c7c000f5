"""The hosts and the data of these tests; without the rights or the programs for hosts they are skipped, and say why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agvm_ds.demo.data import ensure
from tests.faults.runs import Runs
from tests.hosts.namespaces import Network, network, why_not


@pytest.fixture(scope="session")
def allowed() -> None:
    if reason := why_not():
        pytest.skip(f"no hosts: {reason}")


@pytest.fixture(scope="module")
def place(allowed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def two(place: Path) -> Iterator[Network]:
    with network(place / "two", ["alpha", "beta"]) as found:
        yield found


@pytest.fixture(scope="module")
def runs(place: Path) -> Runs:
    """Runs that all hosts see; ``whole`` is one of two ranks on one host, that nothing happened to."""
    found = Runs(place, ensure(place / "digits", train=48, val=8))
    outcome = found.go(place / "whole")
    assert outcome.good, outcome.output
    return found
