"""A shopper's own list of orders."""

from datetime import datetime
from typing import Any, cast

from sqlalchemy import select

from ..extensions import db, stock
from ..models import DeadLetter, Order
from ..reading import User
from ..stock.entries import Entry
from ..times import from_ms, utc_text

MAX_LISTED = 500

# An order in the API's form.
Listed = dict[str, Any]


def _listed(order_id: int, status: str, at: datetime, order: Entry | Order) -> Listed:
    listed: Listed = {
        "id": order_id,
        "status": status,
        "quantity": order.quantity,
        "productId": order.product_id,
        "createdAt": utc_text(at),
        "unitPriceCents": order.unit_price_cents,
        "currency": order.currency,
    }
    if order.reference is not None:
        listed["reference"] = order.reference
    return listed


def columns_of(entry: Entry) -> dict[str, Any]:
    """Return what an entry tells of an order beside its id and its user, by the columns' names."""
    return {
        "product_id": entry.product_id,
        "quantity": entry.quantity,
        "unit_price_cents": entry.unit_price_cents,
        "currency": entry.currency,
        "claimed_at": from_ms(entry.claimed_ms),
        "idempotency_key": entry.idempotency_key,
        "reference": entry.reference,
    }


def queued_orders_of(user: User, limit: int, before: int | None = None) -> list[Listed]:
    """Return the user's orders that wait in Redis, newest first. Raises stock.Unavailable."""
    return [
        _listed(order_id, "QUEUED", from_ms(entry.claimed_ms), entry)
        for order_id, entry in stock.queued_orders(user, MAX_LISTED)
        if before is None or order_id < before
    ][:limit]


def orders_of(
    queued: list[Listed], user: User, limit: int, before: int | None = None
) -> list[Listed]:
    """Return the user's orders, newest first, given those that Redis held a moment *earlier*.

    The order of the two reads is what makes the list complete: an order leaves Redis only after the
    commit that stored it, so what Redis no longer had is found here. What both have counts once.
    """
    stored = select(Order).where(Order.is_of(user)).order_by(Order.id.desc()).limit(limit)
    dead = (
        select(DeadLetter)
        .where(
            DeadLetter.is_of(user),
            DeadLetter.order_id.is_not(None),
            DeadLetter.not_replayed(),
        )
        .order_by(DeadLetter.order_id.desc())
        .limit(limit)
    )
    if before is not None:
        stored = stored.where(Order.id < before)
        dead = dead.where(DeadLetter.order_id < before)
    found = {order["id"]: order for order in queued}
    for letter in db.session.scalars(dead):
        entry, order_id = Entry.parse(letter.payload), cast("int", letter.order_id)
        # FAILED asks for a decision; given up, it is as final as a cancelled order.
        status = "CANCELLED" if letter.resolution else "FAILED"
        found[order_id] = _listed(order_id, status, from_ms(entry.claimed_ms), entry)
    for order in db.session.scalars(stored):
        found[order.id] = _listed(order.id, order.status, order.claimed_at, order)
        if order.returned_units:
            found[order.id]["cancelledQuantity"] = order.returned_units
    return [found[order_id] for order_id in sorted(found, reverse=True)[:limit]]
