"""The list of products as people look through it: by name and state, what sells now first."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, case, func, or_, select, true

from ..extensions import db
from ..models import Product, ProductTotals, sums_by_id
from ..reading import MAX_ID

PAGE_PRODUCTS = 50
# In the order of the list: what sells comes first, what is over comes last.
STATES = ("live", "sold out", "paused", "scheduled", "draft", "ended", "archived")
SORTS = ("live", "newest", "name", "stock")


@dataclass(frozen=True)
class Wanted:
    """What is looked for: a part of the name, the id or the sku; one of STATES; one of SORTS.

    Without a state all are found but the archived ones.
    """

    text: str = ""
    state: str | None = None
    sort: str = "live"


@dataclass(frozen=True)
class Page:
    """Ids of one page's products in their order; `total` counts those of all pages."""

    ids: list[int]
    total: int
    number: int = 1

    @property
    def first(self) -> int:
        return (self.number - 1) * PAGE_PRODUCTS + 1

    @property
    def last(self) -> int:
        return self.first + len(self.ids) - 1


def find(wanted: Wanted, number: int = 1) -> Page:
    """Return one page of the products, counted from 1; past the last one it is the last.

    States are those that PostgreSQL knows: units count as free until their order is stored, so a
    product that has just sold out may be among the live ones for a second.
    """
    now, sums = datetime.now(UTC), sums_by_id()
    found = _matching(wanted, now, sums)
    total = db.session.scalar(select(func.count()).select_from(found.subquery())) or 0
    number = max(1, min(number, -(-total // PAGE_PRODUCTS)))
    page = found.order_by(*_order(wanted.sort, now, sums)).limit(PAGE_PRODUCTS)
    ids = list(db.session.scalars(page.offset((number - 1) * PAGE_PRODUCTS)))
    return Page(ids, total, number)


def _matching(wanted: Wanted, now: datetime, sums: type[ProductTotals]) -> Select[int]:
    query = select(Product.id).join(sums, true())
    if wanted.text:
        matches = [
            Product.name.icontains(wanted.text, autoescape=True),
            Product.sku == wanted.text,
        ]
        number = wanted.text.removeprefix("#")
        if number.isascii() and number.isdigit() and len(number) <= 16 and int(number) <= MAX_ID:
            matches.append(Product.id == int(number))
        query = query.where(or_(*matches))
    if wanted.state:
        query = query.where(_rank(now, sums) == STATES.index(wanted.state))
    else:
        query = query.where(Product.archived.is_(False))
    return query


def _order(sort: str, now: datetime, sums: type[ProductTotals]) -> tuple[ColumnElement[Any], ...]:
    newest = Product.id.desc()
    return {
        "live": (_rank(now, sums), newest),
        "newest": (newest,),
        "name": (func.lower(Product.name), newest),
        "stock": (_free(sums), newest),
    }[sort]


def _rank(now: datetime, sums: type[ProductTotals]) -> ColumnElement[int]:
    """Return the place of a product's state in STATES, decided in the claim's order."""
    return case(
        (Product.archived, STATES.index("archived")),
        (Product.visibility == "draft", STATES.index("draft")),
        (Product.closes_at <= now, STATES.index("ended")),
        (Product.paused, STATES.index("paused")),
        (Product.opens_at > now, STATES.index("scheduled")),
        (_free(sums) <= 0, STATES.index("sold out")),
        else_=STATES.index("live"),
    )


def _free(sums: type[ProductTotals]) -> ColumnElement[int]:
    """Return the units put on sale less those of stored orders and dead letters."""
    taken = sums.stored_units + sums.dead_units + sums.abandoned_units
    return sums.moved_units - taken
