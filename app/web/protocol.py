"""HTTP/1.1 on one connection (RFC 9112): what its client may send next, and whose turn it is.

Two machines, joined by a queue of requests, which are answered one at a time, in their order:

    reading      BETWEEN ──first byte──▶ HEAD ──empty line──▶ BODY ──last byte──▶ BETWEEN
                 any of them ──nothing that is sent from here on matters──▶ DEAF

    answering    WAITING ──the first of the queue is whole──▶ SERVING ──answered──▶ WAITING
                 WAITING, SERVING ──that was the last answer──▶ ENDED

What is refused takes its place in the queue like a request: whatever comes later never changes or
overtakes the answer to what came before. llhttp (in httptools) finds where everything ends.
"""

import asyncio
import logging
import math
import re
from collections import deque
from enum import Enum

import httptools
from uvicorn.server import ServerState

from .. import logs
from ..extensions import stock
from ..reading import MAX_BODY_BYTES
from .answer import BAD_REQUEST, OVERLOADED, Answer, refusal
from .cors import Cors
from .lane import Headers, PurchaseLane
from .pages import Pages, Stream
from .request import Request

log = logging.getLogger(__name__)

# A client has so long for the head of its next request, counted from the last one's end: slow
# senders and idle connections go. A proxy's own idle limit has to be shorter.
HEAD_SECONDS = 30
# A body comes in one packet or a few.
BODY_SECONDS = 10
# So long may a client leave an answer unread.
READ_SECONDS = 30
# Kept connections are not cut at the end: who sends within this gets an answer that says "close".
LINGER_SECONDS = 1.0

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
# What a header takes in memory beside its bytes.
HEADER_COST = 150
# A body in chunks of one byte, the smallest there are, is six times as long on the wire.
WIRE_FACTOR = 8
# So much is read at once, into one buffer for all: the rest stays in the kernel, where TCP holds
# back the sender.
READ_BYTES = 16 * 1024
# ... and so much is given to the parser, which can't be stopped between two requests.
PIECE_BYTES = 1024
# Requests that were sent ahead: past so many, or so many bytes, no more is read until they are
# answered.
MAX_AHEAD = 32
MAX_AHEAD_BYTES = 64 * 1024
# Over all connections: what has come of requests that are not being served, and of answers what
# has not been read. Past them the connection that has held some for longest goes.
MAX_UNSERVED_BYTES = 32 * 1024 * 1024
MAX_UNREAD_BYTES = 64 * 1024 * 1024
MAX_CONNECTIONS = 20_000

# The headers that are looked at here, by their WSGI names.
HEADERS = {
    b"host": "HTTP_HOST",
    b"content-type": "CONTENT_TYPE",
    b"content-length": "CONTENT_LENGTH",
    b"content-encoding": "HTTP_CONTENT_ENCODING",
    b"transfer-encoding": "HTTP_TRANSFER_ENCODING",
    b"expect": "HTTP_EXPECT",
    b"idempotency-key": "HTTP_IDEMPOTENCY_KEY",
    b"authorization": "HTTP_AUTHORIZATION",
    b"x-request-id": "HTTP_X_REQUEST_ID",
    b"x-forwarded-for": "HTTP_X_FORWARDED_FOR",
    b"accept-encoding": "HTTP_ACCEPT_ENCODING",
    b"if-none-match": "HTTP_IF_NONE_MATCH",
    b"cookie": "HTTP_COOKIE",
    b"origin": "HTTP_ORIGIN",
    b"access-control-request-method": "HTTP_ACCESS_CONTROL_REQUEST_METHOD",
    b"x-poll": "HTTP_X_POLL",
}

