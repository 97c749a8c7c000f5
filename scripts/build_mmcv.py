"""Install mmcv-full 1.7.2 with its compiled ops: python scripts/build_mmcv.py [--from-source]

PyPI has mmcv-full as source only, and its setup.py asks for C++17, which the headers of torch 2.14 refuse. This takes,
in this order, whichever first loads and computes a right result with the installed torch:

1. what is installed already;
2. a wheel that an earlier run of this script built (kept under $XDG_CACHE_HOME, by default ~/.cache);
3. a ready wheel that pip finds without building (PIP_FIND_LINKS);
4. a wheel built here, from the source on PyPI, with C++20: 5 minutes on 2 cores. It needs g++, and about 1 GB of memory
   a compiler. MAX_JOBS, CXX, CFLAGS are respected. An interrupted or failed build goes on where it stopped.

With a GPU and nvcc of torch's CUDA version (CUDA_HOME) the CUDA ops are built too, for one architecture about an hour of
one core; FORCE_CUDA=1 builds them without looking for a GPU (name the architectures in TORCH_CUDA_ARCH_LIST), FORCE_CUDA=0
leaves them out. Tried once, with torch 2.11 and CUDA 13.0: docs/limits.md.

Needs what `pip install -e .[mmdet]` installs.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from progress import StatusLine, clock, run_logged

try:
    from agvm_ds.doctor import MMCV_VERSION, cuda_wanted, why_not_importable
except ModuleNotFoundError:
    sys.exit("mmcv-full: agvm_ds comes first: pip install -c constraints.txt -e .[mmdet]")

REQUIREMENT = f"mmcv-full=={MMCV_VERSION}"
GIB_PER_JOB = 2.0  # g++ was seen at 0.8, nvcc takes more
MINUTES_OF_ONE_CORE = {False: 10.0, True: 60.0}
"""Without and with CUDA."""

PROBE = """
import sys
from agvm_ds.doctor import mmcv_ops, package, tried_ranges
checks = [package("mmcv-full", "mmcv", tried_ranges()), mmcv_ops()]
sys.exit(next((check.problem for check in checks if check.problem), None))
"""

STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] ")
"""ninja's counter at the start of a line."""

ERROR = re.compile(r": (fatal )?error: |\(\d+\): error|: undefined reference to |: cannot find -l")
"""An error line of gcc, clang, nvcc or the linker. The source lines under it are indented."""

RAISED = re.compile(r"[\w.]*Error:( |$)")
"""The last line of a Python traceback; the lines after it belong to the message."""

HINTS = {
    "Killed signal": "the compiler was killed, most likely for want of memory: try MAX_JOBS=1",
    "Python.h": "Python's headers are missing (Debian: apt install python3.11-dev)",
    "detected CUDA version": "CUDA_HOME must hold the version that torch was built with; FORCE_CUDA=0 does without",
    "crashed with signal": "a compiler that links libstdc++ into libraries may do that: name another one in CXX",
}


class BuildError(Exception):
    """Why there is no mmcv-full, ready to be read."""


def say(message: str) -> None:
    """Tell the user at once, also where the output is a file."""
    print(f"mmcv-full: {message}", flush=True)


# ---------------------------------------------------------------------------------------------- wheels


