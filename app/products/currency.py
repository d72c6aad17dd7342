"""Amounts of before the minor units of ISO 4217, and putting them right.

Forms of earlier versions took every amount for hundredths: 1500 typed for a product in JPY was
stored as 150000. The API took minor units, so that its rows are right. Which of the two wrote a
row nobody can tell for sure: somebody says it, product by product, and nothing is rewritten before.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, cast

from sqlalchemy import CursorResult, Row, select, true, update

from ..audit import Actor, record
from ..extensions import db, stock
from ..models import (
    STANDING_STATUSES,
    AuditEntry,
    DeadLetter,
    Order,
    Product,
    ProductTotals,
    sums_by_id,
)
from ..money import USUAL_DIGITS, decimal, digits_of
from ..problems import Conflict, UnknownProduct
from ..stock.entries import STANDING
from .sale import publish, require_sale

# So many keys are put right in Redis at once.
KEYS_AT_ONCE = 2000


@dataclass(frozen=True)
class Doubt:
    """A product whose amounts may be hundredths, and the two ways to read its price."""

    product_id: int
    name: str
    currency: str
    price_cents: int
    orders: int
    # Who set the price last, "staff …" by a form or "token …" by the API; and when.
    actor: str | None
    at: datetime | None

    @property
    def as_minor_units(self) -> str:
        """The price if it was stored by the API: what it says now."""
        return f"{self.currency} {decimal(self.price_cents, self.currency, ',')}"

    @property
    def as_hundredths(self) -> str | None:
        """The price if a form stored it; None where that can't be, for it would not be whole."""
        amount = from_hundredths(self.price_cents, self.currency)
        return None if amount is None else f"{self.currency} {decimal(amount, self.currency, ',')}"


def from_hundredths(amount: int, currency: str) -> int | None:
    """Return hundredths in the currency's minor unit, None where they are no whole number of it."""
    digits = digits_of(currency)
    if digits is None:
        return None
    whole, rest = divmod(amount * 10**digits, 10**USUAL_DIGITS)
    return None if rest else whole


def has_orders(product_id: int) -> bool:
    """Tell whether anything of the product was ever sold. Raises stock.Unavailable."""
    totals = db.session.get(ProductTotals, product_id, populate_existing=True)
    if totals and (totals.stored_orders or totals.dead_orders):
        return True
    figures = stock.view([product_id]).products.get(product_id)
    return bool(figures and figures["accepted"])


def doubts() -> list[Doubt]:
    """Return the products about which somebody has to say it, by id."""
    sums = sums_by_id()
    rows = db.session.execute(
        select(Product, sums)
        .join(sums, true())
        .where(Product.minor_units.is_(None))
        .order_by(Product.id)
    )
    return [_doubt(product, totals) for product, totals in rows if in_doubt(product)]


def in_doubt(product: Product) -> bool:
    """Tell whether the product's amounts may be hundredths though its minor unit is another."""
    return product.minor_units is None and digits_of(product.currency) not in (None, USUAL_DIGITS)


def _doubt(product: Product, totals: ProductTotals) -> Doubt:
    said = db.session.execute(
        select(AuditEntry.actor, AuditEntry.at)
        .where(
            AuditEntry.target == f"product {product.id}",
            AuditEntry.action.in_(("product.create", "product.change")),
            AuditEntry.after.has_key("priceCents"),
            AuditEntry.at >= product.created_at,
        )
        .order_by(AuditEntry.id.desc())
        .limit(1)
    ).one_or_none()
    return Doubt(
        product.id,
        product.name,
        product.currency,
        product.price_cents,
        totals.stored_orders,
        said.actor if said else None,
        said.at if said else None,
    )


def keep(product_id: int, actor: Actor) -> None:
    """Note that the product's amounts are right as they stand. Raises Conflict, UnknownProduct."""
    product = _locked(product_id)
    _settle(product, actor, product.price_cents)
    db.session.commit()


