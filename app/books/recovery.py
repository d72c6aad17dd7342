"""Starting a sale in Redis: the first time, after a reset, and after Redis lost everything."""

import functools
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NamedTuple

import psycopg2
from flask import Flask
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from .. import idempotency
from ..audit import Actor, record
from ..database import waiting_at_most
from ..extensions import db, stock
from ..feed import webhooks
from ..generation import Held, held, issued
from ..locks import DRAIN_LOCK, EVENTS_LOCK, REBUILD_LOCK, SALE_LOCK
from ..models import STANDING_STATUSES, Sale
from ..orders import bulk, cancelling, holds
from ..orders.drain import BATCH_ORDERS, Row, store
from ..problems import Conflict, Unavailable
from ..products import catalogue, movements, sale, terms
from ..stock.brakes import BrakeGateway
from ..stock.entries import FAILED, STANDING, Entry, key_record
from ..stock.place import place
from ..stock.shard import Shard
from ..stock.shards import Part, first_above
from ..words import counted
from . import ledger
from .totals import deal_anew

log = logging.getLogger(__name__)

SEED_PRODUCT = {
    "name": "Flash-sale item",
    "priceCents": 99_999,
    "currency": "USD",
    "stock": 100,
}
# How a lookup calls an order that was a dead letter and is given up.
_GIVEN_UP = "CANCELLED"
# How many ids a lost Redis may have issued since it was last sampled, a second ago or an hour:
# far more than any sale sells, and still nothing beside 2^53.
UNKNOWN_IDS = 1_000_000
ROWS_AT_ONCE = 10_000
# A claim waits for this, and may have waited for Redis.
RECORD_WAIT_SECONDS = 0.4
# What belongs to one sale, and ends with it.
SALE_TABLES = (
    "orders", "order_intents", "bulk_cancels", "dead_letters", "batches", "stock_movements",
    "product_totals", "product_names", "products", "sale", "events", "new_events", "sold_out",
    "webhook_deliveries", "webhook_attempts", "sale_shards",
)  # fmt: skip


def database_is_empty() -> bool:
    """Return whether nothing was ever sold or put on sale here."""
    return not db.session.execute(
        text("SELECT EXISTS (SELECT FROM products) OR EXISTS (SELECT FROM sale)")
    ).scalar()


def what_a_reset_deletes() -> tuple[int, int, int]:
    """Return how many products, stored orders and waiting orders. Raises stock.Unavailable."""
    products, stored = db.session.execute(
        text(
            "SELECT (SELECT count(*) FROM products),"
            " (SELECT coalesce(sum(stored_orders), 0) FROM product_totals)"
        )
    ).one()
    return products, int(stored), stock.waiting()


def reset(actor: Actor) -> int:
    """Delete every product, order and movement, here and in Redis; return the new product's id.

    Staff, tokens, endpoints of webhooks and the audit stay. Ids start from 1 again. Raises
    stock.Unavailable before anything is deleted when Redis can't be reached.
    """
    # Whoever holds a lock below may wait for a table that this transaction has read.
    db.session.rollback()
    # A drain under way finishes first, and so does a movement; the next ones find nothing.
    db.session.execute(text(f"SELECT pg_advisory_xact_lock({REBUILD_LOCK})"))
    db.session.execute(text(f"SELECT pg_advisory_xact_lock({DRAIN_LOCK})"))
    db.session.execute(text(f"SELECT pg_advisory_xact_lock({EVENTS_LOCK})"))
    db.session.execute(text(f"SELECT pg_advisory_xact_lock({SALE_LOCK})"))
    made_on = stock.each(Shard.server_id)
    former = _former_shards()
    generation = secrets.token_hex(8)
    webhooks.begin_anew(generation)
    _empty_tables()
    db.session.execute(text("UPDATE feed SET head = 0, floor = 0"))
    # What PostgreSQL refuses is refused by now, and what Redis refuses is rolled back.
    for shard in (*former, *stock.shards):
        shard.clear()
    idempotency.forget((catalogue.CREATE, cancelling.CANCEL, bulk.START, *holds.ROUTES))
    shards = len(stock.shards)
    first = first_above(0, shards)
    db.session.add(
        Sale(generation=generation, epoch=generation, shards=shards, first_order_id=first)
    )
    record(actor, "sale.reset", "sale", after=SEED_PRODUCT)
    db.session.commit()
    _open(generation, first, made_on)
    return int(catalogue.create(terms.read_new(SEED_PRODUCT), actor).product["id"])


