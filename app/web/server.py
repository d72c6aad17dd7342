"""One process of the web server: web.py, started by run/serve.py at a listening socket.

uvicorn speaks HTTP. A purchase leaves its path where the head of the request is read: straight to
the lane, on the event loop, without the scope, events and queues of an ASGI request, which would
cost more than the claim. Everything else goes as ASGI to Flask, in threads.
"""

import asyncio
import gc
import logging
import math
import resource
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress

import uvicorn
from a2wsgi import WSGIMiddleware
from flask import Flask
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from werkzeug.middleware.proxy_fix import ProxyFix

from .. import logs
from ..extensions import stock
from ..reading import MAX_BODY_BYTES
from ..run import serve
from . import polls, probe
from .alive import Heartbeat
from .lane import JSON_TYPE, UNAVAILABLE, UNAVAILABLE_RETRY, PurchaseLane, error_body

# The headers that the lane looks at, by their WSGI names.
HEADERS = {
    b"content-type": "CONTENT_TYPE",
    b"content-length": "CONTENT_LENGTH",
    b"transfer-encoding": "HTTP_TRANSFER_ENCODING",
    b"idempotency-key": "HTTP_IDEMPOTENCY_KEY",
    b"authorization": "HTTP_AUTHORIZATION",
    b"x-request-id": "HTTP_X_REQUEST_ID",
    b"x-forwarded-for": "HTTP_X_FORWARDED_FOR",
}

# A client has so long for the head of its next request, counted from the last one's end: slow
# senders and idle connections go. A proxy's own idle limit has to be shorter.
HEAD_SECONDS = 30
# A body comes in one packet or a few.
BODY_SECONDS = 10
# So long may a client leave an answer unread.
READ_SECONDS = 30
MAX_HEAD_BYTES = 64 * 1024
MAX_CONNECTIONS = 20_000
# Files that are no connections: listening socket, servers, logs, modules.
SPARE_FILES = 200

# Of uvicorn's main loop.
TICKS_PER_SECOND = 10
HELPED_PER_TICK = 1000

# What a request in flight may still take when its process is to end.
STOP_SECONDS = 5
# Kept connections are not cut at the end: who sends within this gets an answer that says "close".
LINGER_SECONDS = 1.0

LATE_BODY = error_body("The body did not come in time", "request_timeout")
HEAD_TOO_LARGE = error_body("The request's head is larger than 64 KiB", "head_too_large")
NO_UPGRADE = error_body("A purchase can't be an upgrade to another protocol", "invalid_request")
MALFORMED = error_body("Not an HTTP request", "invalid_request")


