"""What this installation consists of, and what to do about each thing that is wrong: python -m agvm_ds.doctor

Exit code 0 when all is well, 1 otherwise. At the top only the standard library is imported: where everything else is
missing, this must still speak.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

MMCV_VERSION = "1.7.2"
"""The mmcv-full that mmdet 2.28 wants. It is no dependency in pyproject.toml, because pip cannot build it."""

BUILD_MMCV = "python scripts/build_mmcv.py"

PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "deepspeed": "deepspeed",
    "mmcv-full": "mmcv",
    "mmdet": "mmdet",
    "numpy": "numpy",
}
"""Distribution -> the module that it installs."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. problem: what is wrong, empty when nothing is; remedy: what to do about it."""

    name: str
    value: str
    problem: str = ""
    remedy: str = ""


def why_not_importable(module: str) -> str:
    """The reason why a module does not import, empty when it does."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    except Exception as error:  # A package that fails in its own way (ABI, version check) is what a doctor is for.
        return f"{type(error).__name__}: {error}"
    return ""


def tried_ranges() -> dict[str, str]:
    """Distribution -> version range that agvm_ds was tried with; "python" too. Empty where agvm_ds is not installed."""
    try:
        from packaging.requirements import Requirement

        about = metadata.metadata("agvm_ds")
    except (ImportError, metadata.PackageNotFoundError):
        return {}
    wanted = [Requirement(line) for line in about.get_all("Requires-Dist") or []]
    ranges = {requirement.name: str(requirement.specifier) for requirement in wanted}
    return ranges | {"python": about["Requires-Python"], "mmcv-full": f"=={MMCV_VERSION}"}


def project(tried: dict[str, str]) -> Check:
    """Is agvm_ds itself installed, so that the ranges are known?"""
    if tried:
        return Check("agvm_ds", metadata.version("agvm_ds"))
    return Check(
        "agvm_ds", "-", "agvm_ds or packaging is not installed: versions cannot be compared", "pip install -e ."
    )


def within(version: str, tried: str) -> bool:
    """Is a version in a range like ">=2.14.1,<2.15"? Local parts (2.14.1+cpu) do not count; no range holds all."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(tried).contains(version, prereleases=True)


def python(tried: dict[str, str]) -> Check:
    """The interpreter, and its headers: DeepSpeed and mmcv compile against them."""
    version, wanted = sys.version.split()[0], tried.get("python", "")
    if wanted and not within(version, wanted):
        return Check("python", version, f"tried with {wanted} only", "make the environment with such a Python")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return Check("python", version, f"no {header}", "install Python's headers (Debian: apt install python3.11-dev)")
    return Check("python", version)


def package(name: str, module: str, tried: dict[str, str]) -> Check:
    """Is a distribution installed, importable and in the tried range?"""
    wanted = tried.get(name, "")
    install = BUILD_MMCV if name == "mmcv-full" else f'pip install -c constraints.txt "{name}{wanted}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "-", "not installed", install)
    if reason := why_not_importable(module):
        again = install if name == "mmcv-full" else f"{install} --force-reinstall"
        return Check(name, version, f"installed, but does not import: {reason}", f"mend that; if need be, {again}")
    if wanted and not within(version, wanted):
        return Check(name, version, f"tried with {wanted} only", install)
    return Check(name, version)


def pkg_resources() -> Check:
    """The part of setuptools that version 81 dropped and the build of mmcv-full needs."""
    name, remedy = "setuptools", 'pip install -c constraints.txt "setuptools<81"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "-", "not installed", remedy)
    if reason := why_not_importable("pkg_resources"):
        return Check(name, version, f"no pkg_resources, which mmcv-full's build needs: {reason}", remedy)
    return Check(name, version)


def compiler() -> Check:
    """The C++ compiler: DeepSpeed compiles parts of itself at first use, and mmcv-full comes as source."""
    command = os.environ.get("CXX", "c++")
    name, remedy = "compiler", "install g++ (Debian: apt install g++), or set CXX to a C++20 compiler"
    try:
        answer = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        return Check(name, "-", f"{command}: {error.strerror}", remedy)
    if answer.returncode or not answer.stdout:
        return Check(name, command, f"`{command} --version` failed: not a compiler", remedy)
    return Check(name, answer.stdout.splitlines()[0])


