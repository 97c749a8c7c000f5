"""The table of test_bad_input.py: mistakes that launch/train.py must tell, by where they are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.mmdet import coco
from tests.mmdet.coco import first, first_image, rle


@dataclass(frozen=True)
class Bad:
    """One mistake, and words that the message must have. In ``words`` {place} is the test's own folder."""

    said: tuple[str, ...]
    json: dict[str, Any] = field(default_factory=dict)
    """Keys of the DeepSpeed JSON."""
    text: str | None = None
    """Its whole text."""
    config: str = ""
    """Lines of Python after the config."""
    words: tuple[str, ...] = ()
    data: Callable[[dict[str, Any]], Any] = lambda data: None
    """A change of the annotation file."""
    files: Callable[[Path], Any] = lambda place: None
    """A change of any file."""
    leaves_files: bool = False
    """mmcv leaves an open file when it cannot load the config."""


def bad(*said: str, **row: Any) -> Bad:
    return Bad(said, **row)


def cut(share: float) -> Callable[[Path], None]:
    """The annotation file, cut short."""

    def change(place: Path) -> None:
        text = (place / "train.json").read_text()
        (place / "train.json").write_text(text[: int(len(text) * share)])

    return change


def edit(old: str, new: str, name: str = "train.json") -> Callable[[Path], Any]:
    return lambda place: (place / name).write_text((place / name).read_text().replace(old, new, 1))


