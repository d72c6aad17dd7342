"""The purchase, from the bytes of a request to a claim: what a well-formed one looks like."""

from ..problems import AnotherShopper
from ..reading import MAX_ID, check_key, read_integer, read_object


def read_purchase(
    body: bytes | bytearray, key: str | None, address: str, shopper: int | None = None
) -> tuple[int, int, int, str | None, str]:
    """Return user, product, quantity, key and address, as the roads to Redis take them.

    The request must be the `shopper`'s own where one is given. Members that it does not know are
    ignored. Raises InvalidRequest and AnotherShopper.
    """
    data = read_object(body)
    user_id = read_integer(data, "userId", 1, MAX_ID)
    if shopper is not None and shopper != user_id:
        raise AnotherShopper("The token is another shopper's")
    product_id = read_integer(data, "productId", 1, MAX_ID)
    # The product's own maximum is checked by the claim, which alone knows it.
    quantity = read_integer(data, "quantity", 1, MAX_ID) if "quantity" in data else 1
    if key is not None:
        check_key(key)
    return user_id, product_id, quantity, key, address
