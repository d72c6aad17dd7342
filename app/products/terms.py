"""The terms on which a product is sold: how they are read, checked, described and offered."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..models import MAX_HOLD_SECONDS, MIN_HOLD_SECONDS, Product
from ..money import read_currency, shown_digits
from ..problems import InvalidRequest
from ..reading import MAX_ID, MAX_QUANTITY, MAX_STOCK, check_known, read_integer, read_text
from ..times import utc_text

MAX_NAME = 200
# A draft can't be bought, and is seen by the staff alone; who knows of a hidden one can buy it.
VISIBILITIES = ("draft", "hidden", "listed")
SKU = re.compile(r"[\x21-\x7e]{1,64}").fullmatch
# RFC 3339, 5.6: date, time and an offset.
RFC3339 = re.compile(
    r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?([Zz]|[+-]\d{2}:\d{2})", re.ASCII
).fullmatch


class WrongWindow(InvalidRequest):
    """The sale would close before it opens."""

    def __init__(self) -> None:
        super().__init__("closesAt must be after opensAt", "closesAt")


def moment(value: object, field: str, called: str | None = None) -> datetime:
    """Return the moment that an RFC 3339 text names. Raises InvalidRequest."""
    called = called or field
    try:
        if not isinstance(value, str) or not RFC3339(value):
            raise ValueError
        found = datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"{called} must be a time with offset (RFC 3339), like 2026-11-27T09:00:00Z", field
        ) from None
    if not 1970 <= found.year <= 9000:
        raise InvalidRequest(f"{called} must be between the years 1970 and 9000", field)
    return found


def visibility(value: object, called: str = "visibility") -> str:
    """Return one of VISIBILITIES. Raises InvalidRequest."""
    if value not in VISIBILITIES:
        raise InvalidRequest(f"{called} must be one of {', '.join(VISIBILITIES)}", "visibility")
    return str(value)


def sku(value: object, called: str = "sku") -> str:
    """Return the shop's own name for a product. Raises InvalidRequest."""
    if not isinstance(value, str) or not SKU(value):
        raise InvalidRequest(f"{called} must be 1 to 64 visible ASCII characters", "sku")
    return value


def _flag(data: dict[str, Any], name: str) -> bool:
    value = data.get(name)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false", name)
    return value


Read = Callable[[dict[str, Any], str], object]


def _or_none(read: Read) -> Read:
    """Let null stand for "none"."""
    return lambda data, name: None if data[name] is None else read(data, name)


# The JSON name of each term, the column it is stored in, and how it is read.
TERMS: dict[str, tuple[str, Read]] = {
    "name": ("name", lambda data, name: read_text(data, name, MAX_NAME)),
    "priceCents": ("price_cents", lambda data, name: read_integer(data, name, 0, MAX_ID)),
    "currency": ("currency", lambda data, name: read_currency(data[name])),
    "opensAt": ("opens_at", _or_none(lambda data, name: moment(data[name], name))),
    "closesAt": ("closes_at", _or_none(lambda data, name: moment(data[name], name))),
    "perUserLimit": (
        "per_user_limit",
        _or_none(lambda data, name: read_integer(data, name, 1, MAX_QUANTITY)),
    ),
    "maxQuantity": ("max_quantity", lambda data, name: read_integer(data, name, 1, MAX_QUANTITY)),
    "paused": ("paused", _flag),
    "holdSeconds": (
        "hold_seconds",
        _or_none(lambda data, name: read_integer(data, name, MIN_HOLD_SECONDS, MAX_HOLD_SECONDS)),
    ),
    "sku": ("sku", _or_none(lambda data, name: sku(data[name]))),
    "visibility": ("visibility", lambda data, name: visibility(data[name])),
    "archived": ("archived", _flag),
}
REQUIRED_TERMS = ("name", "priceCents", "currency")


@dataclass(frozen=True)
class NewProduct:
    """What is to be put on sale: its terms by column, and its first stock in units."""

    terms: dict[str, Any]
    units: int


def read(data: dict[str, Any]) -> dict[str, Any]:
    """Return a change's terms by column. Raises InvalidRequest for the first wrong one."""
    if "stock" in data:
        raise InvalidRequest("stock is changed by a restock", "stock")
    check_known(data, TERMS)
    values = {}
    for name in data:
        column, take = TERMS[name]
        values[column] = take(data, name)
    return values


def read_new(data: dict[str, Any]) -> NewProduct:
    """Return a new product's terms and stock. Raises InvalidRequest for the first wrong one."""
    for name in (*REQUIRED_TERMS, "stock"):
        if name not in data:
            raise InvalidRequest(f"{name} is required", name)
    units = read_integer(data, "stock", 0, MAX_STOCK)
    return NewProduct(read({name: data[name] for name in data if name != "stock"}), units)


def check_window(opens_at: datetime | None, closes_at: datetime | None) -> None:
    """Raise WrongWindow unless the sale opens before it closes."""
    if opens_at and closes_at and opens_at >= closes_at:
        raise WrongWindow


def terms_of(product: Product) -> dict[str, Any]:
    """Return the terms by their JSON names, as the API shows and the audit keeps them."""
    return {
        "name": product.name,
        "priceCents": product.price_cents,
        "currency": product.currency,
        "opensAt": product.opens_at and utc_text(product.opens_at),
        "closesAt": product.closes_at and utc_text(product.closes_at),
        "perUserLimit": product.per_user_limit,
        "maxQuantity": product.max_quantity,
        "paused": product.paused,
        "holdSeconds": product.hold_seconds,
        "sku": product.sku,
        "visibility": product.visibility,
        "archived": product.archived,
    }


def describe(product: Product, free: int) -> dict[str, Any]:
    """Return the product as the API shows it."""
    return {
        "id": product.id,
        **terms_of(product),
        "stockRemaining": free,
        "braked": product.braked,
        "currencyDigits": shown_digits(product.currency),
    }
