"""The support desk's search: orders by user, id, product, status and time, newest first.

Every filter becomes a range of one index, and pages follow the last id seen, so that a page costs
the same at a million orders as at a hundred.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, cast

from sqlalchemy import ColumnElement, Select, and_, false, func, select

from ..extensions import db, stock
from ..models import AuditEntry, Batch, DeadLetter, Order, StockMovement
from ..problems import Unavailable, UnknownOrder
from ..products.names import Names
from ..reading import REFERENCE, VALID_KEY, User, canonical
from ..stock.entries import Entry
from ..times import utc_text
from .lookup import MAX_LISTED, columns_of

STATUSES = ("QUEUED", "HELD", "CONFIRMED", "CANCELLED", "RELEASED", "EXPIRED", "FAILED")
# Of orders that wait in Redis.
WAITING_STATUSES = ("QUEUED", "HELD")
PAGE_ORDERS = 50
# An export's step: few statements, and little memory however long the export.
EXPORT_ORDERS = 2000
# So many waiting orders are looked at for a filter, a step at a time, some 0.1 s in all: what waits
# more than that deep is found once it is stored.
MOST_WAITING = 10_000
WAITING_ORDERS = 1000
MOST_UNPAID = 1000
# Ids are given in the order of the claims, so a time is an id. This many more are looked at on
# either side, and judged by their own time, in case the clock was set back a little.
ID_MARGIN = 2000


@dataclass(frozen=True)
class Filter:
    """What is looked for; None where everything will do. Times are claim times."""

    user: User | None = None
    product_id: int | None = None
    status: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    key: str | None = None  # the Idempotency-Key, all of it
    reference: str | None = None  # all of it
    text: str | None = None  # a user, a key or a reference, all of it

    def branches(self) -> list["Filter"]:
        """Return filters without `text`, each for one index, that together find the same."""
        if self.text is None:
            return [self]
        plain = replace(self, text=None)
        found = []
        with suppress(ValueError):
            found.append(replace(plain, user=canonical(self.text)))
        if VALID_KEY(self.text):
            found.append(replace(plain, key=self.text))
        if REFERENCE(self.text):
            found.append(replace(plain, reference=self.text))
        return found

    def admits(self, order: "Found") -> bool:
        """Tell whether an order that is not in the orders' table is looked for, status apart."""
        return (
            (self.product_id is None or order.product_id == self.product_id)
            and (self.since is None or order.claimed_at >= self.since)
            and (self.until is None or order.claimed_at < self.until)
            and (self.key is None or order.idempotency_key == self.key)
            and (self.reference is None or order.reference == self.reference)
        )


# Not frozen, which would make a feed's order take 3 µs more.
@dataclass(slots=True)
class Found:
    """An order as a list shows it, wherever it is stored."""

    id: int
    status: str
    user: User
    product_id: int
    quantity: int
    unit_price_cents: int
    currency: str
    claimed_at: datetime
    persisted_at: datetime | None = None
    cancelled_at: datetime | None = None
    cancelled_by: str | None = None
    cancel_reason: str | None = None
    idempotency_key: str | None = None
    reference: str | None = None
    returned_units: int = 0
    held_until: datetime | None = None
    payment: str | None = None

    @property
    def standing_units(self) -> int:
        return self.quantity - self.returned_units

    @property
    def total_cents(self) -> int:
        return self.quantity * self.unit_price_cents


def described(orders: Collection[Found]) -> Iterator[dict[str, Any]]:
    """Yield orders in the API's form, which cost less one by one than all at once."""
    names = Names.read({order.product_id for order in orders})
    for order in orders:
        yield describe(order, names)


def describe(order: Found, names: Names) -> dict[str, Any]:
    """Return an order in the API's form; `names` has its product."""
    return named(order, names.sold(order.product_id, order.claimed_at))


