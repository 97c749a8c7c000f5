"""The documentation agrees with itself and with the code: links, commands, JSON, and what the site's hooks make."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docs_hooks
import pytest
import yaml
from markdown.extensions.toc import slugify, unique

from agvm_ds.config import AGVMConfig, ConfigError, read_block
from agvm_ds.deepspeed_json import load_config
from agvm_ds.variance import noise_scale, pairwise_variance

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"launch/(\w+)\.py([^`\n]*)")
ROOMS = "agvm_ds|benchmarks|configs|ds_configs|examples|launch|scripts|tests"
FILE = re.compile(rf"(?<![\w/.*}}])((?:{ROOMS})/[\w/.-]+\.(?:py|json))\b")


def without_code(text: str) -> str:
    return INLINE.sub("", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Of a page's headings, as mkdocs makes them (GitHub's are the same for plain words)."""
    used: set[str] = set()
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {unique(slugify(title.replace("`", ""), "-"), used) for title in titles}


def navigated(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    else:
        for part in node.values() if isinstance(node, dict) else node:
            yield from navigated(part)


def test_every_page_is_in_the_navigation_and_the_other_way_round() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = list(navigated(config["nav"]))
    assert sorted(listed) == [page.name for page in DOCS]
    assert config["strict"]


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for link in LINK.findall(without_code(TEXTS[page])):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_are_there(page: str) -> None:
    """X.json and the like stand for the reader's own."""
    names = [name for name in FILE.findall(TEXTS[page]) if Path(name).stem != "X"]
    assert not [name for name in names if not (ROOT / name).exists()]


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(script of launch/, its options) of every command, in code blocks and in lines; a trailing backslash continues it."""
    for name, words in COMMAND.findall(re.sub(r"\\\n\s*", " ", text)):
        yield name, re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", words.split("  #")[0])


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Script of launch/ -> the options that its --help tells."""
    found = {}
    for script in sorted((ROOT / "launch").glob("*.py")):
        with pytest.MonkeyPatch.context() as patch:
            told: list[str] = []
            patch.setattr(sys, "argv", [str(script), "--help"])
            patch.setattr("argparse.ArgumentParser._print_message", lambda self, text, file=None: told.append(text))  # noqa: B023
            with pytest.raises(SystemExit):
                runpy.run_path(str(script), run_name="__main__")
        found[script.stem] = set(re.findall(r"--[\w-]+", "".join(told)))
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_commands_have_options_that_their_scripts_know(page: str, known: dict[str, set[str]]) -> None:
    asked = [(script, option) for script, options in commands(TEXTS[page]) for option in options]
    assert not [pair for pair in asked if pair[1] not in known[pair[0]]]


def test_commands_are_found_and_wrong_ones_too(known: dict[str, set[str]]) -> None:
    text = "deepspeed launch/train.py C \\\n  --work-dir W --resume-from X\nlaunch/test.py --eval x\n -x"
    assert list(commands(text)) == [("train", ["--work-dir", "--resume-from"]), ("test", ["--eval"])]
    assert {"--work-dir", "--dry-run", "--deepspeed_config", "--cfg-options"} <= known["train"]
    assert "--resume-from" not in known["train"]
    assert sum(len(list(commands(text))) for text in TEXTS.values()) > 40


def blocks(text: str) -> Iterator[str]:
    for kind, body in FENCE.findall(text):
        if kind == "json" and '"agvm"' in body:
            yield body


def test_every_json_with_the_block_is_accepted() -> None:
    found = [(page, body) for page, text in TEXTS.items() for body in blocks(text)]
    assert len(found) >= 5
    for page, body in found:
        try:
            read_block(load_config(json.loads(body)))
        except ConfigError as error:
            pytest.fail(f"{page}: {error}\n{body}")


def test_the_mistakes_that_the_reference_shows_are_told_so() -> None:
    said = [body for kind, body in FENCE.findall(TEXTS["docs/json-reference.md"]) if kind == "text"]
    with pytest.raises(ConfigError) as raised:
        read_block(json.loads(f"{{{said[0]}}}"))
    assert str(raised.value) == said[1].strip()


def test_the_table_of_keys_has_every_key_with_its_meaning() -> None:
    table = docs_hooks.keys_table().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]
    assert [row[0] for row in rows] == [f"`{key}`" for key in AGVMConfig.model_fields]
    assert all(len(row) == 4 and all(row) for row in rows)
    by_key = {row[0].strip("`"): row for row in rows}
    assert by_key["interval"][1:3] == ["integer ≥ 1", "`10`"]
    assert by_key["ema_decay"][1] == "number ≥ 0, ≤ 1"
    assert by_key["estimator"][1] == '`"pairwise"` or `"split"`'
    assert by_key["modules"][1] == "[string, …], or {name: [string, …], …}, or `null`"
    assert TEXTS["docs/json-reference.md"].count(docs_hooks.KEYS) == 1


def test_the_readmes_table_of_keys_has_the_defaults() -> None:
    """A row may be of two keys."""
    rows = [
        line.split(" | ")[:2] for line in TEXTS["README.md"].splitlines() if re.match(r"\| `[a-z_]+`.* \| .* \| ", line)
    ]
    keys = [key.strip("| `") for names, _ in rows for key in names.split(", ")]
    told = [json.loads(value) for names, values in rows for value in _values(values, names.count(",") + 1)]
    assert dict(zip(keys, told, strict=True)) == json.loads(AGVMConfig().model_dump_json())


def _values(text: str, count: int) -> list[str]:
    return text.replace("`", "").split(", ") if count > 1 else [text.replace("`", "")]


def test_links_out_of_the_docs_lead_to_pages_of_the_site() -> None:
    moved = docs_hooks.relinked(
        "[a](../tests/reference.py) [b](options.md#x) [c](../configs) [d](https://e.f/g)", DOCS[0]
    )
    assert (
        moved == "[a](source/tests/reference.py.md) [b](options.md#x) [c](source/configs/index.md) [d](https://e.f/g)"
    )
    moved = docs_hooks.relinked("[a](docs/options.md#x)", ROOT / "README.md")
    assert moved == "[a](../options.md#x)"
    assert ROOT / "tests/reference.py" in docs_hooks.linked_files()


@pytest.mark.parametrize(("critical", "batch", "n"), [(512, 512, 16), (30, 512, 4), (9000, 64, 2)])
def test_variance_and_noise_scale_are_related_as_concepts_says(critical: float, batch: int, n: int) -> None:
    """Phi = 2B / (2B + b), for numbers that are at their expectation: |G|^2 = 1 + B/b and S2 = n (1 + B n / b)."""
    s2, g2 = n * (1 + critical * n / batch), 1 + critical / batch
    assert noise_scale(s2, g2, n, batch // n) == pytest.approx(critical)
    assert pairwise_variance(s2, g2, n) == pytest.approx(2 * critical / (2 * critical + batch))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: a link or an anchor that leads nowhere, or a page that is not in the navigation, is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "json-reference.html").read_text()
    assert "ratio_bounds" in page and "<!-- keys" not in page
    assert "scale_factors" in (tmp_path / "api.html").read_text()
