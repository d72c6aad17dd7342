"""The end of holds that nobody paid for: in batches, by PostgreSQL's clock, never while it is away.

A batch is ended in one transaction, with few movements for each product; the units follow in Redis.
Any number of workers may do so at once: each passes by what another has locked.
"""

import logging
import time

from sqlalchemy import select, text

from ..extensions import db, stock
from ..generation import on_record
from ..models import Product, ProductTotals
from ..problems import Unavailable
from ..products.movements import apply_ended
from . import states

log = logging.getLogger(__name__)

# A transaction of some 100 ms.
BATCH_ORDERS = 4000
# So long batches follow each other, before it is noted that ends are carried out.
TURN_SECONDS = 1.0
# An end is carried out within a second; more without one is an outage, in which confirmations may
# have been refused. After it they have as long as it lasted to come again, and at most a minute.
OUTAGE_SECONDS = 5
MOST_PATIENCE_SECONDS = 60
HELD_SECONDS = 1.0
# What a worker that has ended since told of a product is put right so soon.
ALL_SECONDS = 30

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
        self._told_at = self._all_at = float("-inf")
        self._lately: set[int] | None = None

    def step(self) -> bool:
        """End what is due, for a while; tell whether more may be.

        Raises Unavailable and SQLAlchemyError.
        """
        generation = stock.generation()
        if not generation or generation != on_record():
            return False
        if time.monotonic() - self._told_at >= HELD_SECONDS:
            self._told_at = time.monotonic()
            if self._told_at - self._all_at > ALL_SECONDS:
                self._all_at, self._lately = self._told_at, None
            self._lately = tell_held(generation, self._lately)
        may = db.session.execute(SWEPT).scalar()
        db.session.commit()
        until = time.monotonic() + TURN_SECONDS
        while may and expire(BATCH_ORDERS) == BATCH_ORDERS:
            if time.monotonic() > until:
                return True
        return False


def expire(most: int) -> int:
    """End up to so many holds that are due; return how many. Their units go on sale again."""
    ended = states.expire_due(most)
    db.session.commit()
    orders = sum(ended.values())
    if ended:
        try:
            apply_ended(list(ended))
        except Unavailable as error:
            db.session.rollback()
            log.warning("the units of %d ended holds return later: %s", orders, error)
    return orders


def tell_held(generation: str, lately: set[int] | None = None) -> set[int]:
    """Note in Redis, for sold-out answers, how many units of each product are held.

    With `lately`, those of which any were so lately, as this returned it, only they and those that
    hold their orders are looked at.
    """
    wanted = select(Product.id)
    if lately is not None:
        stored_units = select(ProductTotals.product_id).where(ProductTotals.held_units > 0)
        wanted = wanted.where(
            Product.hold_seconds.is_not(None)
            | Product.id.in_(stored_units)
            | Product.id.in_(lately)
        )
    ids = list(db.session.scalars(wanted))
    db.session.rollback()
    # First Redis, then PostgreSQL: what is stored in between may count twice, and never not at all.
    views = stock.views(ids)
    totals = select(ProductTotals.product_id, ProductTotals.held_units)
    of = ProductTotals.product_id.in_(ids)
    stored = dict(db.session.execute(totals if lately is None else totals.where(of)).all())
    db.session.rollback()
    stock.put_held(generation, stored, views)
    if any(isinstance(view, Unavailable) for view in views):
        return set(ids)
    held = {of for of, units in stored.items() if units}
    for view in views:
        if not isinstance(view, Unavailable):
            held |= {of for of, figures in view.products.items() if figures.get("held")}
    return held
