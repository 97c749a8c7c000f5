"""A model's trainable parameters -> named modules -> the optimizer's parameter groups.

Every trainable parameter is in exactly one module; what no entry covers goes to a module named ``rest``. A parameter
shared between modules (tied weights) belongs to the one that comes first in the model's order of definition.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from agvm_ds.config import ConfigError

MODULE = "module"
"""Key of a parameter group: the AGVM module it belongs to."""
NAME = "name"
"""Key of a parameter group: unique among the groups."""
PARAMS = "params"
REST = "rest"
"""The module of the parameters that no entry covers."""

Modules = Sequence[str] | Mapping[str, Sequence[str]] | None
Group = dict[str, Any]


def param_groups(model: nn.Module, modules: Modules = None, **options: Any) -> list[Group]:
    """Parameter groups for AGVM, one a module, each with ``"module"`` and a unique ``"name"``.

    modules: None takes the model's top-level children in order of definition; a list of dotted names, or a dict
    name -> list of dotted prefixes, chooses. Where two prefixes fit a parameter, the longer one has it.
    options (``lr``, ``weight_decay``, ...): written into every group. Modules whose parameters are all frozen have none.

    Raises ConfigError when an entry covers no parameter, or a prefix is in two modules.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    return cut_groups([{PARAMS: trainable, **options}], model, modules)


def cut_groups(groups: Iterable[Mapping[str, Any]], model: nn.Module, modules: Modules = None) -> list[Group]:
    """Cut any parameter groups (for example one a parameter, as ``paramwise_cfg`` makes them) along the modules.

    Groups of one module with equal settings are merged: each group is a flat buffer under ZeRO. Order: modules in order
    of definition, settings as they first appear. Frozen parameters, empty ones, and groups left empty, are dropped.
    """
    owner = _owners(model, modules)
    merged: dict[tuple[str, str], Group] = {}
    for group in groups:
        settings = {key: value for key, value in group.items() if key not in (PARAMS, MODULE, NAME)}
        for parameter in group[PARAMS]:
            if not parameter.requires_grad or not numel_of(parameter):
                continue
            module = _owner_of(parameter, owner)
            key = (module, repr(sorted(settings.items())))
            merged.setdefault(key, {PARAMS: [], MODULE: module, **settings})[PARAMS].append(parameter)
    order = list(dict.fromkeys(owner.values()))
    return _named(sorted(merged.values(), key=lambda group: order.index(group[MODULE])))


def numel_of(parameter: torch.Tensor) -> int:
    """Elements of a whole parameter, which ZeRO-3 may have cut."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _owner_of(parameter: torch.Tensor, owner: Mapping[int, str]) -> str:
    if id(parameter) not in owner:
        raise ConfigError(f"a parameter of shape {tuple(parameter.shape)} in the groups is not in the model")
    return owner[id(parameter)]


def _named(groups: list[Group]) -> list[Group]:
    """Give each group its name: the module's, with a number behind it when the module has several groups."""
    counts: dict[str, int] = {}
    shared = {g[MODULE] for i, g in enumerate(groups) if any(g[MODULE] == other[MODULE] for other in groups[:i])}
    for group in groups:
        module = group[MODULE]
        index = counts[module] = counts.get(module, -1) + 1
        group[NAME] = f"{module}#{index}" if module in shared else module
    return groups


def _owners(model: nn.Module, modules: Modules) -> dict[int, str]:
    """id of a parameter -> the name of its module, in order of definition."""
    prefixes = _prefixes(model, modules)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if modules is not None:
        _refuse_unmatched(prefixes, names)
    return {id(parameter): _module_of(name, prefixes) for name, parameter in model.named_parameters()}


def _prefixes(model: nn.Module, modules: Modules) -> dict[str, str]:
    """Dotted prefix -> module."""
    if modules is None:
        return {name: name for name, _ in model.named_children()}
    if not isinstance(modules, Mapping):
        return {name: name for name in modules}
    result: dict[str, str] = {}
    for module, entries in modules.items():
        for prefix in entries:
            if result.setdefault(prefix, module) != module:
                raise ConfigError(f"modules: the prefix {prefix} is in both {result[prefix]} and {module}")
    return result


def _covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _module_of(name: str, prefixes: Mapping[str, str]) -> str:
    fitting = [prefix for prefix in prefixes if _covers(prefix, name)]
    return prefixes[max(fitting, key=len)] if fitting else REST


def _refuse_unmatched(prefixes: Mapping[str, str], names: Sequence[str]) -> None:
    unmatched = [prefix for prefix in prefixes if not any(_covers(prefix, name) for name in names)]
    if not unmatched:
        return
    known = list(dict.fromkeys(".".join(name.split(".")[:depth]) for depth in (1, 2) for name in names))
    known = [name for name in known if not any(name == full for full in names if "." in full)]
    lines = []
    for prefix in unmatched:
        near = difflib.get_close_matches(prefix, known, 1)
        lines.append(f"{prefix}: covers no parameter of the model" + (f"; did you mean {near[0]}?" if near else ""))
    raise ConfigError("modules: " + "\n  ".join([*lines, f"the model has: {', '.join(known)}"]))
