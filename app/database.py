"""How connections to PostgreSQL behave: no wait is endless, and no session is kept that is useless.

A server that can no longer do its work (read-only, full, ending) is a lost connection.
"""

import math
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import flask_sqlalchemy.session
import psycopg2
from psycopg2 import extensions
from sqlalchemy import Engine, ExceptionContext, Pool, PoolProxiedConnection, event
from sqlalchemy.exc import DBAPIError, DisconnectionError, PendingRollbackError, TimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from .breaker import Breaker

# With one second for Redis this keeps the slowest refusal below two seconds.
REQUEST_WAIT_SECONDS = 0.9
# All waits of one request together: many statements, of which few may be slow.
REQUEST_WAITS_SECONDS = 5.0
# Of a server that has just let somebody wait in vain: requests have gathered meanwhile, and whoever
# tries has waited for a thread.
TRY_WAIT_SECONDS = 0.4
# One that answered a request so short a time ago is no server that is away.
WELL_SECONDS = 0.4
# A session opened while PostgreSQL was read-only may stay so when the server is well again: it is
# used for so long, then renewed.
READ_ONLY_SECONDS = 1.0

# SQLSTATEs, by their beginnings (PostgreSQL, appendix A). After these the session, and every other
# that was opened before, is thrown away: the next one may reach a server that is well.
LOST = (
    "08",  # connection exceptions
    "25006",  # a write in a read-only transaction: a standby, or a server that was made read-only
    "25P03", "25P04",  # the session was idle, or its transaction open, for too long
    "26",  # a statement prepared in another session: a pooler has changed servers
    "53",  # out of disk, memory or connections
    "57P",  # shut down, crashed, starting, or its database was dropped
    "58",  # errors of the system beneath, such as input and output
    "F0", "XX",  # configuration file, internal errors, damaged data
)  # fmt: skip
# After these the session is well; the same request may do better later.
BUSY = (
    "40",  # deadlock, serialization failure
    "42501", "42P01", "42703",  # rights, tables or columns are not there (yet): see /readyz
    "55",  # a lock was not to be had in time; an object is in use
    "57014",  # cancelled, by a timeout or by somebody
)  # fmt: skip

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


def sqlstate(error: BaseException) -> str:
    """Return PostgreSQL's code for an error, "" where it gave none."""
    return getattr(getattr(error, "orig", error), "pgcode", None) or ""


def is_unavailable(error: BaseException) -> bool:
    """Tell a PostgreSQL that can't do its work at the moment from a mistake in what it was asked.

    `error` may be SQLAlchemy's, or psycopg2's own.
    """
    if isinstance(error, (PendingRollbackError, TimeoutError)):
        # The transaction was lost in the middle; no connection of the pool came free in time.
        return True
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return True
        return error.orig is not None and is_unavailable(error.orig)
    return (
        isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError))
        # psycopg2 raises a bare DatabaseError, without a code, for an answer that was cut off.
        or type(error) is psycopg2.DatabaseError
        or (isinstance(error, psycopg2.Error) and sqlstate(error).startswith(LOST + BUSY))
    )


@event.listens_for(Engine, "handle_error")
def _throw_away_lost(context: ExceptionContext) -> None:
    """Let SQLAlchemy renew this connection, and all that were opened before it failed."""
    if sqlstate(context.original_exception).startswith(LOST):
        context.is_disconnect = True


@event.listens_for(Pool, "checkout")
def _renew_read_only(
    connection: extensions.connection,
    record: ConnectionPoolEntry,
    _proxy: PoolProxiedConnection,
) -> None:
    """Renew a read-only session. PostgreSQL tells unasked what it is, so looking costs nothing."""
    told = connection.info.parameter_status
    if "on" in (told("default_transaction_read_only"), told("in_hot_standby")):
        opened = record.info.setdefault("read_only_at", time.monotonic())
        if time.monotonic() - opened > READ_ONLY_SECONDS:
            raise DisconnectionError("the session is read-only")


@contextmanager
def raw_connection(engine: Engine) -> Iterator[extensions.connection]:
    """Lend a connection past SQLAlchemy, for psycopg2's own cursors; not committed is rolled back.

    Its errors are psycopg2's. After one of a lost server no connection of the pool is used again.
    """
    connection = engine.raw_connection()
    try:
        # The pool's proxy has all that psycopg2's own has.
        yield cast("extensions.connection", connection)
    except psycopg2.Error as error:
        driver: extensions.connection = connection.dbapi_connection  # type: ignore[assignment]  # psycopg2's
        if sqlstate(error).startswith(LOST) or driver.closed:
            connection.invalidate(error)
            engine.dispose()
        raise
    finally:
        connection.close()


class Session(flask_sqlalchemy.session.Session):
    """A session whose end never fails: what a lost connection can't roll back, PostgreSQL does.

    Nor does it wait for long. Flask's request may be over by then, and its client still waits.
    """

    def rollback(self) -> None:
        try:
            with waiting_at_most(REQUEST_WAIT_SECONDS):
                super().rollback()
        except DBAPIError:
            self.invalidate()

    def close(self) -> None:
        try:
            with waiting_at_most(REQUEST_WAIT_SECONDS):
                super().close()
        except DBAPIError:
            self.invalidate()


def limit_waits(in_request: Callable[[], bool]) -> None:
    """Make every psycopg2 connection of this process give up after a bounded wait.

    `in_request` tells whether somebody waits for the answer to a request: they wait shortest, and
    not at all for a server that has just let another request wait in vain.

    The server's own statement_timeout is no help against a server that is stopped or cut off.
    """
    extensions.set_wait_callback(
        lambda connection: _wait_in_request(connection) if in_request() else _wait(connection)
    )


class _Answers:
    """When PostgreSQL answered a request of this process last."""

    last = -math.inf


_breaker = Breaker(REQUEST_WAIT_SECONDS, REQUEST_WAITS_SECONDS)
_answers = _Answers()
_thread = threading.local()


@contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Bound what this thread waits for PostgreSQL inside the context, all waits together.

    Of several, one inside the other, the one that ends first holds.
    """
    outer = getattr(_thread, "deadline", math.inf)
    _thread.deadline = min(outer, time.monotonic() + seconds)
    try:
        yield
    finally:
        _thread.deadline = outer


def _wait(connection: extensions.connection) -> None:
    left = getattr(_thread, "deadline", math.inf) - time.monotonic()
    _wait_for(connection, min(left, OTHER_WAIT_SECONDS))


def _wait_in_request(connection: extensions.connection) -> None:
    if not _breaker.has_time():
        raise Unanswered("PostgreSQL took all the time that this request has")
    if not _breaker.admits():
        raise Unanswered("PostgreSQL did not answer a moment ago")
    seconds = TRY_WAIT_SECONDS if _breaker.is_tried() else REQUEST_WAIT_SECONDS
    try:
        with _breaker.waiting():
            _wait_for(connection, min(seconds, _breaker.left()))
    except Unanswered:
        # One that answers others lets this one wait for a row that somebody holds.
        if time.monotonic() - _answers.last > WELL_SECONDS:
            _breaker.waited_in_vain()
        raise
    except psycopg2.Error:
        # An answer, if not the wanted one.
        _answered()
        raise
    _answered()


def _answered() -> None:
    _answers.last = time.monotonic()
    _breaker.answered()


class Unanswered(psycopg2.OperationalError):
    """PostgreSQL did not answer in time."""


def _wait_for(connection: extensions.connection, seconds: float) -> None:
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
