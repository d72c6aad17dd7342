"""Numbers for events: one writer at a time numbers what is committed, and nothing is jumped over.

A reader that has seen a number has seen, or can still see, every lower one: numbers are given
after the commits, in one transaction after the other. A batch takes as many as it has orders.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

from psycopg2 import errors, sql

from ..database import raw_connection
from ..extensions import db, stock
from ..locks import EVENTS_LOCK

log = logging.getLogger(__name__)

# Events by themselves, and batches, that one transaction numbers: some 100 ms of work.
EVENTS_AT_ONCE = 5000
BATCHES_AT_ONCE = 1000
KEPT_DAYS = 30
# A partition is there before its day begins, whatever the hour.
DAYS_AHEAD = 2
KEEP_HOUSE_SECONDS = 60.0

MAKE = """
SET LOCAL lock_timeout = '1s'; SELECT pg_advisory_xact_lock({lock});
CREATE TABLE IF NOT EXISTS {name} (LIKE events INCLUDING DEFAULTS);
ALTER TABLE events ATTACH PARTITION {name} FOR VALUES FROM ({day}) TO ({next})
"""
DROP = """
SET LOCAL lock_timeout = '1s'; SELECT pg_advisory_xact_lock({lock});
UPDATE feed SET floor = greatest(floor, (SELECT max(number) FROM {name}));
DROP TABLE {name}
"""

IS_ANY = """
    SELECT EXISTS (SELECT FROM new_events ORDER BY id LIMIT 1)
        OR EXISTS (SELECT FROM batches WHERE event_number IS NULL)
"""
BEGIN = f"""
    SET LOCAL idle_in_transaction_session_timeout = '5s';
    SET LOCAL statement_timeout = '20s';
    SELECT pg_try_advisory_xact_lock({EVENTS_LOCK})
"""
# Read before the batches: an event that is seen here came after its order was stored, so the
# batches that the next statement sees have it.
SEEN = "SELECT array_agg(id) FROM (SELECT id FROM new_events ORDER BY id LIMIT %s) AS seen"
NUMBER_BATCHES = """
    WITH seen AS (
      SELECT id, sum(orders) OVER (ORDER BY id) AS upto FROM batches
      WHERE event_number IS NULL ORDER BY id LIMIT %(most)s
    ), numbered AS (
      UPDATE batches SET event_number = %(head)s + upto FROM seen WHERE batches.id = seen.id
      RETURNING batches.*
    ), told AS (
      INSERT INTO events (number, day, count, at, type, batch_id, first_order_id, last_order_id)
      SELECT event_number, %(day)s, orders, persisted_at, 'order.stored', id, first_order_id,
             last_order_id
      FROM numbered WHERE orders > 0
    )
    SELECT count(*), coalesce(sum(orders), 0)::bigint FROM numbered
"""
NUMBER_EVENTS = """
    WITH seen AS (DELETE FROM new_events WHERE id = ANY(%(ids)s) RETURNING *), told AS (
      INSERT INTO events (number, day, count, at, type, order_id, sequence, body, movement_id)
      SELECT %(head)s + sum(count) OVER (ORDER BY id), %(day)s, count, at, type, order_id, sequence,
             body, movement_id
      FROM seen RETURNING count
    )
    SELECT sum(count) FROM told
"""
PARTITIONS = """
    SELECT child.relname FROM pg_inherits
    JOIN pg_class AS child ON child.oid = inhrelid WHERE inhparent = 'events'::regclass
