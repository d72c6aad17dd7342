"""Giving an order back, whole or in part: its units go on sale again exactly once.

A stored order is decided by PostgreSQL alone, and its units follow in Redis. One that still waits
there is given back as soon as it is stored: see intents.py.
"""

import logging
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from .. import idempotency
from ..audit import Actor
from ..extensions import db, stock
from ..models import DeadLetter, Order, StockMovement
from ..problems import Conflict, Unavailable, UnknownOrder
from ..products.movements import apply_movement
from . import intents, states
from .search import described, from_entry, story

log = logging.getLogger(__name__)

CANCEL = "POST /orders/cancel"


@dataclass(frozen=True)
class Cancelled:
    """What was given back of an order, and the order as it was right after it (search.describe).

    `waits`: it is done as soon as the order is stored. `free`: Redis has the units.
    """

    order: dict[str, Any]
    units: int
    waits: bool = False
    free: bool = True
    replayed: bool = False

    @property
    def status(self) -> str:
        return str(self.order["status"])


def cancel(
    order_id: int,
    reason: str | None,
    actor: Actor,
    units: int | None = None,
    key: str | None = None,
) -> Cancelled:
    """Give back units of an order, None for all that are left; once for each Idempotency-Key.

    An order that is held is released, which is for all of it. Raises UnknownOrder, KeyMismatch,
    Conflict (`already_cancelled`, `too_many_units`, `order_failed` and others that name a state),
    and Unavailable where neither PostgreSQL nor Redis can tell that there is such an order.
    """
    taken = None
    if key:
        taken = idempotency.take(CANCEL, str(order_id), key, [units, reason])
        if taken.answer is not None:
            db.session.rollback()
            return Cancelled(**taken.answer, free=finish(order_id), replayed=True)
    try:
        done = _cancel(order_id, reason, actor, units)
        if taken:
            taken.answer = {"order": done.order, "units": done.units, "waits": done.waits}
    except BaseException:
        db.session.rollback()
        raise
    db.session.commit()
    if done.waits:
        # It may have been stored since it was looked for.
        intents.apply_to(order_id)
        return done
    return Cancelled(done.order, done.units, free=finish(order_id))


def _cancel(order_id: int, reason: str | None, actor: Actor, units: int | None) -> Cancelled:
    """Do it in this transaction."""
    try:
        order = states.lock(order_id)
    except UnknownOrder:
        sale = intents.epoch()
        entry = stock.waiting_order(order_id) if sale else None
        if entry is None:
            # It was stored, or refused, since.
            order = stored_since(order_id)
        else:
            act = "cancel" if entry.held_until_ms is None else "release"
            _whole(act == "cancel", units, entry.quantity)
            given = intents.accept_return(order_id, act, units, entry.quantity, reason, actor)
            (found,) = described([from_entry(order_id, entry)])
            waiting = found | {"cancelling": intents.units_given_back(order_id)}
            return Cancelled(waiting, given, waits=True)
    intents.carry_out(order)
    held = order.status == "HELD"
    _whole(not held, units, order.quantity)
    status = "RELEASED" if held else "CANCELLED"
    returned = states.give_back(order, units, status, reason, actor)
    (now,) = described([story(order_id).order])
    return Cancelled(now, returned.units)


def _whole(divisible: bool, units: int | None, quantity: int) -> None:
    if not divisible and units not in (None, quantity):
        raise Conflict("An order that is held can only be released as a whole", "order_held")


def stored_since(order_id: int) -> Order:
    """Lock an order that waits in Redis no longer.

    Raises UnknownOrder, and Conflict where it could not be stored.
    """
    try:
        return states.lock(order_id)
    except UnknownOrder:
        letter = db.session.scalar(
            select(DeadLetter).where(DeadLetter.order_id == order_id, DeadLetter.not_replayed())
        )
        if letter is None:
            raise
        if letter.resolution:
            raise Conflict("This order is cancelled already", "already_cancelled") from None
        raise Conflict(
            "This order could not be stored; somebody decides on it", "order_failed"
        ) from None


def finish(order_id: int) -> bool:
    """Tell Redis of the units that an order gave back; tell whether it has them all."""
    pending = db.session.scalars(
        select(StockMovement)
        .where(StockMovement.order_id == order_id, StockMovement.applied_at.is_(None))
        .order_by(StockMovement.act)
    ).all()
    try:
        for movement in pending:
            apply_movement(movement)
    except (Unavailable, Conflict) as error:
        db.session.rollback()
        log.warning("the units of order %d return later: %s", order_id, error)
        return False
    return True
