"""An order as the outbox holds it: one text, written by claim.lua, read by everybody else.

Two forms are in use. An order of an integer user that says nothing new has the form of 0.1.0, so
that older workers read it. Every other begins with its version, which no user's number does.

    <user> <product> <quantity> <cents> <currency> <claimed ms> <key>
    v2 <user> <product> <quantity> <cents> <currency> <claimed ms> <key> <reference> <held until ms>

Key, reference and held until are empty where there is none.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from ..reading import User, canonical

ORDER = r"(\d{1,16}) (\d{1,9}) (\d{1,16}) ([A-Z]{3}) (\d{1,15}) ([\x21-\x7e]{0,255})"
FIRST = re.compile(rf"(\d{{1,16}}) {ORDER}", re.ASCII).fullmatch
SECOND = re.compile(
    rf"v2 ([A-Za-z0-9._~:@|+-]{{1,64}}) {ORDER} ([\x21-\x7e]{{0,64}}) (\d{{0,15}})", re.ASCII
).fullmatch


class Columns(NamedTuple):
    """An entry cut for the columns of a table, all texts: PostgreSQL reads the numbers.

    The user stands in one of the first two. None where an order has no such thing.
    """

    user_id: str | None
    user_name: str | None
    product_id: str
    quantity: str
    unit_price_cents: str
    currency: str
    claimed_ms: str
    idempotency_key: str | None
    reference: str | None
    held_until_ms: str | None


def split(text: str) -> Columns | None:
    """Return an entry's columns; None when the text is no order."""
    if match := FIRST(text):
        user, product, quantity, cents, currency, claimed, key = match.groups()
        return Columns(
            user, None, product, quantity, cents, currency, claimed, key or None, None, None
        )
    match = SECOND(text)
    if match is None:
        return None
    user, product, quantity, cents, currency, claimed, key, reference, held_until = match.groups()
    try:
        is_number = isinstance(canonical(user), int)
    except ValueError:
        return None
    return Columns(
        user if is_number else None,
        None if is_number else user,
        product,
        quantity,
        cents,
        currency,
        claimed,
        key or None,
        reference or None,
        held_until or None,
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """One order as the outbox holds it."""

    user: User
    product_id: int
    quantity: int
    unit_price_cents: int
    currency: str
    claimed_ms: int
    idempotency_key: str | None
    reference: str | None = None
    held_until_ms: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Raises ValueError when the text is not an order."""
        columns = split(text)
        if columns is None:
            raise ValueError("not an order")
        number, name, product, quantity, cents, currency, claimed, key, reference, held = columns
        return cls(
            int(number) if number is not None else str(name),
            int(product),
            int(quantity),
            int(cents),
            currency,
            int(claimed),
            key,
            reference,
            int(held) if held else None,
        )


# The status in a key's record of an order that is neither cancelled nor given up; and of one that
# could not be stored, while nobody has decided.
STANDING = "+"
FAILED = "FAILED"


def key_record(order_id: int, entry: Entry, status: str = STANDING) -> str:
    """Return what Redis keeps under an order's Idempotency-Key, as claim.lua writes it."""
    words = (
        order_id,
        entry.unit_price_cents,
        entry.currency,
        status,
        entry.product_id,
        entry.quantity,
        entry.reference,
    )
    return " ".join(str(word) for word in words if word is not None)


def former_key_record(order_id: int, entry: Entry) -> str:
    """Return what 0.1.0 kept under it."""
    return f"{order_id} {entry.product_id} {entry.quantity}"
