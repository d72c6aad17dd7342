"""The sale in Redis: which one it must be, and putting a product's terms in force there.

Each change of terms has a version, and Redis keeps the highest; what a crash left unpublished is
finished by `publish_stale`, any number of times.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import select

from ..extensions import db, stock
from ..generation import Held, held, on_record
from ..models import Product
from ..problems import Unavailable, Unprepared
from ..stock.spread import in_words


def require_sale() -> None:
    """Refuse a change while Redis can't carry it out. Raises stock.Unavailable."""
    found = held(stock.generation(), on_record())
    if found is Held.NOTHING:
        raise Unprepared("the sale is not in Redis")
    if found is not Held.THIS:
        raise Unprepared("Redis holds another sale")


def is_prepared() -> bool:
    """Return whether Redis holds the sale that PostgreSQL knows. Raises stock.Unavailable."""
    return held(stock.generation(), on_record()) is Held.THIS


def is_withdrawn(product: Product) -> bool:
    """Tell whether the product can't be bought at all: to shoppers it is unknown."""
    return bool(product.archived) or product.visibility == "draft"


def in_force(product: Product) -> dict[str, object]:
    """Return the terms of sale in the form that Redis obeys."""
    return {
        "opens": _milliseconds(product.opens_at),
        "closes": _milliseconds(product.closes_at),
        "pause": int(product.paused),
        "cap": product.per_user_limit,
        # None at all, which claims of version 0.1.0 refuse, too.
        "max": 0 if is_withdrawn(product) else product.max_quantity,
        # Opaque to Redis, and carried by each order: the price at the moment of the claim.
        "price": f"{product.price_cents} {product.currency}",
        "hold": product.hold_seconds,
    }


def all_terms() -> dict[int, tuple[int, dict[str, object]]]:
    """Return (version, terms in force) of every product, by its id."""
    products = db.session.scalars(select(Product))
    return {product.id: (product.version, in_force(product)) for product in products}


def publish(product: Product) -> bool:
    """Put the product's terms in force; False when they are already. Raises stock.Unavailable."""
    return stock.put_product(product.id, product.version, in_force(product))


def to_follow(pending: Sequence[int]) -> str:
    """Return what people are told of shards that a change could not reach; mostly nothing."""
    if not pending:
        return ""
    where = in_words(pending)
    return f" Not yet in {where}, out of reach now: a worker brings it there."


def _milliseconds(moment: datetime | None) -> int | None:
    return None if moment is None else round(moment.timestamp() * 1000)


def publish_stale() -> int:
    """Put in force what Redis does not know yet; return the number of products.

    Raises stock.Unavailable where a shard can't be told, once all else is done.
    """
    versions = dict(db.session.execute(select(Product.id, Product.version)).all())
    known = stock.view(list(versions)).products
    stale = [of for of in versions if known.get(of, {}).get("version", 0) < versions[of]]
    done, failed = 0, None
    for product in db.session.scalars(select(Product).where(Product.id.in_(stale))):
        try:
            done += publish(product)
        except Unavailable as error:
            failed = error
            if len(stock.shards) == 1:
                break
    if failed:
        raise failed
    return done
