"""The study's order and choices, on invented scores; and that the committed lines are runs of its protocol."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from mmcv import Config

from agvm_ds.config import read_block
from agvm_ds.variance import pairwise_variance
from benchmarks.study import estimators, figures, lines, report, tables
from benchmarks.study.launch import config, deepspeed_settings, in_bins, mean_factors, mmdet_settings
from benchmarks.study.plan import Cell, Study
from benchmarks.study.protocol import (
    ALONE,
    BATCHES,
    IMAGES,
    METHODS,
    METHODS_AT,
    METHODS_AT_EQUAL_UPDATES,
    METHODS_HALFWAY,
    MODULATED,
    OPTIMIZERS,
    Run,
    ema_decay,
    interval,
)


def invented(run: Run, score: Callable[[Run], float]) -> dict[str, Any]:
    """A run's line."""
    value = score(run)
    return {
        "key": run.key,
        "status": "done" if math.isfinite(value) else "diverged",
        "run": run.record(),
        "seconds": 60,
        "choose": value if math.isfinite(value) else 0.0,
        "report": value if math.isfinite(value) else 0.0,
        "mean_scale_factors": {"backbone": 1.0, "neck": 2.0},
    }


def scale(run: Run) -> float:
    """SGD's best rate is the same at every batch."""
    return 1.0 if run.base == "SGD" else float((run.batch / 16) ** 0.5)


def score(run: Run) -> float:
    """Best at a rate of 0.01, but for SGD times sqrt(batch / 16); seeds differ a little; far beyond it diverges."""
    away = math.log2(run.rate / (0.01 * scale(run)))
    return math.nan if away > 3 else 0.7 - 0.05 * abs(away) + 0.001 * run.seed


@cache
def whole(score: Callable[[Run], float] = score) -> list[dict[str, Any]]:
    """All lines of a study, two runs at a time."""
    made: list[dict[str, Any]] = []
    while left := Study(made).to_do():
        made += [invented(run, score) for run in left[:2]]
    return made


def test_a_study_ends_with_every_cell_reported() -> None:
    made = whole()
    assert len({line["key"] for line in made}) == len(made)
    study = Study(made)
    for base in ("SGD", "AdamW"):
        for batch, methods in METHODS_AT.items():
            for method in methods:
                runs = study.reported(Cell(base, method, batch))
                assert [run.seed for run in runs] == [1, 2, 3, 4] and all(run.key in study.known for run in runs)
                assert bool(runs[0].multipliers) == (method == "fixed")
        for method in METHODS_HALFWAY:
            assert all(run.key in study.known for run in study.halfway(Cell(base, method, 64)))
        assert study.chosen(Cell(base, "plain", 128)) is not None and not study.known.keys() & {
            run.key for run in study.reported(Cell(base, "plain", 128))
        }
        for batch in BATCHES:
            for method in METHODS_AT_EQUAL_UPDATES:
                runs = study.at_equal_updates(Cell(base, method, batch))
                assert [run.seed for run in runs] == [1, 2] and all(run.key in study.known for run in runs)
                assert {(run.updates, run.batch) for run in runs} == {(256, batch)}
                assert runs[0].rate == study.reported(Cell(base, method, 64))[0].rate
    # by their means, for of two runs at a time one is ahead while the other has yet to choose a rate
    groups: dict[str, list[int]] = {}
    for place, run in enumerate(Run(**line["run"]) for line in made):
        if run.base in MODULATED and run.seed:
            name = "centre" if run.series == "epochs" and run.batch == 64 else run.series
            groups.setdefault(name, []).append(place)
    assert sorted(groups, key=lambda name: mean(groups[name])) == [
        "centre",
        "halfway",
        "updates",
        "causes",
        "again",
        "epochs",
        "ablation",
    ]


def test_halfway_is_between_the_chosen_rate_and_its_better_neighbour() -> None:
    """The best is at 0.012: halfway from 0.01, which is chosen, to 0.02, not to 0.005."""
    study = Study(whole(lambda run: 0.7 - 0.05 * abs(math.log2(run.rate / 0.012))))
    for method in METHODS_HALFWAY:
        runs = study.halfway(Cell("SGD", method, 64))
        assert [run.seed for run in runs] == [1, 2, 3, 4] and {run.series for run in runs} == {"halfway"}
        assert runs[0].rate == pytest.approx(0.01 * 2**0.5)
        assert all(line["run"]["rate"] != runs[0].rate for line in study.first_runs(Cell("SGD", method, 64)))
    assert Study([]).halfway(Cell("SGD", "plain", 64)) == []
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in tables.halfway(study).splitlines()[2:]]
    assert [row[:2] for row in rows[:2]] == [["SGD", "0.01"], ["SGD", "0.0141"]] and len(rows) == 4
    assert {row[4] for row in rows} == {"+0.000 ± 0.000"}


