"""Every movement of stock that is not a purchase: restocks, corrections, and applying them.

PostgreSQL is told first, Redis second, and a mark in PostgreSQL says that Redis has done it. What a
crash leaves in between is finished by `finish_pending`, any number of times.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IntegrityError

from ..audit import SYSTEM, Actor, record
from ..extensions import db, stock
from ..generation import keep_on_record
from ..models import ENDED_STATUSES, DeadLetter, Order, Product, ProductTotals, StockMovement
from ..problems import Conflict, InvalidRequest, KeyMismatch, Unavailable, UnknownProduct
from ..reading import MAX_RESTOCK, MAX_STOCK
from ..stock.entries import Entry, standing
from ..stock.gateway import Moved
from ..stock.moves import Ended, Expired, Movement, Together
from ..times import to_ms
from .observed import restocked
from .sale import in_force, publish, require_sale


class Finish(NamedTuple):
    """What else changes with a movement, in the transaction that ends it.

    `refused` is told the script's word, and returns the error to raise.
    """

    applied: Callable[[StockMovement], None]
    refused: Callable[[StockMovement, str], Conflict]


# By the movement's kind; said by the rooms above, whose orders these are.
FINISH: dict[str, Finish] = {}


@dataclass(frozen=True)
class Restocked:
    """What a restock did: the free stock right after it, and whether this is a repeated answer."""

    free: int
    replayed: bool = False


def restock(
    product_id: int, units: int, reason: str | None, actor: Actor, key: str | None = None
) -> Restocked:
    """Add units to a product's free stock, once for each Idempotency-Key.

    Raises UnknownProduct, KeyMismatch, and stock.Unavailable; when the movement was recorded but
    Redis failed after that, the sweeper applies it, and a retry with the same key is safe.
    """
    if not 1 <= units <= MAX_RESTOCK:
        raise InvalidRequest(f"amount must be from 1 to {MAX_RESTOCK}", "amount")
    if key and (replay := _restock_of(key)):
        return _replayed(replay, product_id, units, reason)
    require_sale()
    if db.session.get(Product, product_id) is None:
        raise UnknownProduct(product_id)
    movement = StockMovement(
        product_id=product_id,
        kind="restock",
        units=units,
        reason=reason,
        actor=actor.name,
        idempotency_key=key,
    )
    db.session.add(movement)
    record(
        actor, "product.restock", f"product {product_id}", after={"units": units, "reason": reason}
    )
    try:
        db.session.commit()
    except IntegrityError:
        # The same key twice at once: the other one was first.
        db.session.rollback()
        if not key or not (replay := _restock_of(key)):
            raise
        return _replayed(replay, product_id, units, reason)
    return Restocked(apply_movement(movement))


def _restock_of(key: str) -> StockMovement | None:
    return db.session.scalar(select(StockMovement).where(StockMovement.idempotency_key == key))


def _replayed(
    movement: StockMovement, product_id: int, units: int, reason: str | None
) -> Restocked:
    if (movement.product_id, movement.units, movement.reason) != (product_id, units, reason):
        raise KeyMismatch
    if movement.applied_at is None:
        return Restocked(apply_movement(movement), replayed=True)
    return Restocked(movement.stock_after or 0, replayed=True)


def correct(product_id: int, units: int, reason: str, actor: Actor) -> int:
    """Add or (negative) take away units because a count was wrong; return the free stock.

    Raises UnknownProduct, InvalidRequest, stock.Unavailable, and Conflict when more would be taken
    than is free.
    """
    if units == 0 or abs(units) > MAX_STOCK:
        raise InvalidRequest(f"units must be from 1 to {MAX_STOCK}, or negative", "units")
    require_sale()
    if db.session.get(Product, product_id) is None:
        raise UnknownProduct(product_id)
    movement = StockMovement(
        product_id=product_id, kind="correction", units=units, reason=reason, actor=actor.name
    )
    db.session.add(movement)
    record(
        actor, "product.correct", f"product {product_id}", after={"units": units, "reason": reason}
    )
    db.session.commit()
    return apply_movement(movement)


def apply_movement(movement: StockMovement) -> int:
    """Carry a recorded movement out in Redis and mark it applied; return the free stock.

    The movement is committed, and so is everything else. Safe to repeat, and safe for two at once:
    the second waits for the first. Raises stock.Unavailable; raises Conflict, and removes the
    movement, when a correction would take more than is free.
    """
    (movement_id,) = inspect(movement).identity or ()
    # What this transaction has read it holds against a reset, which holds the lock that is asked
    # for now: each would wait for the other.
    db.session.rollback()
    generation = keep_on_record()
    found = db.session.get(StockMovement, movement_id, with_for_update=True, populate_existing=True)
    if found is None:
        db.session.rollback()
        raise Conflict("The movement was refused: too few units were free", "insufficient_stock")
    movement = found
    if movement.applied_at is not None:
        db.session.commit()
        return movement.stock_after or 0
    outcome, free, parts = _move(generation, movement)
    if outcome == "unknown":
        publish(db.session.get_one(Product, movement.product_id))
        outcome, free, parts = _move(generation, movement)
    finish = FINISH.get(movement.kind)
    if outcome in ("short", "capped"):
        refusal = Conflict(f"Only {free} units are free", "insufficient_stock")
        if finish:
            refusal = finish.refused(movement, outcome)
        target, units = f"product {movement.product_id}", movement.units
        db.session.delete(movement)
        record(SYSTEM, "movement.refused", target, before={"units": units}, after={"free": free})
        db.session.commit()
        raise refusal
    movement.applied_at = datetime.now(UTC)
    movement.stock_after = free
    movement.parts = parts
    if finish:
        finish.applied(movement)
    if movement.kind in ("restock", "correction") and movement.units > 0:
        restocked(movement, free)
    db.session.commit()
    return free


def _move(generation: str, movement: StockMovement) -> Moved:
    if movement.order_ids is not None:
        (moved,) = stock.move_expired(generation, _together([movement]))
        return moved
    return stock.move(generation, *_told(movement, _ended_by(movement)))


def _told(movement: StockMovement, ended: Ended | None) -> Movement:
    """Return a movement as Redis is told of it."""
    return Movement(movement.id, movement.product_id, movement.units, movement.user, ended)


EXPIRED = text("""
SELECT m.id, o.user_id, o.user_name, o.returned_units, o.idempotency_key,
       CASE WHEN o.idempotency_key IS NOT NULL THEN
         concat_ws(' ', o.id, unit_price_cents, currency, status, o.product_id, quantity, reference)
       END
