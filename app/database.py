"""How connections to PostgreSQL behave: no request hangs on a server that does not answer."""

import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from flask import has_request_context
from psycopg2 import extensions

from .breaker import Breaker

# With one second for Redis this keeps the slowest refusal below two seconds.
REQUEST_WAIT_SECONDS = 0.9
# Workers and commands run longer statements (a migration, a rebuild), but not for ever.
OTHER_WAIT_SECONDS = 600

ENGINE_OPTIONS = {
    "pool_pre_ping": True,
    "pool_size": 5,
    "max_overflow": 10,
    "pool_timeout": REQUEST_WAIT_SECONDS,
    "connect_args": {
        "application_name": "flash-sale",
        # TIMESTAMPs are UTC wherever the server stands.
        "options": "-c timezone=UTC -c synchronous_commit=on",
        # A server that is gone without a word (a dead machine, a cut cable) is noticed in seconds.
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    },
}


def limit_waits() -> None:
    """Make every psycopg2 connection of this process give up after a bounded wait.

    The server's own statement_timeout is no help against a server that is stopped or cut off.
    """
    extensions.set_wait_callback(_wait)


_breaker = Breaker(REQUEST_WAIT_SECONDS)
_thread = threading.local()


@contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Bound what this thread waits for PostgreSQL inside the context, all waits together."""
    _thread.deadline = time.monotonic() + seconds
    try:
        yield
    finally:
        del _thread.deadline


def _wait(connection) -> None:
    if not has_request_context():
        now = time.monotonic()
        _wait_for(connection, getattr(_thread, "deadline", now + OTHER_WAIT_SECONDS) - now)
        return
    if not _breaker.admits():
        raise psycopg2.OperationalError("PostgreSQL did not answer a moment ago")
    try:
        _wait_for(connection, REQUEST_WAIT_SECONDS)
    except Unanswered:
        _breaker.waited_in_vain()
        raise
    except psycopg2.Error:
        # An answer, if not the wanted one.
        _breaker.answered()
        raise
    _breaker.answered()


class Unanswered(psycopg2.OperationalError):
    """PostgreSQL did not answer in time."""


def _wait_for(connection, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    poller = select.poll()
    while (state := connection.poll()) != extensions.POLL_OK:
        events = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
        poller.register(connection.fileno(), events)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            # psycopg2 closes a connection whose wait failed, so it can't be used half-way.
            raise Unanswered("PostgreSQL did not answer in time")
        poller.unregister(connection.fileno())
