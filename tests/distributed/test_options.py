"""Every row of the option table (tests/options.py): identical statistics and training, or a refusal with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests import options
from tests.comparison import Worst
from tests.launch import ON_GPU
from tests.options import Key, Option, Way, judge, key_of, runs_of

GROUPS: dict[str, Sequence[Option]] = {
    "configurations": [*options.CONFIGURATIONS, *options.PRECISIONS, *options.MODELS],
    "bases": options.TORCH_BASES,
    "compiled bases": options.COMPILED_BASES,
    "refusals": options.refusals(),
    "on a GPU": options.ON_A_GPU,
}
"""Ranks are started once a group."""

Judged = Callable[[str], dict[Key, Worst | str]]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """group -> what its runs came to."""

    @cache
    def of(group: str) -> dict[Key, Worst | str]:
        return judge(runs_of(GROUPS[group]), Path(tmp_path_factory.mktemp("options")))

    return of


def cases(*groups: str) -> list:
    found = [(group, *run) for group in groups for run in runs_of(GROUPS[group])]
    return [pytest.param(*one, id="-".join(map(str, key_of(*one[1:])))) for one in found]


AGREEING = ("configurations", "bases", "compiled bases", *(["on a GPU"] if ON_GPU else []))


@pytest.mark.parametrize(("group", "option", "stage", "way"), cases(*AGREEING))
@pytest.mark.timeout(1200)  # the compiled bases' first build
def test_it_agrees_with_the_reference(group: str, option: Option, stage: int, way: Way, judged: Judged) -> None:
    found = judged(group)[key_of(option, stage, way)]
    assert isinstance(found, Worst), found
    print(f"{option.name}, stage {stage}, {way}: {found}")
    assert found.within(option.allowed(way)), found


def test_the_page_has_every_row() -> None:
    page = (Path(__file__).parents[2] / "docs/options.md").read_text()
    assert [option.name for group in GROUPS.values() for option in group if f"| {option.name} |" not in page] == []


@pytest.mark.parametrize(("group", "option", "stage", "way"), cases("refusals"))
def test_it_is_refused_with_the_reason(group: str, option: Option, stage: int, way: Way, judged: Judged) -> None:
    found = judged(group)[key_of(option, stage, way)]
    assert isinstance(found, str), "it was not refused"
    assert option.refused in found
