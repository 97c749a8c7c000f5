"""The set-up refuses a machine that cannot do it, and shows pip's own error. No network, nothing is installed."""

from __future__ import annotations

import sys
import venv
from pathlib import Path

import install
import pytest


def test_everything_that_the_machine_lacks_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install.missing() == []
    monkeypatch.setattr(install, "TRIED", (3, 99))
    monkeypatch.setattr(install, "find_spec", lambda name: None)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    told = "\n".join(install.missing())
    assert "Python 3.11 (this is" in told and "python3.11-venv" in told and "there is no no-such-compiler" in told


def test_an_environment_of_another_place_or_without_pip_is_not_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not install.usable(tmp_path / "bin" / "python")
    venv.create(tmp_path / "new", with_pip=False)
    monkeypatch.setattr(install, "VENV", tmp_path / "new")
    assert not install.usable(tmp_path / "new" / "bin" / "python")
    monkeypatch.setattr(install, "VENV", Path(sys.prefix))
    assert install.usable(Path(sys.executable))
    monkeypatch.setattr(install, "VENV", tmp_path / "elsewhere")
    assert not install.usable(Path(sys.executable))


def test_what_pip_says_of_a_failure_is_shown_with_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talks = "print('Collecting a'); print('ERROR: No matching distribution found for a'); raise SystemExit(1)"
    (tmp_path / "pip.py").write_text(talks)
    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setattr(install, "PYTHON", Path(sys.executable))
    with pytest.raises(install.InstallError) as error:
        install.pip("test", "a", env={"PYTHONPATH": str(tmp_path), "PATH": ""})
    assert str(error.value).splitlines() == [
        "pip failed:",
        "ERROR: No matching distribution found for a",
        f"the complete log: {tmp_path / 'pip-test.log'}",
    ]
    assert "Collecting a" in (tmp_path / "pip-test.log").read_text()