def _empty_tables() -> None:
    db.session.execute(text(f"TRUNCATE {', '.join(SALE_TABLES)} RESTART IDENTITY"))


class ForeignSale(Conflict):
    """Redis holds a sale that is not this database's: somebody has to say that it may go."""

    def __init__(self) -> None:
        super().__init__(
            "Redis holds another sale than PostgreSQL; replacing it deletes that sale",
            "foreign_sale",
        )


@dataclass(frozen=True)
class Loss:
    """What was gone when a rebuild began, as far as it can be known."""

    # Redis held this sale, so nothing was lost.
    intact: bool
    # Where order ids go on; the highest known to have been issued; the highest that is stored.
    first_order_id: int
    last_known_order_id: int
    last_stored_order_id: int
    # When the counter of ids was last seen: what was issued after that is unknown.
    sampled_at: str | None
    # Orders answered 200, as far as their ids were seen, that are nowhere; and their most units.
    lost_orders_at_most: int
    lost_units_at_most: int
    # Waiting orders that were found in Redis and stored.
    rescued: int

    def __str__(self) -> str:
        rescued = f"Waiting orders that were found and stored: {self.rescued}."
        if self.intact:
            return f"Redis was intact, nothing was lost. {rescued}"
        lost = "none"
        if self.lost_orders_at_most:
            units = counted(self.lost_units_at_most, "unit")
            lost = f"at most {self.lost_orders_at_most:,}, with at most {units}"
        return (
            "Redis had lost the sale, and with it the orders that were not stored: up to number "
            f"{self.last_known_order_id} {lost}; and besides, an unknown number that were claimed "
            f"after {self.sampled_at or 'the start'}, when ids were seen last. {rescued}"
        )


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild made."""

    loss: Loss
    generation: str
    products: int
    free_units: int
    orders: int
    dead_letters: int
    idempotency_keys: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"On sale: {counted(self.products, 'product')} with "
            f"{counted(self.free_units, 'free unit')}, after "
            f"{counted(self.orders, 'stored order')} and "
            f"{counted(self.dead_letters, 'dead letter')}; "
            f"{counted(self.idempotency_keys, 'idempotency key')} known. It took "
            f"{self.seconds:.1f} s, and the next order is number {self.loss.first_order_id}. "
            f"{self.loss}"
        )


def _told(rebuild: Callable[[Actor, bool], Rebuilt]) -> Callable[..., Rebuilt]:
    """Let the audit tell when a rebuild began and how it ended, also if it ended badly."""

    @functools.wraps(rebuild)
    def told(actor: Actor, replace: bool = False) -> Rebuilt:
        db.session.rollback()
        record(actor, "sale.rebuild.start", "sale", after={"replace": replace})
        db.session.commit()
        try:
            report = rebuild(actor, replace)
        except Exception as error:
            with suppress(SQLAlchemyError):
                db.session.rollback()
                record(actor, "sale.rebuild.failed", "sale", after={"error": str(error)[:500]})
                db.session.commit()
            raise
        record(actor, "sale.rebuild.done", "sale", after={"result": str(report)})
        db.session.commit()
        return report

    return told


@_told
def rebuild(actor: Actor, replace: bool = False) -> Rebuilt:
    """Make the sale in Redis anew out of PostgreSQL; the audit tells its start and its result.

    Nothing is sold meanwhile. What still waits in Redis is stored first, so a rebuild at the wrong
    time costs seconds of selling and no order. Safe to repeat when it was interrupted.

    Raises Conflict while another rebuild is at work, ForeignSale unless `replace` says that the
    other sale may be deleted, and stock.Unavailable; Redis then stays closed until a rebuild ends.
    """
    started = time.monotonic()
    db.session.rollback()
    with _alone() as connection:
        # Without as many replicas as are asked for it would close the sale, and not open it again.
        made_on = stock.each(Shard.server_id)
        former = _former_shards() or stock.shards
        db.session.rollback()
        known = _read_sale(connection)
        held_by = [shard.view([]) for shard in former]
        holds = [held(view.generation, known.generation) for view in held_by]
        if Held.ANOTHER in holds and not replace:
            raise ForeignSale
        for shard, view in zip(former, held_by, strict=True):
            if view.generation:
                shard.close(view.generation)
        rescued = sum(_store_waiting(connection, shard) for shard in former)
        ends = [
            _end_of(connection, shard, found, last_id, known)
            for shard, *found, last_id in zip(former, holds, held_by, known.issued, strict=True)
        ]
        loss = _loss(connection, known, ends, rescued)
        generation = secrets.token_hex(8)
        _take_over(generation, loss, len(former), actor)
        products = _snapshot(connection)
        for shard in former:
            shard.clear_sale()
        terms = sale.all_terms()
        bits = _movement_bits(connection)
        for shard in stock.shards:
            shard.clear_sale()
            # With their terms: what is sold the moment it is open is sold by them.
            shard.put_accounts(products[shard.part.shard], terms)
            shard.put_movements(bits)
        stock.brakes.remake([BrakeGateway(shard) for shard in former])
        _put_bought(connection)
        keys = _put_keys(connection)
        _open(generation, loss.first_order_id, made_on)
    sale.publish_stale()
    movements.finish_pending()
    totals = movements.totals().values()
    report = Rebuilt(
        loss=loss,
        generation=generation,
        products=len(products[0]),
        free_units=stock.view([], stock.product_ids()).sums()["free"],
        orders=sum(total.stored_orders for total in totals),
        dead_letters=sum(total.dead_orders for total in totals),
        idempotency_keys=keys,
        seconds=time.monotonic() - started,
    )
    db.session.rollback()
    with suppress(Unavailable):
        # The pages would go on showing what was wrong before, for as long as a proof is believed.
        ledger.keep_proof()
    log.warning("the sale was rebuilt: %s", report)
    return report


@contextmanager
def _alone() -> Iterator[Connection]:
    """Yield a connection that holds off drains and other rebuilds for as long as it lives.

    The locks are the session's, since every batch that is rescued is a transaction of its own; they
    end with the connection, however this process dies.
    """
    pooled = db.engine.raw_connection()
    connection: Connection = pooled.dbapi_connection  # type: ignore[assignment]  # psycopg2's
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT pg_try_advisory_lock({REBUILD_LOCK})")
            if not _value(cursor):
                raise Conflict("A rebuild is at work already", "rebuild_running")
            cursor.execute(f"SELECT pg_advisory_lock({DRAIN_LOCK})")
        connection.commit()
        yield connection
    finally:
        # PostgreSQL takes a moment to notice a closed session; the next rebuild may come sooner.
        with suppress(psycopg2.Error), connection.cursor() as cursor:
            connection.rollback()
            cursor.execute("SELECT pg_advisory_unlock_all()")
        # Not back to the pool, where a session that failed to unlock would keep its locks.
        pooled.invalidate()


def _value(cursor: Cursor) -> Any:
    """Return the only value of the only row."""
    (row,) = cursor.fetchall()
    return row[0]


class Known(NamedTuple):
    """The sale as PostgreSQL knows it."""

    generation: str
    first_order_id: int
    # The last id that each shard has surely issued, and when the oldest of them was seen.
    issued: list[int]
    sampled_at: datetime | None


READ_SALE = """
    SELECT generation, first_order_id,
           CASE WHEN shards = 1 THEN sale.last_order_id ELSE s.last_order_id END,
           CASE WHEN shards = 1 THEN sale.sampled_at ELSE s.sampled_at END
    FROM sale, generate_series(0, shards - 1) AS number
    LEFT JOIN sale_shards s ON s.shard = number ORDER BY number
