"""Following the feed: events after a cursor, in the order of their numbers.

A cursor is the id of an event, `<epoch>-<number>`: the epoch is the sale's, new with each reset of
it, so that nobody goes on by mistake in a feed that has begun anew.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import TextClause, text

from ..extensions import db
from ..orders.events import as_json
from ..problems import Conflict, CursorExpired, InvalidRequest
from ..times import utc_text

MOST_EVENTS = 1000
CURSOR = re.compile(r"([0-9a-zA-Z]{1,32})-([0-9]{1,18})").fullmatch

COLUMNS = """
    number, count, at, type, order_id, sequence, batch_id, first_order_id, last_order_id,
    body::text, movement_id
"""
# Numbers have no gaps: these rows, and the one of many orders that reaches beyond, are what is
# asked for.
SELECT_EVENTS = text(f"""
    (SELECT {COLUMNS} FROM events WHERE number > :after AND number <= :upto ORDER BY number)
    UNION ALL (SELECT {COLUMNS} FROM events WHERE number > :upto ORDER BY number LIMIT 1)
""")  # noqa: S608
SELECT_OF_ORDER = text(f"""
    SELECT {COLUMNS} FROM events WHERE order_id = :order AND movement_id IS NULL
    ORDER BY number LIMIT :most
""")  # noqa: S608
# The number of an order's first event: its batch has the last one's, and here is its place in it.
STORED_AT = text("""
    SELECT b.event_number - (SELECT count(*) FROM orders WHERE batch_id = b.id
                             AND id > o.id AND id <= b.last_order_id) AS number,
           b.id AS batch_id, b.persisted_at
    FROM orders o JOIN batches b ON b.id = o.batch_id
    WHERE o.id = :order AND b.event_number > :floor
""")
# That of the end of its hold, if that ended together with others.
ENDED_AT = text("""
    SELECT e.number - e.count + place AS number, m.id AS movement_id, place, e.at
    FROM orders o
    JOIN stock_movements m ON m.order_ids IS NOT NULL AND m.created_at >= o.held_until
      AND m.product_id = o.product_id AND m.order_ids @> ARRAY[o.id]
    JOIN events e ON e.order_id = m.order_ids[1] AND e.movement_id = m.id,
    array_position(m.order_ids, o.id) AS place
    WHERE o.id = :order
""")
# Parts of rows of many orders, in the parts' order: one statement, however small the rows.
PARTS = """
    unnest(CAST(:places AS int[]), CAST(:ids AS bigint[]), CAST(:firsts AS bigint[]),
           CAST(:lasts AS bigint[]), CAST(:skipped AS bigint[]), CAST(:most AS bigint[]))
      AS part (place, id, first, last, skipped, most)
"""
# Orders as the drain stored them, whatever has become of them.
STATUS = "CASE WHEN sold.held_until IS NULL THEN 'CONFIRMED' ELSE 'HELD' END"
AS_STORED = as_json(
    status=STATUS,
    returned_units="0",
    ended_at="NULL::timestamptz",
    end_reason="NULL::text",
    held_until="coalesce(sold.extended_from, sold.held_until)",
)
SELECT_STORED = text(f"""
    SELECT part.place, {STATUS} AS status, 0 AS sequence, {AS_STORED} AS told
    FROM {PARTS},
      LATERAL (SELECT * FROM orders
               WHERE id BETWEEN part.first AND part.last AND batch_id = part.id
               ORDER BY id OFFSET part.skipped LIMIT part.most) AS sold
    ORDER BY part.place, sold.id
""")  # noqa: S608
# Orders as the end of their hold left them. An order that is held can have been extended before,
# and nothing else.
AS_ENDED = as_json(
    status="'EXPIRED'",
    returned_units="sold.quantity",
    ended_at="m.created_at",
    end_reason="m.reason",
    held_until="sold.held_until",
)
SELECT_ENDED = text(f"""
    SELECT part.place, 'EXPIRED' AS status, 1 + (sold.extended_from IS NOT NULL)::int AS sequence,
           {AS_ENDED} AS told
    FROM {PARTS} JOIN stock_movements m ON m.id = part.id
    JOIN orders AS sold ON sold.id = ANY(m.order_ids[part.skipped + 1 : part.skipped + part.most])
    ORDER BY part.place, sold.id
