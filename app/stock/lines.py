"""The hot roads to Redis: one packed EVALSHA for a batch of claims, and never a second one.

`ThreadLine` blocks, with a connection for each thread: any WSGI server, commands, tests; its claims
are batches of one. `LoopLine` belongs to an event loop and has the claims of one turn decided
together: one write, one run of the script, one fsync in Redis and one read serve dozens of them. An
ordinary client would cost several times the CPU, and might send a claim again.

Both check every new connection: a Redis that was exchanged (restored from an old copy, or another
system's) cuts connections, and nothing must be sold from it.
"""

import asyncio
import hashlib
import logging
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import hiredis
import redis

from ..addresses import network_of
from ..breaker import RETRY_AFTER_FAILURE_SECONDS
from ..config import NO_LIMIT, RateLimit, Settings
from ..problems import Unavailable, Unprepared
from ..reading import User
from .keys import Keys
from .place import place, queued_score
from .replicas import Replicas, Unreplicated
from .servers import (
    COMMAND_TIMEOUT_SECONDS,
    CONNECT_TIMEOUT_SECONDS,
    NOTHING_RAN,
    UNFIT,
    Server,
    code_of,
)

log = logging.getLogger(__name__)

# A process that nobody asks for a purchase looks for Redis by itself, less often.
RECONNECT_SECONDS = 1.0
# So many claims are decided by one run of the script, in some 0.5 ms: others wait for it.
MOST_AT_ONCE = 32
# How often a connection that owes answers is looked at.
WATCH_SECONDS = 0.1
# A claim of which surely nothing ran is sent once more, where its server is found again so soon.
AGAIN_SECONDS = 0.3

# Of a claim that met something in Redis which can't be, such as a key of another type.
UNDONE = b"undone"
LIMITED = b"limited"
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


class Claim(NamedTuple):
    """What the claim script decided; see claim.lua for the outcomes.

    `text` is a price, such as b"1999 EUR": the order's, where it is accepted or replayed (empty
    where its record is of 0.1.0), and the one in force where it is price_changed. A price may be
    followed by the end of the order's hold, in ms. Of an order_ended it is the order's status, and
    `detail` its id; of sold_out and insufficient b"held" where units may come back.
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


# The first keys of claim.lua, whatever is claimed.
SHARED_KEYS = (
    Keys.generation,
    Keys.brakes,
    *Keys.attempts,
    Keys.outbox,
    Keys.queued,
    Keys.order_ids,
    Keys.refused,
)


class ClaimScript:
    """Builds the command of a claim: claim.lua, its keys, and its arguments."""

    def __init__(self, script: str, settings: Settings) -> None:
        user, address = settings.purchase_user_limit, settings.purchase_address_limit
        network, early = settings.purchase_network_limit, early_limit(user)
        self._networks = bool(network)
        self._address_units = settings.purchase_address_units
        self.replicas = Replicas(settings.redis_replicas)
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
            "MOST_BYTES": MOST_ATTEMPTS_BYTES,
            "MOST_WAITING": settings.outbox_limit,
            "REPLICAS": self.replicas.count,
        }
        names, values = ", ".join(constants), ", ".join(map(str, constants.values()))
        # As a part of the script they cost nothing; as arguments 5 % of what a claim costs Redis.
        script = f"local {names} = {values}\n{script}"
        self._sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        self.load = hiredis.pack_command(("SCRIPT", "LOAD", script))

    def command(self, *requests: Request) -> bytes:
        """Return the command that decides so many purchases, in this order."""
        products = list(dict.fromkeys([request.product_id for request in requests]))
        numbers = {product_id: str(number) for number, product_id in enumerate(products, 1)}
        keys = [*SHARED_KEYS, *map(Keys.product, products)]
        if self._address_units:
            keys += map(Keys.address_units, products)
        args = [str(len(products)), str(len(requests)), *map(str, products)]
        for user, product_id, quantity, key, address, expected, reference in requests:
            _, bucket, field = place(user)
            keys.append(f"{Keys.bought_prefix}{product_id}:{bucket}")
            letters, more = "", []
            if expected is not None:
                letters, more = "e", [str(expected)]
            if key is not None:
                letters += "k"
                more.append(key)
                keys += (
                    Keys.idempotency(user, key)[0],
                    Keys.former_idempotency(user, key),
                )
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
            keys.append(Keys.fence)
        return hiredis.pack_command(("EVALSHA", self._sha, str(len(keys)), *keys, *args))


ASK_SALE = hiredis.pack_command(("MGET", Keys.generation, Keys.order_ids))
# A replica refuses it, and so does whoever else could not sell.
TRY_WRITING = hiredis.pack_command(("DEL", Keys.nothing))
# Writes nothing either; refused also where memory is short, and with it every new order.
TRY_ADDING = hiredis.pack_command(("SET", Keys.nothing, "1", "XX"))
# A line that could not compare the sale with PostgreSQL tries again at most so often.
COMPARE_SECONDS = 1.0


def _check_sale(record: tuple[str, int] | None, held: bytes | None, last: bytes | None) -> None:
    """Raise Unprepared when Redis holds another sale than the one on record, or an old copy."""
    if record is None or held is None:
        return
    name, issued = record
    if held.decode() != name or int(last or 0) < issued:
        raise Unprepared(
            f"Redis does not hold the sale {name} as it was at order {issued}", executed=False
        )


class Undone(redis.ResponseError):
    """A claim met something in Redis that can't be; nothing is left of it."""


