"""The shared losses are mmdet's own, to the bit, in one collective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm
from mmdet.models import BaseDetector

from agvm_ds.mmdet.detector.losses import WIDTH, parse_losses
from tests.launch import RankFailure, run_ranks


class Detector(BaseDetector):
    """Nothing but its losses."""

    def extract_feat(self, imgs: Any) -> None: ...

    def simple_test(self, img: Any, img_metas: Any, **kwargs: Any) -> None: ...

    def aug_test(self, imgs: Any, img_metas: Any, **kwargs: Any) -> None: ...


class Own(Detector):
    def _parse_losses(self, losses: Any) -> Any:
        return losses["loss"], {"loss": 7.0}


def losses_of(rank: int, numbers: int = 3, nan: bool = False) -> dict[str, Any]:
    torch.manual_seed(rank)
    found: dict[str, Any] = {f"loss_{index}": torch.rand(5, requires_grad=True) for index in range(numbers)}
    found["loss_levels"] = [torch.rand(2, 3, requires_grad=True), torch.rand((), requires_grad=True)]
    found["acc"] = torch.rand(1) * (float("nan") if nan and rank == 1 else 100)
    return found


def both_ways() -> list[Any]:
    """In a rank: (loss, its gradient, log_vars, collectives) of mmdet's way and of this one."""
    rank, detector, found = comm.get_rank(), Detector(), []
    for parse in (detector._parse_losses, lambda losses: parse_losses(detector, losses)):
        losses, count, all_reduce = losses_of(rank), 0, torch.distributed.all_reduce

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return all_reduce(*args, **kwargs)  # noqa: B023

        torch.distributed.all_reduce = counted
        try:
            loss, log_vars = parse(losses)
        finally:
            torch.distributed.all_reduce = all_reduce
        loss.backward()
        found.append((float(loss), losses["loss_levels"][0].grad.tolist(), dict(log_vars), count))
    return found


def bad_and_many() -> Any:
    rank, detector = comm.get_rank(), Detector()
    bad = parse_losses(detector, losses_of(rank, nan=True))[1]
    many, mmdets = (
        parse(losses_of(rank, WIDTH)) for parse in (lambda x: parse_losses(detector, x), detector._parse_losses)
    )
    own = parse_losses(Own(), {"loss": torch.ones(())})[1]
    return bad, many[1] == dict(mmdets[1]), own


class Watch:
    """A rank that was asked to stop, or not, and what it hears of all."""

    def __init__(self, asked: bool) -> None:
        self.asked = asked
        self.heard: list[bool] = []

    def hear_of(self, anyone: bool) -> None:
        self.heard.append(anyone)


def asked_on_rank_1() -> Any:
    """In a rank: what is heard when rank 1 is asked, and when nobody is; the means of the former."""
    rank = comm.get_rank()
    asked, nobody = Watch(rank == 1), Watch(False)
    means = parse_losses(Detector(), losses_of(rank), asked)[1]  # type: ignore[arg-type]
    parse_losses(Detector(), losses_of(rank), nobody)  # type: ignore[arg-type]
    return asked.heard, nobody.heard, means == parse_losses(Detector(), losses_of(rank))[1]


def another_number() -> None:
    parse_losses(Detector(), losses_of(comm.get_rank(), 3 + comm.get_rank()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_as_mmdet_has_them_in_one_collective(ranks: int, tmp_path: Path) -> None:
    by_rank = run_ranks(both_ways, ranks, tmp_path)
    for mmdets, ours in by_rank:
        assert ours[:3] == mmdets[:3]
        assert (mmdets[3], ours[3]) == (7, 1)
    assert by_rank[0][1][2] == by_rank[-1][1][2]


def test_bad_numbers_many_losses_and_detectors_with_a_way_of_their_own(tmp_path: Path) -> None:
    for bad, same, own in run_ranks(bad_and_many, 2, tmp_path):
        assert bad["acc"] != bad["acc"] and bad["loss"] == bad["loss"]
        assert same
        assert own == {"loss": 7.0}


def test_another_number_of_losses_on_a_rank_is_told_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"rank \d has \d losses, another rank not as many; here: loss_0, "):
        run_ranks(another_number, 2, tmp_path)


def test_who_was_asked_to_stop_is_heard_along_with_the_losses(tmp_path: Path) -> None:
    assert run_ranks(asked_on_rank_1, 2, tmp_path) == [([True], [False], True)] * 2
