"""From calls and bytes to seconds: a stated model of nodes and links. A plan, to be checked on real hardware.

Ranks of a node are joined by a switch; the nodes by one link each, which its ranks share. A collective is done by the
hierarchical ring: within nodes, between nodes, within nodes. ``LATENCY`` is what a call of next to nothing takes. Nothing
overlaps with computation, which is the worst case for all ways alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GIGA = 1e9


@dataclass(frozen=True)
class Cluster:
    """Nodes of ``gpus`` ranks; bytes a second of a rank's switch port and of a node's link, in each direction."""

    nodes: int
    link: float
    gpus: int = 8
    switch: float = 300 * GIGA
    latency: float = 100e-6
    """Seconds a call; nccl-tests show 20 to 160 microseconds for small all-reduces between nodes."""

    def seconds(self, kind: str, size: int) -> float:
        """How long a collective over all ranks takes, of ``size`` bytes: the whole tensor."""
        passes = 2 if kind == "all-reduce" else 1
        within, between = _ring(self.gpus), _ring(self.nodes)
        return self.latency + passes * size * (within / self.switch + between / self.link)


def _ring(members: int) -> float:
    """The share of a tensor that crosses each member's port when a ring reduces or gathers it."""
    return (members - 1) / members


def gbit(rate: float) -> float:
    """Bytes a second of a link of ``rate`` Gb/s."""
    return rate * GIGA / 8


def total(cluster: Cluster, calls: Iterable[tuple[str, int, int]]) -> float:
    """Seconds of (kind, number of calls, bytes of all of them)."""
    return sum(
        count * cluster.seconds(kind, 0) + cluster.seconds(kind, size) - cluster.latency for kind, count, size in calls
    )
