"""Every text by which agvm_ds and launch/ may tell a user that something is wrong, read from their sources.

A text counts unless it is known to be of another kind: so a message added anywhere, by whatever means it is told, is found.
Nothing of the package is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
VALUE = "…"
"""Stands for what a message is filled with."""

SENTENCE = 3
"""Words from which on a text is a message wherever it stands; where messages are told, or after a colon, one is enough."""
WORD = re.compile(r"[^\W\d]{2,}\S*(?:\s|$)")
TELLING = {"refuse", "note", "warning", "_warn", "_warn_once", "say", "error", "Problem", "ArgumentError", "Check"}
"""Calls that are made to tell one."""
SAYING = {"add", "add_argument", "ArgumentParser", "print", "info", "waiting", "_say"}
"""Calls whose text is help or progress."""
SHOWING = {"table", "Table", "add_row", "Row", "Picture", "set_title", "legend", "dress", "plot_modules", "_panels"}
"""Calls whose text is in a table or a picture."""

OTHER_FILES = {
    "agvm_ds/report/pictures.py": "captions",
    "agvm_ds/report/figures.py": "captions",
    "agvm_ds/report/table.py": "headings",
    "agvm_ds/mmdet/rehearsal.py": "the tables of a dry run",
}
"""Files without a message -> what their texts are."""

OTHER_TEXTS = {
    "a remedy, which the doctor prints below its problem": (
        "pip install -e .",
        "make the environment with such a Python",
        "install Python's headers (Debian: apt install python3.11-dev)",
        'pip install -c constraints.txt "……"',
        "mend that; if need be, …",
        'pip install -c constraints.txt "setuptools<81"',
        "install g++ (Debian: apt install g++), or set CXX to a C++20 compiler",
        "pip install -c constraints.txt ninja",
        "source …/activate",
        "first mend the packages above",
        "see what nvidia-smi says and whether torch is a CUDA build; or set DS_ACCELERATOR=cpu to mean it",
        "install nvcc of CUDA …, set CUDA_HOME, then python scripts/build_mmcv.py",
    ),
    "what others say, which is looked for, and progress of a search": (
        "exits with return code = -9",
        "out of memory",
        "… images a micro-batch: fits…",
        "… images a micro-batch: out of memory",
        "… images a micro-batch: more than the training set has",
        "or more: --most ends the search",
        "the largest that fits",
        "… images a micro-batch: …",
    ),
    "a note of what was settled, in the log at INFO": (
        "an IterBasedRunner has no epochs, after which mmcv uses the averages: trained weights are published",
        "each host has a work dir of its own",
        "the hosts share the work dir",
        "…: checkpoint.… is …",
        "; the config's … is set aside",
        "--revert-sync-bn: … layers of SyncBN train as BN",
    ),
    "a rule or source in the table of launch/plan.py": (
        "the largest divisor of … / … that is estimated to fit --memory … GiB",
        "it accumulates: 1 reduces gradients once an update, 2 once a micro-batch",
        "one reduction an update in any case",
        "1 holds a smaller micro-batch",
        "2 is estimated not to hold one image",
        "…; …: heads, losses, work space",
        "no img_scale in the training pipeline",
        "the detector does not run on the meta device: …: …",
        "saved by … for an image of … x …, on the meta device",
        "lr x batch / base (Goyal et al., arXiv 1706.02677)",
        "lr x sqrt(batch / base) (Malladi et al., arXiv 2205.10287; betas and eps are left as they are)",
        "linear to … images, square root beyond: the official AGVM recipes",
        "10; 5 from batch …: AGVM, arXiv 2210.11078",
        "counted, as mmdet trains on them: …",
        "COCO train2017's with annotations",
        "COCO train2017's, filter_empty_gt is off",
        "…; … is not here to count",
        "official AGVM recipe of … at …",
        "official AGVM recipe, with lr_config.step = [12, 14]",
        "… / (… GPUs x …), rounded up as mmdet's sampler fills up",
    ),
    "in a table or a picture": (
        "detection, score at least …",
        "the same, wrong label or place",
        "not checked: read by other means than CocoDataset's",
        "critical batch size, images",
        "times fewer updates",
        "of the images well used",
        "Made … by agvm_ds ….",
    ),
    "an internal check: the ranks agree that the checkpoint has a manifest before it is read": (
        "a checkpoint without one counts as damaged",
    ),
    "a formula called with what every caller has refused before": (
        "gradient variance needs at least 2 micro-batches an update, got n = …",
    ),
    "Python's own wording, for a name that the package does not have": ("module … has no attribute …",),
    "what a line of the lock file says, and the message about it quotes": ("rank 0 is process … on …, since …",),
    "cut out of another program's message": (". This is typically",),
    "looked for in a file": ('"format": "…"', '"version": …'),
    "the key by which a warning is said once": ("undefined …", "frozen …"),
    "how messages begin or end": ("error: …", "AGVM: …", "AGVM, update …: …", "update …: …", "… (said once)"),
}
"""Why texts are no messages -> those texts."""


@dataclass(frozen=True)
class Message:
    """A text of the code, its values replaced by VALUE, white space by single spaces."""

    place: str
    text: str


def messages() -> list[Message]:
    """All of them, in the order of files and lines."""
    others = {text for texts in OTHER_TEXTS.values() for text in texts}
    return [message for message in texts() if message.text not in others]


@cache
def texts() -> tuple[Message, ...]:
    """All that look like a message, those in OTHER_TEXTS too."""
    names = [*_sources("agvm_ds"), *_sources("launch")]
    trees = {name: ast.parse((ROOT / name).read_text()) for name in names}
    constants = {name: dict(_constants(tree)) for name, tree in trees.items()}
    found = []
    for name, tree in trees.items():
        reader = _Reader({**constants[name], **dict(_imported(tree, constants))})
        if name not in OTHER_FILES:
            found += [Message(f"{name}:{line}", text) for line, text in reader.read(tree)]
    return tuple(found)


def _sources(folder: str) -> list[str]:
    return sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*.py"))


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """NAME = "text" at the top of a file: messages are filled with them."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from ((target.id, node.value.value) for target in node.targets if isinstance(target, ast.Name))


