"""weights_only() holds against a caller who asks for any pickle, as DeepSpeed does; both contexts leave no trace."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from agvm_ds.checkpoints import any_pickle, weights_only

NAMES = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_code_is_not_run_whoever_asks(tmp_path: Path) -> None:
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "x.pt")
    with weights_only(), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert not (tmp_path / "sprung").exists()


def test_what_deepspeed_saves_is_data(tmp_path: Path) -> None:
    state = {"scaler": LossScaler(1.0), "stage": ZeroStageEnum.gradients, "at": fragment_address(numel=3, start=1)}
    torch.save(state, tmp_path / "x.pt")
    with weights_only():
        loaded = torch.load(tmp_path / "x.pt", weights_only=False)
    assert (loaded["stage"], loaded["at"], loaded["scaler"].cur_scale) == (2, state["at"], 1.0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=True)


class ByName:
    """What stands in a pickle for ``getattr(kind, name)``."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> Any:
        return getattr, (self.kind, self.name)


def test_an_enums_member_as_python_3_11_2_saves_it(tmp_path: Path) -> None:
    """Debian 12's Python: a run could not resume from its own checkpoint."""
    torch.save({"stage": ByName(ZeroStageEnum, "gradients")}, tmp_path / "x.pt")
    with weights_only():
        assert torch.load(tmp_path / "x.pt")["stage"] is ZeroStageEnum.gradients


@pytest.mark.parametrize(
    ("kind", "name"),
    [(ZeroStageEnum, "__class__"), (LossScaler, "__init__"), ("text", "format"), (fragment_address, "_make")],
)
def test_no_other_attribute_is_fetched(kind: Any, name: str, tmp_path: Path) -> None:
    torch.save(ByName(kind, name), tmp_path / "x.pt")
    with weights_only(), pytest.raises(pickle.UnpicklingError, match="is not a member of an enum"):
        torch.load(tmp_path / "x.pt")


@pytest.mark.parametrize("context", [weights_only, any_pickle])
def test_the_environment_is_as_it_was(
    context: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAMES[0], "0")
    monkeypatch.delenv(NAMES[1], raising=False)
    with context():
        assert [name for name in NAMES if os.environ.get(name) == "1"] != []
        assert len([name for name in NAMES if name in os.environ]) == 1, "torch refuses both at once"
    assert os.environ[NAMES[0]] == "0" and NAMES[1] not in os.environ
