"""A few thousand bad requests against the real server; `make fuzz` sends fifty thousand."""

import subprocess
import sys

from app.config import ROOT


def test_bad_requests_change_nothing():
    result = subprocess.run(
        [sys.executable, ROOT / "stress" / "fuzz.py", "--requests", "2500", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
