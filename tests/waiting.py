"""How long a test waits: said in one place, and longer while the machine is busy."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.01, 0.1


def slowness() -> float:
    """Return how many times longer things take now than on an idle machine; 1 or more.

    The processes that want a core, for each core: now (which sees a burst begin) or in the last
    minute, whichever is more. TEST_PATIENCE multiplies it, for machines that are slow by nature.
    """
    cores = os.cpu_count() or 1
    wanting = os.getloadavg()[0]
    if (now := Path("/proc/loadavg")).exists():  # proc(5): running/all, behind the three averages
        wanting = max(wanting, int(now.read_text().split()[3].split("/")[0]))
    return max(1.0, wanting / cores) * float(os.environ.get("TEST_PATIENCE") or 1)


def patience(seconds: float) -> float:
    """Return the deadline for what takes at most `seconds` on an idle machine."""
    return seconds * slowness()


def wait_until(condition: Callable[[], object], seconds: float = 30, what: str = "") -> object:
    """Return the condition's first true value; fail when the deadline passes without one.

    `seconds` are those of an idle machine: how busy it is, is asked when they are over.
    """
    started, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    while not (value := condition()):
        waited = time.monotonic() - started
        if waited > seconds and waited > patience(seconds):
            pytest.fail(f"waited {waited:.0f} s for {what or condition}")
        time.sleep(pause)
        pause = min(LONGEST_PAUSE_SECONDS, max(FIRST_PAUSE_SECONDS, waited / 20))
    return value