FROM stock_movements m JOIN orders o ON o.id = ANY(m.order_ids)
WHERE m.id = ANY(:ids) ORDER BY o.user_id, o.user_name
""")


def expired(movement_ids: list[int]) -> dict[int, list[Expired]]:
    """Return the orders of each of these movements as Redis is told of them."""
    found: dict[int, list[Expired]] = defaultdict(list)
    for movement_id, number, name, *rest in db.session.execute(EXPIRED, {"ids": movement_ids}):
        found[movement_id].append(Expired(name if number is None else number, *rest))
    return found


def _together(movements: Iterable[Any]) -> list[Together]:
    """Return movements of orders that expired together, with the orders."""
    told = [(movement.id, movement.product_id) for movement in movements]
    orders = expired([movement_id for movement_id, _ in told])
    return [Together(*of, orders[of[0]]) for of in told]


def coming(product_ids: Sequence[int]) -> dict[int, list[int]]:
    """Return of these products what each shard still gets by movements that are on record."""
    found = db.session.scalars(
        select(StockMovement).where(
            StockMovement.product_id.in_(product_ids),
            StockMovement.applied_at.is_(None),
            StockMovement.units > 0,
        )
    ).all()
    ended = expired([movement.id for movement in found if movement.order_ids is not None])
    units = {product_id: [0] * len(stock.shards) for product_id in product_ids}
    for movement in found:
        if movement.order_ids is None:
            parts = stock.parts_of(_told(movement, None))
        else:
            by_shard = stock.of_each_shard(ended[movement.id])
            parts = {shard: sum(of.units for of in part) for shard, part in enumerate(by_shard)}
        for shard, part in parts.items():
            units[movement.product_id][shard] += part
    return units


def apply_first_stock(created: list[tuple[Product, StockMovement]]) -> None:
    """Publish new products with their first movements, in one round trip, and mark these applied.

    Safe to repeat, and beside `apply_movement`. Raises stock.Unavailable.
    """
    ids = [movement.id for _, movement in created]
    if not ids:
        return
    generation = keep_on_record()
    # Nobody else applies them meanwhile; in this order, so that two wait for each other in turn.
    locked = select(StockMovement.id).where(StockMovement.id.in_(ids)).order_by(StockMovement.id)
    db.session.execute(locked.with_for_update())
    moved = stock.put_new(
        generation,
        [
            (product.id, product.version, in_force(product), movement.id, movement.units)
            for product, movement in created
        ],
    )
    for (_, movement), (_, free, parts) in zip(created, moved, strict=True):
        movement.applied_at = datetime.now(UTC)
        movement.stock_after = free
        movement.parts = parts
    db.session.commit()


def _ended_by(movement: StockMovement, order: Order | None = None) -> Ended | None:
    """Return the order that a movement ends, or lets stand again, if it came with a key.

    `order` is the movement's, if it was just read.
    """
    if movement.order_id:
        order = order or db.session.get(Order, movement.order_id, populate_existing=True)
        if order is None or order.idempotency_key is None:
            return None
        if movement.kind == "reclaim":
            held_until = order.extended_from or order.held_until
            status = standing(to_ms(held_until) if held_until else None)
            return Ended(order.idempotency_key, order.id, status)
        # One that gave back a part still stands: its key's record is as it was.
        ended = order.status in ENDED_STATUSES
        return Ended(order.idempotency_key, order.id, order.status) if ended else None
    if movement.dead_letter_id:
        letter = db.session.get_one(DeadLetter, movement.dead_letter_id)
        key = Entry.parse(letter.payload).idempotency_key
        return Ended(key, letter.order_id, "CANCELLED") if key and letter.order_id else None
    return None


PENDING_AT_ONCE = 1000
# Of those that can't be applied so many are tried before the next sweep goes on behind them.
FAILED_AT_ONCE = 20
APPLIED = text("""
UPDATE stock_movements m SET applied_at = clock_timestamp(), stock_after = done.free,
                            parts = CAST(done.parts AS bigint[])
