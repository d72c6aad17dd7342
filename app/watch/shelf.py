"""What pages show of the products when PostgreSQL is away: kept in Redis by the sweeper.

Nothing of it can change while PostgreSQL is away, so what was kept last is what is in force.
"""

import json
import time
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import DateTime, Select, select, true

from ..extensions import Base, db, stock
from ..models import Product, ProductTotals, sums_by_id

# Redis may lose what was kept; so all of it is written again so often.
ALL_SECONDS = 30
# A worker does it a tenth of its time at most.
RESTS = 10

Row = tuple[Product, ProductTotals]
Kept = TypeVar("Kept", bound=Base)


class Shelf:
    """Writes what has changed since it wrote last."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, ...]] = {}
        self._all_at = self._next_at = float("-inf")

    def renew(self) -> None:
        """Keep every product as PostgreSQL has it; of very many not at each call.

        Raises stock.Unavailable.
        """
        begun = time.monotonic()
        if begun < self._next_at:
            return
        if begun - self._all_at > ALL_SECONDS:
            self._kept, self._all_at = {}, begun
        sums = sums_by_id()
        columns = [getattr(Product, name) for name in _names(Product)]
        columns += [getattr(sums, name) for name in _names(ProductTotals)]
        found = db.session.execute(select(*columns).join_from(Product, sums, true()))
        # As they come: to make objects of all of them takes ten times as long.
        rows = {row.id: tuple(row) for row in found}
        changed = {p: row for p, row in rows.items() if self._kept.get(p) != row}
        stock.board.put_shelf({p: json.dumps(_fields(row)) for p, row in changed.items()})
        self._kept = rows
        self._next_at = begun + RESTS * (time.monotonic() - begun)


def products_and_totals() -> Select[Product, ProductTotals]:
    """Return the query of every product with its sums, by id."""
    sums = sums_by_id()
    return select(Product, sums).join(sums, true()).order_by(Product.id)


def read() -> list[Row]:
    """Return the products as they were kept, by id; they belong to no session.

    Raises stock.Unavailable.
    """
    found = sorted(stock.board.shelf().items())
    kept = [json.loads(text) for _, text in found]
    return [(_made(Product, product), _made(ProductTotals, sums)) for product, sums in kept]


def _names(model: type[Base]) -> list[str]:
    return [column.key for column in model.__table__.columns]


def _fields(row: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Return a row's fields by their names: the product's, and its sums'."""
    values = [value.isoformat() if isinstance(value, datetime) else value for value in row]
    product = _names(Product)
    return [
        dict(zip(product, values, strict=False)),
        dict(zip(_names(ProductTotals), values[len(product) :], strict=True)),
    ]


def _made(model: type[Kept], fields: dict[str, Any]) -> Kept:
    """Return the row; what another version of this system kept besides is left out."""
    values = {}
    for column in model.__table__.columns:
        value = fields.get(column.key)
        if value is not None and isinstance(column.type, DateTime):
            value = datetime.fromisoformat(value)
        values[column.key] = value
    return model(**values)
