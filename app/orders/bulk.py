"""Cancelling all orders of a product, or those of a filter: some hundreds at a time, by a worker.

What is left to do stands in PostgreSQL: a worker that is killed in the middle has done whole
batches, and another one goes on behind the last of them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, func, select, true

from .. import idempotency
from ..audit import SYSTEM, Actor, record
from ..extensions import db, stock
from ..models import STANDING_STATUSES, BulkCancel, Order, Product, ProductTotals
from ..problems import Conflict, Unavailable, UnknownProduct, Unprepared
from ..products.movements import apply_together
from ..reading import User, canonical
from ..times import utc_text
from . import states
from .search import Filter

log = logging.getLogger(__name__)

START = "POST /orders/bulk-cancels"
# A transaction of about a tenth of a second: whoever wants one of its orders waits for so long.
BATCH_ORDERS = 500
LISTED = 50


class CountChanged(Conflict):
    """There are not as many orders as were expected; `plan` says what there is."""

    def __init__(self, plan: "Plan") -> None:
        super().__init__(f"There are {plan.orders} such orders now", "count_changed")
        self.plan = plan


@dataclass(frozen=True)
class Wanted:
    """Which orders to cancel: those of a product that stand; None where everything will do."""

    product_id: int
    user: User | None = None
    reference: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_all(self) -> bool:
        return self == Wanted(self.product_id)

    @classmethod
    def of(cls, wanted: Filter) -> "Wanted":
        """Return what a search's filter looks for, apart from the status; it names a product."""
        assert wanted.product_id is not None
        return cls(wanted.product_id, wanted.user, wanted.reference, wanted.since, wanted.until)


@dataclass(frozen=True)
class Plan:
    """How many stored orders would be cancelled, up to an id; what is sold later is left alone."""

    wanted: Wanted
    orders: int
    units: int
    through_order_id: int


def _standing(wanted: Wanted, *columns: Any) -> Select[Any]:
    query = select(*columns).where(
        Order.product_id == wanted.product_id, Order.status.in_(STANDING_STATUSES)
    )
    if wanted.user is not None:
        query = query.where(Order.is_of(wanted.user))
    if wanted.reference is not None:
        query = query.where(Order.reference == wanted.reference)
    if wanted.since is not None:
        query = query.where(Order.claimed_at >= wanted.since)
    if wanted.until is not None:
        query = query.where(Order.claimed_at < wanted.until)
    return query


def plan(wanted: Wanted, through: int | None = None) -> Plan:
    """Count the orders, up to the id `through`, or the last one. Raises UnknownProduct.

    Those of a whole product are known without counting; only what came after `through` is counted.
    """
    # All figures of one instant.
    db.session.rollback()
    db.session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
    try:
        if db.session.get(Product, wanted.product_id) is None:
            raise UnknownProduct(wanted.product_id)
        if through is None:
            through = db.session.scalar(
                select(func.max(Order.id)).where(Order.product_id == wanted.product_id)
            )
        through = through or 0
        figures = (func.count(), func.coalesce(func.sum(Order.quantity - Order.returned_units), 0))
        if not wanted.is_all:
            within = _standing(wanted, *figures).where(Order.id <= through)
            orders, units = db.session.execute(within).one()
            return Plan(wanted, orders, int(units), through)
        sums = db.session.get_one(ProductTotals, wanted.product_id, populate_existing=True)
        later = _standing(wanted, *figures).where(Order.id > through)
        orders, units = db.session.execute(later).one()
        return Plan(
            wanted,
            sums.confirmed_orders + sums.held_orders - orders,
            sums.confirmed_units + sums.held_units - int(units),
            through,
        )
    finally:
        db.session.rollback()


def start(
    wanted: Wanted,
    expected: int,
    reason: str,
    actor: Actor,
    through: int | None = None,
    key: str | None = None,
) -> tuple[BulkCancel, bool]:
    """Have the orders cancelled; return the act, and whether this is a repeated answer.

    Nothing is done, and CountChanged raised, unless there are exactly `expected` of them up to the
    id `through`. Raises UnknownProduct and KeyMismatch.
    """
    found = plan(wanted, through)
    taken = None
    if key:
        taken = idempotency.take(START, "", key, [wanted, expected, through, reason])
        if taken.answer is not None:
            bulk_id = taken.answer["id"]
            db.session.rollback()
            return get(bulk_id), True
    if found.orders != expected:
        db.session.rollback()
        raise CountChanged(found)
    bulk = BulkCancel(
        product_id=wanted.product_id,
        user_text=None if wanted.user is None else str(wanted.user),
        reference=wanted.reference,
        since=wanted.since,
        until=wanted.until,
        through_order_id=found.through_order_id,
        orders=found.orders,
        reason=reason,
        actor=actor.name,
        address=actor.address,
    )
    db.session.add(bulk)
    db.session.flush()
    record(
        actor,
        "order.bulk-cancel",
        f"product {wanted.product_id}",
        after={"bulk": bulk.id, "orders": found.orders, "reason": reason},
    )
    if taken:
        taken.answer = {"id": bulk.id}
    db.session.commit()
    return bulk, False


