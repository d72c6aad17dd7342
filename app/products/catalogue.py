"""The products: create, change, open, end. What is changed binds the next purchase.

PostgreSQL is told first and Redis second; the sweeper finishes what a crash leaves in between.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select

from .. import idempotency
from ..audit import Actor, record
from ..extensions import db, stock
from ..models import Product, StockMovement
from ..problems import Conflict, UnknownProduct, Unprepared
from .movements import apply_movement
from .sale import publish, require_sale
from .terms import NewProduct, check_window, describe, terms_of

CREATE = "POST /products"
WINDOW = {"opens_at", "closes_at"}
NOTHING_PLANNED = {"planned_opens_at": None, "planned_closes_at": None}


class StaleVersion(Conflict):
    """The product was changed since the version that this change was made for."""

    def __init__(self) -> None:
        super().__init__("The product was changed meanwhile", "stale_version")


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


def names() -> dict[int, str]:
    """Return the name of every product, by its id."""
    return dict(db.session.execute(select(Product.id, Product.name).order_by(Product.id)).all())


@dataclass(frozen=True)
class Created:
    """A product as it was when it was created, and whether this is a repeated answer."""

    product: dict[str, Any]
    version: int
    replayed: bool = False


def create(new: NewProduct, actor: Actor, key: str | None = None) -> Created:
    """Create a product on sale at once, once for each Idempotency-Key.

    Raises WrongWindow, KeyMismatch, and stock.Unavailable before or after the row exists: in the
    second case the sweeper, or the same key again, puts it on sale as soon as Redis is back.
    """
    check_window(new.terms.get("opens_at"), new.terms.get("closes_at"))
    taken = None
    if key:
        taken = idempotency.take(CREATE, "", key, [new.terms, new.units])
        if taken.answer is not None:
            created = Created(**taken.answer, replayed=True)
            _put_on_sale(created.product["id"])
            return created
    require_sale()
    product = Product(**new.terms)
    db.session.add(product)
    db.session.flush()
    db.session.add(
        StockMovement(
            product_id=product.id,
            kind="initial",
            units=new.units,
            actor=actor.name,
            reason="created",
        )
    )
    # Defaults of the schema are read back, so that the audit shows what really is in force.
    db.session.refresh(product)
    record(
        actor,
        "product.create",
        f"product {product.id}",
        after=terms_of(product) | {"stock": new.units},
    )
    product.braked = stock.braked().bind(product.id)
    created = Created(describe(product, new.units), product.version)
    if taken:
        taken.answer = {"product": created.product, "version": created.version}
    db.session.commit()
    _put_on_sale(product.id)
    return created


def _put_on_sale(product_id: int) -> None:
    """Do in Redis what is left of a creation: nothing, where it was done already."""
    movement = db.session.scalar(
        select(StockMovement).where(
            StockMovement.product_id == product_id,
            StockMovement.kind == "initial",
            StockMovement.applied_at.is_(None),
        )
    )
    if movement is not None:
        publish(db.session.get_one(Product, product_id))
        apply_movement(movement)


def change(
    product_id: int, values: dict[str, Any], actor: Actor, versions: Container[int] | None = None
) -> tuple[Product, int]:
    """Change terms of sale, given by column; return the product and its free stock.

    With `versions` only a product that still has one of them is changed. Raises WrongWindow,
    StaleVersion, UnknownProduct, stock.Unavailable.
    """
    return _change(product_id, lambda product: values, actor, versions)


def open_now(product_id: int, actor: Actor) -> tuple[Product, int]:
    """Let the next purchase through: open, not paused. Errors as in `change`.

    A sale that is ended gets back the window that was planned, as far as it is not over. Raises
    Conflict while a brake is set, which would refuse the purchase all the same.
    """
    now = stock.clock()
    brakes = stock.braked()
    if brakes.bind(product_id):
        what = "The whole sale" if brakes.sale else f"Product {product_id}"
        raise Conflict(f"{what} is braked: release the brake first", "braked")
    return _change(product_id, lambda product: _opened(product, now), actor)


def end_now(product_id: int, actor: Actor) -> tuple[Product, int]:
    """Refuse the next purchase as ended; the planned window is set aside. Errors as in `change`."""
    now = stock.clock()
    return _change(product_id, lambda product: _ended(product, now), actor)


def is_ended(product: Product, now: datetime) -> bool:
    """Tell whether the sale is over, by its closing time."""
    return product.closes_at is not None and product.closes_at <= now


def planned_end(product: Product, now: datetime) -> datetime | None:
    """Return when an ended sale would close if it were opened again, None for never."""
    planned = product.planned_closes_at
    return planned if planned and planned > now else None


def _opened(product: Product, now: datetime) -> dict[str, Any]:
    values: dict[str, Any] = {"paused": False}
    if is_ended(product, now):
        return values | {
            "opens_at": product.planned_opens_at or product.opens_at,
            "closes_at": planned_end(product, now),
        }
    if product.opens_at and product.opens_at > now:
        values["opens_at"] = now
    return values


def _ended(product: Product, now: datetime) -> dict[str, Any]:
    if is_ended(product, now):
        return {}
    values: dict[str, Any] = {
        "closes_at": now,
        "planned_opens_at": product.opens_at,
        "planned_closes_at": product.closes_at,
    }
    if product.opens_at and product.opens_at >= now:
        values["opens_at"] = None
    return values


def _change(
    product_id: int,
    decide: Callable[[Product], dict[str, Any]],
    actor: Actor,
    versions: Container[int] | None = None,
) -> tuple[Product, int]:
    """Write what `decide` says of the product as it stands, which nobody else changes meanwhile."""
    require_sale()
    product = db.session.get(Product, product_id, with_for_update=True, populate_existing=True)
    if product is None:
        raise UnknownProduct(product_id)
    if versions is not None and product.version not in versions:
        db.session.rollback()
        raise StaleVersion
    values = decide(product)
    if any(getattr(product, name) != values[name] for name in WINDOW & values.keys()):
        # Whoever sets the window anew has planned anew.
        values = NOTHING_PLANNED | values
    values = {name: value for name, value in values.items() if getattr(product, name) != value}
    check_window(
        values.get("opens_at", product.opens_at), values.get("closes_at", product.closes_at)
    )
    if values:
        before = terms_of(product)
        for column, value in values.items():
            setattr(product, column, value)
        product.version += 1
        after = terms_of(product)
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
