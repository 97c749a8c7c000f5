"""docs/troubleshooting.md has an entry for every message of the code, and none for a message that is no more."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.messages import OTHER_FILES, OTHER_TEXTS, ROOT, VALUE, Message, messages, normalised, texts

PAGE = ROOT / "docs" / "troubleshooting.md"
OURS = "message"
"""Heads the first column of a table whose messages must be the code's; other tables' need not."""
LONG = 8
"""Characters of a part without values from which on it tells a message."""


def entries(page: str) -> list[str]:
    """The messages of a page's entries: what is in backticks in the first column of its tables."""
    found, ours = [], False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if not line.startswith("|"):
            ours = False
        elif cells[1] == OURS:
            ours = True
        elif ours:
            found += [normalised(text) for text in re.findall(r"`([^`]+)`", cells[1])]
    return found


@cache
def parts(text: str) -> tuple[str, ...]:
    """What of a message does not change."""
    return tuple(part.strip() for part in text.split(VALUE) if part.strip())


def within(inner: str, outer: str) -> bool:
    """Whether the unchanging parts of a message follow each other in another; short ones say too little for that."""
    if max(map(len, parts(inner)), default=0) < LONG:
        return inner == outer
    return re.search(".*".join(map(re.escape, parts(inner))), outer) is not None


def without_entry(found: list[Message], told: list[str]) -> list[str]:
    """Messages that no entry has, whole or its beginning."""
    return [
        f"{message.place}: {message.text}"
        for message in found
        if not any(within(message.text, entry) or within(entry, message.text) for entry in told)
    ]


def stale(told: list[str], found: list[Message]) -> list[str]:
    """Entries of which some words are no message's."""
    known = sorted({part for message in found for part in parts(message.text)}, key=len, reverse=True)
    return [entry for entry in told if not any(within(entry, one.text) for one in found) and _rest(entry, known)]


def _rest(entry: str, known: list[str]) -> str:
    """The words of an entry that remain when those of messages are taken out, the longest parts first."""
    for part in known:
        entry = entry.replace(part, VALUE)
    return "".join(re.findall(r"\w", entry))


@cache
def told() -> list[str]:
    return entries(PAGE.read_text())


def test_every_message_has_an_entry() -> None:
    assert without_entry(messages(), told()) == []


def test_every_entry_is_a_message_of_the_code() -> None:
    assert stale(told(), messages()) == []


def test_no_message_has_two_entries() -> None:
    assert sorted({entry for entry in told() if told().count(entry) > 1}) == []


def test_what_is_no_message_is_still_there() -> None:
    there = {message.text for message in texts()}
    assert [text for one in OTHER_TEXTS.values() for text in one if text not in there] == []
    assert [name for name in OTHER_FILES if not (ROOT / name).is_file()] == []


def test_a_new_message_is_missed_and_a_changed_one_is_stale() -> None:
    """The comparison itself, on messages of its own."""
    written = "train = …: must be even", "no room on …", "…: …"
    found = [Message(f"a.py:{line}", text) for line, text in enumerate(written, 1)]
    page = "| message | |\n|---|---|\n| `train = …: must be even`<br>`…: …` | |\n| `no space on …` | |\n"
    assert without_entry(found, entries(page)) == ["a.py:2: no room on …"]
    assert stale(entries(page), found) == ["no space on …"]


@pytest.mark.parametrize("anchor", re.findall(r"\]\(#([^)]+)\)", PAGE.read_text()))
def test_links_within_the_page(anchor: str) -> None:
    heads = re.findall(r"^#+ (.+)$", PAGE.read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
