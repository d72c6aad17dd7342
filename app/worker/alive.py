"""How a worker proves that it works: a byte a second to the one that started it (run/pulse.py).

systemd gets a word of it, too, where it watches over the worker (WatchdogSec, sd_notify(3)). Each
of its threads counts its turns; one that hangs, or has ended, counts none.
"""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from ..run.pulse import ALIVE, BEAT_SECONDS, STUCK
from .relay import STEP_WAIT_SECONDS

# So many beats without a turn of one of the threads: twice what a turn may wait for PostgreSQL.
MOST_BEATS_STUCK = 2 * STEP_WAIT_SECONDS


class Heartbeat:
    """Writes to the pipe as long as the process lives."""

    def __init__(self, pipe: int) -> None:
        os.set_blocking(pipe, False)
        self._pipe = pipe
        # "@" stands for the zero byte of an abstract address.
        self._systemd = os.environ.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        self._turns: dict[str, int] = {}

    def thread(self, name: str) -> Callable[[], None]:
        """Return what a thread has to call at each of its turns. Add all before the start."""
        # Several may do the same.
        own = f"{name} {len(self._turns)}"
        self._turns[own] = 0

        def turned() -> None:
            self._turns[own] += 1

        return turned

    def start(self) -> None:
        """Begin; the end of the process, and nothing else, ends it: a long end is no standstill."""
        threading.Thread(target=self._beat, name="Heartbeat", daemon=True).start()

    def _beat(self) -> None:
        before, stuck = dict(self._turns), dict.fromkeys(self._turns, 0)
        pause = threading.Event()
        while True:
            self._write(ALIVE if max(stuck.values()) < MOST_BEATS_STUCK else STUCK)
            # Counted in beats, not by a clock: a stopped process wakes up as healthy as it was.
            pause.wait(BEAT_SECONDS)
            now = dict(self._turns)
            stuck = {name: stuck[name] + 1 if now[name] == before[name] else 0 for name in now}
            before = now

    def _write(self, word: bytes) -> None:
        # Full: nobody has read for hours. Broken: nobody is left to read.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, word)
        if word == ALIVE and self._systemd:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
                told.setblocking(False)
                told.sendto(b"WATCHDOG=1", self._systemd)
