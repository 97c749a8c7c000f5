"""Prints the table of options: the worst difference from the dense reference, or the refusal.

    python -m benchmarks.exactness               as in docs/options.md: 3 minutes on two cores
    python -m benchmarks.exactness --all-ways    each row with every estimator, preconditioning and bucket size: 6 minutes
    python -m benchmarks.exactness --write       the table into docs/options.md

Two ranks, two accumulation steps, six updates of a toy detector; needs no GPU. Differences are absolute, the largest over
updates, modules and ways of measuring; of scale factors, of parameters.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests import options
from tests.comparison import Worst
from tests.options import ALL_WAYS, WAYS, Key, Option, judge, key_of, runs_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "options.md"
MARK = "<!-- made by python -m benchmarks.exactness --write -->\n"

SECTIONS: dict[str, Sequence[Option]] = {
    "DeepSpeed's options": options.CONFIGURATIONS,
    "Precision": options.PRECISIONS,
    "Models": options.MODELS,
    "Optimizers": [*options.TORCH_BASES, *options.COMPILED_BASES],
    "Refused at start": options.refusals(),
}


def main() -> None:
    """Measure everything and print, or write, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all-ways", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    lines = []
    for title, rows in SECTIONS.items():
        runs = runs_of(rows, ALL_WAYS if arguments.all_ways else WAYS)
        with tempfile.TemporaryDirectory() as place:
            found = judge(runs, Path(place))
        lines += [f"\n## {title}\n", *(refused if title == "Refused at start" else agreeing)(rows, found)]
    table = "\n".join(lines)
    if arguments.write:
        head = DOCUMENT.read_text().partition(MARK)[0]
        DOCUMENT.write_text(f"{head}{MARK}{table}\n")
    else:
        print(table)


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
        worst = [max(getattr(result, column) for result in numbers) for column in ("scale_factors", "parameters")]
        yield f"| {option.name} | {stages} | {worst[0]:.0e} | {worst[1]:.0e} | {option.note} |"


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