HEAD_TOO_LARGE = refusal(
    "431 Request Header Fields Too Large",
    f"The request's head is larger than 64 KiB or has more than {MAX_HEADERS} headers",
    "head_too_large",
)
LATE_BODY = refusal("408 Request Timeout", "The body did not come in time", "request_timeout")
MALFORMED = refusal(BAD_REQUEST, "Not an HTTP request", "invalid_request")
NO_HOST = refusal(BAD_REQUEST, "HTTP/1.1 needs one Host header", "invalid_request")
BAD_HOST = refusal(BAD_REQUEST, "Host is no host with an optional port", "invalid_request")
# RFC 9110, 7.2 and RFC 3986, 3.2.2: an empty one is valid.
HOST = re.compile(r"(?:\[[\w.:~!$&'()*+,;=-]+\]|[\w.~!$&'()*+,;=%-]*)(?::[0-9]*)?", re.ASCII)
TWO_HOSTS = refusal(BAD_REQUEST, "There is more than one Host header", "invalid_request")
TWO_KEYS = refusal(
    BAD_REQUEST,
    "There is more than one Idempotency-Key header",
    "invalid_request",
    field="Idempotency-Key",
)
# What may be there once only: two readers could each take another one.
ONCE = {"HTTP_HOST": TWO_HOSTS, "HTTP_IDEMPOTENCY_KEY": TWO_KEYS}
NO_LENGTH = refusal(BAD_REQUEST, "Content-Length is not a number", "invalid_request")
UNKNOWN_CODING = refusal(
    "501 Not Implemented", "The only Transfer-Encoding is chunked", "not_implemented"
)
TOO_MUCH_FRAMING = refusal(
    "413 Content Too Large", "The chunks are almost nothing but framing", "body_too_large"
)
NO_TUNNEL = refusal("501 Not Implemented", "This is no proxy", "not_implemented")
OTHER_VERSION = refusal(
    "505 HTTP Version Not Supported", "HTTP/1.1 is spoken here", "http_version_not_supported"
)


class Reading(Enum):
    """What the client may send next."""

    BETWEEN = "the next request"
    HEAD = "the rest of a head"
    BODY = "the rest of the body of the newest request"
    DEAF = "nothing that matters"


class Answering(Enum):
    """What becomes of the first request in the queue."""

    WAITING = "it is not whole yet, or there is none"
    SERVING = "its answer is being made or written"
    ENDED = "nothing: the last answer is written"


BETWEEN, HEAD, BODY, DEAF = Reading
WAITING, SERVING, ENDED = Answering


class Stop(Exception):
    """Raised in the parser's callbacks, whose parser then reads no more."""

    def __init__(self, refused: Answer | None = None) -> None:
        self.refused = refused


class Holdings:
    """How many bytes connections hold, together at most so many: who has held some longest goes."""

    def __init__(self, most: int) -> None:
        self._most, self._sum = most, 0
        self._held: dict[Connection, int] = {}

    def hold(self, connection: "Connection", size: int) -> "Connection | None":
        """Note what a connection holds now; return the one that has to go."""
        self._sum += size - self._held.get(connection, 0)
        self._held[connection] = size
        return next(iter(self._held)) if self._sum > self._most else None

    def release(self, connection: "Connection") -> None:
        self._sum -= self._held.pop(connection, 0)


class State(ServerState):
    """What the connections of one process share."""

    def __init__(self, most_connections: int) -> None:
        super().__init__()
        self.connections: set[Connection] = set()  # type: ignore[assignment]  # not uvicorn's own
        self.most_connections = most_connections
        # The process takes no more connections, and ends those that it has.
        self.ending = False
        self.date = b""
        self.unserved = Holdings(MAX_UNSERVED_BYTES)
        self.unread = Holdings(MAX_UNREAD_BYTES)


