"""Products, their terms of sale, and every movement of stock that is not a purchase.

PostgreSQL is told first, Redis second, and a mark in PostgreSQL says that Redis has done it. What a
crash leaves in between is finished by `finish_pending` and `publish_stale`, any number of times.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from ..audit import SYSTEM, Actor, record
from ..extensions import db, stock
from ..models import Product, ProductTotals, StockMovement
from ..problems import Conflict, InvalidRequest, KeyMismatch, UnknownProduct, Unprepared
from ..reading import MAX_ID, MAX_QUANTITY, MAX_RESTOCK, MAX_STOCK, read_integer, read_text
from ..times import utc_text

# RFC 3339, 5.6: date, time and an offset.
RFC3339 = re.compile(
    r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?([Zz]|[+-]\d{2}:\d{2})"
).fullmatch
# Held shared while a movement is carried out, alone while the sale in Redis is replaced: a movement
# applied to the old sale is never marked as applied to the new one.
SALE_LOCK = 7_316_003


def _read_time(data: dict, name: str) -> datetime | None:
    value = data.get(name)
    if value is None:
        return None
    try:
        if not isinstance(value, str) or not RFC3339(value):
            raise ValueError
        moment = datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"{name} must be a time with offset (RFC 3339), like 2026-11-27T09:00:00Z", name
        ) from None
    if not 1970 <= moment.year <= 9000:
        raise InvalidRequest(f"{name} must be between the years 1970 and 9000", name)
    return moment


def _read_currency(data: dict) -> str:
    value = data.get("currency")
    if not isinstance(value, str) or not re.fullmatch("[A-Z]{3}", value):
        raise InvalidRequest("currency must be three capital letters (ISO 4217)", "currency")
    return value


def _read_flag(data: dict, name: str) -> bool:
    if type(data.get(name)) is not bool:
        raise InvalidRequest(f"{name} must be true or false", name)
    return data[name]


# The JSON name of each term, the column it is stored in, and how it is read.
TERMS = {
    "name": ("name", lambda data: read_text(data, "name", 200)),
    "priceCents": ("price_cents", lambda data: read_integer(data, "priceCents", 0, MAX_ID)),
    "currency": ("currency", _read_currency),
    "opensAt": ("opens_at", lambda data: _read_time(data, "opensAt")),
    "closesAt": ("closes_at", lambda data: _read_time(data, "closesAt")),
    "perUserLimit": (
        "per_user_limit",
        lambda data: (
            None
            if data["perUserLimit"] is None
            else read_integer(data, "perUserLimit", 1, MAX_QUANTITY)
        ),
    ),
    "maxQuantity": (
        "max_quantity",
        lambda data: read_integer(data, "maxQuantity", 1, MAX_QUANTITY),
    ),
    "paused": ("paused", lambda data: _read_flag(data, "paused")),
}
REQUIRED_TERMS = ("name", "priceCents", "currency")


def read_terms(data: dict) -> dict:
    """Return the columns for the terms in `data`. Raises InvalidRequest for the first wrong one."""
    values = {}
    for name in data:
        if name not in TERMS:
            raise InvalidRequest(f"{name} is not known here", name)
        column, read = TERMS[name]
        values[column] = read(data)
    return values


def describe(product: Product, free: int) -> dict:
    """Return the product as the API shows it."""
    return {
        "id": product.id,
        "name": product.name,
        "priceCents": product.price_cents,
        "currency": product.currency,
        "opensAt": product.opens_at and utc_text(product.opens_at),
        "closesAt": product.closes_at and utc_text(product.closes_at),
        "perUserLimit": product.per_user_limit,
        "maxQuantity": product.max_quantity,
        "paused": product.paused,
        "stockRemaining": free,
        "braked": product.braked,
    }


def _audited(product: Product) -> dict:
    """Return the terms as the audit keeps them."""
    terms = describe(product, 0)
    del terms["id"], terms["stockRemaining"], terms["braked"]
    return terms


def products_with_stock(product_id: int | None = None) -> list[tuple[Product, int]]:
    """Return the products (or the one) by id, each with its free stock.

    Raises UnknownProduct, and stock.Unavailable when Redis can't tell the stock.
    """
    query = select(Product).order_by(Product.id)
    if product_id is not None:
        query = query.where(Product.id == product_id)
    products = list(db.session.scalars(query))
    if product_id is not None and not products:
        raise UnknownProduct(product_id)
    held = stock.view([product.id for product in products])
    if not held.generation:
        raise Unprepared("the sale is not in Redis")
    for product in products:
        product.braked = held.brakes.bind(product.id)
    return [(p, held.products.get(p.id, {}).get("free", 0)) for p in products]


def create_product(data: dict, actor: Actor) -> tuple[Product, int]:
    """Create a product on sale at once; return it with its stock.

    Raises InvalidRequest, and stock.Unavailable before or after the row exists: in the second case
    the sweeper puts it on sale as soon as Redis is back.
    """
    for name in (*REQUIRED_TERMS, "stock"):
        if name not in data:
            raise InvalidRequest(f"{name} is required", name)
    units = read_integer(data, "stock", 0, MAX_STOCK)
    values = read_terms({name: value for name, value in data.items() if name != "stock"})
    _check_window(values.get("opens_at"), values.get("closes_at"))
    _require_sale()
    product = Product(**values)
    db.session.add(product)
    db.session.flush()
    movement = StockMovement(
        product_id=product.id, kind="initial", units=units, actor=actor.name, reason="created"
    )
    db.session.add(movement)
    # Defaults of the schema are read back, so that the audit shows what really is in force.
    db.session.refresh(product)
    record(
        actor, "product.create", f"product {product.id}", after=_audited(product) | {"stock": units}
    )
    db.session.commit()
    publish(product)
    free = apply_movement(movement)
    product.braked = stock.braked().bind(product.id)
    return product, free


def change_product(product_id: int, data: dict, actor: Actor) -> tuple[Product, int]:
    """Change terms of sale; the change binds the next purchase. Return the product and its stock.

    Raises InvalidRequest, UnknownProduct, stock.Unavailable.
    """
    if "stock" in data:
        raise InvalidRequest("stock is changed by a restock", "stock")
    values = read_terms(data)
    _require_sale()
    product = db.session.get(Product, product_id, with_for_update=True)
    if product is None:
        raise UnknownProduct(product_id)
    before = _audited(product)
    opens, closes = product.opens_at, product.closes_at
    _check_window(values.get("opens_at", opens), values.get("closes_at", closes))
    for column, value in values.items():
        setattr(product, column, value)
    after = _audited(product)
    if after != before:
        product.version += 1
        changed = [name for name in after if after[name] != before[name]]
        record(
            actor,
            "product.change",
            f"product {product_id}",
            before={name: before[name] for name in changed},
            after={name: after[name] for name in changed},
        )
    db.session.commit()
    publish(product)
    return products_with_stock(product_id)[0]


def open_now(product_id: int, actor: Actor) -> tuple[Product, int]:
    """Let the next purchase through: open, not paused, not ended. Errors as in change_product.

    Raises Conflict while a brake is set, which would refuse it all the same.
    """
    now, product = _moment_of_change(product_id)
    brakes = stock.braked()
    if brakes.bind(product_id):
        what = "The whole sale" if brakes.sale else f"Product {product_id}"
        raise Conflict(f"{what} is braked: release the brake first", "braked")
    terms: dict[str, object] = {"paused": False}
    if product.opens_at and product.opens_at > now:
        terms["opensAt"] = now.isoformat()
    if product.closes_at and product.closes_at <= now:
        terms["closesAt"] = None
    return change_product(product_id, terms, actor)


def end_now(product_id: int, actor: Actor) -> tuple[Product, int]:
    """Refuse the next purchase as ended. Errors as in change_product."""
    now, product = _moment_of_change(product_id)
    terms: dict[str, object] = {"closesAt": now.isoformat()}
    if product.opens_at and product.opens_at >= now:
        terms["opensAt"] = None
    return change_product(product_id, terms, actor)


def _moment_of_change(product_id: int) -> tuple[datetime, Product]:
    """Return the time by the clock that judges claims, or "now" might be a moment too late."""
    product = db.session.get(Product, product_id)
    if product is None:
        raise UnknownProduct(product_id)
    return stock.clock(), product


def _check_window(opens_at: datetime | None, closes_at: datetime | None) -> None:
    if opens_at and closes_at and opens_at >= closes_at:
        raise InvalidRequest("closesAt must be after opensAt", "closesAt")


def _require_sale() -> None:
    """Refuse a change while Redis can't carry it out. Raises stock.Unavailable."""
    held = stock.generation()
    if held is None:
        raise Unprepared("the sale is not in Redis")
    if held != expected_generation():
        raise Unprepared("Redis holds another sale")