class _Unsent(redis.ConnectionError):
    """There was nobody to send the claim to."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.status_code = code_of(cause)


def refused(error: Exception) -> Unavailable:
    """Return what an error that Redis answered means for a claim."""
    nothing_ran = isinstance(error, (Undone, _Unsent)) or code_of(error) in NOTHING_RAN
    return Unavailable(str(error), executed=False if nothing_ran else None)


def _ignore(answer: object) -> None:
    """Have an answer told to nobody."""


def _claim_of(answer: list) -> Claim:
    """Return one claim of a batch's answer. Raises Undone."""
    claim = Claim._make(answer)
    if claim.outcome == UNDONE:
        raise Undone(claim.text.decode("utf-8", "replace"))
    return claim


class ThreadLine:
    """Claims that block their thread. Safe to use from any number of threads."""

    def __init__(self, server: Server, script: ClaimScript, on_record: OnRecord) -> None:
        self._server = server
        self._script = script
        self._replicas = script.replicas
        self._on_record = on_record
        self._record: tuple[str, int] | None = None
        self._recorded_at = 0.0
        self._record_lock = threading.Lock()
        # Only a factory here (it knows URLs, TLS, passwords): each thread keeps its connection.
        self._pool = server.pool(decode=False, cautious=False, max_connections=2**31)
        self._local = threading.local()
        # A failure anywhere makes every thread's connection suspect: they connect anew.
        self._failures = 0
        self._closed_until = 0.0

    def claim(self, request: Request) -> Claim:
        """Decide one purchase. Raises Unavailable when Redis gave no answer."""
        if self._closed_until and time.monotonic() < self._closed_until:
            raise Unavailable("Redis was unreachable a moment ago", executed=False)
        if self._closed_until:
            # This request is the one that tries; the others go on being refused meanwhile.
            self._closed_until = time.monotonic() + COMMAND_TIMEOUT_SECONDS
        command = self._script.command(request)
        started = time.monotonic()
        try:
            try:
                claim = self._decide(command)
            except redis.RedisError as error:
                if code_of(error) not in UNFIT or time.monotonic() > started + AGAIN_SECONDS:
                    raise
                # Nothing ran, and another server may be in its place by now.
                self._leave(error)
                claim = self._decide(command)
        except Unprepared:
            self._closed_until = time.monotonic() + RETRY_AFTER_FAILURE_SECONDS
            raise
        except Unreplicated:
            self._leave()
            raise
        except (redis.RedisError, OSError) as error:
            if isinstance(error, redis.ResponseError) and code_of(error) not in UNFIT:
                # This claim was refused; the next one may be asked all the same.
                self._closed_until = 0.0
            else:
                self._leave(error)
            raise refused(error) from error
        self._closed_until = 0.0
        return claim

    def _leave(self, error: Exception | None = None) -> None:
        if error and code_of(error) in UNFIT:
            self._server.leave()
        self._failures += 1
        self._closed_until = time.monotonic() + RETRY_AFTER_FAILURE_SECONDS

    def _decide(self, command: bytes) -> Claim:
        """Return the claim. Raises redis.RedisError, OSError, Unreplicated, Unprepared."""
        try:
            connection = self._connection(self._failures)
        except (redis.RedisError, OSError) as error:
            raise _Unsent(error) from error
        try:
            answer, copied = self._ask(connection, command)
        except redis.exceptions.NoScriptError:
            # Nothing ran, so this is the one case where sending again is safe.
            self._exchange(connection, self._script.load)
            answer, copied = self._ask(connection, command)
        claim = _claim_of(answer[0])
        if copied is not None and not self._replicas.enough(copied):
            if claim.outcome in PROMISES:
                raise Unreplicated(copied)
            # The next one connects anew, and is asked for its replicas first.
            self._failures += 1
        return claim

    def _ask(self, connection, command: bytes) -> tuple[list, object]:
        """Return the script's answer, and WAIT's where replicas are asked for."""
        wait = self._replicas.wait
        connection.send_packed_command((command + wait,))
        if not wait:
            return connection.read_response(), None
        error = None
        try:
            answer = connection.read_response()
        except redis.ResponseError as refusal:
            error = refusal
        try:
            copied = connection.read_response()
        except redis.ResponseError as refusal:
            copied = refusal
        if error:
            raise error
        return answer, copied

    def check(self) -> bool:
        """Return whether the sale was compared with PostgreSQL; as LoopLine.check."""
        try:
            connection = self._connection(self._failures)
            self._exchange(connection, TRY_ADDING)
            held, last = self._exchange(connection, ASK_SALE)
            if held is None:
                raise Unprepared("the sale is not in Redis")
            if self._record is None and time.monotonic() - self._recorded_at > COMPARE_SECONDS:
                _check_sale(self._sale_on_record(), held, last)
        except Unprepared:
            # Every thread compares anew before it sells.
            self._failures += 1
            raise
        except (redis.RedisError, OSError) as error:
            self._failures += 1
            raise Unavailable(str(error)) from error
        return self._record is not None

    @staticmethod
    def _exchange(connection, command: bytes):
        connection.send_packed_command((command,))
        return connection.read_response()

    def _connection(self, failures: int):
        local = self._local
        if getattr(local, "failures", None) != failures:
            if not hasattr(local, "connection"):
                local.connection = self._pool.make_connection()
            local.connection.disconnect()
            local.connection.connect()
            self._exchange(local.connection, self._script.load)
            self._exchange(local.connection, TRY_WRITING)
            if self._replicas.count:
                self._try_replicas(local.connection)
            # First PostgreSQL, then Redis: the ids on record were issued before Redis is asked.
            record = self._sale_on_record()
            _check_sale(record, *self._exchange(local.connection, ASK_SALE))
            local.failures = failures
        return local.connection

    def _try_replicas(self, connection) -> None:
        connection.send_packed_command((self._replicas.fence,))
        with suppress(redis.ResponseError):
            connection.read_response()
        connection.read_response()
        copied = connection.read_response()
        if not self._replicas.enough(copied):
            raise redis.ConnectionError(str(Unreplicated(copied)))

    def _sale_on_record(self) -> tuple[str, int] | None:
        now = time.monotonic()
        with self._record_lock:
            # Threads that connect together ask once: what was asked since they came will do.
            if self._recorded_at < now:
                self._recorded_at = time.monotonic()
                self._record = self._on_record()
            return self._record


