"""The purchase, from the bytes of a request to a claim: what a well-formed one looks like."""

import json
import re
from collections.abc import Awaitable, Callable

from .identity import AnotherShopper
from .models import MAX_ID
from .stock import Claim

MAX_BODY_BYTES = 16 * 1024
# JSON is UTF-8 (RFC 8259, 8.1); json.loads() would look for other encodings first, every time.
decode = json.JSONDecoder().decode
# draft-ietf-httpapi-idempotency-key-header leaves the form to the server: visible ASCII here.
VALID_KEY = re.compile(r"[\x21-\x7e]{1,255}").fullmatch


class InvalidRequest(ValueError):
    """The request has a wrong shape; `field` names the part that is wrong, if one is."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def read_object(body: bytes) -> dict:
    """Return the JSON object in `body`. Raises InvalidRequest."""
    try:
        data = decode(body.decode())
    except (ValueError, RecursionError):
        raise InvalidRequest("The body is not valid JSON") from None
    if type(data) is not dict:
        raise InvalidRequest("The body must be a JSON object")
    return data


def read_integer(data: dict, name: str, low: int, high: int) -> int:
    """Return a member that is a JSON integer in a range (no string, float or boolean).

    Raises InvalidRequest.
    """
    value = data.get(name)
    # bool is a subclass of int, so isinstance() would let `true` through.
    if type(value) is not int:
        missing = name not in data
        raise InvalidRequest(
            f"{name} is required" if missing else f"{name} must be an integer", name
        )
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be from {low} to {high}", name)
    return value


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
