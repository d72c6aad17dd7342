"""A claim as Redis is asked for it: what it says, how a batch is packed, what the answers mean."""

import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import redis

from ..addresses import network_of
from ..config import NO_LIMIT, RateLimit, Settings
from ..problems import Unavailable, Unprepared
from ..reading import User
from .keys import Keys
from .place import place, queued_score
from .replicas import Replicas
from .servers import NOTHING_RAN, code_of, pack
from .shards import WHOLE, Part

log = logging.getLogger(__name__)

# So many claims are decided by one run of the script, in some 0.5 ms: others wait for it.
MOST_AT_ONCE = 32
# A claim of which surely nothing ran is sent once more, where its server is found again so soon.
AGAIN_SECONDS = 0.3
# A line that could not compare the sale with PostgreSQL tries again at most so often.
COMPARE_SECONDS = 1.0

# Of a claim that met something in Redis which can't be, such as a key of another type.
UNDONE = b"undone"
LIMITED = b"limited"
# Other shards may have what this one lacks: nothing was decided, see pulls.py.
DRY = b"dry"
# Outcomes that promise an order.
PROMISES = (b"accepted", b"replayed")

EARLY_ATTEMPTS_A_MINUTE = 60
# Attempts take no more memory than this, with no maxmemory either: some 2 million shoppers.
MOST_ATTEMPTS_BYTES = 256 << 20

# Tells the sale's name and an order id that it has issued; None when nothing is on record.
OnRecord = Callable[[], tuple[str, int] | None]


class Request(NamedTuple):
    """One purchase that is to be decided. `user` is in canonical form, see place.py.

    `address` is a client's, as addresses.py names it.
    """

    user: User
    product_id: int
    quantity: int
    key: str | None
    address: str
    expected_cents: int | None = None
    reference: str | None = None
    # Of one that was dry: what all shards were found to have, and since when, monotonic.
    found: str | None = None
    dry_since: float = 0.0


class Claim(NamedTuple):
    """What the claim script decided; see claim.lua for the outcomes.

    `text` is a price, such as b"1999 EUR": the order's, where it is accepted or replayed (empty
    where its record is of 0.1.0), and the one in force where it is price_changed. A price may be
    followed by the end of the order's hold, in ms. Of an order_ended it is the order's status, and
    `detail` its id; of sold_out and insufficient b"held" where units may come back, and b"away"
    where a shard out of reach may have some; of not_open in how many ms it opens. A dry one's is
    the sale, as the shard names it.
    """

    outcome: bytes
    detail: int
    attempts_left: int
    reset_ms: int
    text: bytes


# Is told what became of a purchase: Unavailable where that is not known.
Tell = Callable[[Claim | Exception], None]
Batch = list[tuple[Request, Tell]]


