"""What is told when a run is continued with other settings."""

from __future__ import annotations

from agvm_ds.mmdet.checkpointing import plain
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.plan import make_plan
from agvm_ds.mmdet.recipe import differences, recipe_of

PLANNED = {"lr_config.warmup_iters": 460, "runner.max_epochs": 16, "custom_hooks.0.priority": 50}
HOOKS = {"custom_hooks": [{"type": "EMAHook", "priority": 49}]}


def told(options: dict[str, object], settings: dict[str, object]) -> list[str]:
    """What a run with these options says that goes on from one with PLANNED and AGVM from update 560."""
    runs = []
    for more, json in ((PLANNED, {"agvm": {"start_step": 560}}), (options, settings)):
        cfg = read_config(None, HOOKS)
        cfg.merge_from_dict(more)
        plan = make_plan({"train_batch_size": 16, **json}, cfg, 2)
        runs.append(recipe_of(cfg, plan))
        if len(runs) == 1:
            cfg.lr_config.pop("policy")  # as mmcv does it
    return list(differences(*map(plain, runs)))


def test_the_same_run_differs_in_nothing() -> None:
    assert told(PLANNED, {"agvm": {"start_step": 560}}) == []


def test_what_was_left_out_of_the_command_is_named_with_both_values() -> None:
    lines = told(
        {"data.samples_per_gpu": 4}, {"agvm": {"start_step": 0, "modules": ["neck"]}, "gradient_clipping": 1.0}
    )
    cfg = read_config(None)
    assert set(lines) == {
        f"runner.max_epochs: 16 before, {cfg.runner.max_epochs} now",
        f"lr_config.warmup_iters: 460 before, {cfg.lr_config.warmup_iters} now",
        "custom_hooks.0.priority: 50 before, 49 now",
        f"gradient_clipping: {float(cfg.optimizer_config.grad_clip.max_norm)} before, 1.0 now",
        "agvm.start_step: 560 before, 0 now",
    }


def test_data_may_lie_elsewhere() -> None:
    runs = []
    for root in ("/scratch/job_1/", "/scratch/job_2"):
        cfg = read_config(None, {"data_root": root})
        runs.append(plain(recipe_of(cfg, make_plan({"train_batch_size": 16}, cfg, 2))))
    assert list(differences(*runs)) == []
    assert runs[0]["data"]["train"]["ann_file"] == "annotations/train.json"


def test_a_block_that_is_gone_and_a_list_of_another_length() -> None:
    assert list(differences({"a": [{"b": 1}], "c": {"d": 2}}, {"a": []})) == [
        "a: [{'b': 1}] before, [] now",
        "c: {'d': 2} before, nothing now",
    ]