"""


def _read_sale(connection: Connection) -> Known:
    with connection.cursor() as cursor:
        cursor.execute(READ_SALE)
        rows = cursor.fetchall()
    if not rows:
        return Known("", 1, [0] * len(stock.shards), None)
    seen = [sampled for *_, sampled in rows if sampled]
    issued = [last or 0 for _, _, last, _ in rows]
    return Known(rows[0][0], rows[0][1], issued, min(seen, default=None))


def _former_shards() -> list[Shard]:
    """Return the shards of the sale on record where they are not this process's own."""
    shards = db.session.scalar(text("SELECT shards FROM sale")) or len(stock.shards)
    return [] if shards == len(stock.shards) else stock.dealt(shards)


def _open(generation: str, first_order_id: int, made_on: list[str]) -> None:
    for shard, server in zip(stock.shards, made_on, strict=True):
        shard.open(generation, first_order_id=first_order_id, made_on=server)


def _max_quantity(connection: Connection) -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT coalesce(max(max_quantity), 0) FROM products")
        return int(_value(cursor))


def _last_stored(connection: Connection, part: Part) -> int:
    """Return the highest id that is stored of a shard, or of what was before its sale."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT greatest("
            " (SELECT id FROM orders WHERE id %% %(of)s = %(shard)s ORDER BY id DESC LIMIT 1),"
            " (SELECT max(order_id) FROM dead_letters WHERE order_id %% %(of)s = %(shard)s),"
            " (SELECT max(last_order_id) FROM batches WHERE shard = %(shard)s), 0)",
            {"of": part.shards, "shard": part.shard},
        )
        return int(_value(cursor))


class End(NamedTuple):
    """How far a shard's order ids had come."""

    intact: bool
    last_known: int
    last_stored: int
    lost: int