def test_each_method_is_seen_at_the_others_halfway_rate() -> None:
    """Plain is best at 0.012, pairwise at 0.008: both choose 0.01, and their better neighbours are on either side."""
    best = {"pairwise": 0.008}
    made = whole(lambda run: 0.7 - 0.05 * abs(math.log2(run.rate / best.get(run.method, 0.012))) + 0.001 * run.seed)
    study = Study(made)
    above, below = 0.01 * 2**0.5, 0.01 / 2**0.5
    for method, rates in {"plain": [above, below], "pairwise": [below, above]}.items():
        runs = study.halfway(Cell("SGD", method, 64))
        assert list(dict.fromkeys(run.rate for run in runs)) == pytest.approx(rates) and len(runs) == 8
        assert all(run.key in study.known for run in runs)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in tables.halfway(study).splitlines()[2:5]]
    assert [row[1] for row in rows] == ["0.00707", "0.01", "0.0141"]
    assert [row[4][:6] for row in rows] == ["+0.029", "-0.003", "-0.029"]
    assert [row[5][:6] for row in rows] == ["+0.025", "+0.001", ""]


def test_each_guess_why_is_one_change_from_what_was_reported() -> None:
    gains = {"pairwise": 0.03, "fixed": 0.01}
    study = Study(whole(lambda run: score(run) + gains.get(run.method, 0.0) * (2 if run.series == "causes" else 1)))
    pairs = study.causes("SGD")
    plain = study.reported(Cell("SGD", "plain", 64))
    (norms, there, fixed, over) = pairs.values()
    assert norms[0] == [run.with_(series="causes", norm="GN") for run in plain[:2]]
    assert {run.method for run in norms[1]} == {"pairwise"} and {run.norm for run in norms[1]} == {"GN"}
    assert there[0] == [run.with_(series="again") for run in plain[:2]]
    assert {run.series for run in there[1]} == {"ablation"} and {run.method for run in there[1]} == {"pairwise"}
    assert fixed[0] == [run.with_(series="again") for run in plain], "on the machine of what it is compared with"
    assert {run.multipliers["neck"] for run in fixed[1]} == {8.0} and {run.norm for run in fixed[1]} == {"BN"}
    halfway = study.halfway(Cell("SGD", "plain", 64))[:4]
    assert over == ([run.with_(series="again") for run in halfway], fixed[1])
    assert len({run.key for pair in pairs.values() for runs in pair for run in runs}) == 18
    rows = [row.split("|")[1:] for row in tables.causes(study).splitlines()[2:]]
    assert [row[-2].strip() for row in rows] == [
        *("+0.060 ± 0.000", "+0.030 ± 0.000", "+0.020 ± 0.000", "+0.045 ± 0.000"),
        *("+0.060 ± 0.000", "+0.030 ± 0.000", "+0.020 ± 0.000", "+0.013 ± 0.000"),
    ]
    known = [line for line in study.known.values() if line["run"]["series"] == "epochs"]
    assert tables.causes(Study(known)).count("\n") == 1 and Study([]).causes("SGD") == {}


def test_the_search_goes_on_while_the_best_is_at_an_edge() -> None:
    made = whole()
    tried = [run.rate for run in Study(made).choosing(Cell("SGD", "plain", 16))]
    assert tried == [0.005, 0.01, 0.02], "0.01, the best, was at an edge of 0.01, 0.02"
    chosen = Study(made).chosen(Cell("SGD", "plain", 16))
    assert chosen is not None and chosen.rate == 0.01
    tried = [run.rate for run in Study(whole(lambda run: run.rate)).choosing(Cell("SGD", "plain", 16))]
    assert tried == [0.01 * 2**k for k in range(7)]
    falling = whole(lambda run: 0.7 - abs(run.rate - 0.0025) if run.rate < 0.003 else math.nan)
    tried = [run.rate for run in Study(falling).choosing(Cell("SGD", "plain", 16))]
    assert tried == pytest.approx([0.02 / 2**k for k in range(4, -1, -1)]), "where all diverge it goes down"


