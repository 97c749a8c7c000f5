"""All benchmarks of cost, one after another.

python -m benchmarks              prints every table and saves the figures in work_dirs/bench
python -m benchmarks --write      puts the tables into docs/performance.md as well
python -m benchmarks memory       one of them, or some
DS_ACCELERATOR=cuda python -m benchmarks    those that know a GPU, on one; their tables have places of their own
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import communication, memory, peaks, trainer, updates
from benchmarks.machine import with_table
from tests.launch import ON_GPU

ON_CPU = {
    "updates": updates.main,
    "memory": memory.main,
    "communication": communication.main,
    "trainer": trainer.main,
}
ON_A_GPU = {"updates": updates.main, "peaks": peaks.main}
PARTS = ON_A_GPU if ON_GPU else ON_CPU
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"


def place(name: str, on_a_gpu: bool) -> str:
    """The name of a table's place in the document."""
    return f"{name} on a GPU" if on_a_gpu else name


def main() -> None:
    """Measure, print, save, and write if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--save", type=Path, default=Path("work_dirs/bench"), metavar="FOLDER", help="(default %(default)s)"
    )
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    args = parser.parse_args()
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"{', '.join(unknown)}: choose among {', '.join(PARTS)}")
    for name in args.parts or PARTS:
        print(f"\n== {name}\n", flush=True)
        text = PARTS[name](["--save", str(args.save)])
        if args.write:
            DOCUMENT.write_text(with_table(DOCUMENT.read_text(), place(name, ON_GPU), text))


if __name__ == "__main__":
    main()