def _end_of(
    connection: Connection, shard: Shard, found: list[Any], sampled: int, known: Known
) -> End:
    """Return it; `found` is what the shard holds, and its view from before it was closed."""
    holds, view = found
    # A counter below what was seen before means an old copy of this very sale.
    intact = holds is Held.THIS and view.last_order_id >= sampled
    issued = 0 if holds is Held.ANOTHER else view.last_order_id
    if intact:
        issued = shard.view([]).last_order_id
    part = shard.part
    last_stored = _last_stored(connection, part)
    last_known = max(issued, sampled, last_stored)
    before = part.first_id(known.first_order_id) - part.shards
    lost = 0 if intact else max(0, last_known - max(last_stored, before)) // part.shards
    return End(intact, last_known, last_stored, lost)


def _loss(connection: Connection, known: Known, ends: list[End], rescued: int) -> Loss:
    intact = all(end.intact for end in ends)
    last_known = max(end.last_known for end in ends)
    shards = len(stock.shards)
    unknown = 0 if intact else UNKNOWN_IDS * max(shards, len(ends))
    lost = sum(end.lost for end in ends)
    return Loss(
        intact=intact,
        first_order_id=first_above(last_known + unknown, shards),
        last_known_order_id=last_known,
        last_stored_order_id=max(end.last_stored for end in ends),
        sampled_at=known.sampled_at.isoformat(timespec="seconds") if known.sampled_at else None,
        lost_orders_at_most=lost,
        lost_units_at_most=lost * _max_quantity(connection),
        rescued=rescued,
    )


def _store_waiting(connection: Connection, shard: Shard) -> int:
    """Store what waits in the outbox; it stays there until the outbox itself is replaced."""
    stored = 0
    after = None
    while entries := shard.read_outbox(BATCH_ORDERS, after):
        rows = [Row(stream_id, fields) for stream_id, fields in entries]
        with connection.cursor() as cursor:
            _, drained = store(cursor, shard, rows, "rebuild", "")
        connection.commit()
        stored += drained.persisted + drained.dead_letters
        after = entries[-1][0].decode()
    return stored