def test_every_method_searches_from_plains_rate_until_its_best_is_inside() -> None:
    """A method that likes twice plain's rate finds it, as one that likes a quarter."""
    study = Study(whole())
    for base, best in {"SGD": 0.01, "AdamW": 0.008}.items():
        for batch in (32, 64, 128):
            for method in METHODS_AT.get(batch, ("plain",)):
                rates = [run.rate / scale(run) for run in study.choosing(Cell(base, method, batch))]
                tried = [best / 2, best, best * 2]
                assert rates == pytest.approx([best] if method == "split" else tried), "split has pairwise's rate"
    likes = {"plain": 1.0, "pairwise": 2.0, "fixed": 0.25}
    study = Study(whole(lambda run: 0.7 - 0.05 * abs(math.log2(run.rate / (0.01 * likes.get(run.method, 1.0))))))
    for method, factor in likes.items():
        rates = [run.rate for run in study.choosing(Cell("AdamW", method, 64))]
        chosen = study.chosen(Cell("AdamW", method, 64))
        assert chosen is not None and chosen.rate == pytest.approx(0.008 * factor)
        assert rates[0] < chosen.rate < rates[-1]
    assert [run.rate for run in study.choosing(Cell("AdamW", "split", 64))] == pytest.approx([0.016]), (
        "pairwise's, not plain's"
    )


def test_a_failed_run_is_taken_again_and_a_diverged_one_counts() -> None:
    first, second, *_ = Study([]).to_do()
    failed = {"key": first.key, "status": "failed", "run": first.record(), "seconds": 1}
    assert Study([failed]).to_do()[0] == first
    assert first not in Study([failed, invented(first, lambda run: math.nan)]).to_do()
    assert second == Study([invented(first, score)]).to_do()[0]


def test_agvms_settings_are_the_papers_share_of_the_run() -> None:
    assert (interval(3664), ema_decay(3664)) == (10, 0.97)
    assert (interval(128), ema_decay(128)) == (1, pytest.approx(1 - 0.03 * 3664 / 10 / 128, abs=1e-4))
    assert (interval(2048), ema_decay(2048)) == (6, pytest.approx(0.968, abs=0.001))
    for method in METHODS:
        run = Run("epochs", "SGD", method, 256, 0.1, 0)
        settings = deepspeed_settings(run)
        block = read_block(settings)
        assert block is not None and block.modulate == (method in ("pairwise", "split"))
        assert settings["train_batch_size"] == 256 and run.updates == 8 * IMAGES // 256


def test_fixed_multipliers_are_rates_of_modules() -> None:
    run = Run("epochs", "SGD", "fixed", 512, 0.1, 0, {"backbone": 1.0, "neck": 1.5})
    keys = mmdet_settings(run)["optimizer"]["paramwise_cfg"]["custom_keys"]
    assert keys == {"backbone": {"lr_mult": 1.0}, "neck": {"lr_mult": 1.5}}


@pytest.mark.parametrize("base", OPTIMIZERS)
def test_a_runs_config_is_one_of_mmdet(base: str, tmp_path: Path) -> None:
    """timm, of which LAMB and LARS are, is not imported: it need not be there."""
    run = Run("epochs", base, "plain", 64, 0.02, 1)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config(run)))
    found = Config.fromfile(str(file), import_custom_modules=False)
    assert found.optimizer.type == mmdet_settings(run)["optimizer"]["type"] and found.optimizer.lr == 0.02
    assert ("custom_imports" in found) == (base in ALONE)
    assert "_delete_" not in found.pretty_text


def test_measures_are_averaged_in_parts() -> None:
    others = {"ratio": None, "signal": -0.5}
    measures = [
        {"update": t, "modules": {"neck": {**others, "variance": v, "scale_factor": 1 + t, "noise": b}}}
        for t, v, b in ((0, 0.2, 10.0), (1, 0.4, "inf"), (40, 0.6, "inf"), (63, None, 5.0))
    ]
    found = in_bins(measures, 64)["neck"]
    assert found["variance"][0] == pytest.approx(0.3) and found["variance"][10] == 0.6
    assert found["variance"][15] is None and found["ratio"] == [None] * 16
    assert (found["noise"][0], found["noise"][10], found["noise"][15]) == ("inf", "inf", 5.0)
    assert found["signal"][0] == -0.5
    assert mean_factors(measures) == {"neck": 27.0}


