"""How a web process proves that it works: a byte a second to the one that started it.

The byte is written by the event loop, once a trivial task has gone through the page threads, or
while these get on with other tasks: busy is not stuck. What is read from it: app/run/pulse.py.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ..run.pulse import ALIVE, BEAT_SECONDS, STUCK

# So many beats without a page thread that takes up anything. A request waits 2 s at most for a
# server that does not answer, so by then every thread should have been free several times.
MOST_BEATS_STUCK = 15


class Heartbeat:
    """Writes to the pipe for as long as its task runs."""

    def __init__(
        self, pipe: int, probe: Callable[[], Awaitable[object]], taken: Callable[[], int]
    ) -> None:
        """`probe` goes through the page threads; `taken` counts the tasks they ever took up."""
        self._pipe, self._probe, self._taken = pipe, probe, taken
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Write the first byte: connections are accepted. Call it on the event loop."""
        os.set_blocking(self._pipe, False)
        self._write(ALIVE)
        self._task = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        stuck = taken = 0
        probe = asyncio.ensure_future(self._probe())
        try:
            while True:
                # Counted in beats, not by a clock: a stopped process wakes up as healthy as it was.
                await asyncio.sleep(BEAT_SECONDS)
                if _went_through(probe) or self._taken() != taken:
                    stuck = 0
                else:
                    stuck += 1
                taken = self._taken()
                if probe.done():
                    probe = asyncio.ensure_future(self._probe())
                self._write(ALIVE if stuck < MOST_BEATS_STUCK else STUCK)
                stuck %= MOST_BEATS_STUCK
        finally:
            probe.cancel()
            os.close(self._pipe)

    def _write(self, word: bytes) -> None:
        # Full: nobody has read for hours. Broken: nobody is left to read.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, word)


def _went_through(probe: asyncio.Future[object]) -> bool:
    return probe.done() and not probe.cancelled() and probe.exception() is None
