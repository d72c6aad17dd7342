"""Orders as the shop's programs read them, one by one or page by page."""

from dataclasses import dataclass
from typing import Any

from ..problems import Unavailable
from . import intents, search
from .search import Filter, described

PAGE_ORDERS = 50
MOST_ORDERS = 500


def one(order_id: int) -> dict[str, Any]:
    """Return an order; with `cancelling`, while units wait to be given back until it is stored.

    Raises UnknownOrder, and Unavailable where Redis might know it and can't be asked.
    """
    (found,) = described([search.story(order_id).order])
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
    return Listed(list(described(page.orders)), cursor)
