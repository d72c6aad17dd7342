"""Orders that could not be stored: looking at them, replaying them, and giving them up.

Their stock stays held until a person decides. A replay stores the order after all; abandoning it
returns its units, by a movement, exactly once.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError

from ..audit import Actor, record
from ..database import is_unavailable
from ..extensions import db, stock
from ..generation import keep_on_record
from ..models import DeadLetter, Order, Product, StockMovement, user_columns
from ..problems import Conflict, Unavailable
from ..products.movements import apply_movement
from ..reading import User
from ..stock.entries import Entry
from . import events, intents
from .lookup import columns_of

log = logging.getLogger(__name__)

# What is left is applied by the sweeper within a second or two; a page need not wait for it.
MOVEMENTS_AT_ONCE = 50


@dataclass(frozen=True)
class Filters:
    """Which letters to list; None stands for all."""

    state: str | None = "open"  # open | replayed | abandoned
    product_id: int | None = None
    user: User | None = None
    error: str | None = None  # a part of the error's text


def list_letters(
    filters: Filters | None = None, before: int | None = None, limit: int = 50
) -> list[DeadLetter]:
    """Return letters, newest first; `before` is the id where the page before ended."""
    filters = filters or Filters()
    query = select(DeadLetter).order_by(DeadLetter.id.desc()).limit(limit)
    if filters.state == "open":
        query = query.where(DeadLetter.resolution.is_(None))
    elif filters.state is not None:
        query = query.where(DeadLetter.resolution == filters.state)
    if filters.product_id is not None:
        query = query.where(DeadLetter.product_id == filters.product_id)
    if filters.user is not None:
        query = query.where(DeadLetter.is_of(filters.user))
    if filters.error:
        query = query.where(DeadLetter.error.icontains(filters.error, autoescape=True))
    if before is not None:
        query = query.where(DeadLetter.id < before)
    return list(db.session.scalars(query))


@dataclass(frozen=True)
class Effect:
    """What a decision would do to stock. `obstacle` says why a replay would fail."""

    letter: DeadLetter
    returned_units: int
    obstacle: str | None


def effect_of(ids: list[int]) -> list[Effect]:
    """Foretell, for each open letter among `ids`, what abandoning and what replaying it would do.

    A replay never changes free stock: the units were taken by the claim.
    """
    letters = db.session.scalars(
        select(DeadLetter)
        .where(DeadLetter.id.in_(ids), DeadLetter.resolution.is_(None))
        .order_by(DeadLetter.id)
    ).all()
    for letter in letters:
        _read_again(letter)
    return [Effect(letter, _returnable(letter), _obstacle(letter)) for letter in letters]


def _read_again(letter: DeadLetter) -> None:
    """Fill in what an older worker could not read: 0.1.0 knew no texts for users, no references."""
    if letter.order_id is None:
        with suppress(ValueError):
            entry = Entry.parse(letter.payload)
            letter.order_id = int(letter.stream_id.partition("-")[0])
            for name, value in user_columns(entry.user).items():
                setattr(letter, name, value)
            letter.product_id, letter.quantity = entry.product_id, entry.quantity
            letter.reference = entry.reference


def _returnable(letter: DeadLetter) -> int:
    """Return the units that abandoning gives back: none where no product can be told."""
    if letter.product_id is None or not letter.quantity or letter.quantity < 0:
        return 0
    return letter.quantity if db.session.get(Product, letter.product_id) else 0


def _obstacle(letter: DeadLetter) -> str | None:
    try:
        entry = Entry.parse(letter.payload)
    except ValueError:
        return "It is not an order."
    if not db.session.get(Product, entry.product_id):
        return f"There is no product {entry.product_id}."
    if other := _order_under_key(entry):
        return f"The user has order {other} under the same Idempotency-Key."
    return None


def _order_under_key(entry: Entry) -> int | None:
    if entry.idempotency_key is None:
        return None
    return db.session.scalar(
        select(Order.id).where(
            Order.is_of(entry.user), Order.idempotency_key == entry.idempotency_key
        )
    )


@dataclass(frozen=True)
class Resolved:
    """What became of one letter: `done`, or in words why not."""

    letter_id: int
    done: bool
    message: str


def _resolve_each(ids: list[int], resolve: Callable[[DeadLetter], Resolved]) -> list[Resolved]:
    """Lock the letters and resolve the open ones, each by itself."""
    letters = {
        letter.id: letter
        for letter in db.session.scalars(
            select(DeadLetter)
            .where(DeadLetter.id.in_(ids))
            .order_by(DeadLetter.id)
            .with_for_update()
            .execution_options(populate_existing=True)
        )
    }
    results = []
    for letter_id in dict.fromkeys(ids):
        letter = letters.get(letter_id)
        if letter is None:
            results.append(Resolved(letter_id, False, "There is no such dead letter."))
        elif letter.resolution:
            results.append(Resolved(letter_id, False, f"It was {letter.resolution} already."))
        else:
            _read_again(letter)
            results.append(resolve(letter))
    return results


def _mark(letter: DeadLetter, resolution: str, reason: str, actor: Actor) -> None:
    letter.resolution = resolution
    letter.resolved_at = datetime.now(UTC)
    letter.resolved_by = actor.name
    letter.resolve_reason = reason


def replay(ids: list[int], reason: str, actor: Actor) -> list[Resolved]:
    """Try to store the orders after all; each succeeds or fails by itself.

    An order whose id was taken by another one gets a new id. Raises stock.Unavailable when Redis
    can't be reached and has to know: it gives new ids, and tells an Idempotency-Key's order. Then
    nothing is changed.
    """
    # A rebuild waits for it, or has begun and Redis refuses: it reads the keys before or after.
    generation = keep_on_record()

    def resolve(letter: DeadLetter) -> Resolved:
        if obstacle := _obstacle(letter):
            return Resolved(letter.id, False, obstacle)
        entry = Entry.parse(letter.payload)
        status = "HELD" if entry.held_until_ms else "CONFIRMED"
        # What has no obstacle was read as an order, with an id.
        order_id = cast("int", letter.order_id)
        if db.session.get(Order, order_id) is not None:
            order_id = stock.new_order_id(entry.user)
        try:
            with db.session.begin_nested():
                db.session.execute(
                    insert(Order).values(
                        id=order_id,
                        status=status,
                        **user_columns(entry.user),
                        **columns_of(entry),
                    )
                )
                # Before the commit: killed in between, a stored order must not be told as failed.
                if not stock.stand(generation, letter.stream_id, entry, order_id):
                    raise Conflict("A worker is still at it; try again in a second", "waiting")
        except Conflict as error:
            return Resolved(letter.id, False, f"{error}.")
        except (DBAPIError, ValueError, OverflowError) as error:
            if is_unavailable(error):
                raise
            cause = str(getattr(error, "orig", error)).strip().partition("\n")[0]
            return Resolved(letter.id, False, f"It was refused again: {cause}")
        _mark(letter, "replayed", reason, actor)
        events.record_ids(f"order.{status.lower()}", [order_id])
        if order_id != letter.order_id:
            letter.replayed_as = order_id
        record(
            actor,
            "dead-letter.replay",
            f"dead letter {letter.id}",
            before={"error": letter.error},
            after={"order": order_id, "reason": reason},
        )
        return Resolved(letter.id, True, f"Stored as order {order_id}.")

    results = _resolve_each(ids, resolve)
    db.session.commit()
    return results


def abandon(ids: list[int], reason: str, actor: Actor) -> list[Resolved]:
    """Give the orders up; their units go back to free stock exactly once.

    While Redis can't be reached that is recorded, and the units follow when it is back.
    """
    movements: list[StockMovement] = []

    def resolve(letter: DeadLetter) -> Resolved:
        units = _returnable(letter)
        _mark(letter, "abandoned", reason, actor)
        events.record_letter("order.cancelled", letter, units=units, reason=reason)
        if letter.order_id:
            intents.give_up(letter.order_id, "the order was abandoned")
        record(
            actor,
            "dead-letter.abandon",
            f"dead letter {letter.id}",
            before={"error": letter.error, "payload": letter.payload},
            after={"returned": units, "reason": reason},
        )
        if not units:
            return Resolved(letter.id, True, "Abandoned; it held no stock.")
        movement = StockMovement(
            product_id=letter.product_id,
            kind="return",
            units=units,
            reason=reason,
            actor=actor.name,
            user=letter.user,
            dead_letter_id=letter.id,
        )
        db.session.add(movement)
        movements.append(movement)
        return Resolved(letter.id, True, f"Abandoned; {units} units of stock returned.")

    results = _resolve_each(ids, resolve)
    db.session.commit()
    try:
        for movement in movements[:MOVEMENTS_AT_ONCE]:
            apply_movement(movement)
    except (Unavailable, Conflict) as error:
        db.session.rollback()
        log.warning("the units of abandoned orders return later: %s", error)
    return results