def _take_over(generation: str, loss: Loss, former: int, actor: Actor) -> None:
    """Name the new sale in PostgreSQL; from now on movements of the old one are not marked applied.

    The lock waits for those that are being carried out, and Redis, closed, lets no new one begin.
    """
    db.session.execute(text(f"SELECT pg_advisory_xact_lock({SALE_LOCK})"))
    db.session.execute(
        text(
            "INSERT INTO sale (id, generation, epoch, shards, first_order_id, last_order_id,"
            " sampled_at) VALUES (1, :generation, :generation, :shards, :first, :first - 1, now())"
            " ON CONFLICT (id) DO UPDATE SET generation = excluded.generation,"
            " shards = excluded.shards, first_order_id = excluded.first_order_id,"
            " last_order_id = excluded.last_order_id, sampled_at = excluded.sampled_at"
        ),
        {
            "generation": generation,
            "shards": len(stock.shards),
            "first": loss.first_order_id,
        },
    )
    deal_anew(former, loss.first_order_id)
    told = asdict(loss) | {"generation": generation}
    if former > 1 or len(stock.shards) > 1:
        told |= {"former_shards": former, "shards": len(stock.shards)}
    record(actor, "sale.rebuild", "sale", after=told)
    db.session.commit()


def _snapshot(connection: Connection) -> list[dict[int, dict[str, int]]]:
    """Begin a snapshot on the connection; return the counters by shard and product to start with.

    Movements that are not marked as applied stay out: they are carried out afterwards, as ever.
    """
    connection.commit()
    found: list[dict[int, dict[str, int]]] = [{} for _ in stock.shards]
    with connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        cursor.execute(
            """
            SELECT t.shard, t.product_id,
              -- Of several shards only what is applied counts in them.
              t.moved_units - CASE WHEN %(shards)s > 1 THEN 0 ELSE
                coalesce((SELECT sum(units) FROM stock_movements m
                          WHERE m.product_id = t.product_id AND m.applied_at IS NULL), 0) END,
              t.stored_units + t.dead_units + t.abandoned_units,
              t.stored_orders,
              (SELECT held_units FROM product_sums s WHERE s.product_id = t.product_id),
              CASE WHEN %(shards)s > 1 THEN 0 ELSE coalesce(letters, 0) END
            FROM product_totals t
            LEFT JOIN (SELECT product_id, count(*) AS letters FROM dead_letters
                       WHERE resolution IS DISTINCT FROM 'replayed' GROUP BY 1) d
              USING (product_id)
            WHERE t.shard >= 0
            """,
            {"shards": len(stock.shards)},
        )
        for shard, product_id, moved, out, orders, held_units, letters in cursor:
            found[shard][product_id] = {
                "free": int(moved) - out,
                "moved": int(moved),
                "accepted": orders + letters,
                "claimed": out,
                "settled": orders + letters,
                "settled_units": out,
                "persisted": orders,
                "held": held_units,
            }
    return found


def _movement_bits(connection: Connection) -> bytes:
    """Return a bit for each movement, set where the counters contain it."""
    bits = bytearray()
    for rows in _pages(connection, "SELECT id FROM stock_movements WHERE applied_at IS NOT NULL"):
        for (movement_id,) in rows:
            position, bit = divmod(movement_id, 8)
            if position >= len(bits):
                bits.extend(bytes(position + 1 - len(bits)))
            bits[position] |= 128 >> bit
    return bytes(bits)


