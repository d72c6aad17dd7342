"""The products: create, change, open, end. What is changed binds the next purchase.

PostgreSQL is told first and Redis second; the sweeper finishes what a crash leaves in between.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from .. import idempotency
from ..audit import Actor, record
from ..extensions import db, stock
from ..models import Product, StockMovement
from ..money import shown_digits
from ..problems import Conflict, InvalidRequest, UnknownProduct, Unprepared
from ..stock.spread import Pending
from .currency import has_orders
from .movements import apply_first_stock
from .names import Names
from .sale import is_withdrawn, publish, require_sale
from .terms import NewProduct, check_window, describe, terms_of

CREATE = "POST /products"
# A list without a limit has at most so many.
MOST_LISTED = 1000
WINDOW = {"opens_at", "closes_at"}
NOTHING_PLANNED = {"planned_opens_at": None, "planned_closes_at": None}


class CurrencyFixed(Conflict):
    """There are orders in the product's currency."""

    def __init__(self) -> None:
        super().__init__("The currency is fixed: there are orders in it", "currency_fixed")


class StaleVersion(Conflict):
    """The product was changed since the version that this change was made for."""

    def __init__(self) -> None:
        super().__init__("The product was changed meanwhile", "stale_version")


class SkuTaken(Conflict):
    """Another product has this sku."""

    def __init__(self) -> None:
        super().__init__("Another product has this sku", "sku_taken")


@dataclass(frozen=True)
class Listed:
    """Products with their free stock, by id; `after` continues the list, None where it ends."""

    products: list[tuple[Product, int]]
    after: int | None = None


def listed(for_staff: bool, limit: int | None = None, after: int = 0) -> Listed:
    """Return products above an id: those that shoppers are shown, or `for_staff` all of them.

    Raises stock.Unavailable when Redis can't tell the stock.
    """
    limit = limit or MOST_LISTED
    query = select(Product).where(Product.id > after).order_by(Product.id).limit(limit + 1)
    if not for_staff:
        query = query.where(Product.visibility == "listed", Product.archived.is_(False))
    found = list(db.session.scalars(query))
    page = _with_stock(found[:limit])
    return Listed(page, found[limit - 1].id if len(found) > limit else None)


def product_with_stock(product_id: int, for_staff: bool = True) -> tuple[Product, int]:
    """Return a product with its free stock; errors as in `listed`.

    Raises UnknownProduct, also for one that only the staff sees.
    """
    product = db.session.get(Product, product_id)
    if product is None or not (for_staff or is_shown(product)):
        raise UnknownProduct(product_id)
    return _with_stock([product])[0]


def is_shown(product: Product) -> bool:
    """Tell whether shoppers are told of the product."""
    return product.visibility == "listed" and not product.archived


def _with_stock(products: list[Product]) -> list[tuple[Product, int]]:
    held = stock.view([product.id for product in products])
    if not held.generation:
        raise Unprepared("the sale is not in Redis")
    for product in products:
        product.braked = held.brakes.bind(product.id)
    return [(p, held.products.get(p.id, {}).get("free", 0)) for p in products]


def names() -> Names:
    """Return the name of every product, by its id; it knows those of before, too."""
    return Names.read()


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
            put_on_sale([created.product["id"]])
            return created
    require_sale()
    (product,) = add([new], actor, "created")
    product.braked = stock.braked().bind(product.id)
    created = Created(describe(product, new.units), product.version)
    if taken:
        taken.answer = {"product": created.product, "version": created.version}
    db.session.commit()
    put_on_sale([product.id])
    return created


def add(news: Sequence[NewProduct], actor: Actor, reason: str) -> list[Product]:
    """Add products to this transaction, which puts them on record. Raises SkuTaken."""
    products = [Product(**new.terms, minor_units=True) for new in news]
    db.session.add_all(products)
    # What the schema fills in comes back, so that the audit shows what really is in force.
    _flush()
    for product, new in zip(products, news, strict=True):
        db.session.add(
            StockMovement(
                product_id=product.id,
                kind="initial",
                units=new.units,
                actor=actor.name,
                reason=reason,
            )
        )
        record(
            actor,
            "product.create",
            f"product {product.id}",
            after=terms_of(product) | {"stock": new.units},
        )
    return products


def _flush() -> None:
    """Send what the session holds. Raises SkuTaken, and nothing of it is left then."""
    try:
        db.session.flush()
    except IntegrityError as error:
        db.session.rollback()
        if "uq_products_sku" in str(error.orig):
            raise SkuTaken from None
        raise


def put_on_sale(ids: list[int]) -> None:
    """Do in Redis what is left of a creation: nothing, where it was done already.

    Raises stock.Unavailable.
    """
    with_first_stock = (
        select(Product, StockMovement)
        .join(StockMovement, StockMovement.product_id == Product.id)
        .where(
            Product.id.in_(ids),
            StockMovement.kind == "initial",
            StockMovement.applied_at.is_(None),
        )
    )
    apply_first_stock(
        [(product, movement) for product, movement in db.session.execute(with_first_stock)]
    )


class Changed(NamedTuple):
    """A product with its free stock; `pending` are shards in which its terms are not in force yet.

    They can't be reached now, and a worker brings it there.
    """

    product: Product
    free: int
    pending: tuple[int, ...] = ()


def change(
    product_id: int, values: dict[str, Any], actor: Actor, versions: Container[int] | None = None
) -> Changed:
    """Change terms of sale, given by column.

    With `versions` only a product that still has one of them is changed. Raises WrongWindow,
    StaleVersion, SkuTaken, CurrencyFixed, UnknownProduct, stock.Unavailable.
    """
    return _change(product_id, lambda product: values, actor, versions)


def open_now(product_id: int, actor: Actor) -> Changed:
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


def end_now(product_id: int, actor: Actor) -> Changed:
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
    if is_withdrawn(product):
        what = "archived: restore it" if product.archived else "a draft: list or hide it"
        raise Conflict(f"The product is {what} first", "withdrawn")
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
) -> Changed:
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
    if "currency" in values:
        _check_currency(product, values)
    if "price_cents" in values and product.minor_units is None and not has_orders(product.id):
        # Whoever sets the price anew means what it is shown as.
        values["minor_units"] = True
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
        _flush()
    db.session.commit()
    pending: tuple[int, ...] = ()
    try:
        publish(product)
    except Pending as error:
        pending = error.shards
    return Changed(*product_with_stock(product_id), pending)


def _check_currency(product: Product, values: dict[str, Any]) -> None:
    """Refuse another currency once something was sold, and a price that would mean another one.

    Raises CurrencyFixed and InvalidRequest.
    """
    if has_orders(product.id):
        db.session.rollback()
        raise CurrencyFixed
    if "price_cents" not in values and (
        shown_digits(values["currency"]) != shown_digits(product.currency)
    ):
        db.session.rollback()
        raise InvalidRequest(
            "priceCents must come with a currency whose minor unit has other digits", "priceCents"
        )
