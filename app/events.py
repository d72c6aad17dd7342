"""What happened, for whoever follows: written in the transaction in which it happens.

An event gets its number later (feed/numbering.py). Its id here is taken from a sequence, so that
who adds one after locking the row it is about keeps that row's events in their order.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import insert

from .extensions import db
from .models import NewEvent

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


def add(happened: Iterable[Happened]) -> None:
    """Add events to the current transaction; they are told once it is committed."""
    rows = [each._asdict() for each in happened]
    if rows:
        db.session.execute(insert(NewEvent), rows)
