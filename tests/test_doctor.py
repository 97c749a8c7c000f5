"""The doctor names each thing that is wrong, with a remedy, and never ends in a traceback."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agvm_ds import doctor
from agvm_ds.doctor import Check

ROOT = Path(__file__).resolve().parent.parent


def test_a_healthy_package_has_no_problem() -> None:
    assert doctor.package("numpy", "numpy", {}) == Check("numpy", metadata.version("numpy"))


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    check = doctor.package("no-such-thing", "no_such_thing", {"no-such-thing": "<2,>=1"})
    assert check.problem == "not installed"
    assert check.remedy == 'pip install -c constraints.txt "no-such-thing<2,>=1"'


def test_a_version_outside_the_tried_range_is_a_problem() -> None:
    assert "tried with >=99 only" in doctor.package("numpy", "numpy", {"numpy": ">=99"}).problem
    assert "tried with >=99 only" in doctor.python({"python": ">=99"}).problem


def test_the_build_for_cpus_of_a_tried_version_is_in_its_range() -> None:
    assert doctor.within("2.14.1+cpu", "<2.15,>=2.14.1")
    assert not doctor.within("2.15.0", "<2.15,>=2.14.1")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ("assert False, 'mmcv 2 is too new'", "AssertionError: mmcv 2 is too new"),
    ],
)
def test_a_package_that_does_not_import_tells_why(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_thing.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    check = doctor.package("broken-thing", "broken_thing", {})
    assert check.value == "1.0" and reason in check.problem


def test_mmcv_without_its_compiled_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmcv.ops", None)
    check = doctor.mmcv_ops()
    assert check.problem.startswith("do not load") and "build_mmcv.py" in check.remedy


@pytest.mark.parametrize(("force", "wanted"), [("1", True), ("0", False)])
def test_ops_without_cuda_are_a_problem_where_cuda_is_wanted(
    force: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_CUDA", force)
    monkeypatch.setattr("mmcv.ops.get_compiling_cuda_version", lambda: "not available")
    check = doctor.mmcv_ops()
    assert check.value == "CPU only" and bool(check.problem) == wanted


def test_ops_that_compute_something_wrong_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_CUDA", "0")
    monkeypatch.setattr("mmcv.ops.nms", lambda boxes, scores, iou_threshold: (boxes, scores.argsort()))
    assert doctor.mmcv_ops().problem == "nms on cpu keeps [2, 1, 0], not [0, 2]"


@pytest.mark.parametrize(("command", "problem"), [("false", "not a compiler"), ("no-such-compiler", "No such file")])
def test_what_is_no_compiler(command: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    check = doctor.compiler()
    assert problem in check.problem and command in check.problem and "install g++" in check.remedy


def test_a_compiler_may_be_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -E")
    assert doctor.compiler().value.startswith("Python 3")


def test_ninja_must_be_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert doctor.ninja().problem == "not installed"
    (tmp_path / "ninja").touch()
    assert "not on PATH" in doctor.ninja().problem and str(tmp_path / "activate") in doctor.ninja().remedy


def test_setuptools_without_pkg_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    assert "setuptools<81" in doctor.pkg_resources().remedy


def test_a_gpu_that_torch_cannot_use_is_a_problem_unless_the_cpu_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: _cpu_accelerator())
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    found = {check.name: check for check in doctor.accelerator()}
    assert "NVIDIA driver" in found["accelerator"].problem and "DS_ACCELERATOR=cpu" in found["accelerator"].remedy
    assert found["backend"].value == "gloo" and found["precisions"].value == "fp32, bf16"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not any(check.problem for check in doctor.accelerator())


def _cpu_accelerator() -> Any:
    return SimpleNamespace(
        device_name=lambda: "cpu",
        communication_backend_name=lambda: "gloo",
        device_count=lambda: 1,
        is_bf16_supported=lambda: True,
        is_fp16_supported=lambda: None,
    )


@pytest.mark.parametrize(("problem", "code"), [("", 0), ("broken", 1)])
def test_the_exit_code_tells_whether_all_is_well(
    problem: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: [Check("thing", "1.0", problem, "mend it")])
    monkeypatch.setattr("logging.disable", lambda level: None)
    assert doctor.main() == code
    assert ("thing: broken\n    -> mend it" in capsys.readouterr().out) == bool(problem)


def test_where_nothing_is_installed_it_says_so_without_a_traceback() -> None:
    # -S: no site-packages, so neither torch nor rich nor packaging.
    result = subprocess.run(
        [sys.executable, "-S", "-m", "agvm_ds.doctor"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1 and result.stderr == ""
    for name in (*doctor.PACKAGES, "mmcv ops", "setuptools", "accelerator"):
        assert f"\n{name}: " in result.stdout
