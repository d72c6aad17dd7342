"""Numbers as people type them: understood where they can mean one thing only, else refused.

Groups of three are taken with a space, an apostrophe, a comma or a dot between them, and a fraction
with a comma or a dot. What could be either ("1.500" is fifteen hundred to some and one and a half
to others) is asked back. Any script's digits count; signs and exponents don't.
"""

import re
import unicodedata

from .money import decimal, digits_of
from .problems import InvalidRequest

# What a person, or the program they copy from, puts between groups of three.
SPACES = dict.fromkeys("\u00a0\u2009\u202f", " ")
APOSTROPHES = {"\u2019": "'"}
# Full-width forms, and the Arabic separators of groups and of fractions.
POINTS = {"\uff0c": ",", "\uff0e": ".", "\u066c": ",", "\u066b": "."}
SIGNS = str.maketrans(SPACES | APOSTROPHES | POINTS)
NUMBER = re.compile(
    r"(?P<whole>[1-9][0-9]{0,2}(?:(?P<group>[ ',.])[0-9]{3})(?:(?P=group)[0-9]{3})*|[0-9]+)"
    r"(?:(?P<point>[,.])(?P<fraction>[0-9]{1,4}))?"
).fullmatch
# Where the minor unit has three digits, a dot before three digits is how everybody writes it.
THOUSANDTHS = re.compile(
    r"(?P<whole>[1-9][0-9]{0,2}(?:(?P<group>[ ',])[0-9]{3})(?:(?P=group)[0-9]{3})*|[0-9]+)"
    r"(?P<point>\.)(?P<fraction>[0-9]{3})"
).fullmatch
# Far beyond every bound, and still read at once.
MOST_DIGITS = 16
MAX_AMOUNT = 10**15 - 1


def whole(text: str, field: str, called: str, low: int, high: int) -> int:
    """Return a whole number from `low` to `high`; a comma may part its groups of three.

    Raises InvalidRequest for `field`, in words that call it `called`.
    """
    found = _read(text)
    if not found or found["fraction"]:
        raise InvalidRequest(f"{called} must be a whole number, like 1500 or 1,500", field)
    number = _digits(found["whole"])
    if _one_group(found, "."):
        raise InvalidRequest(
            f"{called} must be a whole number: {text.strip()} could be a fraction too, "
            f"so type {number} or {number:,}",
            field,
        )
    if not low <= number <= high:
        raise InvalidRequest(f"{called} must be from {low:,} to {high:,}", field)
    return number


def amount(text: str, field: str, called: str, currency: str) -> int:
    """Return an amount like 999.99, 1,299.00 or 1.299,00 in the minor units of its currency.

    Raises InvalidRequest for `field`, in words that call it `called`.
    """
    digits = digits_of(currency)
    if digits is None:
        raise InvalidRequest(f"{called} needs a currency first", field)
    like = f"an amount like {decimal(99999, currency)}"
    found = (digits == 3 and THOUSANDTHS(_plain(text))) or _read(text)
    if not found or (found["point"] and found["point"] == found["group"]):
        raise InvalidRequest(f"{called} must be {like}", field)
    number, fraction = _digits(found["whole"]), found["fraction"] or ""
    if len(fraction) > digits:
        most = f"{digits} digits" if digits else "no digits"
        raise InvalidRequest(
            f"{called} must be {like}: {currency} has {most} after the point", field
        )
    if not found["point"] and _one_group(found, ",." if digits else "."):
        other = f" or {number / 1000:.{digits}f}" if digits else f" or {number:,}"
        raise InvalidRequest(
            f"{called} must be {like}: {text.strip()} could be a fraction too, "
            f"so type {decimal(number * 10**digits, currency)}{other}",
            field,
        )
    value: int = number * 10**digits + int(fraction.ljust(digits, "0") or 0)
    if value > MAX_AMOUNT:
        raise InvalidRequest(
            f"{called} must be at most {decimal(MAX_AMOUNT, currency, ',')}", field
        )
    return value


def _read(text: str) -> re.Match[str] | None:
    """Return the parts of a number, None for what is none."""
    return NUMBER(_plain(text))


def _plain(text: str) -> str:
    return "".join(
        str(unicodedata.decimal(character, character)) for character in text.strip()
    ).translate(SIGNS)


def _one_group(found: re.Match[str], separators: str) -> bool:
    """Tell whether the only separator parts three digits from the rest, and may be a point."""
    group = found["group"]
    return bool(group) and group in separators and found["whole"].count(group) == 1


def _digits(text: str) -> int:
    digits = re.sub("[^0-9]", "", text)
    # Too long to be in any range; int() would take its time over a long one.
    return int(digits) if len(digits) <= MOST_DIGITS else 10**MOST_DIGITS
