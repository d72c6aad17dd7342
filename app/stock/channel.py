"""A connection to Redis from an event loop, and how it is opened."""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis
import redis

from ..problems import Unavailable
from .claims import refused
from .servers import COMMAND_TIMEOUT_SECONDS, CONNECT_TIMEOUT_SECONDS, Server, pack

# How often a connection that owes answers is looked at, and how often in vain. Looks are counted,
# not seconds: after a stop of this process the first look comes before what Redis answered long ago
# is read.
WATCH_SECONDS = 0.1
MOST_LOOKS = round(COMMAND_TIMEOUT_SECONDS / WATCH_SECONDS)


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
        # Looks since Redis last answered, or was asked after a pause.
        self._looks = 0
        self._watched = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, command: bytes, *tell: Callable[[object], None]) -> None:
        """Send one or several commands; each `tell` gets the answer to one of them.

        That may be a hiredis.ReplyError, or Unavailable.
        """
        self._transport.write(command)
        if not self._watched:
            self._watched = True
            self._looks = 0
            self._loop.call_later(WATCH_SECONDS, self._watch)
        self._waiting.extend(tell)

    def ask(self, command: bytes) -> asyncio.Future[Any]:
        """Send a command; the result may be a hiredis.ReplyError, or Unavailable is raised."""
        if self.lost:
            raise Unavailable("the connection to Redis was lost", executed=False)
        future, tell = self.awaited()
        self.send(command, tell)
        return future

    def awaited(self) -> tuple[asyncio.Future[Any], Callable[[object], None]]:
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

    async def ask_well(self, command: bytes) -> Any:
        """Send a command that Redis does not refuse. Raises Unavailable when it does."""
        answer = await self.ask(command)
        if isinstance(answer, hiredis.ReplyError):
            raise refused(answer)
        return answer

    def data_received(self, data: bytes) -> None:
        self._looks = 0
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
        self._looks += 1
        if self._looks > MOST_LOOKS:
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


async def connect(server: Server) -> Channel:
    """Return a connection to where the server is now. Raises Unavailable, OSError, TimeoutError."""
    loop, options = asyncio.get_running_loop(), server.options
    found = None
    if server.moves:
        try:
            found = await loop.run_in_executor(None, server.address)
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
        await channel.ask_well(pack("AUTH", user, password))
    if database := options.get("db"):
        await channel.ask_well(pack("SELECT", str(database)))
    return channel


def _tls(options: dict[str, Any]) -> ssl.SSLContext | None:
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
