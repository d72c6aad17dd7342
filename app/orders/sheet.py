"""A list of orders as a file for spreadsheets."""

from collections.abc import Iterator

from .. import sheet
from ..money import decimal
from ..products.names import Names
from ..times import utc_text
from .search import Export, Found

HEADER = (
    "order", "status", "user", "product", "product name", "quantity", "unit price", "currency",
    "total", "claimed at", "persisted at", "cancelled at", "cancelled by", "cancel reason",
    "idempotency key", "reference", "cancelled quantity", "held until", "payment",
)  # fmt: skip


# The last row of a file that is not whole.
MISSING = (
    "Not complete: orders that are still queued are missing. Export again once they are stored."
)


def chunks(found: Export, names: Names) -> Iterator[str]:
    """Yield the file's text, some rows at a time; products are called as they were when sold."""

    def rows() -> Iterator[tuple[object, ...]]:
        for order in found:
            yield row_of(order, names)
        if found.incomplete:
            yield (MISSING,)

    return sheet.chunks(HEADER, rows())


def row_of(order: Found, names: Names) -> tuple[object, ...]:
    """Return the order's cells, as many as HEADER has."""
    return (
        order.id,
        order.status,
        order.user,
        order.product_id,
        names.sold(order.product_id, order.claimed_at),
        order.quantity,
        decimal(order.unit_price_cents, order.currency),
        order.currency,
        decimal(order.total_cents, order.currency),
        utc_text(order.claimed_at),
        order.persisted_at and utc_text(order.persisted_at),
        order.cancelled_at and utc_text(order.cancelled_at),
        order.cancelled_by,
        order.cancel_reason,
        order.idempotency_key,
        order.reference,
        order.returned_units,
        order.held_until and utc_text(order.held_until),
        order.payment,
    )
