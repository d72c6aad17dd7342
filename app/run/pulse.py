"""The pulse of a web process: bytes down a pipe of its own, while it can work (app/web/alive.py).

The port tells nothing of one process: the kernel spreads connections over all of them, and a
neighbour answers for one that hangs. uvicorn's own ping is answered by a thread of its own, also
while the event loop stands still.
"""

import os
from contextlib import suppress

# What a process says: that it can work; that its event loop turns, but none of its page threads.
ALIVE, PAGES_STUCK = b".", b"!"
BEAT_SECONDS = 1.0
# So many looks in vain, a second apart, and a process counts as hung. The longest gap of a busy one
# was 2 s, with 10 runnable programs for each core (docs/performance.md).
MOST_MISSED = 10
# Before the first beat it imports; on a machine that has other things to do, slowly.
MOST_MISSED_AT_START = 60

EVENT_LOOP, PAGE_THREADS = "event_loop", "page_threads"


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

    def feel(self, now: float) -> str | None:
        """Return which part does not answer, EVENT_LOOP or PAGE_THREADS, or None."""
        beats = b""
        with suppress(BlockingIOError):
            beats = os.read(self._pipe, 4096)
        if beats:
            self.begun, self._missed, self._looked_at = True, 0, now
            return PAGE_THREADS if PAGES_STUCK in beats else None
        if now - self._looked_at >= BEAT_SECONDS:
            self._missed, self._looked_at = self._missed + 1, now
        most = MOST_MISSED if self.begun else MOST_MISSED_AT_START
        return EVENT_LOOP if self._missed >= most else None

    def close(self) -> None:
        os.close(self._pipe)