def named(order: Found, product_name: str | None) -> dict[str, Any]:
    """Return an order in the API's form; `userId` is always a text."""
    return {
        "id": order.id,
        "status": order.status,
        "userId": str(order.user),
        "productId": order.product_id,
        "productName": product_name,
        "quantity": order.quantity,
        "cancelledQuantity": order.returned_units,
        "unitPriceCents": order.unit_price_cents,
        "currency": order.currency,
        "reference": order.reference,
        "createdAt": utc_text(order.claimed_at),
        "storedAt": order.persisted_at and utc_text(order.persisted_at),
        "endedAt": order.cancelled_at and utc_text(order.cancelled_at),
        "endReason": order.cancel_reason,
        "heldUntil": order.held_until and utc_text(order.held_until),
        "payment": order.payment,
    }


@dataclass(frozen=True)
class Page:
    """`before` continues the list; it is None on the last page.

    `incomplete`: Redis was away. `unseen`: there are older waiting orders that were not looked at.
    """

    orders: list[Found]
    before: int | None = None
    incomplete: bool = False
    unseen: bool = False


COLUMNS = (
    Order.id,
    Order.status,
    Order.user_id,
    Order.user_name,
    Order.product_id,
    Order.quantity,
    Order.unit_price_cents,
    Order.currency,
    Order.claimed_at,
    Order.persisted_at,
    Order.cancelled_at,
    Order.cancelled_by,
    Order.cancel_reason,
    Order.idempotency_key,
    Order.reference,
    Order.returned_units,
    Order.held_until,
    Order.payment,
)


def from_row(row: Sequence[Any]) -> Found:
    """Return the order of a row of COLUMNS."""
    order_id, status, number, name, *others = row
    return Found(order_id, status, name if number is None else number, *others)


def search(wanted: Filter, before: int | None = None, limit: int = PAGE_ORDERS) -> Page:
    """Return a page of orders: those that wait in Redis, the dead letters, and the stored ones.

    Redis is read first: an order leaves it only after it was stored, so none is missed between.
    """
    found: dict[int, Found] = {}
    incomplete = unseen = False
    branches = wanted.branches()
    if wanted.status in (None, *WAITING_STATUSES):
        try:
            for branch in branches:
                waiting, more = _waiting(branch, before, limit + 1)
                found |= {order.id: order for order in waiting}
                unseen |= more
        except Unavailable:
            incomplete = True
    for branch in branches:
        found |= {order.id: order for order in _never_stored(branch, before, limit + 1)}
    for branch in branches:
        found |= {order.id: order for order in _stored(branch, before, limit + 1)}
    if wanted.status in WAITING_STATUSES:
        # What was stored since Redis was read is no longer queued, or perhaps not held any more.
        stored = select(Order.id).where(Order.id.in_(found), Order.status != wanted.status)
        for order_id in db.session.scalars(stored):
            found.pop(order_id)
    orders = [found[order_id] for order_id in sorted(found, reverse=True)[: limit + 1]]
    more = len(orders) > limit
    orders = orders[:limit]
    return Page(orders, orders[-1].id if more else None, incomplete, unseen)


def unpaid_holds(user: User) -> int:
    """Return how many of a user's newest orders were held, and not paid for, in the last hour.

    Who takes stock off sale again and again shows here; a thousand orders are looked at, at most.
    """
    newest = (
        select(Order.status, Order.cancelled_at)
        .where(Order.is_of(user))
        .order_by(Order.id.desc())
        .limit(MOST_UNPAID)
        .subquery()
    )
    unpaid = select(func.count()).where(
        newest.c.status == "EXPIRED",
        newest.c.cancelled_at > func.now() - timedelta(hours=1),
    )
    return db.session.scalar(unpaid) or 0


def _waiting(wanted: Filter, before: int | None, limit: int) -> tuple[list[Found], bool]:
    """Return the newest of what waits in Redis, and whether more than was looked at waits there."""

    def admits(order: Found) -> bool:
        return wanted.status in (None, order.status) and wanted.admits(order)

    if wanted.user is not None:
        entries = stock.queued_orders(wanted.user, MAX_LISTED)
        orders = (from_entry(*entry) for entry in entries if before is None or entry[0] < before)
        return [order for order in orders if admits(order)], False
    found: list[Found] = []
    step, looked_at = limit, 0
    while entries := stock.newest_waiting(step, before):
        orders = (from_entry(*entry) for entry in entries)
        found += [order for order in orders if admits(order)]
        looked_at += len(entries)
        if len(found) >= limit:
            return found, False
        if looked_at >= MOST_WAITING:
            return found, True
        step, before = WAITING_ORDERS, entries[-1][0]
    return found, False


