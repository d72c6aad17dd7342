"""A list of orders as a file for spreadsheets."""

from collections.abc import Iterable, Iterator

from .. import sheet
from ..money import decimal
from ..times import utc_text
from .search import Found

HEADER = (
    "order", "status", "user", "product", "product name", "quantity", "unit price", "currency",
    "total", "claimed at", "persisted at", "cancelled at", "cancelled by", "cancel reason",
    "idempotency key", "reference", "cancelled quantity", "held until", "payment",
)  # fmt: skip


def chunks(found: Iterable[Found], names: dict[int, str]) -> Iterator[str]:
    """Yield the file's text, some rows at a time; `names` are the products' by id."""
    return sheet.chunks(HEADER, (row_of(order, names) for order in found))


def row_of(order: Found, names: dict[int, str]) -> tuple[object, ...]:
    """Return the order's cells, as many as HEADER has."""
    return (
        order.id,
        order.status,
        order.user,
        order.product_id,
        names.get(order.product_id, ""),
        order.quantity,
        decimal(order.unit_price_cents),
        order.currency,
        decimal(order.total_cents),
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
