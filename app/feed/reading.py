"""Following the feed: events after a cursor, in the order of their numbers.

A cursor is the id of an event, `<epoch>-<number>`: the epoch is the sale's, new with each reset of
it, so that nobody goes on by mistake in a feed that has begun anew.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import text

from ..extensions import db
from ..orders import search
from ..orders.search import described
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
# The orders of parts of batches, in the parts' order: one statement, however small the batches.
SELECT_STORED = text(f"""
    SELECT part.place - 1 AS part, {", ".join(f"stored.{column.key}" for column in search.COLUMNS)}
    FROM unnest(CAST(:batches AS bigint[]), CAST(:firsts AS bigint[]), CAST(:lasts AS bigint[]),
                CAST(:skipped AS bigint[]), CAST(:most AS bigint[]))
         WITH ORDINALITY AS part (batch, first, last, skipped, most, place),
      LATERAL (SELECT * FROM orders
               WHERE id BETWEEN part.first AND part.last AND batch_id = part.batch
               ORDER BY id OFFSET part.skipped LIMIT part.most) AS stored
    ORDER BY part.place, stored.id
""")  # noqa: S608
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
        rows = db.session.execute(SELECT_EVENTS, {"after": after, "upto": after + limit}).all()
        events = _told(rows, of, after, limit)
        if (now := ends()).epoch != of.epoch or now.floor > after:
            raise CursorExpired("The events after this cursor are no longer kept")
    return Page(events, events[-1].number if events else after, of)


def of_order(order_id: int, limit: int = 100) -> list[Event]:
    """Return what happened to one order, the oldest first, as far as it is kept."""
    of = ends()
    stored = db.session.execute(STORED_AT, {"order": order_id, "floor": of.floor}).one_or_none()
    events = []
    if stored:
        part = _Part(stored.batch_id, order_id, order_id, 0, 1, stored.number, stored.persisted_at)
        (events,) = _of_batches([part], of)
    rows = db.session.execute(SELECT_OF_ORDER, {"order": order_id, "most": limit})
    return events + [_of_step(row, of) for row in rows]


class _Part(NamedTuple):
    """Some of a batch's orders, of which each is an event: the first one has the number `begin`."""

    batch: int
    first: int
    last: int
    skipped: int
    most: int
    begin: int
    at: datetime


def _told(rows: Sequence[Any], of: Ends, after: int, limit: int) -> list[Event]:
    """Return the rows' events after a number, `limit` at most: of each one, or a batch's."""
    parts: list[_Part] = []
    found: list[Event | None] = []  # None where a batch's stand
    left = limit
    for row in rows:
        if left <= 0:
            break
        if row.type != STORED:
            found.append(_of_step(row, of))
            left -= 1
            continue
        before = row.number - row.count
        skipped = max(0, after - before)
        most = min(left, row.count - skipped)
        orders = row.batch_id, row.first_order_id, row.last_order_id
        parts.append(_Part(*orders, skipped, most, before + skipped + 1, row.at))
        found.append(None)
        left -= most
    of_batches = iter(_of_batches(parts, of))
    return [event for one in found for event in (next(of_batches) if one is None else (one,))]


def _of_step(row: Any, of: Ends) -> Event:
    """Return the event of a row that is one by itself."""
    members = {"id": of.cursor(row.number), "type": row.type, "at": utc_text(row.at)}
    if row.sequence is not None:
        members["sequence"] = row.sequence
    # The body goes on as it was written: `{"id":…` and `"order":…}`.
    told = encode(members)[:-1] + b"," + row.body.encode()[1:]
    return Event(row.number, row.type, told)


def _of_batches(parts: Sequence[_Part], of: Ends) -> list[list[Event]]:
    """Return each part's events: its orders as they were stored, whatever has become of them."""
    if not parts:
        return []
    names = ("batches", "firsts", "lasts", "skipped", "most")
    columns = zip(*(part[: len(names)] for part in parts), strict=True)
    given = {name: list(values) for name, values in zip(names, columns, strict=True)}
    rows = db.session.execute(SELECT_STORED, given).all()
    orders = [as_stored(search.from_row(row[1:])) for row in rows]
    events: list[list[Event]] = [[] for _ in parts]
    for row, order in zip(rows, described(orders), strict=True):
        part, told = parts[row[0]], events[row[0]]
        told.append(_of_stored(part.begin + len(told), part.at, order, of))
    return events


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


def _of_stored(number: int, at: datetime, order: dict[str, Any], of: Ends) -> Event:
    kind = "order.held" if order["status"] == "HELD" else "order.confirmed"
    members = {
        "id": of.cursor(number),
        "type": kind,
        "at": utc_text(at),
        "sequence": 0,
        "order": order,
    }
    return Event(number, kind, encode(members))
