"""An order's steps, told to the feed in the transaction in which they are made."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select

from ..events import Happened, add
from ..extensions import db
from ..models import DeadLetter, Order
from . import search
from .listing import describe


def record(kind: str, orders: Sequence[Order], **more: Any) -> None:
    """Tell of a step of these stored orders; `more` stands beside the order in the event.

    Call it after the orders' rows were locked and changed, before the commit.
    """
    ids = [order.id for order in orders]
    db.session.flush()
    rows = db.session.execute(
        select(*search.COLUMNS, Order.acts).where(Order.id.in_(ids)).order_by(Order.id)
    )
    add(
        Happened(kind, {"order": describe(search.from_row(row[:-1]))} | more, row[0], row[-1])
        for row in rows
    )


def record_letters(kind: str, letters: Sequence[DeadLetter], **more: Any) -> None:
    """Tell of a step of orders that are no rows of `orders`: dead letters that hold one."""
    add(
        Happened(kind, {"order": describe(search.from_letter(letter))} | more, letter.order_id)
        for letter in letters
        if letter.order_id is not None
    )
