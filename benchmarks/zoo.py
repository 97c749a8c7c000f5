"""The AGVM modules of every detector that mmdet ships, and a training of detectors that differ in kind.

    python -m benchmarks.zoo                       about 2 minutes to build all, 15 more to train, on two cores
    python -m benchmarks.zoo --train DETR SOLOv2   these alone; without a name none
    python -m benchmarks.zoo --write               puts the tables into docs/detectors.md as well

Every config of the installed mmdet is read and its detector built, without weights. Printed is a line for each way in
which a family's detectors are cut: how many configs, the modules with their share of the trainable parameters, the share
outside of all modules (which must be 0), and how its training went (zoo_training.py). What mmdet itself cannot
build here is listed with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import mmdet
import torch
from mmcv import Config
from mmdet.models import build_detector
from rich.console import Console
from rich.progress import track
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.groups import MODULE, PARAMS, REST, cut_groups
from agvm_ds.mmdet.configs import BUILDING, read_config, shipped_configs
from agvm_ds.mmdet.detector.modules import modules_of
from benchmarks.machine import save, with_table
from benchmarks.shrunk import make_data
from benchmarks.zoo_training import FAMILIES, Training, train
from tests.launch import CONTEXT

DOCUMENT = Path(__file__).parents[1] / "docs" / "detectors.md"
PIECES = "has no model"
"""What read_config says of the files that others inherit from."""


@dataclass(frozen=True)
class Cut:
    """A config's modules in order of definition, each with its share of the trainable parameters; or why there are none."""

    config: str
    shares: dict[str, float]
    reason: str = ""

    @property
    def family(self) -> str:
        """mmdet's folder."""
        return self.config.partition("/")[0]

    @property
    def outside(self) -> float:
        """Share of the trainable parameters that no module has."""
        return self.shares.get(REST, 0.0)


def bare_detector(cfg: Config) -> nn.Module:
    """A config's detector without memory for its weights, where its code allows that."""
    settings = {"train_cfg": cfg.get("train_cfg"), "test_cfg": cfg.get("test_cfg")}
    if "teacher_ckpt" in cfg.model:
        cfg.model.teacher_ckpt = None
    with _quiet():
        try:
            with torch.device("meta"):
                return build_detector(cfg.model, **settings)
        except (NotImplementedError, RuntimeError):  # it computes with numbers that it keeps in tensors
            return build_detector(cfg.model, **settings)


