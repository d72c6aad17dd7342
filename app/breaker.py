"""Keeps one hanging server from holding every thread."""

import threading
import time

# After a wait in vain everybody is refused at once for so long; then one request tries again.
RETRY_AFTER_FAILURE_SECONDS = 0.25


class Breaker:
    """Tells whether to ask a server at all; one for each server and process.

    Only waits in vain count. A server that refuses or cuts a connection costs nobody any time.
    """

    def __init__(self, wait_seconds: float) -> None:
        """`wait_seconds` is how long one try may take."""
        self._wait_seconds = wait_seconds
        self._closed_until = 0.0
        self._trying: int | None = None

    def admits(self) -> bool:
        """Return whether to ask the server now. Without a lock: two who try at once do no harm."""
        if not self._closed_until:
            return True
        now = time.monotonic()
        thread = threading.get_ident()
        if now < self._closed_until:
            # A try may take several questions, to connect and then to ask.
            return self._trying == thread
        # This one tries; the others go on being refused meanwhile.
        self._closed_until = now + self._wait_seconds
        self._trying = thread
        return True

    def is_tried(self) -> bool:
        """Tell whether this thread's question is to find out if the server is well again."""
        return self._trying == threading.get_ident()

    def waited_in_vain(self) -> None:
        self._trying = None
        self._closed_until = time.monotonic() + RETRY_AFTER_FAILURE_SECONDS

    def answered(self) -> None:
        self._trying = None
        self._closed_until = 0.0
