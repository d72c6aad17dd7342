"""What the tests started ends with them: a process that is left fails the run, and is ended."""

import ctypes
import sys
import time
from contextlib import suppress

import psutil
import pytest
from waiting import patience

PR_SET_CHILD_SUBREAPER = 36
# Processes on their way out: Chromium's, multiprocessing's.
GRACE_SECONDS = 5
LEFT = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Have orphans handed to this process instead of to init, so that they can be found."""
    config.stash[LEFT] = []
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def alive() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of a parallel run's workers each looks after its own, and tells the one that prints."""
    started = time.monotonic()
    while (left := alive()) and time.monotonic() - started < patience(GRACE_SECONDS):
        time.sleep(0.1)
    told = session.config.stash[LEFT]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            told.append(f"{process.pid}: {' '.join(process.cmdline())} in {process.cwd()}")
            process.kill()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = told
    elif told and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[LEFT].extend(getattr(node, "workeroutput", {}).get("left", ()))


def pytest_terminal_summary(terminalreporter) -> None:
    for line in terminalreporter.config.stash[LEFT]:
        terminalreporter.write_line(f"LEFT RUNNING {line}", red=True)
