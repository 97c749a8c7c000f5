"""docs/study.md's tables and figures, written from the committed lines alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import between_marks
from benchmarks.study import figures, lines, tables
from benchmarks.study.plan import Study
from benchmarks.study.protocol import CENTRAL_BATCH

DOCUMENT = lines.FOLDER.with_suffix(".md")
ESTIMATORS = lines.FOLDER / "estimators.json"


def sections(runs: list[dict[str, Any]], compared: list[dict[str, Any]], drawn: list[str]) -> Iterator[str]:
    """Headings, tables, pictures."""
    study = Study(runs)
    equal = any(run["run"]["series"] == "updates" for run in runs)
    yield tables.ended(runs)
    for heading, text in (
        ("Accuracy at equal epochs", tables.reported(study)),
        ("Gains, seed by seed", tables.differences(study, study.reported)),
        (HALFWAY, tables.halfway(study)),
        (LAYERWISE, tables.layerwise(study)),
        ("Accuracy at equal updates", tables.at_equal_updates(study) if equal else ""),
        ("Gains at equal updates", tables.differences(study, study.at_equal_updates) if equal else ""),
        ("Scale factors", tables.factors(study)),
        ("Gradient variance by module and batch", tables.variances(study.chosen_lines)),
        ("Gradient variance at equal updates", tables.variances(study.equal_lines) if equal else ""),
        ("Critical batch size by the noise scale, images", tables.critical(study)),
        ("Where the loss of accuracy begins", tables.onset(study)),
        ("What the noise scale predicts of a larger batch", tables.sweep(study)),
        ("Why no more", tables.causes(study)),
        ("One setting changed", tables.ablation(study)),
        ("Pairwise and split at fixed weights", tables.estimators(compared)),
        ("All rates that were tried", tables.tried(study)),
    ):
        if text.count("\n") > 1:
            yield "\n\n".join(filter(None, (f"### {heading}", NOTES.get(heading), text)))
    for name in drawn:
        yield f"![{Path(name).stem.replace('_', ', ')}](study/{name})"


HALFWAY = f"Rates between those of the search, at batch {CENTRAL_BATCH}"
LAYERWISE = "LARS and LAMB beside their bases"
NOTES = {
    "Accuracy at equal epochs": "mAP on `report`, mean ± standard deviation of seeds 1 to 4, at the chosen rate; * at an "
    "edge of the rates tried. (k): of k seeds. Empty: not trained. At 64 SGD and AdamW are better halfway to another "
    f"rate: see *{HALFWAY}*.",
    "Gains, seed by seed": "Mean difference of equal seeds ± its standard error.",
    HALFWAY: "Each method's chosen rate, and what is halfway to the better of its two neighbours, for both; seeds 1 to 4.",
    LAYERWISE: f"Each at its best rate, at {CENTRAL_BATCH} plain's halfway. On one machine, but for SGD at 16; seeds 1 to 4.",
    "One setting changed": f'"{tables.AGAIN}" are the same runs on the ablation\'s machine, beside those of the tables '
    "above; the other rows are beside it; seeds 1 and 2.",
    "Accuracy at equal updates": f"As many updates as at {CENTRAL_BATCH}, at the rate that was chosen there; seeds 1 and 2.",
    "Gradient variance by module and batch": "Mean Φ in the middle half of the plain run with seed 0, at the chosen "
    "rate (over the backbone's). Where the batch is 128 the detector has hardly begun to learn.",
    "Gradient variance at equal updates": f"The same in as many updates as at {CENTRAL_BATCH}, at one rate for all batches; "
    "seeds 1 and 2.",
    "Critical batch size by the noise scale, images": "Mean noise over mean signal in each quarter of the plain run with "
    "seed 0, at the chosen rate.",
    "Where the loss of accuracy begins": "The plain run with seed 0: mAP on `report` after 8 epochs (how many times the "
    "images of a batch of 16 it would need by the noise scale: (1 + batch/B) / (1 + 16/B), with B of all modules in the "
    "middle half of the run at 16).",
    "What the noise scale predicts of a larger batch": "How many times fewer updates than at 16 the plain run "
    "with seed 0 needs from one loss to a lower one, which both runs have after their losses' highest point (a detector "
    "without proposals has a small loss) and before their rates fall; and (1 + B/16) / (1 + B/batch), with B of all "
    "modules at 16 meanwhile, as `launch/advise.py` tells it. Only where both losses fall by a quarter.",
    "Why no more": "What AGVM may have failed by, each changed alone; seeds 1 and 2, of the multipliers 1 to 4.",
    "Pairwise and split at fixed weights": "`fewer measures`: split's mean squared error over pairwise's.",
}


def write() -> None:
    """Draw, and put all between the document's marks."""
    runs = lines.read()
    compared = json.loads(ESTIMATORS.read_text())["rows"] if ESTIMATORS.exists() else []
    drawn = figures.draw(Study(runs), lines.FOLDER)
    text = "\n\n".join(sections(runs, compared, drawn))
    DOCUMENT.write_text(between_marks(DOCUMENT.read_text(), "study", text))
    print(text)