def overwrite(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda place: (place / name).write_bytes(content)


def other_order(place: Path) -> None:
    data = coco.content()
    data["categories"].reverse()
    (place / "val.json").write_text(json.dumps(data))


AGVM_BLOCK = {
    "json: a writer that comes later": bad(
        "checkpoint.writer: writes checkpoints later",
        json={"checkpoint": {"writer": {"type": "FAST", "decoupled": True}}},
    ),
    "json: nebula": bad(
        "DeepSpeed refuses its config",
        "Nebula checkpointing has been removed",
        json={"nebula": {"enabled": True, "persistent_storage_path": "/tmp", "persistent_time_interval": 1}},
    ),
    "agvm: no object": bad("agvm: must be an object", "not 5", json={"agvm": 5}),
    "agvm: unknown key": bad("agvm.intervall: unknown key; did you mean interval?", json={"agvm": {"intervall": 3}}),
    "agvm: two mistakes": bad("2 mistakes", "agvm.start_step", "agvm.eps", json={"agvm": {"start_step": -1, "eps": 0}}),
    "agvm: interval 0": bad("agvm.interval = 0", "greater than or equal to 1", json={"agvm": {"interval": 0}}),
    "agvm: interval a string": bad("agvm.interval = '3'", "valid integer", json={"agvm": {"interval": "3"}}),
    "agvm: estimator": bad("agvm.estimator = 'spilt'", "'pairwise' or 'split'", json={"agvm": {"estimator": "spilt"}}),
    "agvm: decay": bad("agvm.ema_decay = 1.5", "less than or equal to 1", json={"agvm": {"ema_decay": 1.5}}),
    "agvm: bounds": bad("agvm.ratio_bounds", "0 < low <= 1 <= high", json={"agvm": {"ratio_bounds": [10, 0.5]}}),
    "agvm: stops before start": bad(
        "agvm.stop_step = 2", ">= start_step = 5", json={"agvm": {"start_step": 5, "stop_step": 2}}
    ),
    "agvm: no module": bad("agvm.modules = []", "no module is named", json={"agvm": {"modules": []}}),
    "agvm: module twice": bad("agvm.modules", "given twice", json={"agvm": {"modules": ["neck", "neck"]}}),
    "agvm: window": bad("agvm.clip_window", "first <= last", json={"agvm": {"clip_window": [9, 3]}}),
    "agvm: enabled a number": bad("agvm.enabled = 1", "valid boolean", json={"agvm": {"enabled": 1}}),
    "agvm: one micro-batch": bad("n = 1 micro-batch", "needs at least 2", json={"train_batch_size": 4}),
    "agvm: base": bad("LBFGS", "not supported with AGVM", json={"optimizer": {"type": "LBFGS", "params": {"lr": 1}}}),
    "agvm: base not known": bad("optimizer.type = 'SGDD'", "allowed: ", json={"optimizer": {"type": "SGDD"}}),
}

DEEPSPEED = {
    "json: not found": bad("DeepSpeed config not found: nowhere.json", words=("--deepspeed_config", "nowhere.json")),
    "json: empty": bad("ds.json", "it is empty", text=""),
    "json: cut short": bad("ds.json", "line 2 column 11", text='{"train_batch_size": 16,\n "fp16": {"ena'),
    "json: no comma": bad("ds.json", "line 1 column", text='{"train_batch_size": 16 "agvm": {}}'),
    "json: one brace more": bad("ds.json", "Extra data: line 1 column 25", text='{"train_batch_size": 16}}'),
    "json: a list": bad("must be a JSON object", text='[{"train_batch_size": 16}]'),
    "json: no text": bad("not a DeepSpeed config", "codec", files=overwrite("ds.json", b"\xff\xfe{}")),
    "json: duplicate key": bad(
        "duplicate keys in one object: agvm", text='{"agvm": {}, "train_batch_size": 16, "agvm": {}}'
    ),
    "json: duplicate key inside": bad(
        "duplicate keys in one object: stage", text='{"zero_optimization": {"stage": 1, "stage": 2}}'
    ),
    "json: agvm misspelt": bad("agmv: unknown key", "did you mean agvm?", json={"agmv": {}}),
    "json: AGVM in capitals": bad("AGVM: unknown key", "did you mean agvm?", json={"AGVM": {}}),
    "json: key misspelt": bad(
        "zero_optimisation", "did you mean zero_optimization?", json={"zero_optimisation": {"stage": 2}}
    ),
    "json: key with a hyphen": bad("did you mean gradient_clipping?", json={"gradient-clipping": 1.0}),
    "json: two slips": bad("optimzer", "schedular", json={"optimzer": {}, "schedular": {}}),
    "json: zero an old form": bad(
        "zero_optimization: true or false is an old form", '{"stage": 1}', json={"zero_optimization": True}
    ),
    "json: zero a number": bad("zero_optimization = 2: must be an object", json={"zero_optimization": 2}),
    "json: stage": bad("stage = 7", "0, 1, 2, 3", json={"zero_optimization": {"stage": 7}}),
    "json: key of zero": bad("stge = 2", "not permitted", json={"zero_optimization": {"stge": 2}}),
    "json: offload true": bad(
        "offload_optimizer = True", json={"zero_optimization": {"stage": 2, "offload_optimizer": True}}
    ),
    "json: fp16 true": bad("fp16 = True: must be an object", json={"fp16": True}),
    "json: fp16 null": bad("fp16 = None: must be an object {...}, or left out", json={"fp16": None}),
    "json: fp16 on a CPU": bad('"fp16" needs a GPU', json={"fp16": {"enabled": True}}),
    "json: fp16 and bf16": bad("cannot be simultaneously", json={"fp16": {"enabled": True}, "bf16": {"enabled": True}}),
    "json: optimizer a string": bad("optimizer = 'SGD': must be an object", json={"optimizer": "SGD"}),
    "json: optimizer type": bad("optimizer.type = 3: must be a string", json={"optimizer": {"type": 3}}),
    "json: optimizer params": bad("optimizer.params = [1]", json={"optimizer": {"type": "SGD", "params": [1]}}),
    "json: max_grad_norm": bad(
        "max_grad_norm", "gradient_clipping", json={"optimizer": {"type": "SGD", "params": {"max_grad_norm": 1}}}
    ),
    "json: scheduler": bad("'WarmupLRR': not known; did you mean WarmupLR?", json={"scheduler": {"type": "WarmupLRR"}}),
    "json: scheduler params": bad(
        "scheduler.params", "'steps'", json={"scheduler": {"type": "WarmupLR", "params": {"steps": 1}}}
    ),
    "json: scheduler values": bad(
        "scheduler.params of WarmupLR: warmup_num_steps must be a positive integer",
        json={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
    ),
    "json: auto": bad(
        "bf16.enabled = 'auto': must be true or false",
        "optimizer.params.lr = 'auto': must be a number",
        "optimizer.params.betas = [0.9, '0.99']: must be a number",
        "scheduler.params.warmup_num_steps = 'auto'",
        "zero_optimization.stage = '2': must be a number",
        json={
            "bf16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, "0.99"]}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_type": "log"}},
            "zero_optimization": {"stage": "2"},
        },
    ),
    "json: bf16 a string": bad("bf16.enabled = 'false': must be true or false", json={"bf16": {"enabled": "false"}}),
    "json: clipping a string": bad("gradient_clipping = '1': must be a number", json={"gradient_clipping": "1"}),
    "json: clipping true": bad("gradient_clipping = True: must be a number", json={"gradient_clipping": True}),
    "json: flag a string": bad("prescale_gradients = 'no': must be true or false", json={"prescale_gradients": "no"}),
    "json: steps_per_print 0": bad("steps_per_print = 0: must be at least 1", json={"steps_per_print": 0}),
    "json: removed by DeepSpeed": bad(
        "Sparse Attention has been removed", json={"sparse_attention": {"mode": "fixed"}}
    ),
    "json: communication type": bad("communication_data_type", "fp99", json={"communication_data_type": "fp99"}),
    "json: batch a string": bad("train_batch_size = '16': must be an integer", json={"train_batch_size": "16"}),
    "json: batch 0": bad("train_batch_size = 0: must be an integer of at least 1", json={"train_batch_size": 0}),
    "json: batch 18": bad("18 does not divide", "4 images x 1 ranks", json={"train_batch_size": 18}),
    "json: batches disagree": bad("batch sizes disagree", json={"gradient_accumulation_steps": 3}),
    "json: rounded masters": bad(
        "round_robin_gradients with bf16",
        json={"bf16": {"enabled": True}, "zero_optimization": {"round_robin_gradients": True}},
    ),
}

