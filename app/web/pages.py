"""The way from the event loop to Flask and back: everything that is not a purchase.

A page's thread never meets a client. It is given a whole request and gives back a whole answer, so
it is free again when Flask is done, whether the client reads slowly, sends ahead or is gone. Only
an answer whose length Flask doesn't know (an export) is made in pieces, one whenever the client has
taken the last one. Files, and answers that may be given again, need no thread at all.
"""

import asyncio
import contextvars
import gzip
import io
import logging
import sys
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix

from .. import logs
from ..addresses import client_of
from ..products.importing import MOST_BYTES
from . import polls
from .answer import FAILED, OVERLOADED, Answer
from .confirms import Confirms
from .cors import Cors
from .files import COMPRESSIBLE, LEAST_COMPRESSED, Files, accepts_gzip
from .parked import Parking
from .probe import PATH as PROBE
from .probe import Probe
from .request import Request

log = logging.getLogger(__name__)

# Past so many pages that wait for a thread, the next is answered 503 at once.
MOST_WAITING = 500
# Each holds a connection to PostgreSQL for as long as its reader takes.
MOST_STREAMS = 4
STREAM_THREADS = 2
# The one page to which people send files, which are larger than forms.
FILES_TO = b"/admin/products/import"
MOST_OF_FILE = MOST_BYTES + 64 * 1024
# Pages that are the same for everybody for as long as the process lives.
LASTING = {"/docs", "/openapi.json", "/shop"}
# A tenth of the size of a page of ours; level 9 takes three times as long for some percent more.
COMPRESSION = 5
# What belongs to one answer, not to the next one that is made of it.
OWN_HEADERS = {"x-request-id"}
NO_BODY = ("204", "304")
# What is between client and server alone (RFC 9110, 7.6.1). Werkzeug would look for another route
# where a websocket is offered.
OF_CONNECTION = {b"connection", b"upgrade", b"http2-settings", b"keep-alive", b"te", b"expect"}


Headers = list[tuple[str, str]]
Made = TypeVar("Made")


class Turns:
    """Places for so many at once. Addresses take turns: who asks a lot waits for itself."""

    def __init__(self, places: int, most: int) -> None:
        self._free, self._most = places, most
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._length = 0

    async def take(self, address: str) -> bool:
        """Wait for a place, to be given back with `leave`; False when too many wait for one."""
        if self._free:
            self._free -= 1
            return True
        if self._length >= self._most:
            return False
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(address, deque()).append(turn)
        self._length += 1
        await turn
        return True

    def leave(self) -> None:
        if not self._waiting:
            self._free += 1
            return
        address = next(iter(self._waiting))
        queue = self._waiting.pop(address)
        queue.popleft().set_result(None)
        self._length -= 1
        if queue:
            self._waiting[address] = queue


class Stream:
    """An answer in pieces. Each is made in a thread when it is asked for."""

    def __init__(
        self, status: str, headers: Headers, chunks: Iterable[bytes], context: contextvars.Context
    ) -> None:
        """`context` is what the answer was begun in, which holds Flask's own."""
        self.status, self.headers = status, headers
        self._chunks, self._context = chunks, context
        self._iterator = iter(chunks)
        self.pool: ThreadPoolExecutor | None = None

    async def next(self) -> bytes | None:
        """Return the next piece, None after the last. Raises what Flask raised."""
        return await self._run(lambda: next(self._iterator, None))

    async def close(self) -> None:
        """End it, whether all of it was asked for or not."""
        if close := getattr(self._chunks, "close", None):
            await self._run(close)

    async def _run(self, call: Callable[[], Made]) -> Made:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, lambda: self._context.run(call))


