"""How connections to PostgreSQL behave: bounded waits, so that no request hangs on a dead server."""

import select
import time

import psycopg2
from flask import has_request_context
from psycopg2 import extensions

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
    },
}


def limit_waits() -> None:
    """Make every psycopg2 connection of this process give up after a bounded wait.

    The server's own statement_timeout is no help against a server that is stopped or cut off.
    """
    extensions.set_wait_callback(_wait)


def _wait(connection) -> None:
    allowed = REQUEST_WAIT_SECONDS if has_request_context() else OTHER_WAIT_SECONDS
    deadline = time.monotonic() + allowed
    poller = select.poll()
    while (state := connection.poll()) != extensions.POLL_OK:
        events = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
        poller.register(connection.fileno(), events)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            # psycopg2 closes a connection whose wait failed, so it can't be used half-way.
            raise psycopg2.OperationalError("PostgreSQL did not answer in time")
        poller.unregister(connection.fileno())
