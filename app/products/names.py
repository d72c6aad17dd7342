"""What products are called, now and when they were sold: an order keeps its product's name."""

from bisect import bisect_right
from collections.abc import Collection
from datetime import datetime
from typing import Self

from sqlalchemy import null, select

from ..extensions import db
from ..models import Product, ProductName
from ..reading import MAX_ID


class Names(dict[int, str]):
    """The products' names of today, by id; `sold` knows the earlier ones."""

    def __init__(self, current: dict[int, str], former: dict[int, list[tuple[datetime, str]]]):
        """`former` has each product's earlier names with the moment of the change, ascending."""
        super().__init__(current)
        self._former = former

    @classmethod
    def read(cls, ids: Collection[int] | None = None) -> Self:
        """Return those of all products, or of some. One statement, however many orders there are.

        An id that no product can have is passed over.
        """
        now = select(Product.id, null().label("until"), Product.name)
        before = select(ProductName.product_id, ProductName.until, ProductName.name)
        if ids is not None:
            possible = [product_id for product_id in ids if 0 < product_id <= MAX_ID]
            now = now.where(Product.id.in_(possible))
            before = before.where(ProductName.product_id.in_(possible))
        current: dict[int, str] = {}
        former: dict[int, list[tuple[datetime, str]]] = {}
        for product_id, until, name in db.session.execute(
            now.union_all(before).order_by("id", "until")
        ):
            if until is None:
                current[product_id] = name
            else:
                former.setdefault(product_id, []).append((until, name))
        return cls(current, former)

    def sold(self, product_id: int, at: datetime) -> str | None:
        """Return what the product was called at a moment, None for one that nobody knows."""
        former = self._former.get(product_id, [])
        place = bisect_right(former, at, key=lambda change: change[0])
        return former[place][1] if place < len(former) else self.get(product_id)