"""


class Numbered(NamedTuple):
    """What one run did: where the feed now ends, and whether more may be waiting."""

    epoch: str
    head: int
    given: int = 0
    more: bool = False


def number_events() -> Numbered | None:
    """Number what is committed and has no number; None where another does so, or there is no sale.

    Raises psycopg2.Error; nothing is numbered then, and the next run does the same again.
    """
    with _cursor() as (connection, cursor):
        cursor.execute(IS_ANY)
        is_any = _value(cursor)
        if is_any:
            cursor.execute(BEGIN)
            if not _value(cursor):
                return None
        cursor.execute("SELECT coalesce(epoch, generation), head, now() FROM sale, feed")
        found = cursor.fetchone()
        if found is None:
            return None
        epoch, head, now = found
        if not is_any:
            return Numbered(epoch, head)
        given, more = _number(cursor, head, now.astimezone(UTC).date())
        cursor.execute("UPDATE feed SET head = %s", (head + given,))
        connection.commit()
        return Numbered(epoch, head + given, given, more)


def _number(cursor: Any, head: int, day: date) -> tuple[int, bool]:
    """Give numbers from `head` on; return how many, and whether more may be waiting."""
    cursor.execute(SEEN, (EVENTS_AT_ONCE,))
    ids = _value(cursor) or []
    values = {"head": head, "day": day, "most": BATCHES_AT_ONCE, "ids": ids}
    cursor.execute(NUMBER_BATCHES, values)
    batches, orders = cursor.fetchone()
    if batches == BATCHES_AT_ONCE:
        # An event's batch may be among those that are left.
        return orders, True
    events = 0
    if ids:
        cursor.execute(NUMBER_EVENTS, values | {"head": head + orders})
        events = _value(cursor)
    return orders + events, len(ids) == EVENTS_AT_ONCE


def keep_partitions() -> list[date]:
    """Make the partitions of the next days, and drop the days that are past their time.

    Returns the days that were dropped. No reader waits for it longer than a second; a table that
    is in use then is left for the next time. Raises psycopg2.Error.
    """
    with _cursor() as (connection, cursor):
        cursor.execute("SELECT now()")
        today = _value(cursor).astimezone(UTC).date()
        cursor.execute(PARTITIONS)
        days = {_day_of(name) for (name,) in cursor.fetchall()}
        connection.commit()
        for ahead in range(DAYS_AHEAD + 1):
            if (day := today + timedelta(ahead)) not in days:
                _make(connection, cursor, day)
        old = sorted(day for day in days if day < today - timedelta(KEPT_DAYS))
        for day in old:
            _drop(connection, cursor, day)
    return old


def _of_day(statements: str, day: date) -> sql.Composed:
    return sql.SQL(statements).format(
        lock=sql.Literal(EVENTS_LOCK),
        name=sql.Identifier(f"events_{day:%Y%m%d}"),
        day=sql.Literal(str(day)),
        next=sql.Literal(str(day + timedelta(1))),
    )


def _make(connection: Any, cursor: Any, day: date) -> None:
    """Attach an empty table as a day's partition, which nobody has to wait for."""
    try:
        cursor.execute(_of_day(MAKE, day))
        connection.commit()
    except (errors.WrongObjectType, errors.InvalidObjectDefinition):
        # Attached already, by another worker.
        connection.rollback()


def _drop(connection: Any, cursor: Any, day: date) -> None:
    cursor.execute(_of_day(DROP, day))
    connection.commit()
    log.info("the events of %s are dropped: they were kept for %d days", day, KEPT_DAYS)


def _day_of(partition: str) -> date:
    return datetime.strptime(partition, "events_%Y%m%d").replace(tzinfo=UTC).date()


@contextmanager
def _cursor() -> Iterator[tuple[Any, Any]]:
    """Lend a connection of psycopg2's, and a cursor; what is not committed is rolled back."""
    with raw_connection(db.engine) as connection:
        yield connection, connection.cursor()


def _value(cursor: Any) -> Any:
    """Return the only value of the only row."""
    return cursor.fetchone()[0]


class Numberer:
    """A worker's step: numbers events, tells where the feed ends, and keeps its partitions."""

    def __init__(self) -> None:
        self._kept_house_at = float("-inf")
        self._told: tuple[Numbered | None, float] = None, float("-inf")

    def run_once(self) -> bool:
        """Do so once; tell whether more may be waiting.

        Raises psycopg2.Error and stock.Unavailable.
        """
        if time.monotonic() - self._kept_house_at > KEEP_HOUSE_SECONDS:
            try:
                keep_partitions()
            except errors.LockNotAvailable as error:
                log.info("the feed's partitions are in use: %s", str(error).partition("\n")[0])
            self._kept_house_at = time.monotonic()
        try:
            numbered = number_events()
        except errors.CheckViolation:
            # A day without a partition: PostgreSQL's clock was set, or nobody was here for days.
            self._kept_house_at = float("-inf")
            raise
        if numbered is None:
            return False
        told, at = self._told
        # Told again now and then: Redis may have been exchanged.
        if numbered.given or told is None or time.monotonic() - at > 1.0:
            stock.board.tell_head(numbered.epoch, numbered.head)
            self._told = numbered, time.monotonic()
        return numbered.more
