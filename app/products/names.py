"""What products are called, now and when they were sold: an order keeps its product's name."""

from bisect import bisect_right
from collections.abc import Collection
from datetime import datetime
from typing import Self

from sqlalchemy import text

from ..extensions import db
from ..reading import MAX_ID

# A name of today has no end. As text: building such a query anew, with its lists, was a quarter of
# what a batch of confirmations costs the web process.
NAMES = """
    SELECT id, CAST(NULL AS timestamptz) AS until, name FROM products {of_products}
    UNION ALL SELECT product_id, until, name FROM product_names {of_names} ORDER BY id, until
"""
ALL = text(NAMES.format(of_products="", of_names=""))
SOME = text(
    NAMES.format(
        of_products="WHERE id = ANY(CAST(:ids AS bigint[]))",
        of_names="WHERE product_id = ANY(CAST(:ids AS bigint[]))",
    )
)


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
        if ids is None:
            rows = db.session.execute(ALL)
        else:
            possible = [product_id for product_id in ids if 0 < product_id <= MAX_ID]
            rows = db.session.execute(SOME, {"ids": possible})
        current: dict[int, str] = {}
        former: dict[int, list[tuple[datetime, str]]] = {}
        for product_id, until, name in rows:
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
