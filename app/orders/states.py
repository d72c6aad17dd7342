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
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import select, text

from .. import idempotency, planned
from ..audit import SYSTEM, Actor, record
from ..extensions import db
from ..models import Order, StockMovement
from ..problems import Conflict, UnknownOrder
from ..products.movements import FINISH, Finish
from . import events

# By the status that giving back the last unit leads to: from which one it does, and how that is
# called in events and, where somebody does it, in the audit.
ENDS = {
    "CANCELLED": {"from": "CONFIRMED", "event": "order.cancelled", "action": "order.cancel"},
    "RELEASED": {"from": "HELD", "event": "order.released", "action": "order.release"},
    "EXPIRED": {"from": "HELD", "event": "order.expired"},
}
# A payment that was made in time is confirmed although its confirmation is under way: so long.
GRACE_SECONDS = 2
NOT_PAID = "not paid in time"

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


# For the rest of a transaction: every order by its id, and what is due in its index's order. Of the
# thousands that were held a moment ago PostgreSQL's statistics know nothing, so that it would read
# all that are held for each few of them; `status || ''` keeps it from the index of what is held.
BY_ID = """
SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off; SET LOCAL enable_material = off; SET LOCAL jit = off;
"""
# Each with its event and its key, in one statement: everybody who changes an order waits for its
# product's row of totals, which is locked at the end of it.
CONFIRM = text(f"""
WITH forgotten AS ({idempotency.FORGET}), taken AS ({idempotency.PUT}), confirmed AS (
  UPDATE orders o SET status = 'CONFIRMED', payment = wish.payment, acts = acts + 1
  FROM unnest(CAST(:ids AS bigint[]), CAST(:payments AS text[]), CAST(:bodies AS text[]))
       AS wish (id, payment, body)
  WHERE o.id = wish.id AND o.status || '' = 'HELD'
  RETURNING o.id, o.acts, wish.body
), told AS (
  INSERT INTO new_events (type, order_id, sequence, body)
  SELECT 'order.confirmed', id, acts, CAST(body AS json) FROM confirmed
)
SELECT (SELECT count(*) FROM taken), (SELECT count(*) FROM confirmed)
""")  # noqa: S608
# Of a movement of orders that ended together; its script keeps claims waiting for some 2 ms.
ENDED_TOGETHER = 1000
# One statement, since 100,000 holds may end in a second, and one event for each movement. By the
# transaction's own clock, so that it is the movement's time, too. What is confirmed or extended at
# this moment is locked, and passed by; what will be as soon as it can, waits for that.
EXPIRE = text(f"""{BY_ID}
WITH due AS (
  SELECT id FROM orders o
  WHERE status = 'HELD' AND held_until <= now() - interval '{GRACE_SECONDS} s'
    AND NOT EXISTS (SELECT FROM order_intents i WHERE i.order_id = o.id AND i.applied_at IS NULL
                    AND i.epoch = (SELECT epoch FROM sale))
  ORDER BY held_until, id LIMIT :most FOR UPDATE OF o SKIP LOCKED
), expired AS (
  UPDATE orders o SET status = 'EXPIRED', returned_units = quantity, acts = acts + 1,
                      cancelled_at = now(), cancelled_by = :actor, cancel_reason = :reason
  FROM due WHERE o.id = due.id AND o.status || '' = 'HELD'
  RETURNING o.id, o.product_id, o.quantity
), parted AS (
  SELECT *, (row_number() OVER (PARTITION BY product_id ORDER BY id) - 1) / {ENDED_TOGETHER} AS part
  FROM expired
), returned AS (
  INSERT INTO stock_movements (product_id, kind, units, reason, actor, order_ids)
  SELECT product_id, 'return', sum(quantity), :reason, :actor, array_agg(id ORDER BY id)
  FROM parted GROUP BY product_id, part ORDER BY product_id, part
  RETURNING id, order_ids
), told AS (
  INSERT INTO new_events (type, order_id, count, movement_id)
  SELECT 'order.expired', order_ids[1], cardinality(order_ids), id FROM returned
)
SELECT id, cardinality(order_ids) FROM returned
""")  # noqa: S608


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
        after={
            "status": order.status,
            "reason": reason,
            "units": left - units,
            "returned": units,
        },
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


def confirmed(order: dict[str, Any], payment: str | None) -> dict[str, Any]:
    """Return an order that is held, in the API's form, as it will be."""
    return order | {"status": "CONFIRMED", "payment": payment}


