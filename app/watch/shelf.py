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

Row = tuple[Product, ProductTotals]
Kept = TypeVar("Kept", bound=Base)


class Shelf:
    """Writes what has changed since it wrote last."""

    def __init__(self) -> None:
        self._kept: dict[int, str] = {}
        self._all_at = float("-inf")

    def renew(self) -> None:
        """Keep every product as PostgreSQL has it. Raises stock.Unavailable."""
        if time.monotonic() - self._all_at > ALL_SECONDS:
            self._kept, self._all_at = {}, time.monotonic()
        rows = db.session.execute(products_and_totals())
        texts = {
            product.id: json.dumps([_fields(product), _fields(sums)]) for product, sums in rows
        }
        stock.board.put_shelf({p: text for p, text in texts.items() if self._kept.get(p) != text})
        self._kept = texts


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


def _fields(row: Base) -> dict[str, Any]:
    values = {column.key: getattr(row, column.key) for column in row.__table__.columns}
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in values.items()
    }


def _made(model: type[Kept], fields: dict[str, Any]) -> Kept:
    """Return the row; what another version of this system kept besides is left out."""
    values = {}
    for column in model.__table__.columns:
        value = fields.get(column.key)
        if value is not None and isinstance(column.type, DateTime):
            value = datetime.fromisoformat(value)
        values[column.key] = value
    return model(**values)
