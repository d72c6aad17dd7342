"""A Redis as this process sees it: where it is, how connections behave, how it answers."""

import threading
import time
from copy import copy
from functools import cache
from typing import Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit, urlunsplit

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, parse_url
from redis.crc import key_slot
from redis.retry import Retry
from redis.sentinel import Sentinel

from ..breaker import Breaker
from .keys import KEYS

# A shopper gets an answer within 2 s even from a dead Redis; a healthy one needs about 1 ms.
CONNECT_TIMEOUT_SECONDS = 0.5
COMMAND_TIMEOUT_SECONDS = 1.0
# All that one page waits for one Redis, however many its questions.
PAGE_WAITS_SECONDS = 2.0
SHORTEST_WAIT_SECONDS = 0.001
# Who may know the primary's address is asked one after the other: two that are dead must not use up
# the second.
ASK_SECONDS = 0.25
SENTINEL_PORT, REDIS_PORT = 26_379, 6379
# Of a cluster: where the keys of a sale of one shard are.
SLOT = key_slot(KEYS.prefix.encode())
# How a server says that it can't do a primary's work any more, or not yet: it has become a replica,
# lost its primary or its replicas, is loading, or another holds these keys. Who is told so leaves.
UNFIT = frozenset(
    (
        "READONLY", "MASTERDOWN", "LOADING", "CLUSTERDOWN", "NOREPLICAS", "NOAUTH", "MOVED", "ASK",
        "TRYAGAIN", "UNBLOCKED",
    )
)  # fmt: skip
# Errors of a claim after which surely nothing has happened: Redis gives them before a script runs
# or at its first write. UNDONE is the script's own. Any other may mean that it was cut off midway.
NOTHING_RAN = UNFIT | {"NOSCRIPT", "OOM", "MISCONF", "BUSY", "NOPERM", "WRONGTYPE", "UNDONE"}


def code_of(error: Exception) -> str:
    """Return the code that an error of Redis begins with, such as READONLY."""
    # redis-py cuts the codes that it knows off the message.
    return getattr(error, "status_code", None) or str(error).partition(" ")[0]


def pack(*words: str) -> bytes:
    """Return a command as it is sent."""
    return bytes(hiredis.pack_command(words))  # type: ignore[arg-type]  # it takes any number


def _new_breaker() -> Breaker:
    return Breaker(COMMAND_TIMEOUT_SECONDS, PAGE_WAITS_SECONDS)


Address = tuple[str, int]


class Server:
    """One Redis, wherever it is at the moment; one object for each process.

    A server that hangs or has become a replica is left by all connections to it, and by no others.
    """

    def __init__(self, url: str) -> None:
        """`url` is a REDIS_URL. Raises ValueError when it can't be one."""
        self._breaker = _new_breaker()
        # How often it was told to be unfit; a connection older than the last time is not used.
        self.unfit = 0
        self.options, self._find = read_url(url)
        # Of a cluster: which keys' node it is, and where that was last.
        self._slot = SLOT
        self._at: Address | None = None

    def for_keys(self, prefix: str) -> "Server":
        """Return the one that has the keys which begin so: of a cluster it may be another node."""
        if not isinstance(self._find, Cluster):
            return self
        other = copy(self)
        other._breaker, other._slot = _new_breaker(), key_slot(prefix.encode())
        return other

    @property
    def cluster(self) -> "Cluster | None":
        return self._find if isinstance(self._find, Cluster) else None

    @property
    def last_at(self) -> Address | None:
        """Where it was when somebody last connected; None where the URL itself says it."""
        return self._at

    @property
    def breaker(self) -> Breaker:
        """One for each node, however many shards it has, and whichever it is at the moment."""
        if self._at and isinstance(self._find, Cluster):
            return self._find.breaker_of(self._at)
        return self._breaker

    @property
    def moves(self) -> bool:
        """Tell whether its address has to be asked for."""
        return self._find is not None

    def address(self) -> Address | None:
        """Return where it is now; None where the URL itself says it.

        Blocks, for up to a second. Raises redis.ConnectionError when nobody can tell.
        """
        if isinstance(self._find, Cluster):
            self._at = self._find.primary_of(self._slot)
            return self._at
        return self._find() if self._find else None

    def leave(self) -> None:
        """Have every connection of requests connect anew before it is used again."""
        self.unfit += 1

    def client(self, decode: bool, cautious: bool = True, **more: object) -> redis.Redis:
        """Return a client with connections of its own.

        Not `cautious`, it waits as long as `more` says, and for a server that has just hung.
        """
        return redis.Redis.from_pool(self.pool(decode, cautious, **more))

    def pool(self, decode: bool, cautious: bool = True, **more: object) -> redis.ConnectionPool:
        """Return connections that look for the server whenever they connect."""
        kind = self.options.get("connection_class", redis.Connection)
        options: dict[str, Any] = {
            **connection_options(decode),
            **more,
            **self.options,
            "connection_class": _kind(_Cautious if cautious else _Found, kind),
            "server": self,
        }
        return redis.ConnectionPool(**options)


