"""Prints the table of options: the worst difference from the dense reference, or the refusal.

    python -m benchmarks.exactness               as in docs/options.md: 3 minutes on two cores
    python -m benchmarks.exactness --all-ways    each row with every estimator, preconditioning and bucket size: 6 minutes
    python -m benchmarks.exactness --write       the table into docs/options.md
    DS_ACCELERATOR=cuda python -m benchmarks.exactness   on a GPU, over NCCL

Two ranks, two accumulation steps, six updates of a toy detector. Differences are absolute, the largest over updates, modules
and ways of measuring; of scale factors, of parameters. On a GPU, which both ranks share, the table has a place of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.machine import with_table
from tests import options
from tests.comparison import Worst
from tests.launch import ON_GPU
from tests.options import ALL_WAYS, WAYS, Key, Option, judge, key_of, runs_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "options.md"
MARK = "<!-- made by python -m benchmarks.exactness --write -->\n"

PLACE_ON_A_GPU = "what was found on a GPU"
HEAD = "### {}, on a GPU" if ON_GPU else "## {}"

SECTIONS: dict[str, Sequence[Option]] = {
    "DeepSpeed's options": options.CONFIGURATIONS,
    "Precision": options.PRECISIONS,
    "Models": options.MODELS,
    "Optimizers": [*options.TORCH_BASES, *options.COMPILED_BASES],
    **({"Other programs": options.ON_A_GPU} if ON_GPU else {"Refused at start": options.refusals()}),
}


def main() -> None:
    """Measure everything, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all-ways", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    sections = []
    for title, rows in SECTIONS.items():
        runs = runs_of(rows, ALL_WAYS if arguments.all_ways else WAYS)
        with tempfile.TemporaryDirectory() as place:
            found = judge(runs, Path(place))
        show = refused if title == "Refused at start" else agreeing
        sections.append("\n".join([f"\n{HEAD.format(title)}\n", *show(rows, found)]))
        print(sections[-1], flush=True)
    table = "\n".join(sections)
    if arguments.write and ON_GPU:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(), PLACE_ON_A_GPU, table))
    elif arguments.write:
        head = DOCUMENT.read_text().partition(MARK)[0]
        DOCUMENT.write_text(f"{head}{MARK}{table}\n")


def agreeing(rows: Sequence[Option], found: Mapping[Key, Worst | str]) -> Iterator[str]:
    """A line a row: the stages, the worst of them."""
    yield "| option | stages | scale factors | parameters | |"
    yield "|---|---|---|---|---|"
    for option in rows:
        results = [result for key, result in found.items() if key[0] == option.name]
        stages = ", ".join(map(str, option.stages))
        numbers = [result for result in results if isinstance(result, Worst)]
        if len(numbers) < len(results):
            yield f"| {option.name} | {stages} | failed | | {next(r for r in results if isinstance(r, str))} |"
            continue
        beyond = "; beyond what is allowed" * (not all(_within(option, found)))
        worst = [max(getattr(result, column) for result in numbers) for column in ("scale_factors", "parameters")]
        yield f"| {option.name} | {stages} | {worst[0]:.0e} | {worst[1]:.0e} | {option.note}{beyond} |"


def _within(option: Option, found: Mapping[Key, Worst | str]) -> Iterator[bool]:
    """Of each way and stage of a row that was run: whether it is no farther from the reference than it may be."""
    for _, stage, way in runs_of([option], ALL_WAYS):
        result = found.get(key_of(option, stage, way))
        if isinstance(result, Worst):
            yield result.within(option.allowed(way))


def refused(rows: Sequence[Option], found: Mapping[Key, Worst | str]) -> Iterator[str]:
    """A line a row: why."""
    yield "| option | why |"
    yield "|---|---|"
    for option in rows:
        result = found[key_of(option, option.stages[0], option.ways[0])]
        said = result.splitlines()[-1].strip() if isinstance(result, str) else "NOT REFUSED"
        yield f"| {option.name} | {said.rpartition('with AGVM: ')[2]} |"


if __name__ == "__main__":
    main()
