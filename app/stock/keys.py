"""What all of the Redis side shares: names of keys, errors, and how connections behave."""

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, parse_url
from redis.retry import Retry

from ..breaker import Breaker
from ..reading import User
from .place import place

# A shopper gets an answer within 2 s even from a dead Redis; a healthy one needs about 1 ms.
CONNECT_TIMEOUT_SECONDS = 0.5
COMMAND_TIMEOUT_SECONDS = 1.0
# How a server says that it can't do a primary's work any more, or not yet: it has become a replica,
# lost its primary or its replicas, is loading, or another holds these keys. Who is told so leaves.
UNFIT = frozenset(
    (
        "READONLY", "MASTERDOWN", "LOADING", "CLUSTERDOWN", "NOREPLICAS", "NOAUTH", "MOVED",
        "UNBLOCKED",
    )
)  # fmt: skip
# Errors of a claim after which surely nothing has happened: Redis gives them before a script runs
# or at its first write. UNDONE is the script's own. Any other may mean that it was cut off midway.
NOTHING_RAN = UNFIT | {"NOSCRIPT", "OOM", "MISCONF", "BUSY", "NOPERM", "WRONGTYPE", "UNDONE"}


class Keys:
    """Every Redis key of the sale. The tag {0} names the shard; a shopper's keys all share one."""

    prefix = "sale:{0}:"
    generation = "sale:{0}:generation"
    # Never written: deleting it does nothing, but only a server that takes writes lets it be tried.
    nothing = "sale:{0}:nothing"
    outbox = "sale:{0}:outbox"
    queued = "sale:{0}:queued"
    order_ids = "sale:{0}:order-ids"
    movements = "sale:{0}:movements"
    products = "sale:{0}:products"
    refused = "sale:{0}:refused"
    history = "sale:{0}:history"
    history_by_minute = "sale:{0}:history-by-minute"
    drain_lease = "sale:{0}:drain-lease"
    # The newest ledger check, as JSON; and whose turn the next one is.
    ledger = "sale:{0}:ledger"
    ledger_turn = "sale:{0}:ledger-turn"
    telemetry = "sale:{0}:telemetry"
    processes = "sale:{0}:processes"
    workers = "sale:{0}:workers"
    webhook_lease_prefix = "sale:{0}:webhook-lease:"
    # Where the feed of events ends: "epoch number".
    feed_head = "sale:{0}:feed-head"
    # What pages show of a product when PostgreSQL is away, as JSON by product id.
    shelf = "sale:{0}:shelf"
    # Attempts of users, addresses and networks, in two hashes by turns: see claim.lua.
    attempts = ("sale:{0}:attempts:0", "sale:{0}:attempts:1")
    # Which brakes are set, and changes of them that the audit lacks.
    brakes = "sale:{0}:brakes"
    brake_acts = "sale:{0}:brake-acts"
    bought_prefix = "sale:{0}:bought:"
    idempotency_prefix = "sale:{0}:keys:"
    former_idempotency_prefix = "sale:{0}:key:"

    @staticmethod
    def product(product_id: int) -> str:
        return f"sale:{{0}}:product:{product_id}"

    @staticmethod
    def brake_key(key: str) -> str:
        return f"sale:{{0}}:brake-key:{key}"

    @staticmethod
    def address_units(product_id: int) -> str:
        return f"sale:{{0}}:address-units:{product_id}"

    @staticmethod
    def bought(product_id: int, user: User) -> tuple[str, str]:
        """Return the hash and the field that count the units a user bought of a product."""
        _, bucket, field = place(user)
        return Keys.bucket(product_id, bucket), field

    @staticmethod
    def bucket(product_id: int, bucket: int | str) -> str:
        return f"sale:{{0}}:bought:{product_id}:{bucket}"

    @staticmethod
    def idempotency(user: User, key: str) -> tuple[str, str]:
        """Return the hash and the field that hold the record of a user's Idempotency-Key.

        A blank is in neither alphabet, so no two pairs of user and key share a field.
        """
        _, bucket, field = place(user)
        return f"sale:{{0}}:keys:{bucket}", f"{field} {key}"

    @staticmethod
    def former_idempotency(user: User, key: str) -> str:
        """Return where 0.1.0 kept the record; of a text, which it did not know, there is none."""
        return f"sale:{{0}}:key:{user}:{key}" if isinstance(user, int) else Keys.nothing