def ninja() -> Check:
    """The build tool of DeepSpeed and mmcv-full, which must be on PATH."""
    folder = Path(sys.executable).parent
    if found := shutil.which("ninja"):
        return Check("ninja", found)
    if (folder / "ninja").exists():
        return Check("ninja", "-", f"in {folder}, which is not on PATH", f"source {folder}/activate")
    return Check("ninja", "-", "not installed", "pip install -c constraints.txt ninja")


def accelerator() -> Iterator[Check]:
    """What DeepSpeed will train on, and what its ranks will talk through."""
    if reason := why_not_importable("deepspeed.accelerator"):
        yield Check("accelerator", "-", f"unknown: {reason}", "first mend the packages above")
        return
    import torch
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    problem = ""
    if (
        device.device_name() == "cpu"
        and Path("/proc/driver/nvidia/version").exists()
        and "DS_ACCELERATOR" not in os.environ
    ):
        problem = f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it: DeepSpeed takes the CPU"
    remedy = "see what nvidia-smi says and whether torch is a CUDA build; or set DS_ACCELERATOR=cpu to mean it"
    yield Check("accelerator", device.device_name(), problem, remedy if problem else "")
    yield Check("backend", str(device.communication_backend_name()))
    yield Check("devices", str(device.device_count()))
    halves = {"bf16": device.is_bf16_supported(), "fp16": device.is_fp16_supported()}
    yield Check("precisions", ", ".join(["fp32", *(name for name, yes in halves.items() if yes)]))


def cuda_wanted() -> bool:
    """Must mmcv's ops run on a GPU? FORCE_CUDA=1 or 0, mmcv's own variable, says so; else where DeepSpeed takes one."""
    import torch

    forced = os.environ.get("FORCE_CUDA")
    if forced in ("0", "1"):
        return forced == "1"
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def mmcv_ops() -> Check:
    """Do mmcv's compiled ops load, were they compiled for the GPU if there is one, and is their result right?"""
    name = "mmcv ops"
    if reason := why_not_importable("mmcv.ops"):
        return Check(name, "-", f"do not load: {reason}", BUILD_MMCV)
    import torch
    from mmcv.ops import get_compiling_cuda_version, nms

    cuda = str(get_compiling_cuda_version())
    value = f"CUDA {cuda}" if cuda[:1].isdigit() else "CPU only"
    if value == "CPU only" and cuda_wanted():
        problem = "compiled without CUDA, and there is a GPU to train on"
        remedy = f"install nvcc of CUDA {torch.version.cuda}, set CUDA_HOME, then {BUILD_MMCV}"
        return Check(name, value, problem, remedy)
    # Two boxes that overlap by 81 / 119 and one apart: NMS must drop the worse of the two.
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 11.0, 11.0], [20.0, 20.0, 30.0, 30.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() and cuda_wanted() else [])]:
        try:
            kept = nms(boxes.to(device), scores.to(device), iou_threshold=0.5)[1].tolist()
        except RuntimeError as error:
            return Check(name, value, f"nms on {device} failed: {error}", BUILD_MMCV)
        if kept != [0, 2]:
            return Check(name, value, f"nms on {device} keeps {kept}, not [0, 2]", BUILD_MMCV)
    return Check(name, value)


def diagnose() -> list[Check]:
    """All checks, in the order in which their problems are best mended."""
    tried = tried_ranges()
    packages = [package(name, module, tried) for name, module in PACKAGES.items()]
    tools = [pkg_resources(), compiler(), ninja()]
    return [python(tried), project(tried), *packages, mmcv_ops(), *tools, *accelerator()]


def show(checks: list[Check]) -> None:
    """Print the table of what was found, then each problem with its remedy."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for check in checks:
            print(f"{check.name:12} {check.value}")
    else:
        table = Table("agvm_ds needs", "found", "")
        for check in checks:
            table.add_row(check.name, check.value, "[red]problem" if check.problem else "[green]ok")
        Console().print(table)
    for check in checks:
        if check.problem:
            print(f"{check.name}: {check.problem}\n    -> {check.remedy}")


def main() -> int:
    """Look, tell, return the exit code."""
    logging.disable(logging.WARNING)  # DeepSpeed and torch announce what they found; the table says it better
    warnings.simplefilter("ignore")
    checks = diagnose()
    show(checks)
    problems = sum(bool(check.problem) for check in checks)
    print(f"{problems} problem(s): see above" if problems else "all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
