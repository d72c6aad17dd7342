"""An order's steps, told to the feed in the transaction in which they are made."""

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from psycopg2.extensions import cursor as Cursor
from sqlalchemy import select

from ..events import Happened, add
from ..extensions import db
from ..models import DeadLetter, Order
from ..stock.entries import Entry
from . import search
from .search import described


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
    orders = described([search.from_row(row[:-1]) for row in rows])
    add(
        Happened(kind, {"order": order} | more, row.id, row.acts)
        for row, order in zip(rows, orders, strict=True)
    )


def record_letter(kind: str, letter: DeadLetter, **more: Any) -> None:
    """Tell of a step of a dead letter, if it can be read as an order."""
    if letter.order_id is not None:
        with suppress(ValueError):
            (order,) = described([search.from_letter(letter)])
            add([Happened(kind, {"order": order} | more, letter.order_id)])


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
            (order,) = described([found])
            cursor.execute(INSERT_FAILED, (order_id, json.dumps({"order": order})))
