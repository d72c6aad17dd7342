"""Following the feed: events after a cursor, in the order of their numbers.

A cursor is the id of an event, `<epoch>-<number>`: the epoch is the sale's, new with each reset of
it, so that nobody goes on by mistake in a feed that has begun anew.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import select, text

from ..extensions import db
from ..models import Order
from ..orders import search
from ..orders.search import describe
from ..problems import Conflict, CursorExpired, InvalidRequest
from ..times import utc_text

MOST_EVENTS = 1000
CURSOR = re.compile(r"([0-9a-zA-Z]{1,32})-([0-9]{1,18})").fullmatch

COLUMNS = """
    number, count, at, type, order_id, sequence, batch_id, first_order_id, last_order_id, body::text
"""
# Numbers have no gaps: these rows, and the batch that reaches beyond, are what is asked for.
SELECT_EVENTS = text(f"""
    (SELECT {COLUMNS} FROM events WHERE number > :after AND number <= :upto ORDER BY number)
    UNION ALL (SELECT {COLUMNS} FROM events WHERE number > :upto ORDER BY number LIMIT 1)
""")  # noqa: S608
SELECT_OF_ORDER = text(f"""
    SELECT {COLUMNS} FROM events WHERE order_id = :order ORDER BY number LIMIT :most
""")  # noqa: S608
# The number of an order's first event: its batch has the last one's, and here is its place in it.
STORED_AT = text("""
    SELECT b.event_number - (SELECT count(*) FROM orders WHERE batch_id = b.id
                             AND id > o.id AND id <= b.last_order_id) AS number,
           b.id AS batch_id, b.persisted_at
    FROM orders o JOIN batches b ON b.id = o.batch_id
    WHERE o.id = :order AND b.event_number > :floor
""")
STORED = "order.stored"
encode = msgspec.json.encode


class Event(NamedTuple):
    """An event, and its JSON as everybody is told it."""

    number: int
    type: str
    json: bytes


class Ends(NamedTuple):
    """The sale's epoch, the number of the last event, and that of the last one that was dropped."""

    epoch: str
    head: int
    floor: int

    def cursor(self, number: int) -> str:
        return f"{self.epoch}-{number}"


class Page(NamedTuple):
    """Events, and the number after which the next page begins."""

    events: list[Event]
    next: int
    ends: Ends


def ends() -> Ends:
    """Return where the feed begins and ends. Raises Conflict before there is a sale."""
    found = db.session.execute(
        text("SELECT coalesce(epoch, generation), head, floor FROM sale, feed")
    ).one_or_none()
    if found is None:
        raise Conflict("There is no sale yet", "no_sale")
    return Ends(*found)


def number_of(cursor: str | None, of: Ends) -> int:
    """Return the number after which a cursor goes on; without one, that of the oldest event.

    Raises InvalidRequest for what is no cursor, Conflict for one of another sale or one that is
    ahead of the feed (PostgreSQL was restored from a copy), CursorExpired for one that is too old.
    """
    if cursor is None:
        return of.floor
    match = CURSOR(cursor)
    if not match:
        raise InvalidRequest("after must be the id of an event, or what next was", "after")
    epoch, number = match[1], int(match[2])
    if epoch != of.epoch:
        raise Conflict("The cursor is from another sale, before a reset", "other_sale")
    if number > of.head:
        raise Conflict("The cursor is ahead of the feed, which has lost events", "cursor_ahead")
    if number < of.floor:
        raise CursorExpired("The events after this cursor are no longer kept")
    return number


def read(after: int, limit: int, of: Ends) -> Page:
    """Return up to `limit` events after a number that `number_of` gave. Raises CursorExpired."""
    events: list[Event] = []
    if after < of.head:
        for row in db.session.execute(SELECT_EVENTS, {"after": after, "upto": after + limit}):
            if len(events) < limit:
                events += _told(row, of, after, limit - len(events))
        if (now := ends()).epoch != of.epoch or now.floor > after:
            raise CursorExpired("The events after this cursor are no longer kept")
    return Page(events, events[-1].number if events else after, of)


def of_order(order_id: int, limit: int = 100) -> list[Event]:
    """Return what happened to one order, the oldest first, as far as it is kept."""
    of = ends()
    stored = db.session.execute(STORED_AT, {"order": order_id, "floor": of.floor}).one_or_none()
    events = []
    if stored:
        (order,) = _stored_orders(stored.batch_id, order_id, order_id)
        events.append(_of_stored(stored.number, stored.persisted_at, order, of))
    rows = db.session.execute(SELECT_OF_ORDER, {"order": order_id, "most": limit})
    return events + [event for row in rows for event in _told(row, of, 0, 1)]


def _told(row: Any, of: Ends, after: int, most: int) -> list[Event]:
    """Return a row's events after a number: one, or those of a batch."""
    if row.type != STORED:
        members = {"id": of.cursor(row.number), "type": row.type, "at": utc_text(row.at)}
        if row.sequence is not None:
            members["sequence"] = row.sequence
        # The body goes on as it was written: `{"id":…` and `"order":…}`.
        told = encode(members)[:-1] + b"," + row.body.encode()[1:]
        return [Event(row.number, row.type, told)]
    before = row.number - row.count
    skipped = max(0, after - before)
    orders = _stored_orders(row.batch_id, row.first_order_id, row.last_order_id, skipped, most)
    return [
        _of_stored(number, row.at, order, of)
        for number, order in enumerate(orders, before + skipped + 1)
    ]


def _stored_orders(
    batch_id: int, first: int, last: int, skipped: int = 0, most: int | None = None
) -> Iterator[search.Found]:
    """Yield a batch's orders as they were stored, whatever has become of them since."""
    rows = db.session.execute(
        select(*search.COLUMNS)
        .where(Order.id.between(first, last), Order.batch_id == batch_id)
        .order_by(Order.id)
        .offset(skipped)
        .limit(most)
    )
    for row in rows:
        yield as_stored(search.from_row(row))


def as_stored(found: search.Found) -> search.Found:
    """Return an order as the drain stored it: nothing given back, and not paid for where held."""
    status = "HELD" if found.held_until else "CONFIRMED"
    if found.status == status and not found.returned_units:
        return found
    return replace(
        found,
        status=status,
        returned_units=0,
        cancelled_at=None,
        cancelled_by=None,
        cancel_reason=None,
        payment=None if found.held_until else found.payment,
    )


def _of_stored(number: int, at: Any, order: search.Found, of: Ends) -> Event:
    kind = "order.held" if order.status == "HELD" else "order.confirmed"
    members = {
        "id": of.cursor(number),
        "type": kind,
        "at": utc_text(at),
        "sequence": 0,
        "order": describe(order),
    }
    return Event(number, kind, encode(members))
