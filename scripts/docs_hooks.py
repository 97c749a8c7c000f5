"""mkdocs hooks: the keys of the ``agvm`` block from their pydantic model, and a page for each file that the docs link to.

The pages in docs/ link to files beside them (``../tests/reference.py``), as they are read in the repository. In the site such
a file is a page of its own below ``source/``: Markdown as it is, anything else as a listing, a folder as a list of its files.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agvm_ds.config import AGVMConfig

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SOURCE = "source/"
"""Where the site has the files that are not in docs/."""
KEYS = "<!-- keys of the agvm block -->"
"""Where a page has the table of the keys."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
"""The path of a relative link, without its anchor."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages below ``source/``."""
    from mkdocs.structure.files import File, InclusionLevel

    for path in linked_files():
        uri = page_of(path)
        files.append(File.generated(config, uri, content=shown(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in the table of the keys, and let links out of docs/ lead to the pages below ``source/``."""
    uri = page.file.src_uri
    if uri.startswith(SOURCE):
        return markdown
    return relinked(markdown.replace(KEYS, keys_table()), DOCS / uri)


# Files of the repository


def linked_files() -> list[Path]:
    """The files and folders outside docs/ to which a page leads, itself or by way of others."""
    found: list[Path] = []
    waiting = sorted(DOCS.glob("*.md"))
    while waiting:
        path = waiting.pop(0)
        for target in targets(path):
            if target not in found and target.exists() and not target.is_relative_to(DOCS):
                found.append(target)
                waiting.append(target)
    return found


def targets(path: Path) -> Iterator[Path]:
    """What a Markdown file links to, or the files of a folder."""
    if path.is_dir():
        yield from sorted(file for file in path.iterdir() if file.is_file())
    elif path.suffix == ".md":
        yield from ((path.parent / link).resolve() for link in LINK.findall(path.read_text()))


def page_of(path: Path) -> str:
    """The page of the site that shows a file or folder of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    ending = "/index.md" if path.is_dir() else "" if path.suffix == ".md" else ".md"
    return f"{SOURCE}{path.relative_to(ROOT).as_posix()}{ending}"


def shown(path: Path) -> str:
    """A file or folder as Markdown."""
    title = f"# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        return title + "".join(f"- [{file.name}]({file.name}.md)\n" for file in targets(path))
    text = path.read_text()
    return relinked(text, path) if path.suffix == ".md" else f"{title}~~~~{path.suffix[1:]}\n{text}\n~~~~\n"


def relinked(markdown: str, origin: Path) -> str:
    """A Markdown file of the repository with its links as they are between pages of the site."""
    here = posixpath.dirname(page_of(origin)) or "."

    def moved(link: re.Match[str]) -> str:
        target = (origin.parent / link[1]).resolve()
        return posixpath.relpath(page_of(target), here) if target.exists() else link[1]

    return LINK.sub(moved, markdown)


# The agvm block


def keys_table() -> str:
    """A row a key: its name, what its value may be, its default, what it does."""
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, schema in AGVMConfig.model_json_schema()["properties"].items():
        meaning = schema["description"].replace("``", "`")
        rows.append(f"| `{name}` | {values(schema)} | `{json.dumps(schema['default'])}` | {meaning} |")
    return "\n".join(rows)


def values(schema: Mapping[str, Any]) -> str:
    """What a value may be, in words, from its JSON schema."""
    if "anyOf" in schema:
        return ", or ".join(values(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(one)}`" for one in schema["enum"])
    if "prefixItems" in schema:
        return f"[{', '.join(values(one) for one in schema['prefixItems'])}]"
    kind = schema["type"]
    if kind == "array":
        return f"[{values(schema['items'])}, …]"
    if kind == "object":
        return f"{{name: {values(schema['additionalProperties'])}, …}}"
    words = {"boolean": "`true` or `false`", "null": "`null`", "string": "string"}
    return words.get(kind) or kind + bounds(schema)


def bounds(schema: Mapping[str, Any]) -> str:
    """The range of a number, in words."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ",".join(f" {sign} {schema[key]}" for key, sign in signs.items() if key in schema)