class Pages:
    """The Flask app as ASGI, in threads that never wait for a client: bodies are read here."""

    def __init__(self, app: Flask) -> None:
        settings = app.config["SETTINGS"]
        self.lane: PurchaseLane = app.extensions["lane"]
        self.taken = 0
        self._wsgi = app.wsgi_app
        self.flask = WSGIMiddleware(self._take, workers=settings.web_threads)
        self.polls = polls.Polls()
        self.probe = probe.Probe()
        self.most = app.config["MAX_CONTENT_LENGTH"] or math.inf
        # Only for what it does to a request's address: the same rule on both ways in.
        self.trust_proxies = None
        if isinstance(app.wsgi_app, ProxyFix):
            self.trust_proxies = ProxyFix(lambda environ, _: None, x_for=settings.trusted_proxies)

    def _take(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        self.taken += 1
        return self._wsgi(environ, start_response)

    async def probe(self) -> None:
        """Return when one of the threads was free."""
        await asyncio.get_running_loop().run_in_executor(self.flask.executor, int)

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["path"] == probe.PATH and scope["method"] in ("GET", "HEAD"):
            await self.probe.serve(scope, send)
            return
        body, more = b"", True
        # A little more than is allowed, so that Flask sees that it is too much.
        while more and len(body) <= self.most:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body += event["body"]
            more = event["more_body"]
        # WSGI can't tell X_Forwarded_For from X-Forwarded-For, so a client could pretend.
        scope["headers"] = [pair for pair in scope["headers"] if b"_" not in pair[0]]

        async def receive_body() -> dict:
            return {"type": "http.request", "body": body, "more_body": False}

        async def flask(send: Callable) -> None:
            watching = asyncio.create_task(_watch(scope, receive))
            try:
                await self.flask(scope, receive_body, send)
            finally:
                watching.cancel()

        cookie = polls.cookie_of(scope)
        if cookie is None:
            await flask(send)
        else:
            await polls.serve(self.polls, scope, cookie, flask, send)


async def _watch(scope: dict, receive: Callable) -> None:
    """Note in the scope that the client is gone, for views whose answers take long."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope["gone"] = True


class Purchase:
    """One purchase on a connection, in the place of uvicorn's RequestResponseCycle."""

    __slots__ = (
        "behind", "body", "disconnected", "environ", "keep_alive", "more_body", "protocol",
        "response_complete", "task",
    )  # fmt: skip
    # uvicorn wakes who waits for a body. Nobody does: a purchase starts when its body is there.
    message_event = asyncio.Event()

    def __init__(self, protocol: "Protocol", environ: dict[str, str], keep_alive: bool) -> None:
        self.protocol = protocol
        self.environ = environ
        self.keep_alive = keep_alive
        # Requests that a client sends ahead are answered in their order.
        self.behind = protocol.cycle
        self.body = bytearray()
        self.more_body = True
        self.response_complete = self.disconnected = False

    async def run_asgi(self, pages: Pages) -> None:
        """Decide and answer."""
        try:
            status, body, headers = await pages.lane.serve(
                self.environ, lambda: bytes(self.body), stock.loop_line.claim
            )
            self.response_complete = True
            if self.environ["REQUEST_METHOD"] == "HEAD":
                body = b""
            self.protocol.respond(status, headers, body, self.keep_alive)
            self.protocol.on_response_complete()
        except BaseException:
            # Rather an unknown outcome than a client that waits for ever.
            self.protocol.transport.abort()
            raise


class Protocol(HttpToolsProtocol):
    """HTTP/1.1 on one connection, as uvicorn speaks it, but for purchases and for patience."""

    app: Pages
    cycle: Purchase | RequestResponseCycle | None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.in_head = self.in_message = self.deaf = self.ended = False
        # When the client must have done its next step; see `expire`.
        self.due = self.loop.time() + HEAD_SECONDS
        if self.server_state.ending:
            self.shutdown()
        elif len(self.connections) > self.server_state.most_connections:
            self.refuse("503 Service Unavailable", UNAVAILABLE)

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        in_head = self.in_head
        super().data_received(data)
        if in_head and self.in_head:
            self.head_bytes += len(data)
            if self.head_bytes > MAX_HEAD_BYTES:
                self.refuse("431 Request Header Fields Too Large", HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        # No more than a purchase needs; `_begin_page` makes up for the rest.
        self.in_head = self.in_message = True
        self.head_bytes = 0
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        self.in_head = False
        if self.deaf:
            return
        self.due = self.loop.time() + BODY_SECONDS
        if self.url == b"/purchase" or self.url.startswith(b"/purchase?"):
            self._begin_purchase()
        else:
            self._begin_page()
        # After an Upgrade, which nobody here can speak, the parser reads no more.
        if self.server_state.ending or self.parser.should_upgrade():
            self.cycle.keep_alive = False

    def _begin_page(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()

    def _begin_purchase(self) -> None:
        parser, pages = self.parser, self.app
        environ = {
            "REQUEST_METHOD": parser.get_method().decode(),
            "REMOTE_ADDR": self.client[0] if self.client else "",
        }
        for name, value in self.headers:
            if key := HEADERS.get(name):
                text = value.decode("latin-1")
                environ[key] = f"{environ[key]},{text}" if key in environ else text
        if pages.trust_proxies:
            pages.trust_proxies(environ, None)
        keep_alive = parser.should_keep_alive() and parser.get_http_version() == "1.1"
        self.cycle = Purchase(self, environ, keep_alive)
        # The parser has seen that it is a number, if there is one.
        if int(environ.get("CONTENT_LENGTH", 0)) > MAX_BODY_BYTES:
            self._cut_purchase()
        elif parser.should_upgrade():
            self.refuse("400 Bad Request", NO_UPGRADE)
        elif self.expect_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if self.deaf:
            return
        if type(cycle) is not Purchase:
            super().on_body(body)
        elif cycle.more_body:
            cycle.body += body
            if len(cycle.body) > MAX_BODY_BYTES:
                self._cut_purchase()

    def on_message_complete(self) -> None:
        self.in_message = False
        if self.deaf:
            return
        self.due = math.inf
        if type(self.cycle) is not Purchase:
            super().on_message_complete()
        elif self.cycle.more_body:
            self._start_purchase()

    def _cut_purchase(self) -> None:
        """Let the lane refuse what is too large, unread."""
        self.cycle.keep_alive = False
        self._start_purchase()

    def _start_purchase(self) -> None:
        cycle = self.cycle
        cycle.more_body = False
        behind, cycle.behind = cycle.behind, None
        if behind is None or behind.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _start_asgi_task(self, cycle: Purchase | RequestResponseCycle, app: Pages) -> None:
        if type(cycle) is Purchase:
            # No set of tasks: the connection, which the server waits for, holds it.
            cycle.task = self.loop.create_task(cycle.run_asgi(app))
        else:
            super()._start_asgi_task(cycle, app)

    def respond(
        self, status: str, headers: Iterable[tuple[str, str]], body: bytes, keep_alive: bool
    ) -> None:
        """Write an answer, if somebody is still there to read it."""
        if self.ended or self.transport.is_closing():
            return
        lines = [f"HTTP/1.1 {status}\r\n", *(f"{name}: {value}\r\n" for name, value in headers)]
        if not keep_alive:
            lines.append("Connection: close\r\n")
        head = "".join(lines).encode("latin-1")
        self.transport.write(b"".join((head, self.server_state.date, b"\r\n", body)))
        if keep_alive:
            return
        if not self.in_message:
            self.transport.close()
        else:
            # To close on a client that still sends would reset the connection, and the answer with
            # it: read on for a while (RFC 9112, 9.6).
            self.deaf = self.ended = True
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def on_response_complete(self) -> None:
        # uvicorn's, but that `expire` takes the place of a timer for each answer.
        self.server_state.total_requests += 1
        if self.ended or self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self.cycle.response_complete:
            self.due = self.loop.time() + HEAD_SECONDS

    def pause_writing(self) -> None:
        super().pause_writing()
        self.due = self.loop.time() + READ_SECONDS

    def resume_writing(self) -> None:
        super().resume_writing()
        self.due = self.loop.time() + HEAD_SECONDS if self._is_idle() else math.inf

    def refuse(self, status: str, body: bytes) -> None:
        """Answer what is no request that could be served, and close."""
        self.in_message = True
        headers = [
            JSON_TYPE,
            ("Content-Length", str(len(body))),
            (logs.HEADER, logs.request_id(None)),
        ]
        if status.startswith("503"):
            headers.append(UNAVAILABLE_RETRY)
        self.respond(status, headers, body, keep_alive=False)

    def send_400_response(self, msg: str) -> None:
        if self._is_idle() or self.cycle.more_body:
            self.refuse("400 Bad Request", MALFORMED)
        else:
            # What was asked before it is still answered, and nothing after.
            self.cycle.keep_alive = False
            self.deaf = self.in_message = True

    def expire(self) -> None:
        """End a connection whose client did not do its next step in time."""
        cycle = self.cycle
        if self.transport.is_closing() or self.flow.write_paused:
            self.transport.abort()
        elif not self._is_idle() and cycle.more_body:
            self.refuse("408 Request Timeout", LATE_BODY)
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """End after the request in flight; without one, linger: the next may be on its way."""
        if self._is_idle():
            self.loop.call_later(LINGER_SECONDS, self._leave)
        else:
            self.cycle.keep_alive = False

    def _leave(self) -> None:
        if self._is_idle():
            self.transport.close()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


class Server(uvicorn.Server):
    """Serves until SIGTERM, then finishes what is in flight."""

    def __init__(
        self, config: uvicorn.Config, pulse: int, neighbour: socket.socket | None = None
    ) -> None:
        """`pulse` is a pipe that is written to as long as this process works, see alive.py.

        What waits at the `neighbour`, a listening socket, is accepted too when its own process
        does not do so.
        """
        super().__init__(config)
        self.neighbour = neighbour
        pages: Pages = config.app
        self.heartbeat = Heartbeat(pulse, pages.probe, lambda: pages.taken)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.server_state.most_connections = min(MAX_CONNECTIONS, files - SPARE_FILES)
        self.server_state.ending = False
        self.server_state.date = b""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.heartbeat.start()

    async def on_tick(self, counter: int) -> bool:
        ends = await super().on_tick(counter)
        await self._help_neighbour()
        if counter % TICKS_PER_SECOND == 0:
            state, now = self.server_state, asyncio.get_running_loop().time()
            ((_, date),) = state.default_headers
            state.date = b"Date: %b\r\n" % date
            for connection in [each for each in state.connections if each.due < now]:
                connection.expire()
        return ends

    async def _help_neighbour(self) -> None:
        # A process that is alive accepts at once: who still waits here, waits for a dead one.
        loop = asyncio.get_running_loop()
        for _ in range(HELPED_PER_TICK if self.neighbour else 0):
            try:
                connection, _ = self.neighbour.accept()
            except OSError:
                return
            with suppress(OSError):
                await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> Protocol:
        return Protocol(self.config, self.server_state, {}, asyncio.get_running_loop())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server_state.ending = True
        await super().shutdown(sockets)
        await stock.loop_line.report()


def configured(app: Flask) -> uvicorn.Config:
    """Return how uvicorn is to serve the app."""
    return uvicorn.Config(
        Pages(app),
        http=Protocol,
        loop="uvloop",
        interface="asgi3",
        lifespan="off",
        ws="none",
        proxy_headers=False,  # a ProxyFix does it where TRUSTED_PROXIES says so
        server_header=False,
        access_log=False,
        log_config=None,
        backlog=serve.BACKLOG,
        timeout_graceful_shutdown=STOP_SECONDS,
    )


def run(app: Flask, listener: int, neighbour: int, pulse: int) -> None:
    """Serve the app at a listening socket; the numbers are file descriptors, see `Server`."""
    # What was loaded so far lives as long as the process: no need to look it over again and again.
    # A request's own objects go by reference count: collecting every 700 of them cost 5 % of the
    # CPU.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)
    # Malformed requests are the clients' business.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    beside = None if neighbour == listener else socket.socket(fileno=neighbour)
    if beside:
        beside.setblocking(False)
    Server(configured(app), pulse, beside).run([socket.socket(fileno=listener)])
