"""The end of holds that nobody paid for: in batches, by PostgreSQL's clock, never while it is away.

A batch is ended in one transaction, with one movement for each product; the units follow in Redis.
Any number of workers may do so at once: each passes by what another has locked.
"""

import logging
import time

from sqlalchemy import select, text

from ..extensions import db, stock
from ..generation import on_record
from ..models import ProductTotals, StockMovement
from ..problems import Unavailable
from ..products.movements import apply_movement
from . import states

log = logging.getLogger(__name__)

# A transaction of some 50 ms, and a script that keeps claims waiting for some 5.
BATCH_ORDERS = 1000
# An end is carried out within a second; more without one is an outage, in which confirmations may
# have been refused. After it they have as long as it lasted to come again, and at most a minute.
OUTAGE_SECONDS = 5
MOST_PATIENCE_SECONDS = 60
HELD_SECONDS = 1.0

# The patience ends in time also when the clock is set back meanwhile.
SWEPT = text(f"""
UPDATE sale SET swept_at = now(), expiry_from = CASE
  WHEN now() - swept_at > interval '{OUTAGE_SECONDS} s'
  THEN now() + least(now() - swept_at, interval '{MOST_PATIENCE_SECONDS} s')
  WHEN expiry_from > now() + interval '{MOST_PATIENCE_SECONDS} s'
  THEN now() + interval '{MOST_PATIENCE_SECONDS} s'
  ELSE expiry_from END
RETURNING coalesce(expiry_from <= now(), true)
""")  # noqa: S608


class Expiry:
    """Ends holds, and tells Redis how many units may still come back."""

    def __init__(self) -> None:
        self._told_at = float("-inf")

    def step(self) -> bool:
        """End one batch; tell whether more may be due. Raises Unavailable, SQLAlchemyError."""
        generation = stock.generation()
        if not generation or generation != on_record():
            return False
        if time.monotonic() - self._told_at >= HELD_SECONDS:
            self._told_at = time.monotonic()
            tell_held(generation)
        may = db.session.execute(SWEPT).scalar()
        db.session.commit()
        return bool(may) and expire(BATCH_ORDERS) == BATCH_ORDERS


def expire(most: int) -> int:
    """End up to so many holds that are due; return how many. Their units go on sale again."""
    ended = states.expire_due(most)
    db.session.commit()
    for movement_id, orders in ended.items():
        try:
            apply_movement(db.session.get_one(StockMovement, movement_id))
        except Unavailable as error:
            db.session.rollback()
            log.warning("the units of %d ended holds return later: %s", orders, error)
    return sum(ended.values())


def tell_held(generation: str) -> None:
    """Note in Redis, for sold-out answers, how many units of each product are held."""
    stored = dict(
        db.session.execute(select(ProductTotals.product_id, ProductTotals.held_units)).all()
    )
    db.session.rollback()
    products = stock.view(list(stored)).products
    units = {
        product_id: held
        for product_id, held in stored.items()
        if product_id in products and (held or products[product_id].get("held"))
    }
    if units:
        stock.put_held(generation, units)