def test_the_tables_have_every_cell() -> None:
    study = Study([{**line, "measures": {}, "loss": [], "curve": []} for line in whole()])
    rows = tables.reported(study).splitlines()
    assert len(set(tables.tried(study).splitlines())) == len(tables.tried(study).splitlines())
    assert [row.count("±") for row in rows[2:]] == [3, 2, 1, 1, 3, 2, 1, 1, 2, 2]
    assert "**" not in rows[2] and rows[2].startswith("| SGD |")
    assert "| 16 (1,024 updates) |" in rows[0] and "| 128 (128 updates) |" in rows[0]
    gains = whole(lambda run: score(run) + {"pairwise": 0.03, "fixed": 0.01}.get(run.method, 0.0))
    study = Study(gains)
    table = tables.differences(study, study.reported).splitlines()
    for row, means in {2: ["+0.030", "", "+0.030", ""], 5: ["", "", "+0.020", ""]}.items():
        assert [cell.strip().removesuffix(" ± 0.000") for cell in table[row].split("|")[2:-1]] == means
    equal = tables.differences(study, study.at_equal_updates)
    assert equal.splitlines()[-1].count("+0.020 ± 0.000") == 4
    rows = tables.at_equal_updates(study).splitlines()
    assert [row.count("(2) at 0.01 |") for row in rows[2:5]] == [4, 4, 4]
    assert "None is left to do." in tables.ended(list(study.known.values()))


def test_what_one_setting_gains_is_told_seed_by_seed() -> None:
    """The unchanged runs have four seeds, the changed ones two."""
    elsewhere = 0.03
    made = whole(
        lambda run: 0.5 + 0.1 * run.seed + elsewhere * (run.series == "ablation") + 0.02 * ("interval" in run.changed)
    )
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in tables.ablation(Study(made)).splitlines()[2:]]
    assert rows[0][1:] == ["nothing", "0.750 ± 0.129", ""]
    (row,) = (row for row in rows if row[:2] == ["SGD", "interval = 5"])
    assert row[2:] == ["0.700 ± 0.071 (2)", "+0.020 ± 0.000"]
    assert rows[1][1:] == ["nothing, again", "0.680 ± 0.071 (2)", "+0.030 ± 0.000"]


def drawable(line: dict[str, Any]) -> dict[str, Any]:
    """An invented line with what the figures show."""
    columns = {quantity: [0.5, None] + [0.25] * 14 for quantity in ("variance", "scale_factor")}
    curve = [{"update": update, "report": line["report"] * update / 8} for update in (4, 8)]
    return {**line, "measures": {"backbone": columns, "neck": columns}, "curve": curve, "loss": [[1, 2.0], [8, 1.0]]}


def test_the_variances_are_those_of_the_middle_half() -> None:
    columns = {"backbone": [9.0] * 4 + [0.5, None] + [0.75] * 6 + [9.0] * 4, "neck": [9.0] * 5 + [0.25] * 7 + [9.0] * 4}
    measures = {name: {"variance": values} for name, values in columns.items()}
    study = Study([{**line, "measures": measures} for line in whole()])
    rows = tables.variances(study.chosen_lines).splitlines()
    assert rows[2] == "| SGD | backbone | " + " | ".join(["0.71 (1.00)"] * 4) + " |"
    assert rows[5].startswith("| AdamW | neck | 1.34 (1.88) | ")
    assert rows == tables.variances(study.equal_lines).splitlines(), "the mean of two equal runs"
    assert len(tables.variances(Study([]).chosen_lines).splitlines()) == 2


def test_the_figures_draw_what_the_lines_say(tmp_path: Path) -> None:
    study = Study([drawable(line) for line in whole()])
    assert figures.draw(Study([]), tmp_path) == [] and not list(tmp_path.iterdir())
    drawn = figures.draw(study, tmp_path)
    assert len(drawn) == 5 and {path.name for path in tmp_path.iterdir()} == set(drawn)
    figure = figures.accuracy(study)
    assert figure is not None
    handles, labels = figure.axes[1].get_legend_handles_labels()
    assert labels == ["AdamW", "AdamW, pairwise", "AdamW, fixed", "AdamW, split", "LAMB"]
    assert figure.axes[0].get_legend_handles_labels()[1][-1] == "LARS"
    means = handles[0].lines[0].get_ydata()
    assert means == pytest.approx(
        [mean(tables.scores(study, study.reported(Cell("AdamW", "plain", b)))) for b in sorted(METHODS_AT)]
    )
    variance = figures.variances(study, "SGD")
    assert variance is not None
    line = variance.axes[0].lines[1]
    assert list(line.get_ydata())[:3] == pytest.approx([0.5, math.nan, 0.25], nan_ok=True)
    assert line.get_xdata()[-1] == 15.5 / 16


