"""An order as the shop's back end sees it."""

from typing import Any

from ..times import utc_text
from .search import Found


def describe(found: Found) -> dict[str, Any]:
    """Return the order as JSON for the shop."""
    return {
        "id": found.id,
        "status": found.status,
        "userId": str(found.user),
        "productId": found.product_id,
        "quantity": found.quantity,
        "unitPriceCents": found.unit_price_cents,
        "currency": found.currency,
        "reference": found.reference,
        "claimedAt": utc_text(found.claimed_at),
    }