""")  # noqa: S608
STORED = "order.stored"
TYPES = {"HELD": "order.held", "CONFIRMED": "order.confirmed", "EXPIRED": "order.expired"}
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
    stored = db.session.execute(STORED_AT, {"order": order_id, "floor": of.floor})
    parts = [
        _Part(SELECT_STORED, row.number, row.persisted_at, row.batch_id, 0, 1, order_id, order_id)
        for row in stored
    ]
    parts += (
        _Part(SELECT_ENDED, row.number, row.at, row.movement_id, row.place - 1, 1)
        for row in db.session.execute(ENDED_AT, {"order": order_id})
    )
    events = [event for told in _of_parts(parts, of) for event in told]
    rows = db.session.execute(SELECT_OF_ORDER, {"order": order_id, "most": limit})
    return sorted((*events, *(_of_step(row, of) for row in rows)), key=lambda event: event.number)


class _Part(NamedTuple):
    """Some orders of a row of many, each an event: the first one that is told has `number`.

    `select` finds them, by the id of a batch or a movement.
    """

    select: TextClause
    number: int
    at: datetime
    id: int
    skipped: int
    most: int
    first: int | None = None
    last: int | None = None


def _told(rows: Sequence[Any], of: Ends, after: int, limit: int) -> list[Event]:
    """Return the rows' events after a number, `limit` at most."""
    found: list[Event | _Part] = []
    left = limit
    for row in rows:
        if left <= 0:
            break
        if row.type != STORED and row.movement_id is None:
            found.append(_of_step(row, of))
            left -= 1
            continue
        before = row.number - row.count
        skipped = max(0, after - before)
        most = min(left, row.count - skipped)
        number = before + skipped + 1
        if row.type == STORED:
            ids = row.first_order_id, row.last_order_id
            part = _Part(SELECT_STORED, number, row.at, row.batch_id, skipped, most, *ids)
        else:
            part = _Part(SELECT_ENDED, number, row.at, row.movement_id, skipped, most)
        found.append(part)
        left -= most
    of_parts = iter(_of_parts([part for part in found if isinstance(part, _Part)], of))
    return [
        event for one in found for event in (next(of_parts) if isinstance(one, _Part) else (one,))
    ]


def _of_step(row: Any, of: Ends) -> Event:
    """Return the event of a row that is one by itself."""
    members = {"id": of.cursor(row.number), "type": row.type, "at": utc_text(row.at)}
    if row.sequence is not None:
        members["sequence"] = row.sequence
    # The body goes on as it was written: `{"id":…` and `"order":…}`.
    told = encode(members)[:-1] + b"," + row.body.encode()[1:]
    return Event(row.number, row.type, told)


def _of_parts(parts: Sequence[_Part], of: Ends) -> list[list[Event]]:
    """Return each part's events. Their JSON is PostgreSQL's: here it would take twice as long."""
    events: list[list[Event]] = [[] for _ in parts]
    for select in (SELECT_STORED, SELECT_ENDED):
        places = [place for place, part in enumerate(parts) if part.select is select]
        if not places:
            continue
        chosen = [parts[place] for place in places]
        given = {
            "places": places,
            "ids": [part.id for part in chosen],
            "firsts": [part.first for part in chosen],
            "lasts": [part.last for part in chosen],
            "skipped": [part.skipped for part in chosen],
            "most": [part.most for part in chosen],
        }
        for place, status, sequence, order in db.session.execute(select, given).all():
            part, told = parts[place], events[place]
            number, kind = part.number + len(told), TYPES[status]
            at = utc_text(part.at)
            json = (
                f'{{"id":"{of.epoch}-{number}","type":"{kind}","at":"{at}","sequence":{sequence},'
                f'"order":{order}}}'
            )
            told.append(Event(number, kind, json.encode()))
    return events
