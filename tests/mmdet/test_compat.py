"""mmdet's hooks in a run that is resumed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from mmdet.core.hook import YOLOXModeSwitchHook

from agvm_ds.mmdet.compat import repeat_mode_switch


@pytest.mark.parametrize(("epoch", "switched"), [(6, False), (7, False), (8, True), (9, True)])
def test_a_run_resumed_after_the_switch_stays_switched(epoch: int, switched: bool) -> None:
    """Of ten epochs the last two are plain. In epoch 7 (the eighth), before them, the hook itself switches."""
    skipped: list[Any] = []
    loader = SimpleNamespace(dataset=SimpleNamespace(update_skip_type_keys=skipped.append))
    head = SimpleNamespace(use_l1=False)
    model = SimpleNamespace(module=SimpleNamespace(bbox_head=head))
    hooks = [object(), YOLOXModeSwitchHook(num_last_epochs=2)]
    repeat_mode_switch(SimpleNamespace(hooks=hooks, epoch=epoch, max_epochs=10, model=model), loader)
    assert (head.use_l1, bool(skipped)) == (switched, switched)
