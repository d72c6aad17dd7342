"""Starting a sale in Redis: the first time, after a reset, and after Redis lost everything."""

import secrets

from sqlalchemy import text

from . import inventory
from .audit import Actor, record
from .drain import DRAIN_LOCK
from .extensions import db, stock
from .models import Sale

SEED_PRODUCT = {
    "name": "Flash-sale item",
    "priceCents": 99_999,
    "currency": "USD",
    "stock": 100,
}


def database_is_empty() -> bool:
    """Return whether nothing was ever sold or put on sale here."""
    return not db.session.execute(
        text("SELECT EXISTS (SELECT FROM products) OR EXISTS (SELECT FROM sale)")
    ).scalar()


def reset(actor: Actor) -> int:
    """Delete every product, order and movement, here and in Redis; return the new product's id.

    Staff, tokens and the audit stay. Ids start from 1 again. Raises stock.Unavailable before
    anything is deleted when Redis can't be reached.
    """
    # A drain under way finishes first; the next one finds the outbox empty.
    db.session.execute(text(f"SELECT pg_advisory_xact_lock({DRAIN_LOCK})"))
    stock.clear()
    db.session.execute(
        text(
            "TRUNCATE orders, dead_letters, batches, stock_movements, product_totals, products, sale"
            " RESTART IDENTITY"
        )
    )
    generation = secrets.token_hex(8)
    db.session.add(Sale(generation=generation))
    record(actor, "sale.reset", "sale", after=SEED_PRODUCT)
    db.session.commit()
    stock.open(generation, first_order_id=1)
    product, _ = inventory.create_product(SEED_PRODUCT, actor)
    return product.id