def connection_options(decode: bool) -> dict[str, Any]:
    """Options of every connection: bounded waits, and no silent second try of a command."""
    return {
        "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "socket_timeout": COMMAND_TIMEOUT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "decode_responses": decode,
        "protocol": 2,
    }


def read_url(url: str) -> "tuple[dict[str, Any], _Sentinels | Cluster | None]":
    """Return a connection's options, and who tells its address where the options don't.

    `redis+sentinel://user:password@host:port,host:port/name?db=0` asks Sentinels for the primary
    that they know by this name; they may have a `sentinel_username` and a `sentinel_password`.
    `redis+cluster://user:password@host:port,host:port` asks nodes of a cluster for the sale's.
    """
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    if kind not in ("sentinel", "cluster"):
        return parse_url(url), None  # type: ignore[no-untyped-call]  # redis-py's
    user, at, listed = parts.netloc.rpartition("@")
    port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
    hosts = [_host(each, port) for each in listed.split(",")]
    plain = urlunsplit((scheme, f"{user}{at}{listed.partition(',')[0]}", "", parts.query, ""))
    options = dict(parse_url(plain))  # type: ignore[no-untyped-call]  # the same
    for name in ("host", "port"):
        options.pop(name, None)
    if kind == "cluster":
        return options, Cluster(hosts, options)
    theirs = {
        name: options.pop(f"sentinel_{name}")
        for name in ("username", "password")
        if f"sentinel_{name}" in options
    }
    if scheme == "rediss":
        theirs |= {name: value for name, value in options.items() if name.startswith("ssl_")}
        theirs["ssl"] = True
    service = unquote(parts.path.strip("/"))
    if not service:
        raise ValueError("a redis+sentinel:// URL ends with the name of the primary")
    return options, _Sentinels(hosts, service, theirs)


def _host(text: str, port: int) -> Address:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a redis+sentinel:// or redis+cluster:// URL names hosts")
    return parts.hostname, parts.port or port


class _Sentinels:
    """Tells where the primary is, as the first Sentinel does that can be reached and knows one."""

    def __init__(self, hosts: list[Address], service: str, options: dict[str, Any]) -> None:
        self._service = service
        options = {
            **connection_options(decode=True),
            "socket_connect_timeout": ASK_SECONDS,
            "socket_timeout": ASK_SECONDS,
            **options,
        }
        self._sentinels = Sentinel(hosts, sentinel_kwargs=options)  # type: ignore[no-untyped-call]  # redis-py's

    def __call__(self) -> Address:
        found = self._sentinels.discover_master(self._service)  # type: ignore[no-untyped-call]  # the same
        return cast("Address", found)


class Slots(NamedTuple):
    """Slots of a cluster that one primary has, both ends included, and its replicas."""

    first: int
    last: int
    primary: Address
    replicas: list[Address]


