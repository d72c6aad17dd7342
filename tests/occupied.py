"""Orders that stand where others are to be stored."""

from sqlalchemy import text

from app.extensions import db, stock
from app.stock.keys import KEYS


def occupy(order_id: int, key: str | None = None, user: int = 99) -> None:
    """Store another order under an id, as a restored or foreign database could have it."""
    db.session.execute(
        text(
            "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
            " claimed_at, idempotency_key) VALUES (:id, :user, 1, 1, 1, 'USD', now(), :key)"
        ),
        {"id": order_id, "user": user, "key": key},
    )
    # Its units are put on sale besides, so that the ledger stays even.
    db.session.commit()
    stock.client.hincrby(KEYS.product(1), "claimed", 1)
    stock.client.hincrby(KEYS.product(1), "settled_units", 1)
    stock.client.hincrby(KEYS.product(1), "free", -1)
