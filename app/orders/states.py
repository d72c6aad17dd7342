"""What becomes of a stored order, and the only place that changes its state.

    HELD → CONFIRMED | RELEASED | EXPIRED        RELEASED, EXPIRED → CONFIRMED (by a reclaim)
    CONFIRMED → CANCELLED, whole or part by part: it stands until nothing is left

All of it is done under the orders' row locks, in the caller's transaction. Each change of an order
raises its `acts`, so that (order, act) names the change: a movement of stock, and an event, exist
once for it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select, text

from ..audit import Actor, record
from ..extensions import db
from ..models import Order
from ..problems import Conflict, UnknownOrder
from . import events

# By the status that giving back the last unit leads to: from which one it does, and how that is
# called in events and, where somebody does it, in the audit.
ENDS = {
    "CANCELLED": {"from": "CONFIRMED", "event": "order.cancelled", "action": "order.cancel"},
    "RELEASED": {"from": "HELD", "event": "order.released", "action": "order.release"},
    "EXPIRED": {"from": "HELD", "event": "order.expired"},
}

# The rows are locked by now, so that what is read here is what is changed. A clock of its own: the
# transaction may have waited for the locks.
GIVE_BACK = text("""
WITH part AS (
  SELECT id, coalesce(CAST(:units AS integer), quantity - returned_units) AS units,
         quantity - returned_units AS standing
  FROM orders WHERE id = ANY(:ids) AND status = :former
), changed AS (
  UPDATE orders o SET
    returned_units = returned_units + part.units,
    acts = acts + 1,
    status = CASE WHEN part.units = part.standing THEN :status ELSE o.status END,
    cancelled_at = CASE WHEN part.units = part.standing THEN clock_timestamp() END,
    cancelled_by = CASE WHEN part.units = part.standing THEN :actor END,
    cancel_reason = CASE WHEN part.units = part.standing THEN :reason END
  FROM part WHERE o.id = part.id AND part.units BETWEEN 1 AND part.standing
  RETURNING o.id, o.product_id, o.user_id, o.user_name, o.acts, part.units
)
INSERT INTO stock_movements (product_id, kind, units, reason, actor, user_id, user_name, order_id,
                             act)
SELECT product_id, 'return', units, :reason, :actor, user_id, user_name, id, acts
FROM changed ORDER BY id
RETURNING id, order_id, units
""")


@dataclass(frozen=True)
class Returned:
    """Units that an order gave back; the movement is to be applied after the commit."""

    movement_id: int
    order_id: int
    units: int


def lock(order_id: int) -> Order:
    """Lock a stored order's row until the transaction ends. Raises UnknownOrder."""
    order = db.session.get(Order, order_id, with_for_update=True, populate_existing=True)
    if order is None:
        raise UnknownOrder(order_id)
    return order


def lock_all(order_ids: Sequence[int], skip_locked: bool = False) -> list[int]:
    """Lock the rows of these orders, or those that nobody else holds; return their ids."""
    query = select(Order.id).where(Order.id.in_(order_ids)).order_by(Order.id)
    return list(db.session.scalars(query.with_for_update(skip_locked=skip_locked)))


def give_back(
    order: Order, units: int | None, status: str, reason: str | None, actor: Actor
) -> Returned:
    """Give back units of a locked order, None for all; `status` is what it is when none is left.

    Raises Conflict when the order has another state, or fewer units, than that takes.
    """
    before, left = order.status, order.quantity - order.returned_units
    if before == status:
        raise Conflict(f"This order is {status.lower()} already", f"already_{status.lower()}")
    if before != ENDS[status]["from"]:
        raise Conflict(f"This order is {before.lower()}", f"order_{before.lower()}")
    units = left if units is None else units
    if not 1 <= units <= left:
        raise too_many(left, order.quantity)
    (returned,) = give_back_all([order.id], status, reason, actor, units)
    action = ENDS[status]["action"]
    record(
        actor,
        action,
        f"order {order.id}",
        before={"status": before, "units": left},
        after={"status": order.status, "reason": reason, "units": units},
    )
    return returned


def too_many(left: int, quantity: int) -> Conflict:
    """Return the error of who wants to give back more than is left."""
    return Conflict(f"{left} of this order's {quantity} units are left", "too_many_units")


def give_back_all(
    order_ids: Sequence[int],
    status: str,
    reason: str | None,
    actor: Actor,
    units: int | None = None,
) -> list[Returned]:
    """Give back all that is left of each of these orders (or `units` of each), all locked.

    Those that are not in the state that `status` follows upon are left as they are.
    """
    values = {
        "ids": list(order_ids),
        "units": units,
        "former": ENDS[status]["from"],
        "status": status,
        "actor": actor.name,
        "reason": reason,
    }
    returned = [Returned(*row) for row in db.session.execute(GIVE_BACK, values)]
    _tell(ENDS[status]["event"], returned, reason)
    return returned


def _tell(kind: str, returned: list[Returned], reason: str | None) -> None:
    by_units: dict[int, list[int]] = defaultdict(list)
    for part in returned:
        by_units[part.units].append(part.order_id)
    for units, ids in by_units.items():
        orders = select(Order).where(Order.id.in_(ids)).order_by(Order.id)
        found = db.session.scalars(orders.execution_options(populate_existing=True)).all()
        events.record(kind, found, units=units, reason=reason)