def shares_of(detector: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """Module -> its share of the trainable parameters. Raises AssertionError where a parameter is in two, or in none."""
    trainable = [p for p in detector.parameters() if p.requires_grad]
    groups = cut_groups([{PARAMS: trainable}], detector, names)
    placed = [id(p) for group in groups for p in group[PARAMS]]
    assert sorted(placed) == sorted(id(p) for p in trainable), "a parameter is in no module, or in two"
    total = sum(p.numel() for p in trainable)
    return {group[MODULE]: sum(p.numel() for p in group[PARAMS]) / total for group in groups}


def cuts(names: Sequence[str]) -> list[Cut]:
    """The cut of each config that has a model: many of mmdet's files are pieces of others. A process a core."""
    families = [list(group) for _, group in groupby(names, key=lambda name: name.partition("/")[0])]
    with CONTEXT.Pool() as pool:
        found = track(pool.imap(cuts_here, families), "building", len(families), console=Console(stderr=True))
        return [cut for family in found for cut in family]


def cuts_here(names: Sequence[str]) -> list[Cut]:
    """The same in this process; the same model is built once."""
    found: list[Cut] = []
    known: dict[str, Cut] = {}
    with _as_in_mmdet():
        for name in names:
            try:
                with _quiet():
                    cfg = read_config(name)
            except ConfigError as error:
                if PIECES not in str(error):
                    found.append(Cut(name, {}, _short(str(error).removeprefix(f"config {shipped_configs()[name]}:"))))
                continue
            model = repr(cfg.model)
            if model not in known:
                known[model] = cut_of(name, cfg)
            found.append(replace(known[model], config=name))
    return found


def cut_of(name: str, cfg: Config) -> Cut:
    """One config's."""
    try:
        detector = bare_detector(cfg)
    except BUILDING as error:
        return Cut(name, {}, _short(f"{type(error).__name__}: {error}"))
    return Cut(name, shares_of(detector, modules_of(detector)))


def _short(text: str) -> str:
    return " ".join(text.split())[:160]


@contextmanager
def _as_in_mmdet() -> Iterator[None]:
    """In mmdet's folder, which some configs name others from, and in a group of one rank, which SyncBN asks for."""
    before = Path.cwd()
    os.chdir(Path(mmdet.__file__).parent / ".mim")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        os.chdir(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without mmdet's remarks on its own configs."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def lines_of(found: Sequence[Cut]) -> list[str]:
    """Markdown: a line for each way in which a family's detectors are cut, and one for each reason why some are not."""
    ways: dict[tuple[str, ...], list[Cut]] = {}
    for cut in found:
        ways.setdefault((cut.family, *(cut.shares or [cut.reason])), []).append(cut)
    lines = ["| family | configs | modules: share of the trainable parameters (of the first config) | outside |"]
    lines.append("|---|---|---|---|")
    for cuts_ in ways.values():
        first = cuts_[0]
        shares = ", ".join(f"{name} {100 * share:.2g} %" for name, share in first.shares.items() if name != REST)
        cells = (shares, f"{100 * first.outside:.2g} %") if shares else (f"not built: {first.reason}", "")
        lines.append(f"| {first.family} | {len(cuts_)} | {cells[0]} | {cells[1]} |")
    return lines


def training_lines(trainings: Iterable[Training]) -> Iterator[str]:
    """Markdown: a line a detector, as it ends."""
    yield "| detector | config | losses | gradient variance of each module | s | reason if not |\n|---|---|---|---|---|---|"
    for one in trainings:
        losses = ", ".join(f"{loss:.3g}" for loss in one.run.losses)
        variances = ", ".join(f"{name} {phi:.2g}" for name, phi in one.run.variances.items() if phi is not None)
        yield f"| {one.name} | `{one.config}` | {losses} | {variances} | {one.run.seconds:.0f} | {one.run.reason} |"


def main() -> None:
    """Build, train, print; exit with 1 where a parameter is outside or a training failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", nargs="*", default=list(FAMILIES), metavar="NAME", help=", ".join(FAMILIES))
    parser.add_argument("--bf16", action="store_true", help="train these in bf16; build no others")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {DOCUMENT.name}")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="zoo.json is written there")
    args = parser.parse_args()
    if unknown := set(args.train) - set(FAMILIES):
        parser.error(f"{', '.join(unknown)}: choose among {', '.join(FAMILIES)}")
    found = [] if args.bf16 else cuts(list(shipped_configs()))
    tables = {} if args.bf16 else {"modules": lines_of(found)}
    print(*tables.get("modules", []), sep="\n", flush=True)
    trainings: list[Training] = []
    trained = tables["bf16" if args.bf16 else "training"] = []
    for line in training_lines(_each(args.train, trainings, args.bf16)):
        print(line, flush=True)
        trained.append(line)
    save(args.save, "zoo", [*map(asdict, found), *map(asdict, trainings)])
    if args.write:
        document = DOCUMENT.read_text()
        for name, lines in tables.items():
            document = with_table(document, name, "\n".join(lines))
        DOCUMENT.write_text(document)
    sys.exit(any(cut.outside for cut in found) or any(one.run.reason for one in trainings))


def _each(names: Sequence[str], done: list[Training], half: bool) -> Iterator[Training]:
    """Train the named ones, one after another, and keep what was found."""
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder) / "data")
        for number, name in enumerate(names):
            done.append(train(name, FAMILIES[name], Path(folder) / str(number), data, half))
            yield done[-1]


if __name__ == "__main__":
    main()