class LoopLine:
    """Claims of one event loop, over one connection: those of one turn are decided together.

    A turn has more of them the busier the process is, and more in one batch cost less each.
    """

    def __init__(self, server: Server, script: ClaimScript, on_record: OnRecord) -> None:
        self._server = server
        self._options = server.options
        self._script = script
        self._replicas = script.replicas
        self._on_record = on_record
        # What goes out at the end of this turn of the loop.
        self._gathered: Batch = []
        # Batches that wait for replicas. Other claims gather meanwhile, and cost less together.
        self._in_flight = 0
        # Is told of users who are over their limit.
        self.on_limited: Callable[[Request, Claim], None] = lambda request, claim: None
        self._channel: Channel | None = None
        self._opening: asyncio.Task | None = None
        self._closed_until = 0.0
        self._reconnects: asyncio.TimerHandle | None = None
        # Whether PostgreSQL could tell what Redis must hold, and when it was asked last.
        self._verified = False
        self._compared_at = 0.0

    async def claim(self, request: Request) -> Claim:
        """Decide one purchase. Raises Unavailable when Redis gave no answer."""
        future = asyncio.get_running_loop().create_future()
        self.ask(request, lambda result: None if future.done() else future.set_result(result))
        result = await future
        if isinstance(result, Exception):
            raise result
        return result

    def ask(self, request: Request, tell: Tell) -> None:
        """Decide one purchase; `tell` is called with the claim or with Unavailable, later."""
        gathered = self._gathered
        gathered.append((request, tell))
        if len(gathered) == MOST_AT_ONCE:
            self._send()
        elif len(gathered) == 1:
            # What else is asked in this turn of the loop goes along.
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        if self._in_flight or not self._gathered:
            return
        batch, self._gathered = self._gathered, []
        if len(batch) > MOST_AT_ONCE:
            # Some had to wait for replicas.
            batch, self._gathered = batch[:MOST_AT_ONCE], batch[MOST_AT_ONCE:]
        channel = self._channel
        if channel is None or channel.lost:
            reach = asyncio.get_running_loop().create_task(self._reach())
            reach.add_done_callback(partial(self._reached, batch, False))
        else:
            self._decide(channel, batch)
        if self._gathered:
            self._send()

    def _reached(self, batch: Batch, again: bool, reach: asyncio.Task) -> None:
        error = None if reach.cancelled() else reach.exception()
        if isinstance(error, Unavailable):
            self._tell(batch, error)
        elif error or reach.cancelled() or reach.result().lost:
            self._tell(batch, Unavailable("the connection to Redis was lost", executed=False))
        else:
            self._decide(reach.result(), batch, again)

    def _decide(self, channel: "Channel", batch: Batch, again: bool = False) -> None:
        """Send a batch; `again` that it was sent before, and surely nothing of it ran."""
        command = self._script.command(*[request for request, _ in batch])
        if not self._replicas.count:
            channel.send(command, partial(self._answered, channel, batch, again, None))
            return
        promised: list[tuple[Tell, Claim]] = []
        self._in_flight += 1
        channel.send(
            command + self._replicas.wait,
            partial(self._answered, channel, batch, again, promised),
            partial(self._copied, channel, promised),
        )

    def _answered(
        self,
        channel: "Channel",
        batch: Batch,
        again: bool,
        promised: list[tuple[Tell, Claim]] | None,
        answer: object,
    ) -> None:
        if isinstance(answer, list):
            undone = self._tell(batch, answer, promised)
            if not undone:
                return
            channel.retire()
            self._server.leave()
            self._once_more(undone, again, Undone("READONLY"))
        elif isinstance(answer, hiredis.ReplyError):
            code = code_of(answer)
            if code == "NOSCRIPT" and not again and not channel.lost:
                # Nothing ran, so sending again is safe.
                channel.send(self._script.load, _ignore)
                self._decide(channel, batch, again=True)
            elif code in UNFIT:
                channel.retire()
                self._server.leave()
                self._once_more(batch, again, answer)
            else:
                self._tell(batch, refused(answer))
        else:
            self._tell(batch, answer)

    def _once_more(self, batch: Batch, again: bool, error: Exception) -> None:
        """Send what surely has not run to the server that may be in that one's place by now."""
        if again:
            self._tell(batch, refused(error))
            return
        loop = asyncio.get_running_loop()
        reach = loop.create_task(asyncio.wait_for(self._reach(), AGAIN_SECONDS))
        reach.add_done_callback(partial(self._reached, batch, True))

    def _copied(
        self, channel: "Channel", promised: list[tuple[Tell, Claim]], answer: object
    ) -> None:
        """Tell of the orders which a batch promises, now that replicas have them or do not."""
        self._in_flight -= 1
        enough = self._replicas.enough(answer)
        if not enough:
            # Connecting anew finds out whether there are enough again.
            self._closed_until = time.monotonic() + RETRY_AFTER_FAILURE_SECONDS
            channel.retire()
        for tell, claim in promised:
            self._tell_one(tell, claim if enough else Unreplicated(answer))
        self._send()

    def _tell(
        self,
        batch: Batch,
        answer: list | Exception,
        promised: list[tuple[Tell, Claim]] | None = None,
    ) -> Batch:
        """Tell each of the batch what became of it; promises are kept back in `promised`.

        Returns those of which nothing ran because the server is unfit; they are not told yet.
        """
        undone: Batch = []
        for number, (request, tell) in enumerate(batch):
            result: Claim | Exception
            if isinstance(answer, list):
                result = Claim._make(answer[number])
                if result.outcome == UNDONE:
                    error = Undone(result.text.decode("utf-8", "replace"))
                    if code_of(error) in UNFIT:
                        undone.append((request, tell))
                        continue
                    result = refused(error)
                elif result.outcome == LIMITED:
                    self.on_limited(request, result)
                elif promised is not None and result.outcome in PROMISES:
                    promised.append((tell, result))
                    continue
            else:
                result = answer
            self._tell_one(tell, result)
        return undone

    @staticmethod
    def _tell_one(tell: Tell, result: Claim | Exception) -> None:
        try:
            tell(result)
        except Exception:
            # One that can't be told must not keep the others waiting.
            log.exception("a claim was decided, and not answered")

    async def check(self) -> bool:
        """Return whether the sale was compared with PostgreSQL; if not, try it now and then.

        Raises Unavailable when a claim would find Redis unable to decide it.
        """
        channel = self._channel
        if channel is None or channel.lost:
            channel = await self._reach()
        answer = await channel.ask(TRY_ADDING)
        if isinstance(answer, hiredis.ReplyError):
            if code_of(answer) in UNFIT:
                channel.retire()
            raise refused(answer)
        held, _ = await channel.ask_well(ASK_SALE)
        if held is None:
            raise Unprepared("the sale is not in Redis")
        if not self._verified and time.monotonic() - self._compared_at > COMPARE_SECONDS:
            try:
                await self._compare(channel)
            except Unprepared:
                channel.abort()
                raise
        return self._verified

    async def _compare(self, channel: "Channel") -> None:
        """Raise Unprepared when Redis does not hold the sale that PostgreSQL knows."""
        self._compared_at = time.monotonic()
        # First PostgreSQL, then Redis: the ids on record were issued before Redis is asked.
        record = await asyncio.get_running_loop().run_in_executor(None, self._on_record)
        _check_sale(record, *await channel.ask_well(ASK_SALE))
        self._verified = record is not None

    async def _reach(self) -> "Channel":
        """Connect, once for all who wait. Raises Unavailable, for a while at once."""
        if time.monotonic() < self._closed_until:
            raise Unavailable("Redis was unreachable a moment ago", executed=False)
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> "Channel":
        channel = None
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
                channel = await self._connect()
                await channel.ask_well(self._script.load)
                await channel.ask_well(TRY_WRITING)
                if self._replicas.count:
                    await self._try_replicas(channel)
                await self._compare(channel)
        except (Unavailable, OSError, TimeoutError) as error:
            self._closed_until = time.monotonic() + RETRY_AFTER_FAILURE_SECONDS
            if channel:
                channel.abort()
            self._reconnect_later()
            if isinstance(error, Unavailable):
                error.executed = False
                raise
            raise Unavailable(f"Redis can't be reached: {error}", executed=False) from error
        finally:
            self._opening = None
        self._channel = channel
        channel.on_lost = self._reconnect_later
        return channel

    async def _try_replicas(self, channel: "Channel") -> None:
        """Raise Unreplicated when too few replicas have all that there is."""
        copied, tell = channel.awaited()
        # A fence that could not be made or moved is told by the next claim's own writes.
        channel.send(self._replicas.fence, _ignore, _ignore, tell)
        if not self._replicas.enough(answer := await copied):
            raise Unreplicated(answer)

    def _reconnect_later(self) -> None:
        """Don't leave it to a shopper to find Redis again."""
        if self._reconnects is None:
            loop = asyncio.get_running_loop()
            self._reconnects = loop.call_later(RECONNECT_SECONDS, self._reconnect)

    def _reconnect(self) -> None:
        self._reconnects = None
        if self._opening is None and (self._channel is None or self._channel.lost):
            self._opening = asyncio.create_task(self._open())
            # Nobody may be waiting to be told.
            self._opening.add_done_callback(lambda opening: opening.exception())

    async def _connect(self) -> "Channel":
        loop, options = asyncio.get_running_loop(), self._options
        found = None
        if self._server.moves:
            try:
                found = await loop.run_in_executor(None, self._server.address)
            except redis.RedisError as error:
                raise Unavailable(str(error)) from error
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            if path := options.get("path"):
                _, channel = await loop.create_unix_connection(Channel, path)
            else:
                host, port = found or (options.get("host", "localhost"), options.get("port", 6379))
                tls = _tls(options)
                _, channel = await loop.create_connection(Channel, host, port, ssl=tls)
        if password := options.get("password"):
            user = options.get("username") or "default"
            await channel.ask_well(hiredis.pack_command(("AUTH", user, password)))
        if database := options.get("db"):
            await channel.ask_well(hiredis.pack_command(("SELECT", str(database))))
        return channel


