"""An order's steps, told to the feed in the transaction in which they are made."""

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
from psycopg2.extensions import cursor as Cursor
from sqlalchemy import select

from ..events import Happened, add
from ..extensions import db
from ..models import DeadLetter, Order
from ..stock.entries import Entry
from . import search
from .search import describe


def described(order: Order) -> dict[str, Any]:
    """Return a stored order in the API's form."""
    return describe(search.from_row([getattr(order, column.key) for column in search.COLUMNS]))


def body(order: dict[str, Any]) -> str:
    """Return what an event says of an order, which is in the API's form."""
    return msgspec.json.encode({"order": order}).decode()


def record(kind: str, orders: Sequence[Order], **more: Any) -> None:
    """Tell of a step of these stored orders; `more` stands beside the order in the event.

    Call it after the orders' rows were locked and changed, before the commit.
    """
    record_ids(kind, [order.id for order in orders], **more)


def record_ids(kind: str, ids: Sequence[int], **more: Any) -> None:
    """Do as `record`, for orders by their ids."""
    db.session.flush()
    rows = db.session.execute(
        select(*search.COLUMNS, Order.acts).where(Order.id.in_(ids)).order_by(Order.id)
    )
    add(
        Happened(kind, {"order": describe(search.from_row(found))} | more, found[0], acts)
        for *found, acts in rows
    )


def record_letter(kind: str, letter: DeadLetter, **more: Any) -> None:
    """Tell of a step of a dead letter, if it can be read as an order."""
    if letter.order_id is not None:
        with suppress(ValueError):
            order = describe(search.from_letter(letter))
            add([Happened(kind, {"order": order} | more, letter.order_id)])


# As search.describe has it.
MOMENT = "to_char({0} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')"
DESCRIBED = f"""json_build_object(
  'id', id, 'status', status, 'userId', coalesce(user_id::text, user_name),
  'productId', product_id, 'quantity', quantity, 'cancelledQuantity', returned_units,
  'unitPriceCents', unit_price_cents, 'currency', currency, 'reference', reference,
  'createdAt', {MOMENT.format("claimed_at")}, 'storedAt', {MOMENT.format("persisted_at")},
  'endedAt', {MOMENT.format("cancelled_at")}, 'endReason', cancel_reason,
  'heldUntil', {MOMENT.format("held_until")}, 'payment', payment)"""

# What this transaction has put among the dead letters: one that was read again is told of already.
NEW_LETTERS = """
    SELECT order_id, payload FROM dead_letters
    WHERE stream_id = ANY(%s) AND order_id IS NOT NULL AND created_at = now() ORDER BY id
"""
INSERT_FAILED = "INSERT INTO new_events (type, order_id, body) VALUES ('order.failed', %s, %s)"


def failed(cursor: Cursor, stream_ids: Collection[str]) -> None:
    """Tell, in the drain's transaction, of the orders among these that became dead letters."""
    if not stream_ids:
        return
    cursor.execute(NEW_LETTERS, (list(stream_ids),))
    for order_id, payload in cursor.fetchall():
        # Only what can be read as an order can be told as one.
        with suppress(ValueError):
            found = replace(search.from_entry(order_id, Entry.parse(payload)), status="FAILED")
            cursor.execute(INSERT_FAILED, (order_id, json.dumps({"order": describe(found)})))
