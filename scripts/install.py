"""Make .venv with everything that agvm_ds needs, in the versions it was tried with: python3.11 scripts/install.py

Needs this Python with its headers, and a C++ compiler. pip is configured as ever, by its own configuration and
variables: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS. A second run keeps what is there.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from progress import StatusLine, clock, run_logged

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TRIED = (3, 11)
EXTRAS = "mmdet,demo,tensorboard,docs,dev"
STEPS = 5

PIP_NEWS = re.compile(r"\s*(Collecting|Downloading|Building|Preparing|Installing|Attempting)\b")
"""Lines of pip's that tell how far it is."""


class InstallError(Exception):
    """Why the set-up stopped, ready to be read."""


def missing() -> list[str]:
    """What this machine lacks, each with what to do."""
    lacks = []
    if sys.version_info[:2] != TRIED:
        lacks.append(f"Python 3.11 (this is {sys.version.split()[0]}): run this script with python3.11")
    if find_spec("ensurepip") is None:
        lacks.append("Python's venv (Debian: apt install python3.11-venv)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        lacks.append("Python's headers (Debian: apt install python3.11-dev)")
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        lacks.append(f"a C++ compiler: there is no {compiler} (Debian: apt install g++; or set CXX)")
    return lacks


def environment() -> dict[str, str]:
    """The user's, with the virtual environment's programs (ninja, deepspeed) first."""
    return os.environ | {"PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}


def announce(step: int, what: str, takes: str) -> None:
    """Say what a step does and roughly how long it takes."""
    print(f"[{step}/{STEPS}] {what} ({takes})", flush=True)


def usable(python: Path) -> bool:
    """Is there a virtual environment of the right Python, with pip, that was not moved here from elsewhere?"""
    code = f"import pip, sys; sys.exit(sys.version_info[:2] != {TRIED} or sys.prefix != {str(VENV)!r})"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def make_environment() -> None:
    """Make .venv, unless a usable one is there."""
    if not usable(PYTHON):
        venv.create(VENV, clear=True, with_pip=True, prompt="agvm_ds")


def pip(name: str, *arguments: str, env: Mapping[str, str]) -> None:
    """``pip install`` with the tried versions, showing what pip is at; its output goes to .venv/pip-NAME.log."""
    status, log = StatusLine(), VENV / f"pip-{name}.log"

    def watch(line: str) -> None:
        if PIP_NEWS.match(line):
            status.show(f"      {clock(status.elapsed)} {line.strip()[:100]}")

    command = [str(PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--constraint", "constraints.txt", *arguments]
    code, lines = run_logged(command, log, watch, env=env, cwd=ROOT)
    status.close()
    if code:
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-5:]
        raise InstallError("\n".join(["pip failed:", *errors[:5], f"the complete log: {log}"]))


def about_torch() -> None:
    """Where there is no NVIDIA GPU, say how to spare the CUDA libraries."""
    chosen = {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"} & set(os.environ)
    installed = list((VENV / "lib").glob("python*/site-packages/torch/version.py"))
    if not chosen and not installed and not Path("/proc/driver/nvidia/version").exists():
        print(
            "      No NVIDIA GPU here, and PyPI's torch brings its CUDA libraries with it. To do without, stop now and"
        )
        print(
            "      start again with PIP_EXTRA_INDEX_URL set to the index of CPU wheels that pytorch.org names",
            flush=True,
        )


def program(name: str, *command: str | Path, env: Mapping[str, str]) -> None:
    """Run a program of the project, which speaks for itself."""
    if subprocess.run([PYTHON, *command], cwd=ROOT, env=env, check=False).returncode:
        raise InstallError(f"{name}: see above; mend it and start again, what is done stays done")


def install() -> None:
    """The five steps."""
    if lacks := missing():
        raise InstallError("\n  - ".join(["this machine lacks:", *lacks]))
    env = environment()
    announce(1, f"a virtual environment in {VENV.name}", "10 seconds")
    make_environment()
    announce(2, "torch and torchvision", "1 minute after a download of 3 GB")
    about_torch()
    # The constraints hold setuptools at a version that mmcv-full's build can use, which torch alone would not.
    pip("torch", "torch", "torchvision", "setuptools", "wheel", "ninja", env=env)
    announce(3, "deepspeed, mmdet, agvm_ds and their tools", "1 minute")
    # Without isolation: DeepSpeed's build records the torch that it finds.
    pip("rest", "--no-build-isolation", "--editable", f".[{EXTRAS}]", env=env)
    announce(4, "mmcv-full with its compiled ops", "seconds with a ready wheel, else 5 minutes on 2 cores")
    program("mmcv-full is not installed", ROOT / "scripts" / "build_mmcv.py", env=env)
    announce(5, "a look at the result", "10 seconds")
    program("something is wrong", "-m", "agvm_ds.doctor", env=env)


def main() -> int:
    """Install; the exit code."""
    status = StatusLine()
    try:
        install()
    except (InstallError, subprocess.CalledProcessError, OSError) as error:
        print(f"set-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; start it again, what is done stays done", file=sys.stderr)
        return 130
    print(f"set up in {clock(status.elapsed)}; `source .venv/bin/activate` to use it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
