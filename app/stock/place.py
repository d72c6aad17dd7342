"""Who a shopper is to the stock, and where what it holds of one lies: shard, bucket and field.

Every process must find the same place: nothing here may depend on the process, as hash() does.
"""

import hashlib
from typing import NamedTuple

from ..reading import User

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