class StaffKeys:
    """Redis keys of who is signed in. No part of the sale, so that no reset signs anybody out."""

    @staticmethod
    def session(session_id: str) -> str:
        return f"staff:session:{session_id}"

    @staticmethod
    def bar(subject: int | str) -> str:
        """Of a person (by number) or a session: up to when records of it do not count."""
        return f"staff:bar:{subject}"

    @staticmethod
    def known_address(staff_id: int, client: str) -> str:
        """Of a client (addresses.py) that a person has signed in from."""
        return f"staff:known:{staff_id}:{client}"


def code_of(error: Exception) -> str:
    """Return the code that an error of Redis begins with, such as READONLY."""
    # redis-py cuts the codes that it knows off the message.
    return getattr(error, "status_code", None) or str(error).partition(" ")[0]


class Refused(redis.ConnectionError):
    """Nobody was asked."""


class _Cautious(AbstractConnection):
    """A connection that asks nothing of a Redis which let somebody wait in vain a moment ago.

    And nothing of one that can no longer do its work, whichever connection was told: all of them
    connect anew before they are used again.
    """

    breaker = Breaker(COMMAND_TIMEOUT_SECONDS)
    # How often a server said so; a connection older than the last time is not used.
    unfit = 0
    _unfit_before = 0

    def _connect(self) -> Any:
        self._admitted()
        try:
            return super()._connect()  # type: ignore[no-untyped-call, safe-super]  # redis-py's
        except OSError as error:
            self._failed(error)
            raise

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        self._admitted()
        if self._unfit_before != _Cautious.unfit:
            self._unfit_before = _Cautious.unfit
            self.disconnect()  # type: ignore[no-untyped-call]  # the same
        try:
            super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            self._failed(error)
            raise

    def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            response = super().read_response(*arguments, **options)
        except redis.RedisError as error:
            self._failed(error)
            if code_of(error) in UNFIT:
                leave_server()
            raise
        self.breaker.answered()
        return response

    def _admitted(self) -> None:
        if not self.breaker.admits():
            raise Refused("Redis did not answer a moment ago")

    def _failed(self, error: Exception) -> None:
        """Tell the breaker; an error, a refusal or a cut connection is an answer, too."""
        if isinstance(error, (redis.TimeoutError, TimeoutError)):
            self.breaker.waited_in_vain()
        elif not isinstance(error, Refused):
            self.breaker.answered()


def leave_server() -> None:
    """Have every connection of requests connect anew before it is used again."""
    _Cautious.unfit += 1


class _CautiousConnection(_Cautious, redis.Connection):
    pass


class _CautiousSSLConnection(_Cautious, redis.SSLConnection):
    pass


class _CautiousUnixConnection(_Cautious, redis.UnixDomainSocketConnection):
    pass


# By the kind that a URL asks for.
CAUTIOUS = {
    redis.Connection: _CautiousConnection,
    redis.SSLConnection: _CautiousSSLConnection,
    redis.UnixDomainSocketConnection: _CautiousUnixConnection,
}


def cautious_options(url: str, decode: bool) -> dict[str, Any]:
    """Options of the connections that requests share their threads for."""
    kind = parse_url(url).get("connection_class", redis.Connection)  # type: ignore[no-untyped-call]  # redis-py's
    return {**connection_options(decode), "connection_class": CAUTIOUS[kind]}


def connection_options(decode: bool) -> dict[str, Any]:
    """Options of every connection: bounded waits, and no silent second try of a command."""
    return {
        "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "socket_timeout": COMMAND_TIMEOUT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "decode_responses": decode,
        "protocol": 2,
    }