def early_limit(user: RateLimit) -> RateLimit:
    """Return the limit of attempts before a sale opens, or while it is paused.

    They don't use up the user's own limit, and are never held more tightly than it holds.
    """
    if not user:
        return NO_LIMIT
    a_minute = -(-user.count * 60_000 // user.window_ms)
    return RateLimit(max(EARLY_ATTEMPTS_A_MINUTE, a_minute), 60_000)


class ClaimScript:
    """Builds the commands of a shard's claims: claim.lua, its keys, and its arguments."""

    def __init__(self, script: str, settings: Settings, part: Part = WHOLE) -> None:
        self.part = part
        self.keys = keys = Keys(part)
        user, early = settings.purchase_user_limit, early_limit(settings.purchase_user_limit)
        address = self._share(settings.purchase_address_limit)
        network = self._share(settings.purchase_network_limit)
        self._networks = bool(network)
        self._address_units = part.allows(settings.purchase_address_units)
        self.replicas = Replicas(settings.redis_replicas, keys)
        # A sliding counter looks back into the window before: two of them.
        turn = max(user.window_ms, *(2 * limit.window_ms for limit in (early, address, network)), 1)
        constants = {
            "USER_LIMIT": user.count,
            "USER_WINDOW": user.window_ms,
            "EARLY_LIMIT": early.count,
            "EARLY_WINDOW": early.window_ms,
            "ADDRESS_LIMIT": address.count,
            "ADDRESS_WINDOW": address.window_ms,
            "NETWORK_LIMIT": network.count,
            "NETWORK_WINDOW": network.window_ms,
            "ADDRESS_UNITS": self._address_units,
            "TURN": turn,
            "MOST_BYTES": MOST_ATTEMPTS_BYTES // part.shards,
            "MOST_WAITING": -(-settings.outbox_limit // part.shards),
            "REPLICAS": self.replicas.count,
            "SHARDS": part.shards,
        }
        # As a part of the script they cost nothing; as arguments 5 % of what a claim costs Redis.
        # As variables each function that uses them would be given them anew at each run.
        words = re.compile(rf"\b({'|'.join(constants)})\b")
        script = words.sub(lambda word: str(constants[word[0]]), script)
        self._sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        self.load = pack("SCRIPT", "LOAD", script)
        # The first keys of claim.lua, whatever is claimed.
        self._shared_keys = (
            keys.generation,
            keys.brakes,
            *keys.attempts,
            keys.outbox,
            keys.queued,
            keys.order_ids,
            keys.refused,
        )
        self.ask_sale = pack("MGET", keys.generation, keys.order_ids)
        # A replica refuses it, and so does whoever else could not sell.
        self.try_writing = pack("DEL", keys.nothing)
        # Writes nothing either; refused also where memory is short, and with it every new order.
        self.try_adding = pack("SET", keys.nothing, "1", "XX")

    def _share(self, limit: RateLimit) -> RateLimit:
        return replace(limit, count=self.part.allows(limit.count))

    def command(self, *requests: Request) -> bytes:
        """Return the command that decides so many purchases, in this order."""
        names, shards = self.keys, self.part.shards
        products = list(dict.fromkeys([request.product_id for request in requests]))
        numbers = {product_id: str(number) for number, product_id in enumerate(products, 1)}
        keys = [*self._shared_keys, *map(names.product, products)]
        if self._address_units:
            keys += map(names.address_units, products)
        former = [
            names.former_idempotency(request.user, request.key)
            for request in requests
            if request.key is not None
        ]
        counts = len(products), len(requests), len(former)
        args = [*map(str, counts), self.part.suffix, *map(str, products)]
        for user, product_id, quantity, key, address, expected, reference, found, _ in requests:
            _, bucket, field = place(user, shards)
            keys.append(f"{names.bought_prefix}{product_id}:{bucket}")
            letters, more = "", []
            if expected is not None:
                letters, more = "e", [str(expected)]
            if key is not None:
                letters += "k"
                more.append(key)
                keys.append(f"{names.idempotency_prefix}{bucket}")
            if found is not None:
                letters += "f"
                more.append(found)
            if self._networks:
                letters += "n"
                more.append(network_of(address))
            if reference is not None:
                letters += "r"
                more.append(reference)
            if not isinstance(user, int):
                letters += "s"
                more.append(str(queued_score(user)))
            args += (str(user), field, numbers[product_id], str(quantity), address, letters, *more)
        if self.replicas.count:
            keys.append(names.fence)
        keys += former
        return pack("EVALSHA", self._sha, str(len(keys)), *keys, *args)

    def check_sale(
        self, record: tuple[str, int] | None, held: bytes | None, last: bytes | None
    ) -> None:
        """Raise Unprepared when Redis holds another sale than the one on record, or an old copy.

        `held` and `last` are the answer to `ask_sale`.
        """
        if record is None or held is None:
            return
        name, issued = record
        if held.decode() != self.part.generation(name) or int(last or 0) < issued:
            raise Unprepared(
                f"Redis does not hold the sale {name} as it was at order {issued}", executed=False
            )


class Undone(redis.ResponseError):
    """A claim met something in Redis that can't be; nothing is left of it."""


class Unsent(redis.ConnectionError):
    """There was nobody to send the claim to."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.status_code = code_of(cause)


def refused(error: Exception) -> Unavailable:
    """Return what an error that Redis answered means for a claim."""
    nothing_ran = isinstance(error, (Undone, Unsent)) or code_of(error) in NOTHING_RAN
    return Unavailable(str(error), executed=False if nothing_ran else None)


def tell_one(tell: Tell, result: Claim | Exception) -> None:
    """Tell what became of a claim; one that can't be told must not keep others waiting."""
    try:
        tell(result)
    except Exception:
        log.exception("a claim was decided, and not answered")


def ignore(answer: object) -> None:
    """Have an answer told to nobody."""


def claim_of(answer: list[Any]) -> Claim:
    """Return one claim of a batch's answer. Raises Undone."""
    claim = Claim._make(answer)
    if claim.outcome == UNDONE:
        raise Undone(claim.text.decode("utf-8", "replace"))
    return claim