def expected_generation() -> str | None:
    """Return the name of the sale that Redis should hold, None before the first one."""
    return db.session.execute(text("SELECT generation FROM sale")).scalar()


def _milliseconds(moment: datetime | None) -> int | None:
    return moment and round(moment.timestamp() * 1000)


def terms_of(product: Product) -> dict[str, object]:
    """Return the terms of sale in the form that Redis obeys."""
    return {
        "opens": _milliseconds(product.opens_at),
        "closes": _milliseconds(product.closes_at),
        "pause": int(product.paused),
        "cap": product.per_user_limit,
        "max": product.max_quantity,
        # Opaque to Redis, and carried by each order: the price at the moment of the claim.
        "price": f"{product.price_cents} {product.currency}",
    }


def all_terms() -> dict[int, tuple[int, dict[str, object]]]:
    """Return (version, terms) of every product, by its id."""
    products = db.session.scalars(select(Product))
    return {product.id: (product.version, terms_of(product)) for product in products}


def publish(product: Product) -> bool:
    """Put the product's terms in force; False when they are already. Raises stock.Unavailable."""
    return stock.put_product(product.id, product.version, terms_of(product))


def publish_stale() -> int:
    """Put in force what Redis does not know yet; return the number of products."""
    products = list(db.session.scalars(select(Product)))
    held = stock.view([product.id for product in products])
    return sum(
        publish(product)
        for product in products
        if held.products.get(product.id, {}).get("version", 0) < product.version
    )


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
        return _replayed(replay, product_id, units)
    _require_sale()
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
        return _replayed(replay, product_id, units)
    return Restocked(apply_movement(movement))


