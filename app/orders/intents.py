"""Acts for orders that still wait in Redis: accepted and kept, and done as soon as they are stored.

An intent is a row of its own, so that none is lost whatever is killed. Whoever accepts one commits
it and then looks for the order again; the drain and the sweeper look for the intents. So at least
one of them sees both, and the order's row lock lets one of them act.
"""

import logging
from collections.abc import Collection, Mapping
from datetime import UTC, datetime

from sqlalchemy import select, text, update
from sqlalchemy.dialects.postgresql import insert

from ..audit import Actor
from ..extensions import db
from ..models import Order, OrderIntent, Sale, StockMovement
from ..problems import Conflict, Unavailable, UnknownOrder
from ..products.movements import apply_movement, apply_together
from . import search, states

log = logging.getLogger(__name__)

# What giving back leads to, by the intent's name.
RETURNS = {"cancel": "CANCELLED", "release": "RELEASED"}
# One sweep's or drain's share; the next one takes the others.
APPLIED_AT_ONCE = 500

STORED = text("""
SELECT DISTINCT order_id FROM order_intents JOIN orders ON id = order_id
WHERE applied_at IS NULL AND epoch = (SELECT epoch FROM sale) ORDER BY 1 LIMIT :most
""")
# Of an order nothing else is accepted beside a confirmation, so that what is seen before the row is
# locked is still so. Who has locked it carries out what waits by himself.
PAID = text(f"""
SELECT {", ".join(f"o.{column.key}" for column in search.COLUMNS)}, i.payment
FROM orders o
JOIN order_intents i ON i.order_id = o.id AND i.epoch = (SELECT epoch FROM sale)
     AND i.applied_at IS NULL AND i.act = 'confirm' AND i.number = 1
WHERE o.id = ANY(:ids) AND o.status = 'HELD'
  AND NOT EXISTS (SELECT FROM order_intents other WHERE other.order_id = o.id
                  AND other.epoch = i.epoch AND other.number > 1)
ORDER BY o.id FOR UPDATE SKIP LOCKED
""")  # noqa: S608
APPLIED = text("""
UPDATE order_intents SET applied_at = clock_timestamp()
WHERE order_id = ANY(:ids) AND epoch = (SELECT epoch FROM sale)
""")
ASKED = text("""
SELECT ARRAY(SELECT order_id FROM order_intents i WHERE i.epoch = s.epoch AND order_id = ANY(:ids))
FROM sale s WHERE epoch IS NOT NULL
""")
ACCEPT_CONFIRMS = text("""
INSERT INTO order_intents (epoch, order_id, number, act, payment, actor, address)
SELECT epoch, order_id, 1, 'confirm', payment, actor, address
FROM sale, unnest(CAST(:orders AS bigint[]), CAST(:payments AS text[]), CAST(:actors AS text[]),
                  CAST(:addresses AS text[])) AS paid (order_id, payment, actor, address)
ORDER BY order_id
ON CONFLICT DO NOTHING RETURNING order_id
""")


def epoch() -> str:
    """Return which sale's order ids these are.

    The transaction then holds off a reset, so that what it reads in Redis is of this sale, too.
    """
    return db.session.scalar(select(Sale.epoch)) or ""


def asked(order_ids: Collection[int]) -> set[int] | None:
    """Return of which of these orders anything was asked, None where there is no sale.

    Holds off a reset, as `epoch` does.
    """
    found = db.session.execute(ASKED, {"ids": list(order_ids)}).scalar()
    return None if found is None else set(found)


def of_order(order_id: int) -> list[OrderIntent]:
    """Return the acts that wait for this order, in the order in which they came."""
    return [intent for intent in _all_of(order_id) if intent.applied_at is None]


def _all_of(order_id: int) -> list[OrderIntent]:
    query = (
        select(OrderIntent)
        .where(OrderIntent.epoch == epoch(), OrderIntent.order_id == order_id)
        .order_by(OrderIntent.number)
        .execution_options(populate_existing=True)
    )
    return list(db.session.scalars(query))


def units_given_back(order_id: int) -> int:
    """Return how many units of a waiting order will be given back as soon as it is stored."""
    return sum(intent.units or 0 for intent in of_order(order_id) if intent.act in RETURNS)


def accept_return(
    order_id: int, act: str, units: int | None, quantity: int, reason: str | None, actor: Actor
) -> int:
    """Keep in this transaction that units (None: all) of a waiting order go back; return how many.

    `quantity` is the order's. Of two at once the second waits for the first. Raises Conflict where
    that contradicts what was accepted before.
    """
    while True:
        before = _all_of(order_id)
        waiting = [intent for intent in before if intent.applied_at is None]
        if any(intent.act not in (act, "extend") for intent in waiting):
            raise Conflict("Something else was asked of this order before", "conflicting_intent")
        left = quantity - sum(i.units or 0 for i in waiting if i.act == act)
        if not left:
            ended = RETURNS[act].lower()
            raise Conflict(f"This order is {ended} already", f"already_{ended}")
        wanted = left if units is None else units
        if wanted > left:
            raise states.too_many(left, quantity)
        if _keep(order_id, before, actor, act=act, units=wanted, reason=reason):
            return wanted