def test_the_sweep_is_the_models_where_the_model_holds() -> None:
    """Losses that fall, after some low ones, as 1 / (updates / (1 + B / batch)); measures of that B where they fall."""
    critical = 48.0

    def line(made: dict[str, Any]) -> dict[str, Any]:
        run = Run(**made["run"])
        slow = 1 + critical / run.batch
        updates = range(1, run.updates + 1, max(run.updates // 64, 1))
        columns = {"noise": [30.0] * 16, "signal": [500.0, *[30.0 / critical] * 15]}
        return {
            **made,
            "updates": run.updates,
            "loss": [[update, 0.01 if k < 8 else 9 * slow / update] for k, update in enumerate(updates)],
            "measures": {"backbone": columns, "neck": columns},
        }

    flat = {"loss": [[u, 0.3 - 0.1 * u / 128] for u in range(128)], "updates": 128}
    few = [{**line(made), **(flat if made["run"]["batch"] == 128 else {})} for made in whole()]
    assert [row.split("|")[2].strip() for row in tables.sweep(Study(few)).splitlines()[2:]] == ["32", "64"] * 2
    study = Study([line(made) for made in whole()])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in tables.sweep(study).splitlines()[2:]]
    assert [row[1] for row in rows] == ["32", "64", "128"] * 2
    for row in rows:
        assert float(row[5]) == pytest.approx(float(row[6]), rel=0.1)
    assert float(rows[2][6]) == pytest.approx((1 + 48 / 16) / (1 + 48 / 128), abs=0.01)
    (row,) = (row for row in tables.critical(study).splitlines() if row.startswith("| SGD | 64 | all modules"))
    assert [cell.strip() for cell in row.split("|")[5:-1]] == ["48"] * 3
    images = (1 + 64 / 48) / (1 + 16 / 48)
    (row,) = (row for row in tables.onset(study).splitlines() if row.startswith("| SGD | 48 |"))
    assert row.split("|")[5].strip() == f"{score(Run('epochs', 'SGD', 'plain', 64, 0.01, 0)):.3f} ({images:.2f})"


def test_the_estimators_agree_with_the_formulas_on_inner_products() -> None:
    import numpy as np

    gradients = np.random.default_rng(0).normal(0.3, 1, (200, 50)).astype(np.float32)
    products = estimators.gram(gradients)
    some = gradients[:8].astype(np.float64)
    s2, g2 = float((some**2).sum()), float((some.mean(0) ** 2).sum())
    pairwise, split = estimators.estimates(products, np.arange(8))
    assert pairwise == pytest.approx(pairwise_variance(s2, g2, 8))
    a, b = some[:4].mean(0), some[4:].mean(0)
    assert split == pytest.approx(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    rows = estimators.compare({"module": products}, draws=400)
    assert [row["n"] for row in rows] == [4, 8, 16, 32]
    for row in rows:
        assert row["fewer"] > 1 and abs(row["bias"]["pairwise"]) < 0.02


def test_what_the_readme_tells_of_the_study_is_in_its_files() -> None:
    rows = json.loads(report.ESTIMATORS.read_text())["rows"]
    for n, (least, most) in {4: (1.2, 2.0), 32: (1.5, 16.0)}.items():
        fewer = [row["fewer"] for row in rows if row["n"] == n]
        assert round(min(fewer), 1) == least and round(max(fewer)) == most
    gains = [row.split("|")[6:8] for row in tables.sweep(Study(lines.read())).splitlines()[2:]]
    assert len(gains) == 3 and all(float(found) == pytest.approx(float(told), rel=0.2) for found, told in gains)


@pytest.mark.parametrize(
    ("document", "begin", "end"),
    [("README.md", "**Does it help?**", "## Try it"), ("docs/study.md", "## What to make of it", "## What it shows")],
)
def test_every_gain_that_is_told_in_words_is_in_a_table(document: str, begin: str, end: str) -> None:
    said = (Path(__file__).parents[2] / document).read_text().partition(begin)[2].partition(end)[0]
    gains = set(re.findall(r"[+-]0\.\d{3} ± 0\.\d{3}", " ".join(said.split())))
    made = "\n".join(report.sections(lines.read(), [], []))
    assert len(gains) >= 4 and [one for one in gains if one not in made] == []


def test_the_committed_lines_are_runs_of_the_protocol() -> None:
    assert lines.read()
    for line in lines.read():
        run = Run(**line["run"])
        assert line["key"] == run.key
        assert line["deepspeed"] == json.loads(json.dumps(deepspeed_settings(run))), run.key
        assert line["mmdet"] == json.loads(json.dumps(mmdet_settings(run))), run.key


def test_lines_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "new/runs.jsonl"
    assert lines.read(file) == []
    for key in ("a", "b"):
        lines.append({"key": key}, file)
    assert lines.read(file) == [{"key": "a"}, {"key": "b"}]
