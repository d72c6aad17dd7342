"""What followers of the feed are told of products: units put on sale, and none left."""

from typing import Any

from sqlalchemy import select, text

from ..events import Happened, add
from ..extensions import db, stock
from ..models import Product, StockMovement

SEEN_AGAIN = text("DELETE FROM sold_out WHERE product_id = ANY(:ids)")
SEEN_SOLD_OUT = text("""
    INSERT INTO sold_out (product_id) SELECT id FROM products WHERE id = ANY(:ids) ORDER BY id
    ON CONFLICT DO NOTHING RETURNING product_id
""")


def restocked(movement: StockMovement, free: int) -> None:
    """Tell, in the transaction that marks it as applied, of units that were put on sale."""
    product = _described(db.session.get_one(Product, movement.product_id), free)
    add([Happened("product.restocked", {"product": product, "units": movement.units})])


class Observer:
    """Looks once a second which products have no free units left.

    An observation: a product that was sold out and restocked between two looks is not told.
    """

    def __init__(self) -> None:
        self._seen: dict[int, bool] = {}

    def run_once(self) -> list[int]:
        """Tell of products that are sold out since the last look, of any worker; return them.

        Raises stock.Unavailable.
        """
        view = stock.view(stock.product_ids())
        if view.missing:
            # There may be units of it where nobody can look.
            return []
        seen = {
            product_id: figures["free"] == 0
            for product_id, figures in view.products.items()
            # What has never had a unit is not sold out.
            if figures["free"] or figures["claimed"]
        }
        changed = [of for of, sold_out in seen.items() if self._seen.get(of) is not sold_out]
        if not changed:
            return []
        db.session.execute(SEEN_AGAIN, {"ids": [of for of in changed if not seen[of]]})
        gone = list(db.session.scalars(SEEN_SOLD_OUT, {"ids": [of for of in changed if seen[of]]}))
        products = db.session.scalars(select(Product).where(Product.id.in_(gone)))
        observed = {"observed": True}
        add(
            Happened("product.sold_out", {"product": _described(product, 0)} | observed)
            for product in products
        )
        db.session.commit()
        self._seen = seen
        return gone


def _described(product: Product, free: int) -> dict[str, Any]:
    return {"id": product.id, "name": product.name, "freeUnits": free}
