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


def described(order: Order) -> dict[str, Any]:
    """Return a stored order in the API's form."""
    row = [getattr(order, column.key) for column in search.COLUMNS]
    return next(search.described([search.from_row(row)]))


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
    ).all()
    orders = search.described([search.from_row(row[:-1]) for row in rows])
    add(
        Happened(kind, {"order": order} | more, row.id, row.acts)
        for row, order in zip(rows, orders, strict=True)
    )


def record_letter(kind: str, letter: DeadLetter, **more: Any) -> None:
    """Tell of a step of a dead letter, if it can be read as an order."""
    if letter.order_id is not None:
        with suppress(ValueError):
            (order,) = search.described([search.from_letter(letter)])
            add([Happened(kind, {"order": order} | more, letter.order_id)])


def _moment(sql: str) -> str:
    written = f"to_char({sql} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')"
    return _plain(written)


def _plain(sql: str) -> str:
    """Return SQL of a JSON string, of a text that has nothing to be escaped."""
    return f"""coalesce('"' || ({sql}) || '"', 'null')"""


def _escaped(sql: str) -> str:
    return f"coalesce(to_json({sql})::text, 'null')"


# Few products are ever renamed: which were is found out once for a statement, not for each order.
NAME = """coalesce(
  CASE WHEN sold.product_id IN (SELECT product_id FROM product_names) THEN
    (SELECT name FROM product_names n WHERE n.product_id = sold.product_id
     AND n.until > sold.claimed_at ORDER BY n.until LIMIT 1) END,
  (SELECT name FROM products p WHERE p.id = sold.product_id))"""


def as_json(
    status: str, returned_units: str, ended_at: str, end_reason: str, held_until: str
) -> str:
    """Return SQL of an order's JSON, as search.describe has it; its row is called `sold`.

    What may be otherwise by now is given as SQL: an event tells the order as it was then. It is put
    together as text: row_to_json takes more than twice as long.
    """
    members = {
        "id": "sold.id",
        "status": _plain(status),
        "userId": _plain("coalesce(sold.user_id::text, sold.user_name)"),
        "productId": "sold.product_id",
        "productName": _escaped(NAME),
        "quantity": "sold.quantity",
        "cancelledQuantity": returned_units,
        "unitPriceCents": "sold.unit_price_cents",
        "currency": _plain("sold.currency"),
        "reference": _escaped("sold.reference"),
        "createdAt": _moment("sold.claimed_at"),
        "storedAt": _moment("sold.persisted_at"),
        "endedAt": _moment(ended_at),
        "endReason": _escaped(end_reason),
        "heldUntil": _moment(held_until),
        "payment": "'null'",
    }
    parts = ", ',".join(f"""\"{name}":', {sql}""" for name, sql in members.items())
    return f"concat('{{{parts}, '}}')"


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
            (order,) = search.described([found])
            cursor.execute(INSERT_FAILED, (order_id, json.dumps({"order": order})))
