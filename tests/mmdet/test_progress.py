"""What a terminal shows of a run, and what other places get."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from agvm_ds.mmdet import progress
from agvm_ds.mmdet.progress import ProgressHook, counted, waiting


class Runner(SimpleNamespace):
    """As much of mmcv's as the hook reads: resumed at update 2 of 6."""

    def __init__(self, **more: Any) -> None:
        log = {"log_vars": {"loss": 1.25}}
        super().__init__(**{"rank": 0, "iter": 2, "max_iters": None, "max_epochs": 3, "outputs": log, **more})
        self.updates_per_epoch = 2


def shown(capsys: pytest.CaptureFixture[str], runner: Runner) -> str:
    with ProgressHook() as hook:
        hook.before_run(runner)
        for _ in range(3):
            hook.after_train_iter(runner)
        logging.getLogger("agvm_ds").warning("a line of the log")
    return capsys.readouterr().err


@pytest.fixture
def own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log to the terminal, as open_log leaves it."""
    log = logging.getLogger("agvm_ds")
    monkeypatch.setattr(log, "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(log, "propagate", False)


@pytest.mark.parametrize("runner", [Runner(), Runner(max_iters=6)], ids=["epochs", "updates"])
@pytest.mark.usefixtures("own_log")
def test_a_terminal_has_a_bar_below_the_log(
    runner: Runner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "at_terminal", lambda rank: rank == 0)
    text = shown(capsys, runner)
    assert "5/6" in text and "loss=1.250" in text
    lines = text.replace("\r", "\n").splitlines()
    assert "a line of the log" in lines, "on a line of its own, by tqdm"
    assert logging.getLogger("agvm_ds").handlers[0].__class__ is logging.StreamHandler, "put back"


@pytest.mark.usefixtures("own_log")
def test_elsewhere_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, Runner()).replace("a line of the log", "").strip() == ""
    batches = [1, 2]
    assert counted(batches, 2, "evaluation", 0) is batches


def test_the_bar_goes_when_a_run_ends_in_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "at_terminal", lambda rank: True)
    hook = ProgressHook()
    hook.before_run(Runner())
    with pytest.raises(ValueError, match="mistake"), hook:
        raise ValueError("mistake")
    assert hook._bar.disable


def test_what_is_waited_for_is_said_before_and_its_time_after_if_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_say", lambda text: print(text))
    with waiting("reading"):
        assert capsys.readouterr().out == "reading ...\n"
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "SOON", -1.0)
    with waiting("reading"):
        pass
    assert capsys.readouterr().out.splitlines()[1] == "reading: done in 0.0 s"


def test_rank_0_says_it_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("agvm_ds"), "handlers", [])
    for rank, said in (("1", ""), ("0", "words\n")):
        monkeypatch.setenv("RANK", rank)
        progress._say("words")
        assert capsys.readouterr().err == said