def confirm_all(
    orders: Sequence[dict[str, Any]], route: str = "", keys: idempotency.Keys | None = None
) -> bool:
    """Confirm these orders, all locked and held: make each what `confirmed` returned.

    Best as a transaction's last statement. The keys are taken with it; False when somebody took one
    meanwhile: then nothing of this transaction may stay.
    """
    keys = keys or {}
    values = {
        "ids": [order["id"] for order in orders],
        "payments": [order["payment"] for order in orders],
        "bodies": [events.body(order) for order in orders],
        **idempotency.values_of(route, keys),
    }
    taken, changed = planned.execute(CONFIRM, values, BY_ID).one()
    if changed != len(orders):
        raise RuntimeError(f"of orders {values['ids']} not all were held")
    return bool(taken == len(keys))


def confirm(order: Order, payment: str | None) -> None:
    """Confirm a locked order. Raises Conflict unless it is held."""
    if order.status != "HELD":
        raise Conflict(f"This order is {order.status.lower()}", f"order_{order.status.lower()}")
    db.session.flush()
    confirm_all([confirmed(events.described(order), payment)])
    db.session.refresh(order)


def extend(order: Order, seconds: int) -> None:
    """Hold a locked order for longer, once, and not beyond one whole hold from now.

    Raises Conflict unless it is held, and was not extended before.
    """
    if order.status != "HELD":
        raise Conflict(f"This order is {order.status.lower()}", f"order_{order.status.lower()}")
    if order.extended_from is not None:
        raise Conflict("This order's hold was extended already", "already_extended")
    held_until = cast("datetime", order.held_until)
    now: datetime = db.session.execute(text("SELECT clock_timestamp()")).scalar_one()
    most = now + (held_until - order.claimed_at)
    order.extended_from = held_until
    order.held_until = max(held_until, min(held_until + timedelta(seconds=seconds), most))
    order.acts += 1
    db.session.flush()
    events.record_ids("order.held", [order.id], extended=True)


def expire_due(most: int) -> dict[int, int]:
    """End up to so many holds whose time is over, by PostgreSQL's clock.

    Returns, by the movement, of how many orders it is: of ENDED_TOGETHER of a product at most. They
    are in this transaction, and to be applied after the commit.
    """
    values = {"most": most, "actor": SYSTEM.name, "reason": NOT_PAID}
    return dict(db.session.execute(EXPIRE, values).all())


def movement_of(order: Order) -> StockMovement | None:
    """Return the movement that brought back an ended order's last units."""
    if order.status == "EXPIRED":
        together = select(StockMovement).where(
            StockMovement.created_at == order.cancelled_at,
            StockMovement.product_id == order.product_id,
            StockMovement.order_ids.contains([order.id]),
        )
        return db.session.scalars(together).one_or_none()
    own = select(StockMovement).where(
        StockMovement.order_id == order.id,
        StockMovement.act == order.acts,
        StockMovement.kind == "return",
    )
    return db.session.scalars(own).one_or_none()


def begin_reclaim(
    order: Order, payment: str | None, reason: str | None, actor: Actor
) -> StockMovement:
    """Begin to take an ended order's units anew for a late payment; the order stays as it is.

    The movement is to be applied after the commit; then the order is confirmed, or the movement is
    no more.
    """
    movement = StockMovement(
        product_id=order.product_id,
        kind="reclaim",
        units=-order.quantity,
        reason=reason or "paid late",
        actor=actor.name,
        user=order.user,
        order_id=order.id,
        act=order.acts + 1,
    )
    order.payment = payment
    db.session.add(movement)
    db.session.flush()
    return movement


class HoldExpired(Conflict):
    """A payment came too late, and the units can't be had again; `reason` may say why."""

    def __init__(self, reason: str | None = None) -> None:
        super().__init__("The hold has ended, and its units are gone", "hold_expired")
        self.reason = reason


def _reclaimed(movement: StockMovement) -> None:
    order = lock(cast("int", movement.order_id))
    before = order.status
    order.status, order.returned_units, order.acts = "CONFIRMED", 0, movement.act
    order.cancelled_at = order.cancelled_by = order.cancel_reason = None
    db.session.flush()
    record(
        Actor(movement.actor, None),
        "order.reclaim",
        f"order {order.id}",
        before={"status": before},
        after={
            "status": order.status,
            "payment": order.payment,
            "units": order.quantity,
            "reason": movement.reason,
        },
    )
    events.record_ids("order.reclaimed", [order.id], units=order.quantity)


def _not_reclaimed(movement: StockMovement, why: str) -> Conflict:
    order = lock(cast("int", movement.order_id))
    order.payment = None
    return HoldExpired("purchase_limit" if why == "capped" else None)


FINISH["reclaim"] = Finish(_reclaimed, _not_reclaimed)


def _tell(kind: str, returned: list[Returned], reason: str | None) -> None:
    by_units: dict[int, list[int]] = defaultdict(list)
    for part in returned:
        by_units[part.units].append(part.order_id)
    for units, ids in by_units.items():
        orders = select(Order).where(Order.id.in_(ids)).order_by(Order.id)
        found = db.session.scalars(orders.execution_options(populate_existing=True)).all()
        events.record(kind, found, units=units, reason=reason)
