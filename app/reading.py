"""Reading and checking what comes in: JSON bodies, numbers, texts. The same words on every road."""

import codecs
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec

from .problems import InvalidRequest

MAX_BODY_BYTES = 16 * 1024
# The largest integer that every JSON reader keeps exactly (RFC 8259, 6).
MAX_ID = 2**53 - 1
MAX_QUANTITY = 1_000_000
MAX_RESTOCK = 1_000_000
MAX_STOCK = 10_000_000
MAX_REASON = 500
# draft-ietf-httpapi-idempotency-key-header leaves the form to the server: visible ASCII here.
VALID_KEY = re.compile(r"[\x21-\x7e]{1,255}").fullmatch
# The longest of them all, 2^53 - 1, has 16.
DIGITS = re.compile(r"[0-9]{1,16}").fullmatch
# A shopper, in the one form that names nobody else: a number where the shop counts its users.
User = int | str
# What needs no quotation in JSON, CSV, a Redis key or a form, and no space, which parts an entry.
USER_TEXT = re.compile(r"[A-Za-z0-9._~:@|+-]{1,64}").fullmatch
USER_WORDS = "an integer or a text of 1 to 64 characters of A-Z a-z 0-9 . _ ~ : @ | + -"
# Clients take these for parts of a path (RFC 3986, 5.2.4) and leave them out.
DOTS = frozenset((".", ".."))
COUNTED = re.compile(r"[1-9][0-9]{0,15}").fullmatch
# The shop's own name for an order: a cart, or a line of one.
REFERENCE = re.compile(r"[\x21-\x7e]{1,64}").fullmatch
# What no text of ours holds, as a part of a character class: control characters, tabs and ends of
# lines among them, and what turns the direction of all that follows (Unicode 6.1, UAX 9). A name
# stands in a line of a page, a log, a CSV file or a terminal, and must stay there.
CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
# What nobody sees alone.
INVISIBLE = r"\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff"
has_control = re.compile(f"[{CONTROLS}]").search
is_visible = re.compile(f"[^{INVISIBLE}]").search


def _no_number(name: str) -> None:
    raise InvalidRequest(f"The body is not valid JSON: {name} is no JSON number")


def _unique(members: list[tuple[str, object]]) -> dict[str, Any]:
    data = dict(members)
    if len(data) != len(members):
        names = [name for name, _ in members]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"The body has the member {json.dumps(twice[:100])} more than once")
    return data


# Five times as fast as the other, which has the words for what is wrong; of two members of one name
# it takes the last.
_decode = msgspec.json.Decoder().decode
STRICT_JSON = json.JSONDecoder(parse_constant=_no_number, object_pairs_hook=_unique)
_decode_strictly = STRICT_JSON.decode


def read_object(body: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object in `body`, whose members have different names. Raises InvalidRequest.

    Of two members of one name every reader takes another (RFC 8259, 4), so that a gateway might
    vouch for what is not done. A byte order mark is ignored (RFC 8259, 8.1).
    """
    try:
        data = _decode(body)
    except (ValueError, RecursionError):
        return _read_strictly(body)
    if type(data) is dict:
        # A name has two quotation marks, and so has a text. Only where there are more, escaped, in
        # what is inside or of a name that came twice, is it worth to look at every name.
        more = body.count(b'"') - 2 * len(data)
        if not more or more == 2 * sum([type(value) is str for value in data.values()]):
            return data
    return _read_strictly(body)


def _read_strictly(body: bytes | bytearray) -> dict[str, Any]:
    try:
        # JSON is UTF-8 (RFC 8259, 8.1); json.loads() would look for other encodings first.
        data = _decode_strictly(body.removeprefix(codecs.BOM_UTF8).decode())
    except InvalidRequest:
        raise
    except (ValueError, RecursionError):
        raise InvalidRequest("The body is not valid JSON") from None
    if type(data) is not dict:
        raise InvalidRequest("The body must be a JSON object")
    return data


def check_known(names: Iterable[str], known: Collection[str]) -> None:
    """Refuse a name that means nothing here. Raises InvalidRequest.

    Left out in silence, a misspelt filter, quantity or reason would be as if it had not been sent.
    """
    for name in names:
        if name not in known:
            raise InvalidRequest(f"{name[:100]} is not known here", name[:100])


def check_key(key: str) -> None:
    """Refuse an Idempotency-Key that is none. Raises InvalidRequest.

    It is taken as it was sent: quotation marks, which the draft's structured fields have around a
    text, are a part of it.
    """
    if not VALID_KEY(key):
        raise InvalidRequest(
            "Idempotency-Key must be 1 to 255 visible ASCII characters", "Idempotency-Key"
        )


def read_integer(data: dict[str, Any], name: str, low: int, high: int) -> int:
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


def canonical(value: object) -> User:
    """Return the one form of a shopper's name: 42 for 42 and "42", any other text byte for byte.

    So "042", "0" and numbers above MAX_ID, which not every JSON reader keeps, are texts of their
    own, and case counts. Raises ValueError for what can be nobody's name.
    """
    # bool is a subclass of int, so isinstance() would let `true` through.
    if type(value) is str:
        if COUNTED(value) and (number := int(value)) <= MAX_ID:
            return number
        if USER_TEXT(value) and value not in DOTS:
            return value
    elif type(value) is int and 1 <= value <= MAX_ID:
        return value
    raise ValueError("not a user id")


def read_user(data: Mapping[str, Any], name: str = "userId") -> User:
    """Return the shopper in a member: an integer from 1 to MAX_ID or a text, in canonical form.

    Raises InvalidRequest.
    """
    try:
        return canonical(data.get(name))
    except ValueError:
        if type(data.get(name)) is int:
            raise InvalidRequest(f"{name} must be from 1 to {MAX_ID}", name) from None
        fault = f"must be {USER_WORDS}" if name in data else "is required"
        raise InvalidRequest(f"{name} {fault}", name) from None


def read_reference(data: Mapping[str, Any], name: str = "reference") -> str | None:
    """Return the shop's own name for an order, None where there is none (or null).

    Raises InvalidRequest.
    """
    value = data.get(name)
    if value is not None and not (type(value) is str and REFERENCE(value)):
        raise InvalidRequest(f"{name} must be a text of 1 to 64 visible ASCII characters", name)
    return value


def read_price(data: dict[str, Any], name: str = "expectedPriceCents") -> int | None:
    """Return the price that a shopper was shown, None where none is given (or null).

    Raises InvalidRequest.
    """
    return read_integer(data, name, 0, MAX_ID) if data.get(name) is not None else None


def read_text(data: Mapping[str, Any], name: str, longest: int, called: str | None = None) -> str:
    """Return a member that is a text of one line, of 1 to `longest` characters, without blanks
    around it.

    `called` is what an error calls it, where that is not its name. Raises InvalidRequest.
    """
    called = called or name
    value = data.get(name)
    if not isinstance(value, str) or len(value.strip()) > longest or not is_visible(value):
        raise InvalidRequest(f"{called} must be a text of 1 to {longest} characters", name)
    if has_control(value):
        raise InvalidRequest(f"{called} must be one line, without control characters", name)
    value = value.strip()
    # A lone surrogate is legal in JSON and in Python, but not in UTF-8.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidRequest(f"{called} must be Unicode text", name)
    return value
