"""Reading a DeepSpeed configuration: its JSON, and its top-level keys, of which DeepSpeed ignores any it does not know."""

from __future__ import annotations

import base64
import copy
import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hjson

from agvm_ds.config import BLOCK, ConfigError

Kinds = tuple[type, ...]
_FLAG: Kinds = (bool,)
_NUMBER: Kinds = (int, float)
_WHOLE: Kinds = (int,)
_TEXT: Kinds = (str,)
_KINDS = {_FLAG: "true or false", _NUMBER: "a number", _WHOLE: "an integer", _TEXT: "a string"}

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

BLOCKS = (
    *(
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comet",
        "comms_logger",
    ),
    *("compile", "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency", "data_types"),
    *("datastates_ckpt", "eigenvalue", "elasticity", "expert_parallel", "flops_profiler", "fp16", "hybrid_engine"),
    *(
        "nebula",
        "optimizer",
        "pipeline",
        "progressive_layer_drop",
        "quantize_training",
        "scheduler",
        "sparse_attention",
    ),
    *(
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "wandb",
        "weight_quantization",
        "zero_optimization",
    ),
)
"""Top-level keys of DeepSpeed 0.19 whose value is an object."""

VALUES: dict[str, Kinds | None] = {
    **dict.fromkeys(BATCH_KEYS),
    **dict.fromkeys(("communication_data_type", "seq_parallel_communication_data_type", "vocabulary_size")),
    **dict.fromkeys(("sequence_parallel_size", "data_parallel_size"), _WHOLE),
    **dict.fromkeys(("gradient_clipping", "gradient_predivide_factor", "steps_per_print"), _NUMBER),
    **dict.fromkeys(("gradient_allreduce_op", "log_level"), _TEXT),
    **dict.fromkeys(("dataloader_drop_last", "disable_allgather", "disable_python_gc", "dump_state"), _FLAG),
    **dict.fromkeys(("graph_harvesting", "managed_gradient_accumulation", "memory_breakdown"), _FLAG),
    **dict.fromkeys(("prescale_gradients", "sparse_gradients", "use_data_before_expert_parallelism"), _FLAG),
    **dict.fromkeys(("wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), _FLAG),
}
"""The others, with the types of their values (None: not looked at here)."""

SWITCHES = ("fp16", "bf16", "bfloat16", "torch_autocast")
"""Blocks whose ``enabled`` is looked at before DeepSpeed has read it."""

LIKENESS = 0.75
"""How like a known key an unknown one is when it is taken for a slip of the pen (difflib's ratio)."""


def load_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration as a dict of its own: of a dict, or of a file in JSON or Hjson, as DeepSpeed reads it.

    JSON in base64, in the place of a file's name, is what DeepSpeed's autotuner passes.

    Raises ConfigError for a file that is no configuration, with the position of the mistake, and, all together, for
    top-level keys that are like a known one and for values of another kind than DeepSpeed's. Any other unknown key is
    the user's own: see ``unknown_keys``.
    """
    where, given = "", config if isinstance(config, Mapping) else _decoded(str(config))
    if given is None:
        where, loaded = f"{config}: ", _read(Path(str(config)))
    else:
        loaded = copy.deepcopy(dict(given))
    problems = [*_slips(loaded), *_shapes(loaded), *_values(loaded), *_texts(loaded)]
    if problems:
        raise ConfigError("\n  ".join([f"{where}the DeepSpeed config has mistakes:", *problems]))
    return loaded


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """The top-level keys that neither DeepSpeed nor AGVM reads."""
    return [key for key in config if key not in BLOCKS and key not in VALUES and key != BLOCK]


def _decoded(text: str) -> dict[str, Any] | None:
    """The object that a text is in base64; None for any other text."""
    try:
        found = json.loads(base64.b64decode(text, altchars=b"-_", validate=True))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"DeepSpeed config not found: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        loaded = hjson.loads(text, object_pairs_hook=_without_duplicates)
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a DeepSpeed config: {error}") from None
    if not isinstance(loaded, dict) or text.lstrip()[:1] == "[":
        raise ConfigError(f"{path}: not a DeepSpeed config: must be a JSON object")
    if not loaded:
        raise ConfigError(f"{path}: not a DeepSpeed config: it is empty")
    return loaded


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One object of the file. Of two equal keys a JSON reader would keep the last in silence."""
    twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f"duplicate keys in one object: {', '.join(twice)}")
    return dict(pairs)


def _slips(config: Mapping[str, Any]) -> Iterator[str]:
    """Unknown keys that are like a known one. Keys put out of use ("_fp16", "#fp16") and comments are not."""
    known = [BLOCK, *BLOCKS, *VALUES]
    for key in unknown_keys(config):
        name = str(key).lower().replace("-", "_")
        near = difflib.get_close_matches(name, known, 1, LIKENESS)
        if near and name[:1].isalpha() and not name.startswith("comment"):
            yield f"{key}: unknown key, which DeepSpeed would ignore; did you mean {near[0]}?"


def _shapes(config: Mapping[str, Any]) -> Iterator[str]:
    """Blocks that are no objects."""
    for key in BLOCKS:
        value = config.get(key, {})
        if key == "zero_optimization" and isinstance(value, bool):
            yield f'{key}: true or false is an old form of DeepSpeed\'s; write {{"stage": 1}}, or 0, 2, 3'
        elif not isinstance(value, Mapping):
            yield f"{key} = {value!r}: must be an object {{...}}, or left out"
        elif key in ("optimizer", "scheduler"):
            if not isinstance(value.get("type", ""), str):
                yield f"{key}.type = {value['type']!r}: must be a string"
            if not isinstance(value.get("params") or {}, Mapping):
                yield f"{key}.params = {value['params']!r}: must be an object {{...}}"


def _values(config: Mapping[str, Any]) -> Iterator[str]:
    """Values of the wrong kind. Python takes a bool for a number."""
    for key, kinds in VALUES.items():
        value = config.get(key)
        wrong = kinds is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kinds != _FLAG))
        if kinds is not None and wrong and key in config:
            yield f"{key} = {value!r}: must be {_KINDS[kinds]}, or left out"
    steps = config.get("steps_per_print")
    if isinstance(steps, (int, float)) and steps < 1:
        yield f"steps_per_print = {steps}: must be at least 1"


def _texts(config: Mapping[str, Any]) -> Iterator[str]:
    """Text in the place of a value. DeepSpeed passes over "auto", which Hugging Face's trainer fills in, or hands it on."""
    blocks = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    for key in SWITCHES:
        if isinstance(value := blocks.get(key, {}).get("enabled"), str):
            yield f"{key}.enabled = {value!r}: must be true or false"
    if isinstance(value := blocks.get("zero_optimization", {}).get("stage"), str):
        yield f"zero_optimization.stage = {value!r}: must be a number, and is text"
    for key in ("optimizer", "scheduler"):
        params = blocks.get(key, {}).get("params")
        for name, value in params.items() if isinstance(params, Mapping) else ():
            if any(map(_is_number_as_text, value if isinstance(value, list) else [value])):
                yield f"{key}.params.{name} = {value!r}: must be a number, and is text"


def _is_number_as_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return value == "auto"
    return True
