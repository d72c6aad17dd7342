"""What happened to orders, for those who follow it."""

from collections.abc import Sequence

from ..models import Order


def record(kind: str, orders: Sequence[Order], **more: object) -> None:
    """Note a step of these orders in the current transaction, which has changed and locks them.

    `kind` is order.cancelled (also of a part: then the order still stands), order.released,
    order.expired, order.confirmed; `more` is what this step did.
    """
