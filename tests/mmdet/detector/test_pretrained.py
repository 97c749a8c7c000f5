"""Pretrained weights: which a detector wants, where they are kept, and that a host fetches each once, or says what to do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from deepspeed import comm
from mmcv.runner import BaseModule

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.detector.pretrained import cached, provide, sources_of, url_of
from tests.launch import run_ranks

CONTENT = b"weights"


class Server(BaseHTTPRequestHandler):
    """Has one file, and counts what is asked of it; slow enough that ranks which all ask, ask before one has it."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Server.asked.append(self.path)
        time.sleep(1)
        self.send_response(200 if self.path == "/there.pth" else 404)
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Server.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def provided(home: str, sources: dict[str, str]) -> str:
    """In a rank: what was said, or nothing."""
    os.environ |= {"TORCH_HOME": home, "no_proxy": "127.0.0.1"}
    comm.barrier()
    try:
        provide(sources)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_host_fetches_a_file_once(address: str, tmp_path: Path) -> None:
    sources = {f"{address}/there.pth": "load_from"}
    assert run_ranks(provided, 3, tmp_path, str(tmp_path), sources) == [""] * 3
    assert Server.asked == ["/there.pth"]
    folder = tmp_path / "hub/checkpoints"
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("there.pth", CONTENT)]
    assert run_ranks(provided, 2, tmp_path, str(tmp_path), sources) == [""] * 2
    assert len(Server.asked) == 1


def test_every_rank_hears_of_all_that_is_missing(address: str, tmp_path: Path) -> None:
    key = "model.backbone.init_cfg.checkpoint"
    sources = {f"{address}/gone.pth": key, "nowhere.pth": "model.neck.init_cfg.checkpoint"}
    sources["torchvision://resnet51"] = "load_from"
    for said in run_ranks(provided, 2, tmp_path, str(tmp_path), sources):
        assert f"{address}/gone.pth cannot be fetched: HTTP Error 404" in said
        assert f"put it at {tmp_path}/hub/checkpoints/gone.pth" in said and f"{key}=FILE" in said
        assert "model.neck.init_cfg.checkpoint: not found: nowhere.pth" in said
        assert "load_from: mmcv knows no weights torchvision://resnet51" in said
    assert not list((tmp_path / "hub/checkpoints").iterdir())


def test_what_a_detector_starts_from() -> None:
    net = BaseModule()
    net.backbone = BaseModule(dict(type="Pretrained", checkpoint="torchvision://resnet50"))
    net.neck = BaseModule([dict(type="Xavier", layer="Conv2d"), dict(type="Pretrained", checkpoint="x.pth")])
    assert sources_of(net) == {
        "torchvision://resnet50": "model.backbone.init_cfg.checkpoint",
        "x.pth": "model.neck.init_cfg.checkpoint",
    }


def test_urls_and_their_place_are_mmcvs_and_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = url_of("torchvision://resnet50")
    assert url is not None and url.startswith("https://download.pytorch.org/models/resnet50-")
    assert cached(url) == tmp_path / "hub/checkpoints" / url.rpartition("/")[2]
    assert str(url_of("open-mmlab://resnext101_32x4d")).startswith("https://")
    assert url_of("open-mmlab://resnet50_caffe") == url_of("open-mmlab://detectron/resnet50_caffe")
    assert url_of("https://host/x.pth?v=1") == "https://host/x.pth?v=1"
    assert cached("https://host/x.pth?v=1").name == "x.pth"
    assert url_of("folder/x.pth") is url_of("s3://bucket/x.pth") is None
    with pytest.raises(LookupError, match="mmcv knows no weights torchvision://resnet51"):
        url_of("torchvision://resnet51")
