"""What happened, for whoever follows: written in the transaction in which it happens.

An event gets its number later (feed/numbering.py). Its id here is taken from a sequence, so that
who adds one after locking the row it is about keeps that row's events in their order.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import text

from .extensions import db

# Every type there is. A partly cancelled order is told by order.cancelled too.
TYPES = (
    "order.confirmed", "order.held", "order.cancelled", "order.released", "order.expired",
    "order.reclaimed", "order.failed", "product.sold_out", "product.restocked",
)  # fmt: skip


class Happened(NamedTuple):
    """An event to be: `body` has the members that it shows beside its id, type and time."""

    type: str
    body: dict[str, Any]
    order_id: int | None = None
    # The order's own count of what happened to it; 0 when it was stored.
    sequence: int | None = None


# One statement for any number.
ADD = text("""
INSERT INTO new_events (type, order_id, sequence, body)
SELECT type, order_id, sequence, CAST(body AS json)
FROM unnest(CAST(:types AS text[]), CAST(:order_ids AS bigint[]), CAST(:sequences AS int[]),
            CAST(:bodies AS text[])) AS happened (type, order_id, sequence, body)
""")


def add(happened: Iterable[Happened]) -> None:
    """Add events to the current transaction; they are told once it is committed."""
    rows = list(happened)
    if rows:
        values = {
            "types": [row.type for row in rows],
            "order_ids": [row.order_id for row in rows],
            "sequences": [row.sequence for row in rows],
            "bodies": [msgspec.json.encode(row.body).decode() for row in rows],
        }
        db.session.execute(ADD, values)
