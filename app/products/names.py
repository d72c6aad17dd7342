"""What products are called, now and when they were sold: an order keeps its product's name."""

from bisect import bisect_right
from datetime import datetime
from typing import Self

from sqlalchemy import select

from ..extensions import db
from ..models import Product, ProductName


class Names(dict[int, str]):
    """The products' names of today, by id; `sold` knows the earlier ones."""

    def __init__(self, current: dict[int, str], former: dict[int, list[tuple[datetime, str]]]):
        """`former` has each product's earlier names with the moment of the change, ascending."""
        super().__init__(current)
        self._former = former

    @classmethod
    def read(cls) -> Self:
        """Return those of all products. Two statements, however many orders there are."""
        current = db.session.execute(select(Product.id, Product.name).order_by(Product.id))
        former: dict[int, list[tuple[datetime, str]]] = {}
        rows = db.session.execute(
            select(ProductName.product_id, ProductName.until, ProductName.name).order_by(
                ProductName.product_id, ProductName.until
            )
        )
        for product_id, until, name in rows:
            former.setdefault(product_id, []).append((until, name))
        return cls(dict(current.all()), former)

    def sold(self, product_id: int, at: datetime) -> str | None:
        """Return what the product was called at a moment, None for one that nobody knows."""
        former = self._former.get(product_id, [])
        place = bisect_right(former, at, key=lambda change: change[0])
        return former[place][1] if place < len(former) else self.get(product_id)