def _tls(options: dict) -> ssl.SSLContext | None:
    """Return the TLS settings of a rediss:// URL, by redis-py's names for them."""
    if not issubclass(options.get("connection_class", object), redis.SSLConnection):
        return None
    context = ssl.create_default_context(
        cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path")
    )
    if options.get("ssl_check_hostname") is False or options.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
    if options.get("ssl_cert_reqs") == "none":
        context.verify_mode = ssl.CERT_NONE
    if options.get("ssl_certfile"):
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    return context


class Channel(asyncio.Protocol):
    """A connection to Redis that answers in the order in which it was asked."""

    def __init__(self) -> None:
        # Nothing more may be asked; and there is no connection any more.
        self.lost = False
        self._gone = False
        self.on_lost: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._waiting: deque[Callable[[object], None]] = deque()
        # When Redis last answered, or was asked after a pause.
        self._heard_at = 0.0
        self._watched = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def send(self, command: bytes, *tell: Callable[[object], None]) -> None:
        """Send one or several commands; each `tell` gets the answer to one of them.

        That may be a hiredis.ReplyError, or Unavailable.
        """
        self._transport.write(command)
        if not self._watched:
            self._watched = True
            self._heard_at = self._loop.time()
            self._loop.call_later(WATCH_SECONDS, self._watch)
        self._waiting.extend(tell)

    def ask(self, command: bytes) -> asyncio.Future:
        """Send a command; the result may be a hiredis.ReplyError, or Unavailable is raised."""
        if self.lost:
            raise Unavailable("the connection to Redis was lost", executed=False)
        future, tell = self.awaited()
        self.send(command, tell)
        return future

    def awaited(self) -> tuple[asyncio.Future, Callable[[object], None]]:
        """Return an answer to wait for, and what is to be told of it."""
        future = self._loop.create_future()

        def tell(answer: object) -> None:
            # Who gave up waiting is not told any more.
            if not future.done():
                if isinstance(answer, Unavailable):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

        return future, tell

    async def ask_well(self, command: bytes):
        """Send a command that Redis does not refuse. Raises Unavailable when it does."""
        answer = await self.ask(command)
        if isinstance(answer, hiredis.ReplyError):
            raise refused(answer)
        return answer

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        reader, waiting = self._reader, self._waiting
        reader.feed(data)
        while (answer := reader.gets()) is not False:
            waiting.popleft()(answer)
        if self.lost and not waiting:
            self._transport.close()

    def _watch(self) -> None:
        """Give up on a Redis that owes answers and has been silent for too long."""
        self._watched = bool(self._waiting) and not self._gone
        if not self._watched:
            return
        if self._loop.time() - self._heard_at > COMMAND_TIMEOUT_SECONDS:
            self.abort()
        else:
            self._loop.call_later(WATCH_SECONDS, self._watch)

    def retire(self) -> None:
        """Ask no more, of a server that can't do its work; the answers that it owes still come."""
        if not self.lost:
            self.lost = True
            self.on_lost()
        if not self._waiting:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()
        self.connection_lost(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._gone = True
        if not self.lost:
            self.lost = True
            self.on_lost()
        while self._waiting:
            self._waiting.popleft()(Unavailable("Redis did not answer"))
