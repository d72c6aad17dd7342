"""Orders that are held until they are paid for: confirmed, released, extended, paid too late.

PostgreSQL decides what becomes of a hold, by the order's state under its row's lock. An order that
still waits in Redis is decided as soon as it is stored: see intents.py.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import select, text

from .. import idempotency, planned
from ..audit import Actor, record
from ..extensions import db, stock
from ..models import Order, RequestKey, StockMovement
from ..problems import Conflict, KeyMismatch, Unavailable, UnknownOrder
from ..products.movements import apply_movement
from ..stock.entries import Entry
from ..times import utc_text
from . import cancelling, events, intents, search, states
from .search import described
from .states import HoldExpired

CONFIRM = "POST /orders/confirm"
RELEASE = "POST /orders/release"
EXTEND = "POST /orders/extend"
ROUTES = (CONFIRM, RELEASE, EXTEND)
MAX_PAYMENT = 128


# The orders, locked, of each whether something was accepted that is still to be done, and what its
# product was called. One that somebody else has locked keeps nobody waiting but who asks for it.
COLUMNS = ", ".join(column.key for column in search.COLUMNS)
LOCKED = text(f"""
SELECT {COLUMNS},
       EXISTS (SELECT FROM order_intents i WHERE i.order_id = sold.id AND i.applied_at IS NULL),
       {events.NAME}
