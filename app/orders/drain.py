"""The drain: from the outbox into PostgreSQL, a batch at a time, each order exactly once.

Read, INSERT … ON CONFLICT DO NOTHING, COMMIT, and only then trim. Killed at any point it leaves
either nothing stored, or orders stored that are still in the outbox and are recognised next time.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

import psycopg2
from psycopg2 import errors
from psycopg2.extensions import cursor as Cursor

from ..database import raw_connection
from ..extensions import db, stock
from ..locks import DRAIN_LOCK, SHARD_DRAIN_LOCKS
from ..problems import Unavailable
from ..stock.entries import Columns, Entry, split
from ..stock.shard import Shard
from ..words import counted
from . import events

log = logging.getLogger(__name__)

# Large enough that RQ's own cost per job (7 ms) hardly counts, small enough that a batch is stored
# and trimmed in well under 100 ms, so that claims never wait for it.
BATCH_ORDERS = 2000
# The lock ends with the transaction, and PostgreSQL ends a transaction whose
# worker hangs, so that the next worker can go on.
BEGIN = f"""
    SET LOCAL idle_in_transaction_session_timeout = '2s';
    SET LOCAL statement_timeout = '10s';
    SELECT pg_try_advisory_xact_lock_shared({DRAIN_LOCK})
           AND pg_try_advisory_xact_lock({SHARD_DRAIN_LOCKS}, %s), (SELECT generation FROM sale)
"""  # noqa: S608
INSERT_BATCH = """
    INSERT INTO batches (job_id, worker, shard, first_order_id, last_order_id, orders, dead_letters)
    VALUES (%s, %s, %s, %s, %s, %s, 0) RETURNING id
"""
INSERT_ORDERS = """
    INSERT INTO orders (id, user_id, user_name, product_id, quantity, unit_price_cents, currency,
                        claimed_at, idempotency_key, reference, held_until, status, batch_id)
    SELECT id, user_id, user_name, product_id, quantity, cents, currency,
           'epoch'::timestamptz + claimed_ms * interval '1 ms', key, reference,
           'epoch'::timestamptz + held_ms * interval '1 ms',
           CASE WHEN held_ms IS NULL THEN 'CONFIRMED' ELSE 'HELD' END, %s
    FROM unnest(%s::bigint[], %s::bigint[], %s::text[], %s::bigint[], %s::int[], %s::bigint[],
                %s::text[], %s::bigint[], %s::text[], %s::text[], %s::bigint[])
         AS entry (id, user_id, user_name, product_id, quantity, cents, currency, claimed_ms, key,
                   reference, held_ms)
    -- A dead letter read again (the trim failed) stays one: somebody may have abandoned it since.
    WHERE NOT EXISTS (SELECT FROM dead_letters WHERE stream_id = entry.id || '-0')
    ON CONFLICT DO NOTHING
"""
SELECT_STORED = """
    SELECT id, user_id, user_name, product_id, quantity,
           (extract(epoch FROM claimed_at) * 1000)::bigint, idempotency_key, reference
    FROM orders WHERE id = ANY(%s)
"""
INSERT_DEAD_LETTER = """
    INSERT INTO dead_letters (stream_id, payload, error, order_id, user_id, user_name, product_id,
                              quantity, reference)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING
"""
UPDATE_BATCH = "UPDATE batches SET orders = %s, dead_letters = %s WHERE id = %s"


@dataclass(frozen=True)
class Drained:
    """What one run did. `more` says that a full batch was read, so that more is likely waiting."""

    persisted: int = 0
    duplicates: int = 0
    dead_letters: int = 0
    more: bool = False
    busy: bool = False

    def __add__(self, other: "Drained") -> "Drained":
        """Return what both did; busy where neither could do anything."""
        return Drained(
            self.persisted + other.persisted,
            self.duplicates + other.duplicates,
            self.dead_letters + other.dead_letters,
            self.more or other.more,
            self.busy and other.busy,
        )

    def __str__(self) -> str:
        if self.busy:
            return "another drain is at work"
        text = f"persisted {counted(self.persisted, 'order')}"
        if self.duplicates:
            text += f", {self.duplicates} were stored already"
        if self.dead_letters:
            text += f", {self.dead_letters} to the dead letters"
        return text


class Row:
    """An entry of the outbox on its way into a table, as text: PostgreSQL reads the numbers."""

    __slots__ = ("order_id", "parts", "payload", "stream_id")

    def __init__(self, stream_id: bytes, fields: dict[bytes, bytes]) -> None:
        self.stream_id = stream_id.decode()
        self.order_id = int(self.stream_id.partition("-")[0])
        order = fields.get(b"order")
        self.payload = repr(fields) if order is None else order.decode("utf-8", "replace")
        # Nothing, if it is no order.
        self.parts: Columns | None = split(self.payload)


def drain_batch(job_id: str, worker: str, most: int = BATCH_ORDERS) -> Drained:
    """Store the oldest waiting orders, `most` of each shard, and take them out of the outbox.

    Raises stock.Unavailable and psycopg2.Error when a server fails; then nothing is lost. A shard
    that fails keeps no other from being drained.
    """
    done, failed = Drained(busy=True), None
    for shard in stock.shards:
        try:
            done += drain_shard(shard, job_id, worker, most)
        except Unavailable as error:
            failed = error
    if failed and not done.persisted:
        raise failed
    return done


def drain_shard(shard: Shard, job_id: str, worker: str, most: int) -> Drained:
    """Store a shard's oldest waiting orders, in one transaction."""
    with raw_connection(db.engine) as connection:
        with connection.cursor() as cursor:
            cursor.execute(BEGIN, (shard.part.shard,))
            ((locked, generation),) = cursor.fetchall()
            if not locked:
                return Drained(busy=True)
            if shard.generation() != generation:
                # Another sale's orders, or a rebuild at work, which stores what waits by itself.
                return Drained()
            entries = shard.read_outbox(most)
            if not entries:
                return Drained()
            rows = [Row(stream_id, fields) for stream_id, fields in entries]
            dead, drained = store(cursor, shard, rows, job_id, worker)
        connection.commit()
    _settle(shard, generation, rows, dead)
    return replace(drained, more=len(rows) == most)