class Pages:
    """Everything of one process that is not a purchase."""

    def __init__(self, app: Flask) -> None:
        settings = app.config["SETTINGS"]
        self.wsgi = app.wsgi_app
        self._most = app.config["MAX_CONTENT_LENGTH"]
        self.files = Files(Path(app.static_folder or ""), f"{app.static_url_path}/")
        self.polls: polls.Polls = app.extensions["polls"]
        self.lasting: dict[tuple[str, bool], Answer] = {}
        self.turns = Turns(settings.web_threads, MOST_WAITING)
        self.threads = ThreadPoolExecutor(settings.web_threads, "page")
        self.stream_threads = ThreadPoolExecutor(STREAM_THREADS, "stream")
        self.streams = 0
        # How many pages their threads ever took up: the watchdog tells busy from stuck by it.
        self.taken = 0
        self.probe = Probe()
        self.confirms = Confirms(app)
        self.parking = Parking()
        self.cors = Cors(settings.cors_origins) if settings.cors_origins else None
        # Only for what it does to a request's address: the same rule on all ways in.
        self.trust_proxies: Callable[[dict[str, Any]], object] | None = None
        if isinstance(app.wsgi_app, ProxyFix):
            fix = ProxyFix(lambda environ, _: (), x_for=settings.trusted_proxies)
            self.trust_proxies = lambda environ: fix(environ, _start_nothing)

    def most(self, url: bytes) -> int:
        """Return how many bytes a request's body may have."""
        return MOST_OF_FILE if url == FILES_TO else self._most

    def at_once(self, request: Request) -> Answer | None:
        """Return the answer where it needs no thread."""
        path = request.url.partition("?")[0]
        if path in LASTING and request.method in ("GET", "HEAD"):
            # They look at no query, and a HEAD is a GET whose body is left out: made once for all.
            request.method, request.url = "GET", path
        method, url, known = request.method, request.url, request.environ
        answer = self.files.find(method, url, known)
        if answer is None and (poll := _poll_of(request)):
            answer = self.polls.find(poll)
        if answer is None and method == "GET":
            answer = self.lasting.get((url, _understands_gzip(request)))
        if answer is None:
            return None
        identity = logs.request_id(known.get("HTTP_X_REQUEST_ID"))
        return answer._replace(headers=[*answer.headers, (logs.HEADER, identity)])

    async def answer(self, request: Request) -> Answer | Stream | None:
        """Have Flask answer; None when the client is gone before it was its turn."""
        if request.method in ("GET", "HEAD") and request.url.partition("?")[0] == PROBE:
            return await self.probe.serve(request.environ.get("HTTP_X_REQUEST_ID"))
        if poll := _poll_of(request):
            return await self._poll(request, poll)
        offer = polls.Offer()
        answer = await self._ask(request, offer)
        if offer.wait is not None and not request.gone:
            # Without a thread; what is asked afterwards is a whole request again, token and all.
            if not await self.parking.park(offer.wait, request):
                return OVERLOADED
            answer = await self._ask(request, polls.Offer(again=True))
        return answer

    async def _poll(self, request: Request, poll: polls.Poll) -> Answer | Stream | None:
        await self.polls.made(poll)
        if answer := self.at_once(request):
            return answer
        with self.polls.making(poll):
            return await self._ask(request, polls.Offer())

    async def _ask(self, request: Request, offer: polls.Offer) -> Answer | Stream | None:
        """Have Flask answer, in a thread."""
        asked_at = time.monotonic()
        known = request.environ.copy()
        if self.trust_proxies:
            self.trust_proxies(known)
        if told := await self.confirms.answer(request, client_of(known["REMOTE_ADDR"])):
            return told
        if not await self.turns.take(client_of(known["REMOTE_ADDR"])):
            return OVERLOADED
        if request.gone:
            self.turns.leave()
            return None
        environ = environ_of(request)
        environ[polls.OFFER] = offer
        context = contextvars.copy_context()
        call = asyncio.get_running_loop().run_in_executor(
            self.threads, context.run, self._call, environ, context
        )
        # By the thread's own end, not by that of who waits for it.
        call.add_done_callback(lambda _: self.turns.leave())
        answer = await call
        if isinstance(answer, Stream):
            return await self._admit(answer)
        self._remember(request, offer, asked_at, answer)
        return answer

    async def _admit(self, stream: Stream) -> Answer | Stream:
        stream.pool = self.stream_threads
        if self.streams >= MOST_STREAMS:
            await stream.close()
            return OVERLOADED
        self.streams += 1
        return stream

    async def end(self, stream: Stream) -> None:
        """Let go of a stream that `answer` gave."""
        self.streams -= 1
        with suppress(Exception):
            await stream.close()

    def _call(self, environ: dict[str, Any], context: contextvars.Context) -> Answer | Stream:
        """Run Flask in this thread, and in this context."""
        self.taken += 1
        try:
            status, headers, chunks = self._begin(environ)
            names = {name.lower() for name, _ in headers}
            bare = environ["REQUEST_METHOD"] == "HEAD" or status.startswith(NO_BODY)
            if not bare and "content-length" not in names:
                return Stream(status, headers, chunks, context)
            try:
                body = b"".join(chunks)
            finally:
                if close := getattr(chunks, "close", None):
                    close()
            return compressed(environ, Answer(status, headers, body))
        except Exception:
            log.exception("%s %s failed", environ["REQUEST_METHOD"], environ["PATH_INFO"])
            return FAILED

    def _begin(self, environ: dict[str, Any]) -> tuple[str, Headers, Iterable[bytes]]:
        told: list[tuple[str, Headers]] = []

        def start_response(
            status: str, headers: Headers, exc_info: object = None, /
        ) -> Callable[[bytes], object]:
            if any("\n" in text or "\r" in text for pair in headers for text in pair):
                raise ValueError("a header has more than one line")
            told[:] = [(status, headers)]
            return _write_nothing

        chunks = self.wsgi(environ, start_response)
        status, headers = told[0]
        return status, headers, chunks

    def _remember(
        self, request: Request, offer: polls.Offer, asked_at: float, answer: Answer
    ) -> None:
        """Keep what may be given again."""
        names = {name.lower() for name, _ in answer.headers}
        if answer.status != "200 OK" or request.method != "GET" or "set-cookie" in names:
            return
        others = [pair for pair in answer.headers if pair[0].lower() not in OWN_HEADERS]
        answer = answer._replace(headers=others)
        if poll := _poll_of(request):
            self.polls.keep(poll, offer, asked_at, answer)
        elif request.url in LASTING:
            self.lasting[request.url, _understands_gzip(request)] = answer

    async def check(self) -> None:
        """Return when a page's thread is free and does something: the watchdog's question."""
        await asyncio.get_running_loop().run_in_executor(self.threads, time.monotonic)


