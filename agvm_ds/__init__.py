"""AGVM, adaptive gradient variance modulation (arXiv 2210.11078), as a DeepSpeed client optimizer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agvm_ds.config import ConfigError
    from agvm_ds.engine import attach, initialize
    from agvm_ds.groups import param_groups
    from agvm_ds.optimizer import AGVM

__version__ = "0.1.0"

__all__ = ["AGVM", "ConfigError", "attach", "initialize", "param_groups"]

_HOMES = {"AGVM": "optimizer", "ConfigError": "config", "attach": "engine", "initialize": "engine"} | {
    "param_groups": "groups"
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home at first use: reading a configuration must not cost DeepSpeed's import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