def from_entry(order_id: int, entry: Entry) -> Found:
    """Return an order of the outbox."""
    return Found(id=order_id, status=entry.status, user=entry.user, **columns_of(entry))


def _conditions(
    table: type[Order] | type[DeadLetter], wanted: Filter, before: int | None
) -> Iterator[ColumnElement[bool]]:
    """Yield what both tables are asked for in the same words."""
    if before is not None:
        yield (Order.id if table is Order else DeadLetter.order_id) < before
    if wanted.user is not None:
        yield table.is_of(wanted.user)
    if wanted.product_id is not None:
        yield table.product_id == wanted.product_id
    if wanted.reference is not None:
        yield table.reference == wanted.reference


def _never_stored(wanted: Filter, before: int | None, limit: int) -> Iterator[Found]:
    """Yield the dead letters: FAILED while nobody has decided, CANCELLED once given up."""
    query = select(DeadLetter).where(DeadLetter.order_id.is_not(None))
    match wanted.status:
        case "FAILED":
            query = query.where(DeadLetter.resolution.is_(None))
        case "CANCELLED":
            query = query.where(DeadLetter.resolution == "abandoned")
        case None:
            query = query.where(DeadLetter.not_replayed())
        case _:
            return
    query = query.where(*_conditions(DeadLetter, wanted, before))
    if wanted.key is not None:
        query = query.where(DeadLetter.payload.contains(wanted.key, autoescape=True))
    if _ids_follow_time() and wanted.until and (last := _id_at(wanted.until)) is not None:
        query = query.where(DeadLetter.order_id < last + ID_MARGIN)
    # Its time of claim stands in the payload alone, so the limit can't be the statement's.
    query = query.order_by(DeadLetter.order_id.desc()).execution_options(yield_per=limit)
    with db.session.scalars(query) as letters:
        orders = (from_letter(letter) for letter in letters)
        yield from islice((order for order in orders if wanted.admits(order)), limit)


def from_letter(letter: DeadLetter) -> Found:
    """Return the order of a dead letter that holds one; it was not replayed."""
    order = from_entry(cast("int", letter.order_id), Entry.parse(letter.payload))
    if letter.resolution is None:
        return replace(order, status="FAILED")
    return replace(
        order,
        status="CANCELLED",
        cancelled_at=letter.resolved_at,
        cancelled_by=letter.resolved_by,
        cancel_reason=letter.resolve_reason,
        returned_units=order.quantity,
    )


def _stored(wanted: Filter, before: int | None, limit: int) -> Iterator[Found]:
    query = stored_query(wanted, before, limit)
    if query is not None:
        for row in db.session.execute(query):
            yield from_row(row)


def stored_query(
    wanted: Filter, before: int | None, limit: int
) -> Select[Any, *tuple[Any, ...]] | None:
    """Return the statement that finds stored orders; None when there can be none."""
    if wanted.status in ("QUEUED", "FAILED"):
        return None
    query = select(*COLUMNS).where(*_conditions(Order, wanted, before))
    query = query.order_by(Order.id.desc()).limit(limit)
    if wanted.status is not None:
        query = query.where(Order.status == wanted.status)
    if wanted.key is not None:
        query = query.where(Order.idempotency_key == wanted.key)
    if wanted.since is not None:
        first = _id_at(wanted.since)
        if first is None:
            return None
        if _ids_follow_time():
            query = query.where(Order.id >= first - ID_MARGIN)
        query = query.where(Order.claimed_at >= wanted.since)
    if wanted.until is not None:
        last = _id_at(wanted.until)
        if last is not None and _ids_follow_time():
            query = query.where(Order.id < last + ID_MARGIN)
        query = query.where(Order.claimed_at < wanted.until)
    return query