FROM unnest(CAST(:ids AS bigint[]), CAST(:free AS bigint[]), CAST(:parts AS text[]))
     AS done (id, free, parts)
WHERE m.id = done.id
""")


def apply_together(movement_ids: Sequence[int]) -> set[int]:
    """Carry out recorded returns as `apply_movement` does each, with one round trip for all.

    Returns those that Redis has now; the others (it does not know the product of, or they are of
    many orders) are left to `apply_movement`. Raises stock.Unavailable.
    """
    generation = keep_on_record()
    found = db.session.scalars(
        select(StockMovement)
        .where(
            StockMovement.id.in_(movement_ids),
            StockMovement.applied_at.is_(None),
            # One of many orders has a script of its own.
            StockMovement.order_ids.is_(None),
        )
        .order_by(StockMovement.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).all()
    # All in one statement, for _ended_by.
    ids = [movement.order_id for movement in found]
    orders = select(Order).where(Order.id.in_(ids)).execution_options(populate_existing=True)
    by_id = {order.id: order for order in db.session.scalars(orders)}
    moved = stock.move_all(
        generation,
        [_told(m, _ended_by(m, by_id.get(m.order_id or 0))) for m in found],
    )
    return _mark_applied([movement.id for movement in found], moved)


ENDED = text("""
SELECT id, product_id FROM stock_movements
WHERE id = ANY(:ids) AND applied_at IS NULL AND order_ids IS NOT NULL ORDER BY id FOR UPDATE
""")


def apply_ended(movement_ids: Sequence[int]) -> None:
    """Carry out recorded returns of many orders each, as `apply_together` does those of one.

    Raises stock.Unavailable.
    """
    generation = keep_on_record()
    found = db.session.execute(ENDED, {"ids": list(movement_ids)}).all()
    moved = stock.move_expired(generation, _together(found))
    _mark_applied([movement.id for movement in found], moved)


def _mark_applied(movement_ids: Sequence[int], moved: Sequence[Moved]) -> set[int]:
    """Mark those that Redis has now, commit, and return them."""
    done = [
        (movement_id, free, parts and f"{{{','.join(map(str, parts))}}}")
        for movement_id, (outcome, free, parts) in zip(movement_ids, moved, strict=True)
        if outcome in ("applied", "repeated")
    ]
    ids, free, parts = map(list, zip(*done, strict=True)) if done else ([], [], [])
    db.session.execute(APPLIED, {"ids": ids, "free": free, "parts": parts})
    db.session.commit()
    return set(ids)


class Finisher:
    """Applies the movements that a crash left between PostgreSQL and Redis.

    One that waits for a shard which is out of reach keeps none of the others.
    """

    def __init__(self) -> None:
        self._after = 0

    def run_once(self) -> int:
        """Return how many were looked at. Raises stock.Unavailable where some must wait."""
        pending = db.session.execute(
            select(StockMovement.id, StockMovement.kind)
            .where(StockMovement.applied_at.is_(None), StockMovement.id > self._after)
            .order_by(StockMovement.id)
            .limit(PENDING_AT_ONCE)
        ).all()
        self._after = 0
        # A bulk cancel that was killed leaves hundreds.
        returns = [movement_id for movement_id, kind in pending if kind == "return"]
        done, failed = set(), []
        try:
            done = apply_together(returns) if returns else set()
        except Unavailable:
            # One by one, then: each is of one shard alone.
            db.session.rollback()
        for movement_id, _ in pending:
            movement = None if movement_id in done else db.session.get(StockMovement, movement_id)
            if movement is None:
                continue
            try:
                with suppress(Conflict):
                    apply_movement(movement)
            except Unavailable as error:
                db.session.rollback()
                failed.append(error)
                if len(failed) == FAILED_AT_ONCE:
                    self._after = movement_id
                    break
        if failed:
            raise failed[0]
        return len(pending)


def finish_pending() -> int:
    """Do it once, from the oldest on. See Finisher.run_once."""
    return Finisher().run_once()


def movements_of(
    product_id: int, before: int | None = None, limit: int = 50
) -> list[StockMovement]:
    """Return a product's movements, newest first."""
    query = (
        select(StockMovement)
        .where(StockMovement.product_id == product_id)
        .order_by(StockMovement.id.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(StockMovement.id < before)
    return list(db.session.scalars(query))


def totals() -> dict[int, ProductTotals]:
    """Return the sums of every product, by its id."""
    return {row.product_id: row for row in db.session.scalars(select(ProductTotals))}
