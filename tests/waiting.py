"""How long a test waits: said in one place, and longer while the machine is busy."""

import time
from collections.abc import Callable

import pytest
from client import patience

__all__ = ["patience", "wait_until"]

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.01, 0.1


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
