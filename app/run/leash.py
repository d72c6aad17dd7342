"""The child's side of a start: ties a program to its parent's life, then turns into it."""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

NAMESPACE = "namespace"
NOBODY = 65534
CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1


def leashed(
    argv: Sequence[str], death: signal.Signals, directory: Path, identity: str = ""
) -> list[str]:
    """Return the command that runs `argv` in `directory`, and gets `death` when we die."""
    # -I -S: neither packages nor the environment matter, and it takes 20 ms.
    python = [sys.executable, "-I", "-S", __file__]
    return [*python, str(os.getpid()), str(int(death)), identity, str(directory), *argv]


def _become(parent: str, death: str, identity: str, directory: str, *argv: str) -> None:
    """Turn this process into `argv`, as another user if need be, tied to the parent's life.

    A preexec_fn would do the same, but isn't safe in a process with threads.
    """
    if identity == NAMESPACE:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER) != 0:
            raise OSError(ctypes.get_errno(), "no user namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} 0 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} 0 1")
    elif identity:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if sys.platform == "linux":
        # Only now, since a change of identity clears it; and the parent may be gone already.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death), 0, 0, 0)
        if os.getppid() != int(parent):
            raise ProcessLookupError("the parent is gone")
    os.chdir(directory)
    os.execv(argv[0], argv)  # noqa: S606


def _tell(failure: OSError) -> None:
    if os.environ.get("LOG_FORMAT") == "json":
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": "error", "logger": "app.run", "message": str(failure)}
        print(json.dumps(line), file=sys.stderr)
    else:
        print(f"error: {failure}", file=sys.stderr)


if __name__ == "__main__":
    try:
        _become(*sys.argv[1:])
    except OSError as failure:
        _tell(failure)
        sys.exit(1)