def _put_bought(connection: Connection) -> None:
    """Count what each user has bought, whether or not the product has a cap: it may get one.

    What was given back, and Redis is still to be told, counts until it is.
    """
    query = """
        SELECT product_id, user_id, user_name, sum(units)::bigint FROM (
          SELECT product_id, user_id, user_name, quantity - returned_units AS units FROM orders
          UNION ALL
          SELECT product_id, user_id, user_name, quantity FROM dead_letters
          WHERE product_id IS NOT NULL AND num_nonnulls(user_id, user_name) = 1
            AND resolution IS NULL
          UNION ALL
          SELECT product_id, user_id, user_name, units FROM stock_movements
          WHERE num_nonnulls(user_id, user_name) = 1 AND applied_at IS NULL AND kind = 'return'
          UNION ALL
          SELECT o.product_id, o.user_id, o.user_name, o.returned_units FROM stock_movements m
          JOIN orders o ON o.id = ANY(m.order_ids) WHERE m.applied_at IS NULL
        ) flows GROUP BY 1, 2, 3 HAVING sum(units) > 0
        -- Neighbours share a bucket: few commands.
        ORDER BY 1, 2
    """
    for rows in _pages(connection, query):
        buckets: list[dict[tuple[int, str], tuple[list[str], list[int]]]]
        buckets = [{} for _ in stock.shards]
        for product_id, number, name, units in rows:
            shard, bucket, field = place(name if number is None else number, len(buckets))
            fields, bought = buckets[shard].setdefault((product_id, bucket), ([], []))
            fields.append(field)
            bought.append(units)
        for one, of in zip(stock.shards, buckets, strict=True):
            one.put_bought((*where, *what) for where, what in of.items())


def _put_keys(connection: Connection) -> int:
    """Remember the Idempotency-Key of every order of the sale, and what has become of it."""
    count = 0
    letters = """
        SELECT payload, order_id, resolution FROM dead_letters
        WHERE order_id IS NOT NULL AND resolution IS DISTINCT FROM 'replayed' ORDER BY id
    """
    for rows in _pages(connection, letters):
        parsed = [(Entry.parse(payload), *of) for payload, *of in rows]
        count += stock.put_keys(
            (
                e.user,
                e.idempotency_key,
                key_record(order_id, e, _GIVEN_UP if given_up else FAILED),
            )
            for e, order_id, given_up in parsed
            if e.idempotency_key
        )
    # After the letters: where both have a key, the order is the one that exists.
    orders = """
        SELECT user_id, user_name, idempotency_key,
               concat_ws(' ', id, unit_price_cents, currency,
                         CASE WHEN status = ANY(%(statuses)s)
                              THEN concat(%(standing)s,
                                          (extract(epoch FROM first_end) * 1000)::bigint)
                              ELSE status END,
                         product_id, quantity, reference)
        FROM orders, coalesce(extended_from, held_until) AS first_end
        WHERE idempotency_key IS NOT NULL
    """
    values = {"standing": STANDING, "statuses": list(STANDING_STATUSES)}
    for rows in _pages(connection, orders, values):
        count += stock.put_keys(
            (name if number is None else number, key, record) for number, name, key, record in rows
        )
    return count


def _pages(
    connection: Connection, query: str, values: dict[str, Any] | None = None
) -> Iterator[list[tuple[Any, ...]]]:
    """Yield a query's rows some at a time: a server-side cursor, so that memory stays flat."""
    with connection.cursor(name=f"rebuild_{secrets.token_hex(4)}") as cursor:
        cursor.execute(query, values)
        while rows := cursor.fetchmany(ROWS_AT_ONCE):
            yield rows


def sale_on_record(app: Flask) -> tuple[str, list[int]] | None:
    """Return what a Redis that is fit for claims must hold; None when PostgreSQL can't tell.

    Asked for whenever claims connect to Redis, so that one which was exchanged is noticed before
    anything is sold from it. With PostgreSQL down, selling goes on unchecked.
    """
    try:
        with app.app_context(), waiting_at_most(RECORD_WAIT_SECONDS):
            return issued()
    except SQLAlchemyError as error:
        log.warning("Redis was not checked: %s", str(error).partition("\n")[0])
        return None


def close_when_stale() -> bool:
    """Close a Redis that has gone back in time (an old copy restored); tell whether it was one.

    Reads PostgreSQL first: what it knows was issued before Redis is asked.
    """
    generation, last_ids = issued()
    closed = False
    for shard, last_id in zip(stock.shards, last_ids, strict=False):
        with suppress(Unavailable):
            if last_id and shard.close(generation, issued=last_id):
                log.error(
                    "Redis has forgotten orders up to %s%s: run `flask rebuild`",
                    last_id,
                    f" of shard {shard.part.shard}" if len(stock.shards) > 1 else "",
                )
                closed = True
    return closed