def _start_nothing(status: str, headers: Headers, exc_info: object = None, /) -> NoReturn:
    raise NotImplementedError  # ProxyFix calls the app, which here answers nothing


def _write_nothing(chunk: bytes) -> NoReturn:
    raise NotImplementedError("PEP 3333's write() is for old programs")


def _understands_gzip(request: Request) -> bool:
    return accepts_gzip(request.environ.get("HTTP_ACCEPT_ENCODING", ""))


def _poll_of(request: Request) -> polls.Poll | None:
    if request.url not in polls.PATHS:
        return None
    return polls.poll_of(request.method, request.url, request.environ, _understands_gzip(request))


def compressed(environ: dict[str, Any], answer: Answer) -> Answer:
    """Compress an answer where its reader understands that, and it is worth it and safe.

    A page holds the session's CSRF token, the same in each of them. One that also repeats what it
    was asked with is left as it is: from the size of such a page, compressed, the token could be
    guessed, letter by letter (BREACH).
    """
    headers = {name.lower(): value for name, value in answer.headers}
    media_type = headers.get("content-type", "")
    if not media_type.startswith(COMPRESSIBLE) or "content-encoding" in headers:
        return answer
    if "content-length" not in headers:
        return answer
    repeats = environ["QUERY_STRING"] or environ["REQUEST_METHOD"] not in ("GET", "HEAD")
    if media_type.startswith("text/html") and repeats:
        return answer
    vary = ", ".join(filter(None, (headers.get("vary"), "Accept-Encoding")))
    kept = [(n, v) for n, v in answer.headers if n.lower() not in ("vary", "content-length")]
    kept.append(("Vary", vary))
    body, length = answer.body, headers["content-length"]
    if len(body) >= LEAST_COMPRESSED and accepts_gzip(environ.get("HTTP_ACCEPT_ENCODING", "")):
        body = gzip.compress(body, COMPRESSION, mtime=0)
        length = str(len(body))
        kept.append(("Content-Encoding", "gzip"))
    kept.append(("Content-Length", length))
    return Answer(answer.status, kept, body)


def environ_of(request: Request) -> dict[str, Any]:
    """Return the request as WSGI has it (PEP 3333)."""
    path, _, query = request.url.partition("?")
    if path.startswith(("http://", "https://")):
        # An absolute address, as for a proxy, means the same (RFC 9112, 3.2.2).
        path = urllib.parse.urlsplit(path).path or "/"
    host, port = request.server
    environ = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": urllib.parse.unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "SERVER_NAME": host,
        "SERVER_PORT": str(port),
        "SERVER_PROTOCOL": f"HTTP/{request.version}",
        "REMOTE_ADDR": request.environ["REMOTE_ADDR"],
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(request.body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for name, value in _headers(request.headers):
        joint = "; " if name == "HTTP_COOKIE" else ","
        environ[name] = f"{environ[name]}{joint}{value}" if name in environ else value
    # However the body came, it is all here, and this long; but for one that was cut off unread.
    if "HTTP_TRANSFER_ENCODING" in environ:
        del environ["HTTP_TRANSFER_ENCODING"]
        environ["CONTENT_LENGTH"] = str(len(request.body))
    return environ


def _headers(pairs: list[tuple[bytes, bytes]]) -> Iterator[tuple[str, str]]:
    for raw, value in pairs:
        # WSGI can't tell X_Forwarded_For from X-Forwarded-For, so a client could pretend.
        if b"_" not in raw and raw not in OF_CONNECTION:
            name = raw.decode("latin-1").upper().replace("-", "_")
            plain = name in ("CONTENT_TYPE", "CONTENT_LENGTH")
            yield name if plain else f"HTTP_{name}", value.decode("latin-1")
