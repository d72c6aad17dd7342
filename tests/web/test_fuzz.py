"""A few thousand bad requests against the real server; `make fuzz` sends fifty thousand."""

import sys

import pytest
from drills import often
from system import run_program

from app.config import ROOT


@pytest.mark.drill
def test_bad_requests_change_nothing():
    requests = often(2500, 50_000)
    program = [sys.executable, ROOT / "stress" / "fuzz.py", "--requests", requests, "--seed", 1]
    result = run_program(program, 3600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
