"""Orders as the shop's programs read them, one by one or page by page."""

from dataclasses import dataclass
from typing import Any

from ..problems import Unavailable
from ..times import utc_text
from . import intents, search
from .search import Filter, Found

PAGE_ORDERS = 50
MOST_ORDERS = 500


def describe(order: Found) -> dict[str, Any]:
    """Return an order in the API's form; `userId` is always a text."""
    return {
        "id": order.id,
        "status": order.status,
        "userId": str(order.user),
        "productId": order.product_id,
        "quantity": order.quantity,
        "cancelledQuantity": order.returned_units,
        "unitPriceCents": order.unit_price_cents,
        "currency": order.currency,
        "reference": order.reference,
        "createdAt": utc_text(order.claimed_at),
        "storedAt": order.persisted_at and utc_text(order.persisted_at),
        "endedAt": order.cancelled_at and utc_text(order.cancelled_at),
        "endReason": order.cancel_reason,
        "heldUntil": order.held_until and utc_text(order.held_until),
        "payment": order.payment,
    }


def one(order_id: int) -> dict[str, Any]:
    """Return an order; with `cancelling`, while units wait to be given back until it is stored.

    Raises UnknownOrder, and Unavailable where Redis might know it and can't be asked.
    """
    found = describe(search.story(order_id).order)
    if found["status"] == "QUEUED" and (units := intents.units_given_back(order_id)):
        found["cancelling"] = units
    return found


@dataclass(frozen=True)
class Listed:
    """A page of orders; `next` is the cursor that goes on, None on the last page."""

    orders: list[dict[str, Any]]
    next: str | None


def listed(wanted: Filter, before: int | None, limit: int) -> Listed:
    """Return a page of orders, newest first. Raises Unavailable rather than leave any out."""
    page = search.search(wanted, before, limit)
    if page.incomplete:
        raise Unavailable("orders that wait in Redis can't be listed")
    cursor = None if page.before is None else str(page.before)
    return Listed([describe(order) for order in page.orders], cursor)
