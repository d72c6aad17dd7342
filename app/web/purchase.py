"""The purchase, from the bytes of a request to a claim: what a well-formed one looks like."""

from ..problems import AnotherShopper
from ..reading import (
    MAX_ID,
    User,
    check_key,
    read_integer,
    read_object,
    read_price,
    read_reference,
    read_user,
)
from ..stock.claims import Request


def read_purchase(
    body: bytes | bytearray, key: str | None, address: str, shopper: User | None = None
) -> Request:
    """Return what is to be claimed, as the roads to Redis take it.

    The request must be the `shopper`'s own where one is given. Members that it does not know are
    ignored. Raises InvalidRequest and AnotherShopper.
    """
    data = read_object(body)
    user = read_user(data)
    if shopper is not None and shopper != user:
        raise AnotherShopper("The token is another shopper's")
    product_id = read_integer(data, "productId", 1, MAX_ID)
    # The product's own maximum is checked by the claim, which alone knows it.
    quantity = read_integer(data, "quantity", 1, MAX_ID) if "quantity" in data else 1
    if key is not None:
        check_key(key)
    return Request(user, product_id, quantity, key, address, read_price(data), read_reference(data))