def rewrite(product_id: int, actor: Actor) -> int:
    """Turn a product's price, and those of its orders, from hundredths to minor units.

    All in one transaction; Redis gets the orders' prices, which replays tell, before it ends and
    the product's own after it, as with any change. Killed midway, it can be run again. Returns the
    number of orders. Raises Conflict while something of it could still come with the old price, or
    where an amount would not be whole; UnknownProduct; stock.Unavailable.
    """
    require_sale()
    product = _locked(product_id)
    price = from_hundredths(product.price_cents, product.currency)
    if price is None or not _all_orders_whole(product):
        _refuse("There is an amount that is no whole number of minor units, if it is in hundredths")
    _require_rest(product)
    rewritten = _rewrite_orders(product)
    _put_keys(product_id)
    _settle(product, actor, price, rewritten)
    product.price_cents = price
    product.version += 1
    db.session.commit()
    publish(product)
    return rewritten


def _locked(product_id: int) -> Product:
    product = db.session.get(Product, product_id, with_for_update=True, populate_existing=True)
    if product is None:
        db.session.rollback()
        raise UnknownProduct(product_id)
    if not in_doubt(product):
        _refuse("The amounts of this product are not in doubt")
    return product


def _refuse(why: str) -> NoReturn:
    db.session.rollback()
    raise Conflict(why, "currency")


def _require_rest(product: Product) -> None:
    """Refuse while a purchase is possible, or an order on its way that has the old price."""
    figures = stock.view([product.id]).products.get(product.id)
    # What Redis does not have in force yet, it may still sell.
    if figures is None or figures["version"] < product.version or not figures["pause"]:
        _refuse("Pause the product first: its price changes meanwhile")
    if figures and figures["accepted"] > figures["settled"]:
        _refuse("Orders of it wait to be stored: try again in a moment")
    letters = select(DeadLetter.id).where(
        DeadLetter.product_id == product.id, DeadLetter.resolution.is_(None)
    )
    if db.session.scalar(letters.limit(1)):
        _refuse("It has open dead letters: decide about them first")


def _rewrite_orders(product: Product) -> int:
    """Turn the prices of the product's orders from hundredths to minor units; return how many."""
    digits, price = digits_of(product.currency) or 0, Order.unit_price_cents
    if digits < USUAL_DIGITS:
        price = price // 10 ** (USUAL_DIGITS - digits)
    else:
        price = price * 10 ** (digits - USUAL_DIGITS)
    done = db.session.execute(
        update(Order)
        .where(Order.product_id == product.id)
        .values(unit_price_cents=price)
        .execution_options(synchronize_session=False)
    )
    return cast("CursorResult[Any]", done).rowcount


def _all_orders_whole(product: Product) -> bool:
    parts = 10 ** max(0, USUAL_DIGITS - (digits_of(product.currency) or 0))
    broken = select(Order.id).where(
        Order.product_id == product.id, Order.unit_price_cents % parts != 0
    )
    return db.session.scalar(broken.limit(1)) is None


def _put_keys(product_id: int) -> None:
    """Write what replays of the product's orders tell. A cancellation waits for our row locks."""
    last = 0
    while True:
        page = db.session.execute(
            select(
                Order.id,
                Order.user_id,
                Order.user_name,
                Order.idempotency_key,
                Order.unit_price_cents,
                Order.currency,
                Order.status,
                Order.quantity,
                Order.reference,
            )
            .where(
                Order.product_id == product_id,
                Order.idempotency_key.is_not(None),
                Order.id > last,
            )
            .order_by(Order.id)
            .limit(KEYS_AT_ONCE)
        ).all()
        if not page:
            return
        stock.put_keys(
            (
                row.user_name if row.user_id is None else row.user_id,
                row.idempotency_key,
                _record_of_key(product_id, row),
            )
            for row in page
        )
        last = page[-1].id


def _record_of_key(product_id: int, row: Row[*tuple[Any, ...]]) -> str:
    status = STANDING if row.status in STANDING_STATUSES else row.status
    words = (row.id, row.unit_price_cents, row.currency, status, product_id, row.quantity)
    return " ".join(map(str, words)) + (f" {row.reference}" if row.reference is not None else "")


def _settle(product: Product, actor: Actor, price_cents: int, rewritten: int | None = None) -> None:
    """Note what was said about the product; the caller commits it."""
    record(
        actor,
        "product.currency",
        f"product {product.id}",
        before={"priceCents": product.price_cents, "currency": product.currency},
        after={"priceCents": price_cents}
        | ({} if rewritten is None else {"orders": rewritten, "from": "hundredths"}),
    )
    product.minor_units = True