def pip(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python's pip, quietly."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def probe(unpacked: Path | None = None) -> str:
    """What is wrong with the installed mmcv-full, or with the wheel unpacked there; empty when its ops work."""
    paths = [str(unpacked)] * (unpacked is not None) + [os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=False)
    if result.returncode < 0:
        return f"loading its ops crashed with signal {-result.returncode}"
    return result.stderr.strip().splitlines()[-1] if result.returncode else ""


def probe_wheel(wheel: Path) -> str:
    """What is wrong with a wheel, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        return probe(Path(folder))


def install(wheel: Path) -> None:
    """Put a wheel into this environment. What mmcv-full needs is in pyproject.toml, with ranges that were tried."""
    result = pip("install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    if result.returncode:
        raise BuildError(f"pip cannot install {wheel}:\n{result.stderr.strip()}")
    say(f"installed {wheel.name}")


def ready_wheels(cache: Path, draft: Path) -> Iterator[Path]:
    """Wheels that need no compiler: what an earlier run kept, then what pip finds (downloaded to ``draft``)."""
    yield from sorted(cache.glob("*.whl"))
    pip("download", "--no-deps", "--only-binary=:all:", "--dest", draft, REQUIREMENT)
    yield from sorted(draft.glob("*.whl"))


def take_ready_wheel(cache: Path) -> bool:
    """Install the first ready wheel that works with this torch, saying of others why not."""
    with tempfile.TemporaryDirectory() as draft:
        for wheel in ready_wheels(cache, Path(draft)):
            problem = probe_wheel(wheel)
            if not problem:
                say("taking a ready wheel")
                install(wheel)
                return True
            say(f"the ready wheel {wheel.name} is of no use here: {problem}")
    return False


# ---------------------------------------------------------------------------------------------- build


def patch_setup(text: str) -> str:
    """mmcv's setup.py with C++20 wherever it asks for an older one, of the C++ compiler and of nvcc."""
    patched, count = re.subn(r"-std=c\+\+1[47]", "-std=c++20", text)
    if not count:
        raise BuildError("its setup.py names no C++ standard to replace: is this another release of mmcv-full?")
    return patched


def fetch_source(cache: Path, env: dict[str, str]) -> Path:
    """The patched source tree; an earlier one is used again, so that ninja goes on where it stopped."""
    source = cache / f"mmcv-full-{MMCV_VERSION}"
    if source.is_dir():
        say(f"going on with the build in {source}")
        return source
    with tempfile.TemporaryDirectory(dir=cache) as draft:
        # pip runs the package's setup.py to read its name: with this environment's torch and setuptools, therefore.
        arguments = ("--no-deps", "--no-binary=:all:", "--no-build-isolation", "--dest", draft, REQUIREMENT)
        result = pip("download", *arguments, env=env)
        archives = list(Path(draft).glob("*.tar.gz"))
        if result.returncode or not archives:
            raise BuildError(f"its source cannot be downloaded:\n{result.stderr.strip()}")
        shutil.unpack_archive(archives[0], draft)
        setup = Path(draft) / source.name / "setup.py"
        setup.write_text(patch_setup(setup.read_text()))
        setup.parent.rename(source)
    return source


def memory_gib() -> float:
    """Memory that is free for new processes, infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), float("inf"))


def jobs() -> int:
    """Compilers at once: MAX_JOBS, else one a core as far as memory goes."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return int(os.environ["MAX_JOBS"])
    return int(max(1, min(len(os.sched_getaffinity(0)), memory_gib() // GIB_PER_JOB)))


def build_environment(cuda: bool) -> dict[str, str]:
    """What mmcv's setup.py, torch's build extension and the compilers read.

    Optimized without debug symbols: a quarter of the time that Python's own flags take. A GPU is hidden where CUDA is
    not wanted, because setup.py goes by what torch sees.
    """
    env = os.environ | {
        "MMCV_WITH_OPS": "1",
        "FORCE_CUDA": "1" if cuda else "0",
        "MAX_JOBS": str(jobs()),
        "CFLAGS": f"-O2 -g0 {os.environ.get('CFLAGS', '')}".strip(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # for ninja
    }
    return env if cuda else env | {"CUDA_VISIBLE_DEVICES": ""}


def counter(line: str, elapsed: float) -> str:
    """What a line of the log tells: "37 of 74 compiled, 1:32 gone, about 1:32 left"; nothing if it has no counter."""
    found = STEP.match(line)
    if not found:
        return ""
    done, total = int(found[1]), int(found[2])
    left = elapsed / max(done, 1) * (total - done)
    return f"{done} of {total} compiled, {clock(elapsed)} gone, about {clock(left)} left"


def first_error(log: Sequence[str]) -> list[str]:
    """The lines that tell why a build failed: what was being made, the first error, the source lines under it."""
    error = next((index for index, line in enumerate(log) if ERROR.search(line)), None)
    failed = [index for index, line in enumerate(log[:error]) if line.startswith("FAILED:")]
    raised = next((index for index, line in enumerate(log) if RAISED.match(line)), None)
    made = [log[index] for index in failed[-1:]]
    if error is not None:
        return [*made, log[error], *takewhile(re.compile(r"\s").match, log[error + 1 : error + 6])]
    if failed:  # a compiler that says nothing, or is not there: its command, and what the shell says of it
        return made + [line[:200] for line in log[failed[-1] + 1 : failed[-1] + 3] if not line.startswith("ninja:")]
    if raised is not None:
        return [log[raised], *takewhile(str.strip, log[raised + 1 : raised + 6])]
    return list(log[-5:])


def hints(lines: Iterable[str]) -> list[str]:
    """What is known about such errors."""
    text = "\n".join(lines)
    return [hint for sign, hint in HINTS.items() if sign in text]


def compile_wheel(source: Path, env: dict[str, str], log: Path) -> Path:
    """Build the wheel, showing progress; everything that is said goes to ``log``."""
    status = StatusLine()

    def watch(line: str) -> None:
        if text := counter(line, status.elapsed):
            status.show(f"mmcv-full: {text}")

    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(source / "dist")]
    code, lines = run_logged(command, log, watch, cwd=source, env=env)
    status.close()
    wheels = sorted((source / "dist").glob("*.whl"))
    if code or not wheels:
        why = [line.replace(f"{source}/", "") for line in first_error(lines)]
        raise BuildError("\n".join(["the build failed:", *why, *hints(why), f"the complete log: {log}"]))
    return wheels[0]


def build(cache: Path, cuda: bool) -> Path:
    """Build from source, keep the wheel in the cache, remove the source tree."""
    env = build_environment(cuda)
    minutes = MINUTES_OF_ONE_CORE[cuda] / int(env["MAX_JOBS"])
    guess = f"{'with CUDA, ' * cuda}about {minutes:.0f} minutes"
    say(f"building from source, {env['MAX_JOBS']} compilers at once: {guess} (log: {cache / 'build.log'})")
    source = fetch_source(cache, env)
    built = compile_wheel(source, env, cache / "build.log")
    wheel = built.rename(cache / built.name)
    shutil.rmtree(source)
    say(f"built; the wheel is kept in {cache}")
    return wheel


# ---------------------------------------------------------------------------------------------- run


def cache_folder(cuda: bool) -> Path:
    """Where the wheel for this Python, this torch and this kind of ops is kept."""
    import torch

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agvm_ds"
    kind = f"py{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}-{'cuda' if cuda else 'cpu'}"
    return base / f"mmcv-full-{MMCV_VERSION}-{kind}"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Two set-ups at once build once: the second waits, and finds the wheel."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up that builds the same wheel")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def must_be_able_to_build(cuda: bool) -> None:
    """Refuse at once what would fail after minutes."""
    from torch.utils.cpp_extension import CUDA_HOME

    if reason := why_not_importable("pkg_resources"):
        raise BuildError(f'its setup.py needs pkg_resources ({reason}): pip install -c constraints.txt "setuptools<81"')
    if cuda and CUDA_HOME is None:
        raise BuildError(
            "there is a GPU, but no nvcc to compile the CUDA ops with: install the CUDA toolkit of torch's version and "
            "set CUDA_HOME; or set FORCE_CUDA=0 for ops without CUDA, and DS_ACCELERATOR=cpu to train without the GPU"
        )


def run(from_source: bool) -> None:
    """Get mmcv-full into this environment, or raise BuildError."""
    if reason := why_not_importable("torch"):
        raise BuildError(f"needs torch first ({reason}): pip install -c constraints.txt torch torchvision")
    if not from_source and not probe():
        say(f"{MMCV_VERSION} is installed already, and its ops work")
        return
    cuda = cuda_wanted()
    cache = cache_folder(cuda)
    cache.mkdir(parents=True, exist_ok=True)
    with alone(cache / "lock"):
        if not from_source and take_ready_wheel(cache):
            return
        must_be_able_to_build(cuda)
        wheel = build(cache, cuda)
        if problem := probe_wheel(wheel):
            wheel.unlink()
            raise BuildError("\n".join([f"built, but of no use here: {problem}", *hints([problem])]))
        install(wheel)


def main() -> int:
    """Parse, run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from-source", action="store_true", help="build, whatever is installed or ready")
    logging.disable(logging.WARNING)  # torch on CUDA, setuptools on pkg_resources: nothing to act on here
    warnings.simplefilter("ignore")
    try:
        run(parser.parse_args().from_source)
    except BuildError as error:
        print(f"mmcv-full: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmmcv-full: interrupted; the next run goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