CONFIG = {
    "config: not found": bad(
        "config not found: faster_rcnn_r50_fpn_1x_coko",
        "faster_rcnn_r50_fpn_1x_coco",
        words=("faster_rcnn_r50_fpn_1x_coko",),
    ),
    "config: syntax": bad("syntax errors", "line", config="x =", leaves_files=True),
    "config: import": bad("ModuleNotFoundError: No module named 'nope'", config="import nope", leaves_files=True),
    "config: exit": bad("SystemExit: 3", config="raise SystemExit(3)", leaves_files=True),
    "config: base": bad("nope.py", "does not exist", config='_base_ = "nope.py"', leaves_files=True),
    "config: no model": bad("has no model", config="del model"),
    "config: no data": bad("has no data", config="del data"),
    "config: no val": bad("has no data.val", config='del data["val"]'),
    "config: no train": bad("data.train: is missing", config='del data["train"]'),
    "config: model a number": bad("model = 5: must be a dict", config="model = 5"),
    "config: runner": bad(
        "runner.type = 'Nope'", "EpochBasedRunner, IterBasedRunner", config='runner = dict(type="Nope")'
    ),
    "config: runner and total_epochs": bad("total_epochs = 3, and runner.max_epochs = 6", config="total_epochs = 3"),
    "config: no epochs": bad("EpochBasedRunner needs max_epochs", config='runner = dict(type="EpochBasedRunner")'),
    "config: 0 epochs": bad("runner.max_epochs = 0", config='runner["max_epochs"] = 0'),
    "config: workflow": bad("'train' is no (phase, epochs)", config='workflow = ["train"]'),
    "config: phases": bad("phases must be 'train'", config='workflow = [("test", 1)]'),
    "config: grad_clip": bad(
        "optimizer_config.grad_clip = 35: must be a dict", config="optimizer_config = dict(grad_clip=35)"
    ),
    "config: max_norm": bad(
        "max_norm = 'x': must be a number", config='optimizer_config = dict(grad_clip=dict(max_norm="x"))'
    ),
    "config: norm_type": bad(
        "norm_type = 1: DeepSpeed clips by the 2-norm",
        config="optimizer_config = dict(grad_clip=dict(max_norm=1, norm_type=1))",
    ),
    "config: no optimizer": bad("names an optimizer", config="del optimizer"),
    "config: derived hook": bad(
        "custom hook Mine: saves or averages weights",
        config="from mmcv.runner import CheckpointHook\nclass Mine(CheckpointHook): pass\ncustom_hooks = [dict(type=Mine)]",
    ),
    "config: checkpoint hook": bad(
        "checkpoint_config.type = 'EMAHook': allowed: CheckpointHook", config='checkpoint_config["type"] = "EMAHook"'
    ),
    "config: hook": bad("custom_hooks: 5 is no dict with a type", config="custom_hooks = [5]"),
    "config: micro-batch 0": bad("data.samples_per_gpu = 0", config='data["samples_per_gpu"] = 0'),
    "config: workers": bad("data.workers_per_gpu = -1", config='data["workers_per_gpu"] = -1'),
    "config: evaluation 0": bad("evaluation.interval = 0", config='evaluation["interval"] = 0'),
    "config: metric": bad(
        "evaluation metric 'bbx': not known; allowed: bbox, segm", config='evaluation["metric"] = "bbx"'
    ),
    "config: resume_from": bad("resume_from = 'x.pth'", "--resume", config='resume_from = "x.pth"'),
    "config: load_from": bad("load_from: not found: no.pth", config='load_from = "no.pth"'),
    "config: rate without a base": bad("no auto_scale_lr.base_batch_size", config="auto_scale_lr = dict(enable=True)"),
    "config: one class, no comma": bad(
        "data.train.classes = 'cat'", '("name",)', config='data["train"]["classes"] = ("cat")'
    ),
    "config: image folder a number": bad(
        "data.train: cannot be built: TypeError", config='data["train"]["img_prefix"] = 5'
    ),
    "config: pipeline of strings": bad(
        "data.train: cannot be built", config='data["train"]["pipeline"] = ["LoadImageFromFile"]'
    ),
    "config: no annotation file": bad(
        "data.train.ann_file: not found: no.json", config='data["train"]["ann_file"] = "no.json"'
    ),
    "config: no image folder": bad(
        "data.val.img_prefix: not found: no/val", config='data["val"]["img_prefix"] = "no/val"'
    ),
}