FROM orders sold WHERE id = ANY(CAST(:ids AS bigint[])) ORDER BY id FOR UPDATE SKIP LOCKED
""")  # noqa: S608


class Confirm(NamedTuple):
    """That an order is paid; `payment` is the shop's or its provider's name for the payment."""

    order_id: int
    actor: Actor
    payment: str | None = None
    key: str | None = None
    # Why a person did it; noted in the audit then.
    reason: str | None = None


@dataclass(frozen=True)
class Done:
    """The order as it is after the act, see describe.

    `waits`: the act is done as soon as the order is stored. `reclaimed`: the hold had ended, and
    its units were taken anew.
    """

    order: dict[str, Any]
    waits: bool = False
    reclaimed: bool = False
    replayed: bool = False

    @property
    def answer(self) -> dict[str, Any]:
        """What a repeated request is told."""
        return {"order": self.order, "waits": self.waits, "reclaimed": self.reclaimed}


def confirm(wish: Confirm) -> Done:
    """Confirm an order, once for each Idempotency-Key.

    Raises UnknownOrder, KeyMismatch, HoldExpired where it is too late and the units are gone,
    Conflict with a code that names another state, and Unavailable: the same key then tells what
    has become of it.
    """
    try:
        outcome = confirm_together([wish])[0] or _confirm_alone(wish)
    except BaseException:
        db.session.rollback()
        raise
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def confirm_together(wishes: Sequence[Confirm]) -> list[Done | Exception | None]:
    """Decide in one transaction, with a handful of statements, what is nothing special.

    That is a hold of an order that is stored, or still waits. The list has what `confirm` would
    return or raise, or None: then `confirm` has to be asked. Raises SQLAlchemyError where nobody
    can tell.
    """
    # Of several for one order the later ones have to see what the first one does.
    firsts = {wish.order_id: number for number, wish in reversed(list(enumerate(wishes)))}
    outcomes = _confirm_together({number: wishes[number] for number in sorted(firsts.values())})
    return [outcomes.get(number) for number in range(len(wishes))]


def _confirm_together(turn: dict[int, Confirm]) -> dict[int, Done | Exception]:
    ids = [wish.order_id for wish in turn.values()]
    orders: dict[int, search.Found] = {}
    asked: set[int] = set()
    names: dict[int, str] = {}
    for *columns, waits, name in planned.execute(LOCKED, {"ids": ids}, states.BY_ID):
        order_id = columns[0]
        orders[order_id], names[order_id] = search.from_row(columns), name
        if waits:
            asked.add(order_id)
    # A stored order that is held was confirmed under no key yet.
    known = idempotency.find_all(
        CONFIRM,
        [
            (str(wish.order_id), wish.key)
            for wish in turn.values()
            if wish.key and ((order := orders.get(wish.order_id)) is None or order.status != "HELD")
        ],
    )
    early = _early(
        {
            wish.order_id
            for wish in turn.values()
            if wish.order_id not in orders and (str(wish.order_id), wish.key) not in known
        }
    )
    reclaimed = _reclaimed([order.id for order in orders.values() if order.status == "CONFIRMED"])
    outcomes: dict[int, Done | Exception] = {}
    held: list[dict[str, Any]] = []
    keys: dict[tuple[str, str], tuple[object, dict[str, Any]]] = {}
    for number, wish in turn.items():
        found = orders.get(wish.order_id)
        taken = known.get((str(wish.order_id), wish.key or ""))
        if wish.order_id in early:
            outcomes[number] = done = Done(early[wish.order_id], waits=True)
            _note(wish)
            if wish.key:
                keys[str(wish.order_id), wish.key] = [wish.payment], done.answer
            continue
        if found is None or found.id in asked or (taken and taken.answer is None):
            continue
        try:
            if taken:
                if taken.fingerprint != idempotency.fingerprint([wish.payment]):
                    raise KeyMismatch
                outcomes[number] = _replayed(taken.answer or {})
                continue
            told = search.named(found, names[found.id])
            if found.status == "HELD":
                told = states.confirmed(told, wish.payment)
                held.append(told)
                _note(wish)
            elif found.status in ("CONFIRMED", "CANCELLED"):
                _check_confirmed(found, wish.payment)
            else:
                continue
        except (Conflict, KeyMismatch) as refusal:
            outcomes[number] = refusal
            continue
        done = outcomes[number] = Done(told, reclaimed=found.id in reclaimed)
        if wish.key:
            keys[str(found.id), wish.key] = [wish.payment], done.answer
    # What is accepted comes between the keys and the orders' sums.
    last = None if early or not held else keys
    if not (
        (last is keys or idempotency.put_all(CONFIRM, keys))
        and (not early or _accept(wish for wish in turn.values() if wish.order_id in early))
        and (not held or states.confirm_all(held, CONFIRM, last))
    ):
        # Taken by one for which the order was not stored yet, or something else was asked.
        db.session.rollback()
        return {}
    db.session.commit()
    if early and (stored := _stored_since(early)):
        # Perhaps their holds have even ended: each has to be looked at, as if it came again.
        idempotency.reopen(CONFIRM, [key for key in keys if int(key[0]) in stored])
        db.session.commit()
        return {n: done for n, done in outcomes.items() if turn[n].order_id not in stored}
    return outcomes


def _early(order_ids: Collection[int]) -> dict[int, dict[str, Any]]:
    """Return the held ones that wait in Redis and of which nothing was asked, as they will be."""
    asked = intents.asked(order_ids) if order_ids else None
    if asked is None:
        return {}
    held: list[search.Found] = []
    try:
        for order_id in set(order_ids) - asked:
            entry = stock.waiting_order(order_id)
            if entry and entry.held_until_ms is not None:
                held.append(search.from_entry(order_id, entry))
    except Unavailable:
        return {}
    return {order["id"]: order | {"confirming": True} for order in described(held)}


def _accept(wishes: Iterable[Confirm]) -> bool:
    """Keep that these orders are paid; False where something else was asked of one meanwhile."""
    paid = {wish.order_id: (wish.payment, wish.actor) for wish in wishes}
    return len(intents.accept_confirms(paid)) == len(paid)


def _stored_since(order_ids: Iterable[int]) -> set[int]:
    return set(db.session.scalars(select(Order.id).where(Order.id.in_(order_ids))))


def _note(wish: Confirm) -> None:
    if wish.reason:
        after = {"status": "CONFIRMED", "payment": wish.payment, "reason": wish.reason}
        record(wish.actor, "order.confirm", f"order {wish.order_id}", after=after)


def _replayed(answer: dict[str, Any]) -> Done:
    if "refused" in answer:
        raise HoldExpired(answer["refused"])
    return Done(**answer, replayed=True)


def _check_confirmed(order: search.Found | Order, payment: str | None) -> None:
    """Raise Conflict unless the order is confirmed already, and by the same payment."""
    if order.held_until is None:
        raise Conflict("This order was never held", "not_held")
    if order.status != "CONFIRMED":
        raise Conflict(f"This order is {order.status.lower()}", f"order_{order.status.lower()}")
    if payment not in (None, order.payment):
        raise Conflict("This order is confirmed with another payment", "already_confirmed")


def _confirm_alone(wish: Confirm) -> Done:
    """Confirm an order that is not stored yet, or whose hold has ended."""
    while True:
        # Locked as a turn locks them, or each could wait for the other: the order's row, then the
        # key, then what is asked of an order that waits.
        found = _find(wish.order_id)
        taken = _take(CONFIRM, wish.order_id, wish.key, [wish.payment])
        if taken and taken.answer is not None:
            answer = taken.answer
            db.session.rollback()
            return _replayed(answer)
        if isinstance(found, Entry):
            _check_held(found)
            intents.accept_confirm(wish.order_id, wish.payment, wish.actor)
            _note(wish)
            done = Done(_waiting(wish.order_id, found) | {"confirming": True}, waits=True)
            _commit(taken, done)
            if not intents.apply_to(wish.order_id):
                return done
            # It was stored since it was looked for; perhaps its hold had even ended.
            if taken:
                taken.answer = None
                db.session.commit()
        elif intents.of_order(found.id):
            db.session.rollback()
            intents.apply_to(wish.order_id)
        elif found.status == "HELD":
            states.confirm(found, wish.payment)
            _note(wish)
            return _commit(taken, Done(_described(found)))
        elif found.status in ("CONFIRMED", "CANCELLED"):
            _check_confirmed(found, wish.payment)
            again = found.id in _reclaimed([found.id])
            return _commit(taken, Done(_described(found), reclaimed=again))
        else:
            pending = _pending(found)
            if pending is None:
                pending = states.begin_reclaim(found, wish.payment, wish.reason, wish.actor)
            elif pending.kind != "reclaim":
                # What it gave back goes to Redis before it is taken again.
                db.session.rollback()
                apply_movement(pending)
                continue
            elif wish.payment not in (None, found.payment):
                raise Conflict("This order is paid for by another payment", "already_confirmed")
            db.session.commit()
            return _reclaim(wish.order_id, pending, taken)


def _reclaim(order_id: int, movement: StockMovement, taken: RequestKey | None) -> Done:
    try:
        apply_movement(movement)
    except Conflict as refusal:
        reason = refusal.reason if isinstance(refusal, HoldExpired) else None
        if taken:
            # The shop gives the money back: asked again, it must not be told otherwise.
            taken.answer = {"refused": reason}
            db.session.commit()
        raise HoldExpired(reason) from None
    order = db.session.get_one(Order, order_id, populate_existing=True)
    return _commit(taken, Done(_described(order), reclaimed=True))


def _pending(order: Order) -> StockMovement | None:
    """Return what Redis is still to be told of an ended order: its return, or its reclaim."""
    reclaim = select(StockMovement).where(
        StockMovement.order_id == order.id,
        StockMovement.kind == "reclaim",
        StockMovement.applied_at.is_(None),
    )
    found = db.session.scalars(reclaim).one_or_none() or states.movement_of(order)
    return found if found and found.applied_at is None else None


def _reclaimed(confirmed: Sequence[int]) -> set[int]:
    """Return which of these orders, all confirmed, were so too late."""
    if not confirmed:
        return set()
    reclaims = select(StockMovement.order_id).where(
        StockMovement.order_id.in_(confirmed), StockMovement.kind == "reclaim"
    )
    return {order_id for order_id in db.session.scalars(reclaims) if order_id is not None}


def release(order_id: int, reason: str | None, actor: Actor, key: str | None = None) -> Done:
    """Give a hold up; its units go on sale again exactly once. Errors as of `confirm`.

    A hold that was given up, or has ended, is left as it is.
    """

    def act(found: Order | Entry) -> Done:
        if isinstance(found, Entry):
            _check_held(found)
            intents.accept_return(order_id, "release", None, found.quantity, reason, actor)
            order = _waiting(order_id, found)
            units = intents.units_given_back(order_id)
            return Done(order | {"cancelling": units}, waits=True)
        if found.held_until is None:
            raise Conflict("This order was never held", "not_held")
        if found.status not in ("RELEASED", "EXPIRED"):
            states.give_back(found, None, "RELEASED", reason, actor)
        return Done(_described(found))

    done = _once(RELEASE, order_id, key, [reason], act)
    if not done.waits:
        cancelling.finish(order_id)
    return done


def extend(
    order_id: int, seconds: int, actor: Actor, key: str | None = None, reason: str | None = None
) -> Done:
    """Hold an order for longer, once. Errors as of `confirm`."""

    def act(found: Order | Entry) -> Done:
        if isinstance(found, Entry):
            _check_held(found)
            intents.accept_extend(order_id, seconds, actor)
            after = {"seconds": seconds, "reason": reason}
            record(actor, "order.extend", f"order {order_id}", after=after)
            return Done(_waiting(order_id, found) | {"extending": seconds}, waits=True)
        if found.held_until is None:
            raise Conflict("This order was never held", "not_held")
        before = found.held_until
        states.extend(found, seconds)
        record(
            actor,
            "order.extend",
            f"order {order_id}",
            before={"heldUntil": utc_text(before)},
            after={"heldUntil": utc_text(found.held_until), "reason": reason},
        )
        return Done(_described(found))

    return _once(EXTEND, order_id, key, [seconds], act)


def _once(
    route: str,
    order_id: int,
    key: str | None,
    content: list[object],
    act: Callable[[Order | Entry], Done],
) -> Done:
    """Do an act of one order, once for each Idempotency-Key."""
    while True:
        taken = _take(route, order_id, key, content)
        if taken and taken.answer is not None:
            answer = taken.answer
            db.session.rollback()
            return _replayed(answer)
        try:
            found = _find(order_id)
            if isinstance(found, Order) and intents.of_order(order_id):
                db.session.rollback()
                intents.apply_to(order_id)
                continue
            done = _commit(taken, act(found))
        except BaseException:
            db.session.rollback()
            raise
        if done.waits:
            # It may have been stored since it was looked for.
            intents.apply_to(order_id)
        return done


def _take(route: str, order_id: int, key: str | None, content: list[object]) -> RequestKey | None:
    return idempotency.take(route, str(order_id), key, content) if key else None


def _commit(taken: RequestKey | None, done: Done) -> Done:
    if taken:
        taken.answer = done.answer
    db.session.commit()
    return done


def _find(order_id: int) -> Order | Entry:
    """Return the order's row, locked, or what waits in Redis. Raises UnknownOrder, Conflict."""
    try:
        return states.lock(order_id)
    except UnknownOrder:
        entry = stock.waiting_order(order_id) if intents.epoch() else None
        return cancelling.stored_since(order_id) if entry is None else entry


def _check_held(entry: Entry) -> None:
    if entry.held_until_ms is None:
        raise Conflict("This order was never held", "not_held")


def _waiting(order_id: int, entry: Entry) -> dict[str, Any]:
    return next(described([search.from_entry(order_id, entry)]))


def _described(order: Order) -> dict[str, Any]:
    db.session.flush()
    row = db.session.execute(select(*search.COLUMNS).where(Order.id == order.id)).one()
    return next(described([search.from_row(row)]))