class Cluster:
    """Tells which node of a cluster has a slot; one for each process, whatever the shards.

    It is asked anew for every connection that is made: after MOVED, a failover or a lost
    connection. What is older is never used, so there is nothing to keep up to date.
    """

    def __init__(self, hosts: list[Address], options: dict[str, Any]) -> None:
        self._hosts, self._options = hosts, options
        self._turn = 0
        self._lock = threading.Lock()
        self._slots: list[Slots] = []
        self._read_at = float("-inf")
        self._breakers: dict[Address, Breaker] = {}

    def breaker_of(self, node: Address) -> Breaker:
        return self._breakers.setdefault(node, _new_breaker())

    def primary_of(self, slot: int) -> Address:
        """Return where a slot is now. Raises redis.ConnectionError when nobody can tell."""
        for slots in self.slots():
            if slots.first <= slot <= slots.last:
                return slots.primary
        raise redis.ConnectionError(f"nobody has slot {slot}")

    def slots(self) -> list[Slots]:
        """Return who has which slots, as a node tells it now. Raises redis.ConnectionError."""
        asked_at = time.monotonic()
        with self._lock:
            # Shards that connect together ask once: what was read since they came will do.
            if self._read_at < asked_at:
                read_at = time.monotonic()
                self._slots = self._read()
                self._read_at = read_at
            return self._slots

    def _read(self) -> list[Slots]:
        errors = []
        # Each time another one comes first: one that is cut off from the others knows old things.
        self._turn += 1
        known = [slots.primary for slots in self._slots]
        hosts = list(dict.fromkeys([*self._hosts, *known]))
        for number in range(len(hosts)):
            host, port = hosts[(self._turn + number) % len(hosts)]
            try:
                return self._ask(host, port)
            except redis.RedisError as error:
                errors.append(f"{host}:{port}: {error}")
        raise redis.ConnectionError(f"no node of the cluster tells who has the sale: {errors}")

    def _ask(self, host: str, port: int) -> list[Slots]:
        options = {
            **connection_options(decode=True),
            "socket_connect_timeout": ASK_SECONDS,
            "socket_timeout": ASK_SECONDS,
            **self._options,
        }
        pool = redis.ConnectionPool(host=host, port=port, **options)
        with redis.Redis.from_pool(pool) as client:
            # As the server sends it; redis-py would make a dict of it.
            client.response_callbacks.pop("CLUSTER SLOTS", None)
            ranges = client.execute_command("CLUSTER SLOTS")
        # A node that does not know its own address means: where you have asked.
        return [Slots(first, last, *self._nodes(nodes, host)) for first, last, *nodes in ranges]

    @staticmethod
    def _nodes(nodes: list[list[Any]], asked: str) -> tuple[Address, list[Address]]:
        primary, *replicas = [(host or asked, port) for host, port, *_ in nodes]
        return primary, replicas


class _Found(AbstractConnection):
    """A connection to wherever its server is when it connects."""

    def __init__(self, *arguments: Any, server: Server, **options: Any) -> None:
        self.server = server
        super().__init__(*arguments, **options)

    def _connect(self) -> Any:
        if address := self.server.address():
            self.host, self.port = address
        return super()._connect()  # type: ignore[safe-super, no-untyped-call]  # the class beside it


class Refused(redis.ConnectionError):
    """Nobody was asked."""


class _Cautious(_Found):
    """A connection that asks nothing of a Redis which let somebody wait in vain a moment ago.

    And nothing of one that can no longer do its work, whichever connection was told: all of them
    connect anew before they are used again.
    """

    _unfit_before = 0

    def _connect(self) -> Any:
        self._admitted()
        try:
            with self.server.breaker.waiting():
                return super()._connect()
        except OSError as error:
            self._failed(error)
            raise

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        self._admitted()
        if self._unfit_before != self.server.unfit:
            self._unfit_before = self.server.unfit
            self.disconnect()  # type: ignore[no-untyped-call]  # redis-py's
        try:
            super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            self._failed(error)
            raise

    def read_response(self, *arguments: Any, **options: Any) -> Any:
        breaker = self.server.breaker
        if (left := breaker.left()) < COMMAND_TIMEOUT_SECONDS:
            # None at all would mean: don't wait for the rest of what is on its way.
            options["timeout"] = max(left, SHORTEST_WAIT_SECONDS)
        try:
            with breaker.waiting():
                response = super().read_response(*arguments, **options)
        except redis.RedisError as error:
            self._failed(error)
            if code_of(error) in UNFIT:
                self.server.leave()
            raise
        breaker.answered()
        return response

    def _admitted(self) -> None:
        if not self.server.breaker.has_time():
            raise Refused("Redis took all the time that this request has")
        if not self.server.breaker.admits():
            raise Refused("Redis did not answer a moment ago")

    def _failed(self, error: Exception) -> None:
        """Tell the breaker; an error, a refusal or a cut connection is an answer, too."""
        if isinstance(error, (redis.TimeoutError, TimeoutError)):
            self.server.breaker.waited_in_vain()
        elif not isinstance(error, Refused):
            self.server.breaker.answered()


@cache
def _kind(manner: type[_Found], kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return a class of connections of this kind (TCP, TLS, Unix) that behave in this manner."""
    return type(manner.__name__ + kind.__name__, (manner, kind), {})