COMMAND_LINE = {
    "words: none of the JSON": bad("--deepspeed_config is missing", words=("--deepspeed_config", "")),
    "words: unknown flag": bad("unrecognized arguments: --reusme", words=("--reusme",)),
    "words: no pair": bad("'foo' is not KEY=VALUE", words=("--cfg-options", "foo")),
    "words: brackets": bad("--cfg-options", "mbalanced", words=("--cfg-options", "a=[1,(2]")),
    "words: seed": bad("--seed", "'x'", words=("--seed", "x")),
    "words: negative seed": bad("seed = -1: must be 0 to 2**32 - 1", words=("--seed", "-1")),
    "config: no evaluation": bad("evaluation = None", "--no-validate", config="evaluation = None"),
    "words: no value": bad("--work-dir", "expected one argument", words=("--work-dir",)),
    "words: nothing to resume": bad("nothing to resume", words=("--resume",)),
    "words: no weights": bad("--load-from: not found: no.pth", words=("--load-from", "no.pth")),
    "words: no scaling": bad("no auto_scale_lr.base_batch_size", words=("--auto-scale-lr",)),
    "words: work dir in the way": bad(
        "--work-dir",
        "cannot be written",
        words=("--work-dir", "{place}/a_file/work"),
        files=lambda p: (p / "a_file").touch(),
    ),
    "words: option of no place": bad(
        "--cfg-options model.type.x=1: one of them has no place", words=("--cfg-options", "model.type.x=1")
    ),
}

