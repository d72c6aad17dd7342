"""The purchase, from the bytes of a request to a claim: what a well-formed one looks like."""

from collections.abc import Awaitable, Callable

from ..problems import AnotherShopper, InvalidRequest
from ..reading import MAX_ID, VALID_KEY, read_integer, read_object
from ..stock.lines import Claim


async def purchase(
    claim: Callable[..., Awaitable[Claim]],
    body: bytes,
    key: str | None,
    address: str,
    shopper: int | None = None,
) -> Claim:
    """Decide one purchase request, which must be the `shopper`'s own where one is given.

    `claim` is the road to Redis. Raises InvalidRequest and AnotherShopper before Redis is asked,
    and stock.Unavailable when it gave no answer, so that the outcome is unknown.
    """
    data = read_object(body)
    user_id = read_integer(data, "userId", 1, MAX_ID)
    if shopper is not None and shopper != user_id:
        raise AnotherShopper("The token is another shopper's")
    product_id = read_integer(data, "productId", 1, MAX_ID)
    # The product's own maximum is checked by the claim, which alone knows it.
    quantity = read_integer(data, "quantity", 1, MAX_ID) if "quantity" in data else 1
    if key is not None and not VALID_KEY(key):
        raise InvalidRequest(
            "Idempotency-Key must be 1 to 255 visible ASCII characters", "Idempotency-Key"
        )
    return await claim(user_id, product_id, quantity, key, address)
