"""Reading and checking what comes in: JSON bodies, numbers, texts. The same words on every road."""

import json
import re
from collections.abc import Mapping

from .problems import InvalidRequest

MAX_BODY_BYTES = 16 * 1024
# The largest integer that every JSON reader keeps exactly (RFC 8259, 6).
MAX_ID = 2**53 - 1
MAX_QUANTITY = 1_000_000
MAX_RESTOCK = 1_000_000
MAX_STOCK = 10_000_000
MAX_REASON = 500
# JSON is UTF-8 (RFC 8259, 8.1); json.loads() would look for other encodings first, every time.
decode = json.JSONDecoder().decode
# draft-ietf-httpapi-idempotency-key-header leaves the form to the server: visible ASCII here.
VALID_KEY = re.compile(r"[\x21-\x7e]{1,255}").fullmatch
# The longest of them all, 2^53 - 1, has 16.
DIGITS = re.compile(r"[0-9]{1,16}").fullmatch
# All but tab, line feed and carriage return: PostgreSQL refuses NUL, and none of them is text.
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]").search


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


def read_digits(text: str, low: int, high: int) -> int | None:
    """Return the number that a text of ASCII digits names; None for any other, or out of range."""
    number = int(text) if DIGITS(text) else None
    return number if number is not None and low <= number <= high else None


def read_text(data: Mapping, name: str, longest: int, called: str | None = None) -> str:
    """Return a member that is a text of 1 to `longest` characters.

    `called` is what an error calls it, where that is not its name. Raises InvalidRequest.
    """
    called = called or name
    value = data.get(name)
    if not isinstance(value, str) or not 1 <= len(value.strip()) <= longest or CONTROLS(value):
        raise InvalidRequest(f"{called} must be a text of 1 to {longest} characters", name)
    value = value.strip()
    # A lone surrogate is legal in JSON and in Python, but not in UTF-8.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidRequest(f"{called} must be Unicode text", name)
    return value