def _restock_of(key: str) -> StockMovement | None:
    return db.session.scalar(select(StockMovement).where(StockMovement.idempotency_key == key))


def _replayed(movement: StockMovement, product_id: int, units: int) -> Restocked:
    if (movement.product_id, movement.units) != (product_id, units):
        raise KeyMismatch
    if movement.applied_at is None:
        return Restocked(apply_movement(movement), replayed=True)
    return Restocked(movement.stock_after, replayed=True)


def correct(product_id: int, units: int, reason: str, actor: Actor) -> int:
    """Add or (negative) take away units because a count was wrong; return the free stock.

    Raises UnknownProduct, InvalidRequest, stock.Unavailable, and Conflict when more would be taken
    than is free.
    """
    if units == 0 or abs(units) > MAX_STOCK:
        raise InvalidRequest(f"units must be from 1 to {MAX_STOCK}, or negative", "units")
    _require_sale()
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

    Safe to repeat, and safe for two at once: the second waits for the first. Raises
    stock.Unavailable; raises Conflict, and removes the movement, when a correction would take more
    than is free.
    """
    movement_id = movement.id
    db.session.execute(text(f"SELECT pg_advisory_xact_lock_shared({SALE_LOCK})"))
    generation = expected_generation()
    movement = db.session.get(
        StockMovement, movement_id, with_for_update=True, populate_existing=True
    )
    if movement is None:
        db.session.rollback()
        raise Conflict("The movement was refused: too few units were free", "insufficient_stock")
    if movement.applied_at is not None:
        db.session.commit()
        return movement.stock_after
    identity = (movement_id, movement.product_id, movement.units, movement.user_id)
    outcome, free = stock.move(generation, *identity)
    if outcome == "unknown":
        publish(db.session.get(Product, movement.product_id))
        outcome, free = stock.move(generation, *identity)
    if outcome == "short":
        target, units = f"product {movement.product_id}", movement.units
        db.session.delete(movement)
        record(SYSTEM, "movement.refused", target, before={"units": units}, after={"free": free})
        db.session.commit()
        raise Conflict(f"Only {free} units are free", "insufficient_stock")
    movement.applied_at = datetime.now(UTC)
    movement.stock_after = free
    db.session.commit()
    return free


def finish_pending() -> int:
    """Apply the movements that a crash left between PostgreSQL and Redis; return their number."""
    pending = list(
        db.session.scalars(
            select(StockMovement)
            .where(StockMovement.applied_at.is_(None))
            .order_by(StockMovement.id)
            .limit(1000)
        )
    )
    for movement in pending:
        try:
            apply_movement(movement)
        except Conflict:
            continue
    return len(pending)


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


def names() -> dict[int, str]:
    """Return the name of every product, by its id."""
    return dict(db.session.execute(select(Product.id, Product.name).order_by(Product.id)).all())


def totals() -> dict[int, ProductTotals]:
    """Return the sums of every product, by its id."""
    return {row.product_id: row for row in db.session.scalars(select(ProductTotals))}