def get(bulk_id: int) -> BulkCancel:
    """Raises LookupError."""
    found = db.session.get(BulkCancel, bulk_id, populate_existing=True)
    if found is None:
        raise LookupError(f"There is no bulk cancel {bulk_id}")
    return found


def newest(product_id: int | None = None, limit: int = LISTED) -> Sequence[BulkCancel]:
    query = select(BulkCancel).order_by(BulkCancel.id.desc()).limit(limit)
    if product_id is not None:
        query = query.where(BulkCancel.product_id == product_id)
    return db.session.scalars(query).all()


def stop(bulk_id: int, actor: Actor) -> BulkCancel:
    """Let no further batch begin. A second time, or after its end, nothing changes.

    Raises LookupError.
    """
    bulk = db.session.get(BulkCancel, bulk_id, with_for_update=True, populate_existing=True)
    if bulk is None:
        raise LookupError(f"There is no bulk cancel {bulk_id}")
    if bulk.finished_at is None and bulk.stopped_at is None:
        bulk.stopped_at = bulk.finished_at = datetime.now(UTC)
        bulk.stopped_by = actor.name
        record(actor, "order.bulk-cancel.stop", f"product {bulk.product_id}", after=_told(bulk))
    db.session.commit()
    return bulk


def _told(bulk: BulkCancel) -> dict[str, int]:
    return {
        "bulk": bulk.id,
        "orders": bulk.cancelled_orders,
        "units": bulk.cancelled_units,
    }


def step(bulk_id: int | None = None) -> bool:
    """Cancel the next batch of the oldest bulk cancel that nobody is at; tell whether there is one.

    Raises Unavailable before anything is cancelled while Redis can't take the units.
    """
    query = select(BulkCancel).where(BulkCancel.finished_at.is_(None)).order_by(BulkCancel.id)
    if bulk_id is not None:
        query = query.where(BulkCancel.id == bulk_id)
    bulk = db.session.scalar(query.limit(1).with_for_update(skip_locked=True))
    if bulk is None:
        db.session.rollback()
        return False
    if not stock.generation():
        raise Unprepared("the sale is not in Redis")
    ids = db.session.scalars(
        _standing(_wanted(bulk), Order.id)
        .where(Order.id > bulk.last_order_id, Order.id <= bulk.through_order_id)
        # Of several shards a later order may have a lower id, and was not among those counted.
        .where(true() if len(stock.shards) == 1 else Order.persisted_at < bulk.created_at)
        .order_by(Order.id)
        .limit(BATCH_ORDERS)
    ).all()
    if not ids:
        bulk.finished_at = datetime.now(UTC)
        record(SYSTEM, "order.bulk-cancel.done", f"product {bulk.product_id}", after=_told(bulk))
        db.session.commit()
        return True
    actor = Actor(bulk.actor, bulk.address)
    states.lock_all(ids)
    returned = [
        part
        for status in ("CANCELLED", "RELEASED")
        for part in states.give_back_all(ids, status, bulk.reason, actor)
    ]
    bulk.cancelled_orders += len(returned)
    bulk.cancelled_units += sum(part.units for part in returned)
    bulk.last_order_id = ids[-1]
    db.session.commit()
    try:
        apply_together([part.movement_id for part in returned])
    except Unavailable as error:
        db.session.rollback()
        log.warning("the units of %d orders return later: %s", len(returned), error)
    return True


def _wanted(bulk: BulkCancel) -> Wanted:
    user = None if bulk.user_text is None else canonical(bulk.user_text)
    return Wanted(bulk.product_id, user, bulk.reference, bulk.since, bulk.until)


def describe(bulk: BulkCancel) -> dict[str, Any]:
    """Return a bulk cancel in the API's form."""
    return {
        "id": bulk.id,
        "status": bulk.state,
        "productId": bulk.product_id,
        "userId": bulk.user_text,
        "reference": bulk.reference,
        "claimedFrom": bulk.since and utc_text(bulk.since),
        "claimedUntil": bulk.until and utc_text(bulk.until),
        "throughOrderId": bulk.through_order_id,
        "orders": bulk.orders,
        "cancelledOrders": bulk.cancelled_orders,
        "cancelledUnits": bulk.cancelled_units,
        "reason": bulk.reason,
        "createdAt": utc_text(bulk.created_at),
        "finishedAt": bulk.finished_at and utc_text(bulk.finished_at),
    }