def accept_confirm(order_id: int, payment: str | None, actor: Actor) -> None:
    """Keep in this transaction that a waiting order is paid. Raises Conflict as above."""
    while True:
        before = _all_of(order_id)
        waiting = [intent for intent in before if intent.applied_at is None]
        if any(intent.act in RETURNS for intent in waiting):
            raise Conflict("Something else was asked of this order before", "conflicting_intent")
        if paid := [intent for intent in waiting if intent.act == "confirm"]:
            if payment not in (None, paid[0].payment):
                raise Conflict("This order is confirmed with another payment", "already_confirmed")
            return
        if _keep(order_id, before, actor, act="confirm", payment=payment):
            return


def accept_extend(order_id: int, seconds: int, actor: Actor) -> None:
    """Keep in this transaction that a waiting order is held for longer. Conflict as above."""
    while True:
        before = _all_of(order_id)
        waiting = [intent.act for intent in before if intent.applied_at is None]
        if "extend" in waiting:
            raise Conflict("This order's hold was extended already", "already_extended")
        if waiting:
            raise Conflict("Something else was asked of this order before", "conflicting_intent")
        if _keep(order_id, before, actor, act="extend", units=seconds):
            return


def _keep(order_id: int, before: list[OrderIntent], actor: Actor, **what: object) -> bool:
    """Tell whether it was kept; else somebody came between, and all is to be looked at again."""
    statement = insert(OrderIntent).values(
        epoch=epoch(),
        order_id=order_id,
        number=before[-1].number + 1 if before else 1,
        actor=actor.name,
        address=actor.address,
        **what,
    )
    returning = statement.on_conflict_do_nothing().returning(OrderIntent.number)
    return db.session.execute(returning).scalar() is not None


def accept_confirms(wishes: Mapping[int, tuple[str | None, Actor]]) -> set[int]:
    """Keep that waiting orders are paid, by what and who says so; return of which it was kept.

    Not of those for which anything was accepted before: that is `accept_confirm`'s.
    """
    orders = sorted(wishes)
    values = {
        "orders": orders,
        "payments": [wishes[order_id][0] for order_id in orders],
        "actors": [wishes[order_id][1].name for order_id in orders],
        "addresses": [wishes[order_id][1].address for order_id in orders],
    }
    return set(db.session.scalars(ACCEPT_CONFIRMS, values))


def apply_open() -> int:
    """Carry out what was accepted for orders that are stored by now; return of how many orders.

    Where Redis is away the units follow later, as those of any other movement.
    """
    found = list(db.session.scalars(STORED, {"most": APPLIED_AT_ONCE}))
    db.session.rollback()
    paid = _confirm_together(found) if len(found) > 1 else set()
    returned: list[states.Returned] = []
    for order_id in found:
        if order_id not in paid:
            returned += _commit(order_id) or []
    if len(returned) > 1:
        try:
            told = apply_together([moved.movement_id for moved in returned])
        except Unavailable as error:
            db.session.rollback()
            log.warning("the units of %d orders return later: %s", len(returned), error)
            return len(found)
        returned = [moved for moved in returned if moved.movement_id not in told]
    _tell(returned)
    return len(found)


def _confirm_together(order_ids: list[int]) -> set[int]:
    """Confirm those of these orders of which nothing else was asked, in one transaction."""
    rows = db.session.execute(PAID, {"ids": order_ids}).all()
    told = search.described([search.from_row(row[:-1]) for row in rows])
    orders = [states.confirmed(order, row[-1]) for row, order in zip(rows, told, strict=True)]
    paid = [order["id"] for order in orders]
    if orders:
        db.session.execute(APPLIED, {"ids": paid})
        states.confirm_all(orders)
    db.session.commit()
    return set(paid)


def apply_to(order_id: int) -> bool:
    """Carry out what was accepted for one order, if it is stored; tell whether it is."""
    returned = _commit(order_id)
    _tell(returned or [])
    return returned is not None


def _commit(order_id: int) -> list[states.Returned] | None:
    """Carry it out in PostgreSQL; return what Redis is to be told, None where it is not stored."""
    try:
        order = states.lock(order_id)
    except UnknownOrder:
        db.session.rollback()
        return None
    returned = carry_out(order)
    db.session.commit()
    return returned


def _tell(returned: list[states.Returned]) -> None:
    """Tell Redis of units that were given back, movement by movement."""
    for moved in returned:
        try:
            apply_movement(db.session.get_one(StockMovement, moved.movement_id))
        except (Unavailable, Conflict) as error:
            db.session.rollback()
            log.warning("the units of movement %d return later: %s", moved.movement_id, error)


def carry_out(order: Order) -> list[states.Returned]:
    """Do what was accepted for a locked order, in this transaction.

    Whoever acts on a stored order does this first: what was accepted earlier comes earlier.
    """
    waiting = of_order(order.id)
    return [returned for intent in waiting if (returned := _carry_out(order, intent))]


def _carry_out(order: Order, intent: OrderIntent) -> states.Returned | None:
    intent.applied_at = datetime.now(UTC)
    actor = Actor(intent.actor, intent.address)
    try:
        if intent.act == "confirm":
            states.confirm(order, intent.payment)
            return None
        if intent.act == "extend":
            states.extend(order, intent.units or 0)
            return None
        return states.give_back(order, intent.units, RETURNS[intent.act], intent.reason, actor)
    except Conflict as refusal:
        intent.refusal = str(refusal)
        return None


def give_up(order_id: int, why: str) -> None:
    """Let nothing wait any more for an order that will never be stored, in this transaction."""
    db.session.execute(
        update(OrderIntent)
        .where(
            OrderIntent.epoch == epoch(),
            OrderIntent.order_id == order_id,
            OrderIntent.applied_at.is_(None),
        )
        .values(applied_at=datetime.now(UTC), refusal=why)
    )
