"""Who a shopper is to the stock, and where what it holds of one lies: shard, bucket and field.

Every process must find the same place: nothing here may depend on the process, as hash() does.
"""

import hashlib
import re
from typing import NamedTuple

# A shop's own name of a shopper: an integer, or a text such as a UUID, "auth0|7f" or "ann@example".
User = int | str

# The largest integer that every JSON reader keeps exactly (RFC 8259, 6).
MAX_INTEGER = 2**53 - 1
INTEGER = re.compile(r"[1-9][0-9]{0,15}").fullmatch
TEXT = re.compile(r"[A-Za-z0-9._~:@|+-]{1,64}").fullmatch
# Texts that would mean another path where they stand in one (RFC 3986, 3.3).
DOTS = frozenset((".", ".."))

# So many users share one small hash of bought units: about 8 bytes each instead of 100.
USERS_PER_BUCKET = 128
# The texts' share so many hashes, whoever they are.
TEXT_BUCKETS = 65_536
# Scores of a sorted set are floats, exact up to 53 bits.
SCORE_BITS = 52
WORD = 2**64 - 1


class Place(NamedTuple):
    """Where a user's figures lie; bucket and field are parts of names in Redis."""

    shard: int
    bucket: str
    field: str


def canonical(value: int | str) -> User:
    """Return the one form of a user's name: 42 for 42 and "42", any other text byte for byte.

    Raises ValueError for what is neither an integer of 1 to 2^53 - 1 nor 1 to 64 of the characters
    A-Z a-z 0-9 . _ ~ : @ | + -
    """
    if isinstance(value, str):
        if INTEGER(value) and (number := int(value)) <= MAX_INTEGER:
            return number
        if TEXT(value) and value not in DOTS:
            return value
    elif type(value) is int and 1 <= value <= MAX_INTEGER:
        return value
    raise ValueError("not a user id")


def place(user: User, shards: int = 1) -> Place:
    """Return where a user (in canonical form) belongs, in a sale of so many shards."""
    if isinstance(user, int):
        block, position = divmod(user, shards)
        shard = (position + _mixed(block)) % shards if shards > 1 else 0
        bucket, field = divmod(block, USERS_PER_BUCKET)
        return Place(shard, str(bucket), str(field))
    hashed = _hash(user)
    # The field is the text itself: two texts may share a hash, and must not share a limit.
    return Place((hashed >> 32) % shards, f"t{hashed % TEXT_BUCKETS}", user)


def queued_score(user: User) -> int:
    """Return the score of a user's orders in the index of what waits; texts may share one."""
    return user if isinstance(user, int) else _hash(user) & (1 << SCORE_BITS) - 1


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _mixed(number: int) -> int:
    """Spread neighbours over all of 64 bits: the finalizer of splitmix64 (Steele et al., 2014)."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & WORD
    number = (number ^ number >> 27) * 0x94D049BB133111EB & WORD
    return number ^ number >> 31
