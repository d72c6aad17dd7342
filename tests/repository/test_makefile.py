"""`make` makes .venv: never with a Python that is too old, and anew what was left half done."""

import os
import shutil
import subprocess
import sys

import pytest
from waiting import patience

from app.config import ROOT

# A Python that says to be 3.9, and can do nothing else.
TOO_OLD = """#!/bin/sh
exec {python} -c 'import sys; sys.version_info = (3, 9, 2); exec(sys.argv[2])' "$@"
"""

OUTER = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")


@pytest.fixture
def make(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").write_text("# nothing: no index is asked\n")

    def run(python=sys.executable):
        return subprocess.run(
            ["make", ".venv/installed", f"PYTHON={python}"],
            cwd=tmp_path,
            # Not as a part of the `make test` that runs this.
            env={name: value for name, value in os.environ.items() if name not in OUTER},
            capture_output=True,
            text=True,
            timeout=patience(120),
            check=False,
        )

    return run


@pytest.fixture
def too_old(tmp_path):
    path = tmp_path / "python3.9"
    path.write_text(TOO_OLD.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_a_python_that_is_too_old_is_told_in_one_line_and_harms_nothing(make, too_old, tmp_path):
    for before in ([], ["kept"]):
        for name in before:
            (tmp_path / ".venv").mkdir()
            (tmp_path / ".venv" / name).touch()
        done = make(too_old)
        assert done.returncode != 0
        told, *rest = done.stderr.splitlines()
        assert told.startswith(f"error: Python 3.11, 3.12 or 3.13 is needed, and {too_old} is 3.9;")
        assert [line for line in rest if not line.startswith("make: ***")] == []
        assert done.stdout == ""
        venv = tmp_path / ".venv"
        assert [path.name for path in venv.iterdir()] == before if before else not venv.exists()


@pytest.mark.drill
def test_what_was_left_half_done_is_made_anew_and_what_is_whole_is_kept(make, tmp_path):
    """By an older Python, or an install that was cut short; later its Python is taken away."""
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (venv / "lib" / "python3.9" / "half").mkdir(parents=True)
    first = make()
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Installing the packages into .venv")
    assert not (venv / "lib" / "python3.9").exists()
    assert "up to date" in make().stdout

    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/usr/bin/a-python-of-before")
    assert make().returncode == 0
    checked = subprocess.run([venv / "bin" / "python", "-m", "pip", "--version"], check=False)
    assert checked.returncode == 0