class Connection(asyncio.BufferedProtocol):
    """One client's connection."""

    _buffer = memoryview(bytearray(READ_BYTES))

    def __init__(
        self, lane: PurchaseLane, pages: Pages, state: State, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.lane, self.pages, self.state, self.loop = lane, pages, state, loop
        self.parser = httptools.HttpRequestParser(self)
        self.reading, self.answering = BETWEEN, WAITING
        # Those that are not answered yet; the last may be still on its way in.
        self.queue: deque[Request] = deque()
        # What was received and not given to the parser, as too much waits already.
        self.rest = b""
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        # Of the newest request, counted after the piece in which it begins.
        self.wire_bytes = 0
        # The bytes of the head that begin the body again, after an offer to upgrade.
        self.begin_body: bytes | None = None
        # The client doesn't read what was written; `read` is set when it does, or is gone.
        self.unread = False
        self.read = asyncio.Event()
        self.holds = False
        # Something that the client has sent, or still sends, is not read.
        self.cut_off = False
        # When the client must have done its next step; see `expire`.
        self.due = math.inf
        # `lane.serve` is at work: an answer comes from within it.
        self.serving = False
        self.task: asyncio.Task[None] | None = None

    # The connection's beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a socket's
        self.transport = transport
        peer, here = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self.address = peer[0] if peer else ""
        self.server = here[:2] if here else ("", 0)
        self.state.connections.add(self)
        self._restart_clock()
        if self.state.ending:
            self.shutdown()
        elif len(self.state.connections) > self.state.most_connections:
            self._refuse(OVERLOADED)
            self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        state = self.state
        state.connections.discard(self)
        state.unserved.release(self)
        state.unread.release(self)
        for request in self.queue:
            request.gone = True
        self.queue.clear()
        self.reading, self.answering, self.rest = DEAF, ENDED, b""
        self.read.set()
        # They know each other; left to the collector they would stay for long.
        del self.parser

    def eof_received(self) -> bool:
        """The client sends no more; what it has asked is still answered."""
        if self.reading is BODY:
            self.queue.pop()
        self.reading = DEAF
        if not self.queue:
            return False
        self.queue[-1].keep_alive = False
        return True

    def shutdown(self) -> None:
        """End after the requests in flight; without one, linger: the next may be on its way."""
        if not self.queue:
            self.loop.call_later(LINGER_SECONDS, self._leave)

    def _leave(self) -> None:
        if not self.queue:
            self.transport.close()

    def expire(self) -> None:
        """End a connection whose client did not do its next step in time."""
        if self.transport.is_closing() or self.unread or self.answering is ENDED:
            self.transport.abort()
        elif self.reading is BODY:
            self._refuse(LATE_BODY)
            self._advance()
        elif self.queue:
            # Nobody waits for the client: it was still idle when the clock was set.
            self.due = math.inf
        else:
            self.transport.close()

    def _restart_clock(self) -> None:
        seconds: float
        if self.unread:
            seconds = READ_SECONDS
        elif self.reading is BODY:
            seconds = BODY_SECONDS
        else:
            seconds = math.inf if self.queue else HEAD_SECONDS
        self.due = self.loop.time() + seconds

    # Reading

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, size: int) -> None:
        if self.reading is not DEAF:
            self._receive(self._buffer[:size])

    def _receive(self, data: memoryview) -> None:
        """Parse what was received, as far as what waits already leaves room for it."""
        queue = self.queue
        unfinished = queue[-1] if self.reading is BODY else None
        while data and self.reading is not DEAF:
            if queue and self._has_enough():
                self.rest = bytes(data)
                self.transport.pause_reading()
                break
            # Most of what is received is one request, less than a piece.
            piece = data if len(data) <= PIECE_BYTES else data[:PIECE_BYTES]
            self._parse(piece)
            self._advance()
            data = data[len(piece) :]
        if (queue[-1] if self.reading is BODY else None) is not unfinished:
            self._restart_clock()
        if self.reading is not BETWEEN or len(queue) > 1 or self.holds:
            self._note_holding()

    def _read_rest(self) -> None:
        if self.rest and not self._has_enough():
            rest, self.rest = self.rest, b""
            self.transport.resume_reading()
            self._receive(memoryview(rest))

    def _has_enough(self) -> bool:
        queue = self.queue
        return (
            len(queue) > 1
            and queue[-1].whole
            and (len(queue) >= MAX_AHEAD or self._waiting_bytes() > MAX_AHEAD_BYTES)
        )

    def _waiting_bytes(self) -> int:
        return sum(request.size + len(request.body) for request in self.queue)

    def _note_holding(self) -> None:
        """Count what this connection has sent and is not being served."""
        self.holds = self.reading in (HEAD, BODY) or len(self.queue) > 1
        if not self.holds:
            self.state.unserved.release(self)
            return
        size = self._waiting_bytes() + len(self.rest)
        if self.reading is HEAD:
            size += self.wire_bytes + HEADER_COST * len(self.headers)
        if longest := self.state.unserved.hold(self, size):
            longest.give_way()

    def give_way(self) -> None:
        """Let go of what has come and is not being served."""
        self.state.unserved.release(self)
        self._refuse(OVERLOADED)
        self._advance()

    def _parse(self, data: memoryview) -> None:
        self.wire_bytes += len(data)
        try:
            self.parser.feed_data(data)
            if self.reading is not BETWEEN:
                self._check_progress(data)
        except httptools.HttpParserUpgrade as offer:
            self._ignore_upgrade()
            self._parse(data[offer.args[0] :])
        except Stop as stop:
            self._stop(stop.refused)
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, Stop):
                log.error("a request can't be read", exc_info=error)
            self._stop(getattr(error.__context__, "refused", MALFORMED))
        except httptools.HttpParserError:
            self._stop(MALFORMED)

    def _stop(self, refused: Answer | None) -> None:
        self.cut_off = True
        if self.reading is not DEAF and refused:
            self._refuse(refused)
        self.reading = DEAF

    def _ignore_upgrade(self) -> None:
        """Read on as HTTP/1.1 (RFC 9110, 7.8), where llhttp expects another protocol to begin.

        It has not read the body: another parser does, which is told how long it is.
        """
        if begin := self.begin_body:
            self.begin_body = None
            self.parser = httptools.HttpRequestParser(self)
            self.parser.feed_data(begin)

    def _check_progress(self, data: memoryview) -> None:
        """Refuse what grows without end within one part of a request."""
        if len(self.headers) > MAX_HEADERS:
            raise Stop(HEAD_TOO_LARGE)
        if self.reading is HEAD:
            if self.wire_bytes > MAX_HEAD_BYTES:
                raise Stop(HEAD_TOO_LARGE)
            # HTTP/0.9 has a first line and nothing else; llhttp would wait for headers.
            if self.url and self.parser.get_http_version() == "0.0" and bytes(data[-1:]) == b"\n":
                raise Stop(OTHER_VERSION)
        elif self.reading is BODY:
            request = self.queue[-1]
            if self.wire_bytes > WIRE_FACTOR * request.most + MAX_HEAD_BYTES:
                raise Stop(TOO_MUCH_FRAMING)

    def _refuse(self, answer: Answer) -> None:
        """Let this be the answer to what is being read, and the last one."""
        if self.reading is BODY:
            request = self.queue[-1]
        else:
            request = Request({})
            self.queue.append(request)
        request.refusal, request.whole = answer, True
        request.purchase = request.keep_alive = False
        request.body = bytearray()
        self.reading, self.rest, self.headers, self.cut_off = DEAF, b"", [], True

    # What the parser calls; Stop leaves it

    def on_message_begin(self) -> None:
        if self.reading is BODY:
            return  # of the same request, see `_ignore_upgrade`
        if self.reading is DEAF:
            raise Stop
        self.reading = HEAD
        self.url = b""
        self.wire_bytes = 0

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers are headers to the parser; after the head's end nobody looks at the list.
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.reading is BODY:
            return
        headers, self.headers = self.headers, []
        parser, url = self.parser, self.url
        if len(headers) > MAX_HEADERS or (
            # Pieces are counted but for the first, and the last may hold more than the head.
            self.wire_bytes > MAX_HEAD_BYTES - PIECE_BYTES
            and _size_of(url, headers) > MAX_HEAD_BYTES
        ):
            raise Stop(HEAD_TOO_LARGE)
        method, version = parser.get_method().decode(), parser.get_http_version()
        environ = {"REQUEST_METHOD": method, "REMOTE_ADDR": self.address}
        for name, value in headers:
            if key := HEADERS.get(name):
                if key not in environ:
                    environ[key] = value.decode("latin-1")
                elif key in ONCE:
                    raise Stop(ONCE[key])
                else:
                    environ[key] += f",{value.decode('latin-1')}"
        length = _check_framing(method, version, environ)
        request = Request(environ)
        if url == b"/purchase" or url.startswith(b"/purchase?"):
            request.purchase, request.most = True, MAX_BODY_BYTES
        elif url[:1] == b"/" or url[:7].lower() == b"http://" or url[:8].lower() == b"https://":
            request.is_page(method, url, version, headers, self.server)
            request.most = self.pages.most(url)
        else:
            raise Stop(MALFORMED)
        if self.pages.cors and "HTTP_ORIGIN" in environ:
            self._allow_origin(self.pages.cors, request, method, url)
        request.size = self.wire_bytes + HEADER_COST * len(headers)
        request.keep_alive = version == "1.1" and parser.should_keep_alive()
        if "HTTP_EXPECT" in environ:
            request.expects_continue = environ["HTTP_EXPECT"].lower() == "100-continue"
        self.queue.append(request)
        self.reading = BODY
        if length > request.most:
            self._cut(request)
        if parser.should_upgrade():
            self._prepare_to_ignore_upgrade(environ, length)

    def _allow_origin(self, cors: Cors, request: Request, method: str, url: bytes) -> None:
        environ = request.environ
        if method == "OPTIONS" and (preflight := cors.preflight(environ, url)):
            request.refusal, request.purchase = preflight, False
        else:
            request.allowed = cors.headers(environ["HTTP_ORIGIN"], method, url)

    def _prepare_to_ignore_upgrade(self, environ: dict[str, str], length: int) -> None:
        if "HTTP_TRANSFER_ENCODING" in environ:
            self.begin_body = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        elif length:
            self.begin_body = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % length

    def on_body(self, body: bytes) -> None:
        request = self.queue[-1]
        request.body += body
        if len(request.body) > request.most:
            self._cut(request)

    def on_message_complete(self) -> None:
        if self.begin_body:
            return
        request = self.queue[-1]
        request.whole = True
        self.reading = BETWEEN if request.keep_alive else DEAF
        self.headers = []

    def _cut(self, request: Request) -> None:
        """Read no more of what is too large: who serves it, refuses it."""
        request.whole, request.keep_alive, request.expects_continue = True, False, False
        self.reading = DEAF
        raise Stop

    # Answering

    def _advance(self) -> None:
        """Serve the first request, if it is whole and the client has read what came before it."""
        while self.answering is WAITING and self.queue and not self.unread:
            request = self.queue[0]
            if not request.whole:
                if request.expects_continue:
                    request.expects_continue = False
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return
            if request.purchase:
                self.answering = SERVING
                self._sell(request)
            elif request.refusal:
                identity = logs.HEADER, logs.request_id(None)
                status, headers, body = request.refusal
                self._answer(Answer(status, (*headers, identity), body))
            elif answer := self.pages.at_once(request):
                self._answer(answer)
            else:
                self.answering = SERVING
                self.task = self.loop.create_task(self._show(request))

    def _go_on(self) -> None:
        """Serve and read what had to wait for an answer."""
        self._advance()
        self._read_rest()
        if self.holds:
            self._note_holding()

    def _sell(self, request: Request) -> None:
        """Have a purchase answered: at once, or when Redis has decided it."""
        try:
            environ = request.environ
            if trust_proxies := self.pages.trust_proxies:
                trust_proxies(environ)
            self.serving = True
            self.lane.serve(environ, request.body, stock.loop_line.ask, self._sold)
        except BaseException:
            self.transport.abort()
            raise
        finally:
            self.serving = False

    def _sold(self, answer: Answer) -> None:
        if self.serving:
            # It was there at once. In a turn of its own, so that who sends thousands ahead waits
            # for everybody else between one and the next.
            self.loop.call_soon(self._sold, answer)
            return
        try:
            self._answer(answer)
            if (self.queue or self.rest) and self.answering is not ENDED:
                self.loop.call_soon(self._go_on)
        except BaseException:
            # Rather an unknown outcome than a client that waits for ever.
            self.transport.abort()
            raise

    async def _show(self, request: Request) -> None:
        try:
            answer = await self.pages.answer(request)
            if isinstance(answer, Stream):
                await self._stream(request, answer)
            elif answer:
                self._answer(answer)
            self._go_on()
        except Exception:
            # Part of the answer may be written already.
            log.exception("%s %s was not answered", request.method, request.url[:200])
            self.transport.abort()

    def _answer(self, answer: Answer) -> None:
        """Write the answer to the first request, if somebody is still there to read it."""
        if self.transport.is_closing():
            self.answering = ENDED
            return
        request = self.queue[0]
        status, headers, body = answer
        if request.environ.get("REQUEST_METHOD") == "HEAD":
            body = b""
        last = self._write(request, status, headers, body)
        self._finish(last)

    def _write(self, request: Request, status: str, headers: Headers, body: bytes = b"") -> bool:
        """Write a head, and a body with it; return whether it says that it is the last one."""
        last = not request.keep_alive or (self.state.ending and len(self.queue) == 1)
        lines = [f"HTTP/1.1 {status}\r\n", *[f"{name}: {value}\r\n" for name, value in headers]]
        if request.allowed:
            lines += [f"{name}: {value}\r\n" for name, value in request.allowed]
        if last:
            lines.append("Connection: close\r\n")
        head = "".join(lines).encode("latin-1")
        self.transport.write(b"".join((head, self.state.date, b"\r\n", body)))
        return last

    async def _stream(self, request: Request, stream: Stream) -> None:
        """Write an answer whose length nobody knows, as fast as it is read."""
        try:
            headers = list(stream.headers)
            if request.version == "1.1":
                headers.append(("Transfer-Encoding", "chunked"))
            else:
                request.keep_alive = False
            last = self._write(request, stream.status, headers)
            while not request.gone and (chunk := await stream.next()) is not None:
                if chunk:
                    self._write_chunk(request, chunk)
                await self._until_read()
        finally:
            await self.pages.end(stream)
        if not request.gone:
            if request.version == "1.1":
                self.transport.write(b"0\r\n\r\n")
            self._finish(last)

    def _write_chunk(self, request: Request, chunk: bytes) -> None:
        if request.version == "1.1":
            chunk = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        self.transport.write(chunk)

    async def _until_read(self) -> None:
        while self.unread and not self.transport.is_closing():
            self.read.clear()
            await self.read.wait()

    def _finish(self, last: bool) -> None:
        """The first request is answered."""
        self.queue.popleft()
        self.answering = WAITING
        if last:
            self._end()
        self._restart_clock()

    def _end(self) -> None:
        self.answering = ENDED
        if self.reading in (BETWEEN, DEAF) and not (self.cut_off or self.rest):
            self.transport.close()
            return
        # To close on a client that still sends would reset the connection, and the answer with
        # it: read on for a while (RFC 9112, 9.6).
        self.reading, self.rest = DEAF, b""
        self.transport.resume_reading()
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def pause_writing(self) -> None:
        self.unread = True
        self._restart_clock()
        size = self.transport.get_write_buffer_size()
        if longest := self.state.unread.hold(self, size):
            longest.transport.abort()

    def resume_writing(self) -> None:
        self.unread = False
        self.state.unread.release(self)
        self._restart_clock()
        self.read.set()
        if self.answering is WAITING:
            self._go_on()


def _size_of(url: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    """Return how many bytes of a head are its address and its headers."""
    return len(url) + sum(len(name) + len(b": \r\n") + len(value) for name, value in headers)


def _check_framing(method: str, version: str, environ: dict[str, str]) -> int:
    """Return the announced length of the body, 0 where none is. Raises Stop."""
    if version == "1.1":
        if "HTTP_HOST" not in environ:
            raise Stop(NO_HOST)
        if not HOST.fullmatch(environ["HTTP_HOST"]):
            raise Stop(BAD_HOST)
    elif version != "1.0":
        raise Stop(OTHER_VERSION)
    if method == "CONNECT":
        raise Stop(NO_TUNNEL)
    if "HTTP_TRANSFER_ENCODING" in environ:
        if environ["HTTP_TRANSFER_ENCODING"].strip().lower() != "chunked":
            raise Stop(UNKNOWN_CODING)
        return 0
    length = environ.get("CONTENT_LENGTH") or "0"
    # The parser has seen that it is a number.
    if len(length) > 18:
        raise Stop(NO_LENGTH)
    return int(length)
