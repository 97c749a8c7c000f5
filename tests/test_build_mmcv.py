"""The build of mmcv-full: what is shown, what is taken ready, what is said when it fails. No network, no compiler."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import build_mmcv
import pytest
from build_mmcv import BuildError

COMMAND = "c++ -MMD -MF a.o.d -O2 -g0 -fPIC -Werror=format -c a.cpp -o a.o -std=c++20"

GCC = f"""\
running build_ext
W1124 torch/utils/cpp_extension.py:183] No CUDA runtime is found
building 'mmcv._ext' extension
[1/3] {COMMAND}
a.cpp: In function 'int f()':
a.cpp:3:7: warning: unused variable 'x' [-Wunused-variable]
[2/3] c++ -c nms.cpp -o /tmp/nms.o
FAILED: [code=1] /tmp/nms.o
c++ -c nms.cpp -o /tmp/nms.o
In file included from torch/all.h:4,
                 from nms.cpp:1:
torch/all.h:5:2: error: #error C++20 or later compatible compiler is required to use PyTorch.
    5 | #error C++20 or later compatible compiler is required to use PyTorch.
      |  ^~~~~
nms.cpp:9:1: error: 'second' was not declared in this scope
ninja: build stopped: subcommand failed.
Traceback (most recent call last):
  File "cpp_extension.py", line 2890, in _run_ninja_build
    subprocess.run(
subprocess.CalledProcessError: Command '['ninja', '-v']' returned non-zero exit status 1.
RuntimeError: Error compiling objects for extension
"""

NVCC = """\
[7/9] nvcc -c carafe.cu -o carafe.o
FAILED: [code=2] carafe.o
nvcc -c carafe.cu -o carafe.o
carafe.cu(12): error: identifier "THCState" is undefined
    THCState *state;
    ^
1 error detected in the compilation of "carafe.cu".
"""

KILLED = """\
[4/9] c++ -c a.cpp -o a.o
FAILED: [code=1] a.o
c++ -c a.cpp -o a.o
c++: fatal error: Killed signal terminated program cc1plus
compilation terminated.
"""

TRACEBACK = f"""\
running build_ext
Traceback (most recent call last):
  File "setup.py", line 560, in <module>
    setup(
RuntimeError:{" "}
The detected CUDA version (12.4) mismatches the version that was used to compile
PyTorch (13.0). Please make sure to use the same CUDA versions.
"""

SILENT = """\
[1/3] false -c a.cpp -o a.o
FAILED: [code=1] a.o
false -c a.cpp -o a.o
ninja: build stopped: subcommand failed.
subprocess.CalledProcessError: Command '['ninja', '-v']' returned non-zero exit status 1.
"""


def test_the_counter_of_ninja_becomes_progress() -> None:
    assert build_mmcv.counter(f"[37/74] {COMMAND}", 92.0) == "37 of 74 compiled, 1:32 gone, about 1:32 left"
    assert build_mmcv.counter("  [74/74] link", 60.0) == "74 of 74 compiled, 1:00 gone, about 0:00 left"


@pytest.mark.parametrize("line", ["", "running build_ext", "array[3/4] x", "[1/2", "copying a[1/2] b"])
def test_other_lines_are_no_progress(line: str) -> None:
    assert build_mmcv.counter(line, 1.0) == ""


@pytest.mark.parametrize(
    ("log", "lines"),
    [
        pytest.param(
            GCC,
            [
                "FAILED: [code=1] /tmp/nms.o",
                "torch/all.h:5:2: error: #error C++20 or later compatible compiler is required to use PyTorch.",
                "    5 | #error C++20 or later compatible compiler is required to use PyTorch.",
                "      |  ^~~~~",
            ],
            id="gcc: the first error, with the source lines under it",
        ),
        pytest.param(
            NVCC,
            [
                "FAILED: [code=2] carafe.o",
                'carafe.cu(12): error: identifier "THCState" is undefined',
                "    THCState *state;",
                "    ^",
            ],
            id="nvcc",
        ),
        pytest.param(
            KILLED,
            ["FAILED: [code=1] a.o", "c++: fatal error: Killed signal terminated program cc1plus"],
            id="killed",
        ),
        pytest.param(
            TRACEBACK,
            [
                "RuntimeError: ",
                "The detected CUDA version (12.4) mismatches the version that was used to compile",
                "PyTorch (13.0). Please make sure to use the same CUDA versions.",
            ],
            id="setup.py itself",
        ),
        pytest.param(SILENT, ["FAILED: [code=1] a.o", "false -c a.cpp -o a.o"], id="a compiler that says nothing"),
        pytest.param(
            "ld: a.o: in function `f':\na.cpp:(.text+0x5): undefined reference to `g()'\ncollect2: error: ld failed\n",
            ["a.cpp:(.text+0x5): undefined reference to `g()'"],
            id="linker",
        ),
    ],
)
def test_the_first_error_is_found_in_the_log(log: str, lines: list[str]) -> None:
    assert build_mmcv.first_error(log.splitlines()) == lines


def test_known_errors_come_with_a_hint() -> None:
    assert "MAX_JOBS=1" in build_mmcv.hints(KILLED.splitlines())[0]
    assert "CUDA_HOME" in build_mmcv.hints(TRACEBACK.splitlines())[0]
    assert build_mmcv.hints(GCC.splitlines()) == []


def test_setup_py_gets_the_standard_that_torch_needs_for_both_compilers() -> None:
    text = "extra['cxx'] = ['-std=c++14']\nelse: ['-std=c++17']\nextra['nvcc'] += ['-std=c++17']\n"
    assert build_mmcv.patch_setup(text).count("-std=c++20") == 3
    with pytest.raises(BuildError, match="another release"):
        build_mmcv.patch_setup("extra['cxx'] = []")


def test_compilers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build_mmcv.jobs() == 7
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    for gib, jobs in ((100.0, 16), (9.0, 4), (0.5, 1), (float("inf"), 16)):
        monkeypatch.setattr(build_mmcv, "memory_gib", lambda gib=gib: gib)
        assert build_mmcv.jobs() == jobs


def test_without_cuda_a_gpu_is_hidden_from_setup_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-march=native")
    plain, cuda = build_mmcv.build_environment(False), build_mmcv.build_environment(True)
    assert plain["CUDA_VISIBLE_DEVICES"] == "" and plain["FORCE_CUDA"] == "0"
    assert cuda["FORCE_CUDA"] == "1" and cuda.get("CUDA_VISIBLE_DEVICES") != ""
    assert plain["CFLAGS"] == "-O2 -g0 -march=native"  # the user's come last, and win
    assert plain["PATH"].startswith(str(Path(sys.executable).parent))


# ---------------------------------------------------------------------------------------------- wheels


def make_wheel(folder: Path, code: str) -> Path:
    """A wheel of mmcv-full whose import runs ``code``."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "mmcv_full-1.7.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("mmcv/__init__.py", code)
        archive.writestr("mmcv_full-1.7.2.dist-info/METADATA", "Name: mmcv-full\nVersion: 1.7.2\n")
    return wheel


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise ImportError('mmcv/_ext.so: undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        ("import os; os.abort()", "crashed with signal 6"),
        ("", "do not load: No module named 'mmcv.ops'"),
    ],
)
def test_a_wheel_is_tried_before_it_is_installed(code: str, problem: str, tmp_path: Path) -> None:
    assert problem in build_mmcv.probe_wheel(make_wheel(tmp_path, code))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is installed, by a pip that finds one ready wheel and a probe that dislikes those under "broken"."""
    wheels: list[Path] = []

    def pip(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        if arguments[0] == "download":
            make_wheel(Path(arguments[arguments.index("--dest") + 1]), "")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(build_mmcv, "pip", pip)
    monkeypatch.setattr(build_mmcv, "install", wheels.append)
    monkeypatch.setattr(build_mmcv, "probe_wheel", lambda wheel: "built for another torch" * ("broken" in str(wheel)))
    return wheels


def test_the_wheel_of_an_earlier_run_is_used_again(installed: list[Path], tmp_path: Path) -> None:
    kept = make_wheel(tmp_path / "cache", "")
    assert build_mmcv.take_ready_wheel(tmp_path / "cache")
    assert installed == [kept]


def test_a_wheel_that_does_not_load_is_set_aside_for_the_next(
    installed: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_wheel(tmp_path / "broken", "")
    assert build_mmcv.take_ready_wheel(tmp_path / "broken")
    assert len(installed) == 1 and "broken" not in str(installed[0])
    assert "of no use here: built for another torch" in capsys.readouterr().out


def test_without_a_ready_wheel_nothing_is_installed(
    installed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_mmcv, "pip", lambda *arguments, env=None: subprocess.CompletedProcess([], 1, "", "none"))
    assert not build_mmcv.take_ready_wheel(tmp_path)
    assert installed == []


# ---------------------------------------------------------------------------------------------- build


def make_source(folder: Path, code: str) -> Path:
    """A source tree whose setup.py is ``code``."""
    folder.mkdir()
    (folder / "setup.py").write_text(code)
    return folder


def test_a_failed_build_tells_the_first_error_and_where_the_log_is(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", f"print({GCC!r})\nraise SystemExit(1)")
    log = tmp_path / "build.log"
    with pytest.raises(BuildError) as error:
        build_mmcv.compile_wheel(source, build_mmcv.build_environment(False), log)
    told = str(error.value)
    assert "torch/all.h:5:2: error: #error C++20" in told and str(log) in told
    assert len(told.splitlines()) < 10
    assert GCC in log.read_text()


def test_a_built_wheel_is_kept_and_the_source_tree_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from pathlib import Path\nPath('dist').mkdir()\nPath('dist/mmcv_full.whl').touch()\nprint('[1/1] c++')"
    make_source(tmp_path / f"mmcv-full-{build_mmcv.MMCV_VERSION}", code)  # as an interrupted run leaves it
    monkeypatch.setattr(build_mmcv, "pip", None)  # so nothing is downloaded
    assert build_mmcv.build(tmp_path, cuda=False) == tmp_path / "mmcv_full.whl"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.log", "mmcv_full.whl"]


def test_a_built_wheel_that_crashes_is_taken_away_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "built", "import os; os.abort()")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build_mmcv, "build", lambda cache, cuda: wheel)
    monkeypatch.setattr(build_mmcv, "must_be_able_to_build", lambda cuda: None)
    with pytest.raises(BuildError, match="of no use here: loading its ops crashed with signal 6\na compiler.*CXX"):
        build_mmcv.run(from_source=True)
    assert not wheel.exists()


def test_a_gpu_without_nvcc_is_refused_before_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(BuildError, match="no nvcc.*FORCE_CUDA=0"):
        build_mmcv.must_be_able_to_build(cuda=True)
    build_mmcv.must_be_able_to_build(cuda=False)


def test_a_failure_is_a_message_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for mmcv-full==1.7.2")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build_mmcv, "pip", no_network)
    monkeypatch.setattr(sys, "argv", ["build_mmcv.py", "--from-source"])
    monkeypatch.setattr("logging.disable", lambda level: None)
    assert build_mmcv.main() == 1
    assert "its source cannot be downloaded:\nERROR: No matching distribution" in capsys.readouterr().err
