"""Amounts of money: whole minor units everywhere but where people read and write them.

How many digits a currency's minor unit has is ISO 4217's to say: none for JPY, three for KWD.
"""

from functools import cache

from iso4217 import raw_table

from .problems import InvalidRequest

# What rows of before show that name no currency of the standard.
USUAL_DIGITS = 2
WORDS = "a code of ISO 4217 that has a minor unit, like EUR"


@cache
def digits_of(code: str) -> int | None:
    """Return the digits of a currency's minor unit; None where it has none, or is none."""
    digits = raw_table.get(code, {}).get("CcyMnrUnts")
    return int(digits) if isinstance(digits, str) and digits.isdigit() else None


def read_currency(value: object, called: str = "currency") -> str:
    """Return a currency's code. Raises InvalidRequest, also for gold and the code for tests."""
    if not isinstance(value, str) or digits_of(value) is None:
        raise InvalidRequest(f"{called} must be {WORDS}", "currency")
    return value


def shown_digits(code: str) -> int:
    """Return how many digits amounts are shown with, also where the code is no currency."""
    digits = digits_of(code)
    return USUAL_DIGITS if digits is None else digits


def decimal(amount: int, currency: str, grouping: str = "") -> str:
    """99999 USD → 999.99, 1500 JPY → 1500; with a comma as `grouping` 1,234.567 KWD."""
    digits = shown_digits(currency)
    whole, part = divmod(amount, 10**digits)
    return f"{whole:{grouping}}.{part:0{digits}}" if digits else f"{whole:{grouping}}"