def _ids_follow_time() -> bool:
    """Tell whether a later order has a higher id: each of several shards counts by itself."""
    return len(stock.shards) == 1


def _id_at(moment: datetime) -> int | None:
    """Return the id of the first order claimed at or after a moment; None when there is none."""
    return db.session.scalar(
        select(Order.id)
        .where(Order.claimed_at >= moment)
        .order_by(Order.claimed_at, Order.id)
        .limit(1)
    )


class Export:
    """Every order of a filter, newest first, of which one step at a time is held."""

    def __init__(self, wanted: Filter) -> None:
        self._wanted = wanted
        # Once all are read: whether orders that wait in Redis are missing, see Page.
        self.incomplete = False

    def __iter__(self) -> Iterator[Found]:
        before = None
        while True:
            page = search(self._wanted, before, EXPORT_ORDERS)
            self.incomplete |= page.incomplete or page.unseen
            # A slow reader must not hold a connection, nor a transaction open.
            db.session.remove()
            yield from page.orders
            if page.before is None:
                return
            before = page.before


@dataclass(frozen=True)
class Story:
    """All that is known of one order."""

    order: Found
    batch: Batch | None = None
    # Units given back, and taken again, in the order in which that was done.
    movements: Sequence[StockMovement] = ()
    # Whether its hold was extended, which is possible once.
    extended: bool = False
    letter: DeadLetter | None = None
    # By whom and why its hold was confirmed or extended, as far as a reason was given.
    acts: Sequence[AuditEntry] = ()

    @property
    def confirmed(self) -> AuditEntry | None:
        return next((act for act in self.acts if act.action == "order.confirm"), None)

    @property
    def extensions(self) -> list[AuditEntry]:
        return [act for act in self.acts if act.action == "order.extend"]


def _expired_with(order: Found) -> ColumnElement[bool]:
    """Return the condition for the movement of all orders that expired with this one."""
    if order.held_until is None:
        return false()
    return and_(
        StockMovement.created_at >= order.held_until,
        StockMovement.product_id == order.product_id,
        StockMovement.order_ids.contains([order.id]),
    )


def _acts_of_hold(order: Found) -> Sequence[AuditEntry]:
    if order.held_until is None:
        return ()
    return db.session.scalars(
        select(AuditEntry)
        .where(
            AuditEntry.target == f"order {order.id}",
            AuditEntry.action.in_(("order.confirm", "order.extend")),
        )
        .order_by(AuditEntry.id)
    ).all()


def story(order_id: int) -> Story:
    """Return one order with what happened to it. Raises UnknownOrder.

    Redis, too, is asked, and before PostgreSQL, as in `search`; it may be away for a stored order.
    """
    unavailable = entry = None
    try:
        entry = stock.waiting_order(order_id)
    except Unavailable as error:
        unavailable = error
    row = db.session.execute(
        select(*COLUMNS, Order.batch_id, Order.extended_from).where(Order.id == order_id)
    ).one_or_none()
    letter = db.session.scalar(
        select(DeadLetter)
        .where(DeadLetter.order_id == order_id)
        .order_by(DeadLetter.id.desc())
        .limit(1)
    )
    if row is not None:
        order = from_row(row[:-2])
        return Story(
            order,
            extended=row.extended_from is not None,
            batch=db.session.get(Batch, row.batch_id) if row.batch_id else None,
            movements=db.session.scalars(
                select(StockMovement)
                .where((StockMovement.order_id == order_id) | _expired_with(order))
                .order_by(StockMovement.id)
            ).all(),
            acts=_acts_of_hold(order),
        )
    if letter is not None:
        return Story(
            from_letter(letter),
            movements=db.session.scalars(
                select(StockMovement).where(StockMovement.dead_letter_id == letter.id)
            ).all(),
            letter=letter,
        )
    if entry is not None:
        return Story(from_entry(order_id, entry))
    if unavailable:
        raise unavailable
    raise UnknownOrder(order_id)