def _imported(tree: ast.Module, constants: dict[str, dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Those of other files."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            there = constants.get(f"{str(node.module).replace('.', '/')}.py", {})
            yield from ((one.asname or one.name, there[one.name]) for one in node.names if one.name in there)


class _Reader:
    """Goes through a tree, with an eye on whether a message is told there."""

    def __init__(self, constants: dict[str, str]) -> None:
        self.constants = constants

    def read(self, node: ast.AST, told: bool = False) -> Iterator[tuple[int, str]]:
        """(line, text) of every text that looks like a message."""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            text = normalised(self._text(node))
            least = 1 if told or ": " in text else SENTENCE
            if " " in text and len(WORD.findall(text)) >= least:
                yield node.lineno, text
        for child in self._children(node):
            yield from self.read(child, told or self._tells(node))

    def _text(self, node: ast.Constant | ast.JoinedStr) -> str:
        if isinstance(node, ast.Constant):
            return re.sub(r"%[sd]|\{\}", VALUE, node.value) if isinstance(node.value, str) else ""
        return "".join(
            self.constants.get(ast.unparse(part.value), VALUE) if isinstance(part, ast.FormattedValue) else part.value
            for part in node.values
        )

    def _tells(self, node: ast.AST) -> bool:
        return isinstance(node, (ast.Raise, ast.Yield)) or (isinstance(node, ast.Call) and _called(node) in TELLING)

    def _children(self, node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.JoinedStr):
            yield from (part.value for part in node.values if isinstance(part, ast.FormattedValue))
        elif isinstance(node, ast.Call):
            if not _shows(node):
                yield from [*node.args, *node.keywords]
            if not (isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Constant)):
                yield node.func  # "text".join(...) tells nothing by itself
        else:
            yield from ast.iter_child_nodes(node)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _shows(node: ast.Call) -> bool:
    """Whether a call's arguments are texts of another kind; ``notes`` are what a run has settled."""
    notes = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value).endswith("notes")
    elsewhere = any(keyword.arg == "file" for keyword in node.keywords)  # print(..., file=sys.stderr)
    return notes or (_called(node) in SAYING | SHOWING and not elsewhere)


def normalised(text: str) -> str:
    """White space made single, backticks left out."""
    return " ".join(text.replace("`", "").split())