def store(
    cursor: Cursor, shard: Shard, rows: list[Row], job_id: str, worker: str
) -> tuple[set[str], Drained]:
    """Store a batch in the current transaction; return the stream ids of its dead letters too."""
    first, last = rows[0].order_id, rows[-1].order_id
    cursor.execute(INSERT_BATCH, (job_id, worker, shard.part.shard, first, last, len(rows)))
    ((batch_id,),) = cursor.fetchall()
    dead, inserted = _insert_all(cursor, batch_id, rows)
    if inserted != len(rows):
        cursor.execute(UPDATE_BATCH, (inserted, len(dead), batch_id))
    return dead, Drained(inserted, len(rows) - inserted - len(dead), len(dead))


def _insert_all(cursor: Cursor, batch_id: int, rows: list[Row]) -> tuple[set[str], int]:
    """Insert the rows; return the stream ids of the dead letters and the number inserted."""
    orders = [row for row in rows if row.parts]
    dead = {row.stream_id: "not an order" for row in rows if not row.parts}
    refused: dict[str, str] = {}
    inserted = _insert(cursor, batch_id, orders, refused)
    if inserted != len(orders):
        dead |= _tell_conflicts(cursor, orders, refused)
    for row in rows:
        if row.stream_id in dead:
            log.error("order %s is a dead letter: %s", row.stream_id, dead[row.stream_id])
            parts = row.parts
            cursor.execute(
                INSERT_DEAD_LETTER,
                (
                    row.stream_id,
                    row.payload.replace("\0", "\\0"),
                    dead[row.stream_id],
                    row.order_id if row.parts else None,
                    parts and parts.user_id,
                    parts and parts.user_name,
                    parts and parts.product_id,
                    parts and parts.quantity,
                    parts and parts.reference,
                ),
            )
    events.failed(cursor, dead)
    return set(dead), inserted


def _insert(cursor: Cursor, batch_id: int, rows: list[Row], refused: dict[str, str]) -> int:
    """Insert what can be; halve a refused batch until the rows at fault stand alone."""
    if not rows:
        return 0
    cursor.execute("SAVEPOINT batch")
    try:
        ids = _array(str(row.order_id) for row in rows)
        entries = zip(*(row.parts for row in rows if row.parts), strict=True)
        columns = dict(zip(Columns._fields, entries, strict=True))
        cursor.execute(
            INSERT_ORDERS,
            (
                batch_id,
                ids,
                _array(columns["user_id"]),
                list(columns["user_name"]),
                _array(columns["product_id"]),
                _array(columns["quantity"]),
                _array(columns["unit_price_cents"]),
                list(columns["currency"]),
                _array(columns["claimed_ms"]),
                list(columns["idempotency_key"]),
                list(columns["reference"]),
                _array(columns["held_until_ms"]),
            ),
        )
    except (psycopg2.IntegrityError, psycopg2.DataError, errors.RaiseException) as error:
        cursor.execute("ROLLBACK TO SAVEPOINT batch")
        if len(rows) == 1:
            refused[rows[0].stream_id] = str(error).strip().partition("\n")[0]
            return 0
        middle = len(rows) // 2
        return _insert(cursor, batch_id, rows[:middle], refused) + _insert(
            cursor, batch_id, rows[middle:], refused
        )
    return cursor.rowcount


def _array(numbers: Iterable[str | None]) -> str:
    """Return a PostgreSQL array literal; a value that is no number makes the statement fail."""
    return "{" + ",".join([number or "NULL" for number in numbers]) + "}"


def _tell_conflicts(cursor: Cursor, rows: list[Row], refused: dict[str, str]) -> dict[str, str]:
    """Return what is wrong with the rows that are not stored, neither now nor by an earlier run.

    An order that is stored is none of them, even when PostgreSQL would refuse it today.
    """
    dead = {}
    cursor.execute(SELECT_STORED, ([row.order_id for row in rows],))
    stored = {found[0]: found[1:] for found in cursor.fetchall()}
    for row in rows:
        of = cast("Columns", row.parts)  # what is no order was told already
        found = stored.get(row.order_id)
        if found is None:
            dead[row.stream_id] = refused.get(
                row.stream_id, "the user has another order under this Idempotency-Key"
            )
        elif found != (
            of.user_id and int(of.user_id),
            of.user_name,
            int(of.product_id),
            int(of.quantity),
            int(of.claimed_ms),
            of.idempotency_key,
            of.reference,
        ):
            dead[row.stream_id] = f"order id {row.order_id} belongs to another order"
    return dead


def _settle(shard: Shard, generation: str | None, rows: list[Row], dead: set[str]) -> None:
    figures: dict[int, tuple[int, int, int]] = {}
    for row in rows:
        if row.parts:
            product, quantity = int(row.parts.product_id), int(row.parts.quantity)
            orders, units, persisted = figures.get(product, (0, 0, 0))
            stored = row.stream_id not in dead
            figures[product] = orders + 1, units + quantity, persisted + stored
    shard.settle(
        generation,
        [row.stream_id for row in rows],
        [row.order_id for row in rows],
        figures,
        [
            (row.order_id, Entry.parse(row.payload))
            for row in rows
            if row.parts and row.stream_id in dead
        ],
    )