DATA = {
    "data: cut short": bad("train.json: not JSON", "line 1, column", "cut short", files=cut(0.5)),
    "data: empty file": bad("train.json: not JSON", "line 1, column 1", files=cut(0)),
    "data: a comma too many": bad("not JSON", "line 1, column", files=edit('"iscrowd": 0, ', '"iscrowd": 0,, ')),
    "data: no JSON": bad("cannot be read as JSON", files=overwrite("train.json", b"\x80\x81")),
    "data: a list": bad("must be an object with images, annotations, categories", files=overwrite("train.json", b"[]")),
    "data: no categories": bad("has no list of categories", data=lambda data: data.pop("categories")),
    "data: no annotations": bad("empty list of annotations", data=lambda data: data["annotations"].clear()),
    "data: image id twice": bad("image id twice: image 1", data=lambda data: data["images"].append(data["images"][0])),
    "data: annotation id twice": bad("annotation id twice: annotation 12", data=first(id=12)),
    "data: category id twice": bad(
        "category id twice: category 1", data=lambda data: data["categories"][1].update(id=1)
    ),
    "data: category name twice": bad(
        "category name twice: 'cat'", data=lambda data: data["categories"][1].update(name="cat")
    ),
    "data: unknown image": bad("image that the file does not list: annotation 11 (image_id 9)", data=first(image_id=9)),
    "data: image id a string": bad("does not list: annotation 11 (image_id '1')", data=first(image_id="1")),
    "data: unknown category": bad(
        "category that the file does not list: annotation 11 (category_id 9)", data=first(category_id=9)
    ),
    "data: other category": bad(
        "annotation of category 'cow'",
        "not in the classes",
        "--allow-other-categories",
        "annotation 11",
        data=lambda data: (
            data["categories"].append({"id": 3, "name": "cow"}),
            data["annotations"][0].update(category_id=3),
        ),
    ),
    "data: other classes": bad(
        "none of its categories is in the classes",
        "'Cat'",
        data=lambda data: [c.update(name=c["name"].title()) for c in data["categories"]],
    ),
    "data: a class less": bad(
        "no category 'cat' of the classes", "'dog' would be trained", data=lambda data: data["categories"].pop(0)
    ),
    "data: val in another order": bad("val.json: category", "have label", "same order", files=other_order),
    "data: category without a name": bad(
        "category without a name: category 1", data=lambda data: data["categories"][0].pop("name")
    ),
    "data: no box": bad("annotation without bbox: annotation 11", data=first(bbox=...)),
    "data: no area": bad("annotation without area: annotation 11", data=first(area=...)),
    "data: no id": bad("annotation without an id", "position 0", data=first(id=...)),
    "data: no crowd flag to evaluate": bad(
        "val.json: annotation without iscrowd", files=edit('"iscrowd": 0, ', "", "val.json")
    ),
    "data: area NaN": bad("area that is no finite number: annotation 11 (nan)", data=first(area=float("nan"))),
    "data: box NaN": bad("box with NaN or infinity: annotation 11", data=first(bbox=[1, 1, float("nan"), 5])),
    "data: box infinite": bad("box with NaN or infinity: annotation 11", data=first(bbox=[1, 1, float("inf"), 5])),
    "data: box negative": bad(
        "negative width or height", "not two corners", "annotation 11", data=first(bbox=[30, 30, -10, 5])
    ),
    "data: box of three": bad("box that is not four numbers", "annotation 11", data=first(bbox=[1, 2, 3])),
    "data: box of strings": bad("box that is not four numbers", "annotation 11", data=first(bbox=["1", "2", "3", "4"])),
    "data: box null": bad("box that is not four numbers", "annotation 11 (None)", data=first(bbox=None)),
    "data: image of width 0": bad("width or height is no whole number above 0: image 1", data=first_image(width=0)),
    "data: image without a height": bad(
        "width or height is no whole number above 0: image 1", data=first_image(height=...)
    ),
    "data: image without a file": bad("image without a file_name: image 1", data=first_image(file_name=...)),
    "data: polygon odd": bad(
        "polygon with an odd count of numbers: annotation 11", data=first(segmentation=[[1, 1, 9, 1, 9, 9, 1]])
    ),
    "data: polygon short": bad(
        "polygon of less than 6 numbers: annotation 11", data=first(segmentation=[[1, 1, 9, 9]])
    ),
    "data: polygon of strings": bad("not a list of numbers", data=first(segmentation=[["1", 1, 9, 1, 9, 9]])),
    "data: polygon flat": bad("not a list of numbers", data=first(segmentation=[1, 1, 9, 1, 9, 9])),
    "data: polygon NaN": bad("polygon with NaN", data=first(segmentation=[[float("nan"), 1, 9, 1, 9, 9]])),
    "data: polygon far off": bad("beyond 1e+06", data=first(segmentation=[[1e12, 1, 9, 1, 9, 9]])),
    "data: no polygon": bad("segmentation without a polygon", data=first(segmentation=[])),
    "data: no segmentation": bad("neither a list of polygons nor an RLE", data=first(segmentation=...)),
    "data: RLE size": bad("RLE whose size", data=first(segmentation=rle([48 * 64], (64, 48)))),
    "data: RLE short": bad("do not add up", data=first(segmentation=rle([10, 20]))),
    "data: RLE negative": bad("do not add up", data=first(segmentation=rle([100, -10, 48 * 64 - 90]))),
    "data: RLE junk": bad("do not add up", data=first(segmentation=rle("abc"))),
    "data: RLE without counts": bad("counts are neither", data=first(segmentation={"size": [48, 64]})),
    "data: image missing": bad(
        "image file not found", "images/2.png", files=lambda place: (place / "images/2.png").unlink()
    ),
    "data: image of no bytes": bad("image file of no bytes", "images/2.png", files=overwrite("images/2.png", b"")),
    "data: nothing left": bad(
        "no annotation is left", data=lambda data: [note.update(bbox=[0, 0, 0, 0]) for note in data["annotations"]]
    ),
}

TABLE = AGVM_BLOCK | DEEPSPEED | CONFIG | COMMAND_LINE | DATA
