"""Keeps one hanging or slow server from holding every thread."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# After a wait in vain everybody is refused at once for so long; then one request tries again.
RETRY_AFTER_FAILURE_SECONDS = 0.25
# With less left of what a request may wait nobody is asked: a wait that is cut so short would say
# nothing about the server.
LEAST_WAIT_SECONDS = 0.25

_thread = threading.local()


@contextmanager
def one_request() -> Iterator[None]:
    """Bound what this thread waits for each server inside the context, all questions together.

    Without it, a server that answers each question just in time would make a page take as long as
    it has questions.
    """
    _thread.waited = {}
    try:
        yield
    finally:
        _thread.waited = None


class Breaker:
    """Tells whether to ask a server at all; one for each server and process.

    Only waits in vain count. A server that refuses or cuts a connection costs nobody any time.
    """

    def __init__(self, wait_seconds: float, request_seconds: float = math.inf) -> None:
        """`wait_seconds` is how long one try may take, the other all waits of one request."""
        self._wait_seconds, self._request_seconds = wait_seconds, request_seconds
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

    def left(self) -> float:
        """Return how many seconds this thread's request may still wait; none of it: no bound."""
        waited: dict[Breaker, float] | None = getattr(_thread, "waited", None)
        return math.inf if waited is None else self._request_seconds - waited.get(self, 0.0)

    def has_time(self) -> bool:
        """Tell whether this thread's request has not waited for this server for too long."""
        return self.left() >= LEAST_WAIT_SECONDS

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what passes inside the context as waiting for the server."""
        started = time.monotonic()
        try:
            yield
        finally:
            waited: dict[Breaker, float] | None = getattr(_thread, "waited", None)
            if waited is not None:
                waited[self] = waited.get(self, 0.0) + time.monotonic() - started

    def is_tried(self) -> bool:
        """Tell whether this thread's question is to find out if the server is well again."""
        return self._trying == threading.get_ident()

    def waited_in_vain(self) -> None:
        self._trying = None
        self._closed_until = time.monotonic() + RETRY_AFTER_FAILURE_SECONDS

    def answered(self) -> None:
        self._trying = None
        self._closed_until = 0.0
