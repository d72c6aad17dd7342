"""The pulse of a process: bytes down a pipe of its own, while it can work.

Written by app/web/alive.py and app/worker/alive.py. The port tells nothing of one web process: the
kernel spreads connections over all of them, and a neighbour answers for one that hangs. uvicorn's
own ping is answered by a thread of its own, also while the event loop stands still.
"""

import os
from contextlib import suppress
from enum import Enum, auto

# What a process says: that it can work; that it runs, but a thread of it, or all, don't get on.
ALIVE, STUCK = b".", b"!"
BEAT_SECONDS = 1.0
# So many looks in vain, a second apart, and a process counts as hung. The longest gap of a busy one
# was 2 s, with 10 runnable programs for each core (docs/performance.md).
MOST_MISSED = 10
# Before the first beat it imports; on a machine that has other things to do, slowly.
MOST_MISSED_AT_START = 60


class Trouble(Enum):
    """What ails a process that lives."""

    SILENT = auto()
    STUCK = auto()


class Pulse:
    """The reading end of a process's pipe.

    Counted are looks in vain, a second apart, not the time between two beats: whatever stops this
    process or the whole machine for a while makes it look late, not the other process sick.
    """

    def __init__(self, pipe: int, now: float) -> None:
        """`now` is a moment of time.monotonic()."""
        os.set_blocking(pipe, False)
        self._pipe = pipe
        self._looked_at = now
        self._missed = 0
        self.begun = False

    def feel(self, now: float) -> Trouble | None:
        """Return what ails the process, None when nothing does."""
        beats = b""
        with suppress(BlockingIOError):
            beats = os.read(self._pipe, 4096)
        if beats:
            self.begun, self._missed, self._looked_at = True, 0, now
            return Trouble.STUCK if STUCK in beats else None
        if now - self._looked_at >= BEAT_SECONDS:
            self._missed, self._looked_at = self._missed + 1, now
        most = MOST_MISSED if self.begun else MOST_MISSED_AT_START
        return Trouble.SILENT if self._missed >= most else None

    def close(self) -> None:
        os.close(self._pipe)
