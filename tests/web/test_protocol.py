"""One connection: its states and their changes, answers in order, and what a client can't take."""

import asyncio
import gzip
import json
import socket
import threading
import time
from contextlib import suppress

import pytest
from flask import Response
from people import cookie_name
from waiting import patience
from wire import post, purchase, serving, until

from app.extensions import stock
from app.web import pages, protocol
from app.web.files import accepts_gzip
from app.web.protocol import (
    BETWEEN,
    BODY,
    DEAF,
    ENDED,
    HEAD,
    MAX_AHEAD,
    SERVING,
    WAITING,
    Connection,
    Holdings,
)

JSON = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"
STYLES = "/static/vendor/tabler-1.6.1.min.css"


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *headers, "", ""]).encode()


def talk(app, conversation, seconds: float = 60):
    async def whole():
        async with serving(app) as process:
            return await conversation(process)

    return asyncio.run(asyncio.wait_for(whole(), patience(seconds)))


def replies_to(app, data: bytes, count: int, closed: bool = False) -> list:
    """Send all of it in one write; return the answers, after which the connection ends or not."""

    async def conversation(process):
        wire = await process.connect()
        wire.send(data)
        replies = [await wire.reply() for _ in range(count)]
        if closed:
            assert await wire.is_closed()
        else:
            wire.send(get("/healthz"))
            assert (await wire.reply()).status == 200
        return replies

    return talk(app, conversation)


# States


def the(process) -> Connection:
    (connection,) = process.server.server_state.connections
    return connection


def test_the_states_of_reading(app):
    async def conversation(process):
        wire = await process.connect()
        await until(lambda: process.server.server_state.connections)
        connection, seen = the(process), []
        assert connection.reading is BETWEEN
        head, body = (
            post(b"", JSON, "Content-Length: 26", length=False),
            b'{"userId":1,"productId":1}',
        )
        for piece, state in ((head[:9], HEAD), (head[9:], BODY), (body[:5], BODY)):
            wire.send(piece)
            await until(lambda state=state: connection.reading is state)
            seen.append(connection.reading)
        wire.send(body[5:])
        assert (await wire.reply()).status == 200
        seen.append(connection.reading)
        wire.send(b"nonsense\r\n\r\n")
        assert (await wire.reply()).status == 400
        return [*seen, connection.reading]

    assert talk(app, conversation) == [HEAD, BODY, BODY, BETWEEN, DEAF]


def test_the_states_of_answering(app, held_pages):
    async def conversation(process):
        wire = await process.connect()
        wire.send(get("/held", "Connection: close"))
        await until(lambda: held_pages.entered == 1)
        connection = the(process)
        seen = [connection.answering]
        held_pages.release()
        assert (await wire.reply()).status == 200
        await until(lambda: connection.answering is ENDED)
        wire = await process.connect()
        wire.send(purchase(1))
        await wire.reply()
        await until(lambda: len(process.server.server_state.connections) == 1)
        return [*seen, the(process).answering]

    assert talk(app, conversation) == [SERVING, WAITING]


def session_of(app, browser) -> str:
    """Return the session's cookie as a browser sends it."""
    name = cookie_name(app)
    return f"{name}={browser.get_cookie(name, path='/admin').value}"


class HeldPages:
    """A page of the app under test that waits until it is let go."""

    def __init__(self) -> None:
        self.entered, self._open = 0, threading.Event()
        self.lock = threading.Lock()
        # Whose requests came to a thread, in their order.
        self.addresses: list[str] = []

    def view(self, address: str) -> str:
        with self.lock:
            self.entered += 1
            self.addresses.append(address)
        assert self._open.wait(30)
        return "held"

    def release(self) -> None:
        self._open.set()


@pytest.fixture
def held_pages(app, monkeypatch):
    """The path /held, which takes a thread until it is released."""
    held = HeldPages()
    below = app.wsgi_app

    def wsgi(environ, start_response):
        if environ["PATH_INFO"] == "/held":
            return Response(held.view(environ["REMOTE_ADDR"]))(environ, start_response)
        return below(environ, start_response)

    monkeypatch.setattr(app, "wsgi_app", wsgi)
    yield held
    held.release()


# What goes wrong


@pytest.fixture
def put_below(app, monkeypatch):
    """Put something beside Flask, under a path."""

    def put(path: str, view) -> None:
        below = app.wsgi_app

        def wsgi(environ, start_response):
            other = environ["PATH_INFO"] == path
            return (view if other else below)(environ, start_response)

        monkeypatch.setattr(app, "wsgi_app", wsgi)

    return put


def test_a_program_that_fails_is_a_500_and_the_connection_goes_on(app, put_below):
    def fail(environ, start_response):
        raise RuntimeError("a bug")

    put_below("/fault", fail)
    broken, healthy = replies_to(app, get("/fault") + get("/healthz"), 2)
    assert (broken.status, broken.json["code"], healthy.status) == (500, "internal_error", 200)


def test_a_header_of_two_lines_is_never_sent(app, put_below):
    def answer(environ, start_response):
        start_response("200 OK", [("Content-Length", "0"), ("A", "b\r\nSet-Cookie: x")])
        return []

    put_below("/two", answer)
    (broken,) = replies_to(app, get("/two"), 1)
    assert broken.status == 500
    assert "set-cookie" not in broken.headers


@pytest.mark.parametrize("where", ["lane", "answer", "page"])
def test_a_fault_of_the_server_s_own_ends_that_connection_alone(app, monkeypatch, where):
    """Rather an unknown outcome than a client that waits for ever."""

    def fail(*_):
        raise RuntimeError("a bug")

    async def conversation(process):
        wire, other = [await process.connect() for _ in range(2)]
        other.send(get("/healthz"))
        assert (await other.reply()).status == 200
        with monkeypatch.context() as patch:
            if where == "lane":
                patch.setattr(protocol.PurchaseLane, "serve", fail)
            elif where == "answer":
                patch.setattr(protocol.Connection, "_answer", fail)
            else:
                patch.setattr(pages.Pages, "answer", fail)
            wire.send(get("/healthz") if where == "page" else purchase(1))
            assert await wire.is_closed()
        other.send(purchase(2))
        assert (await other.reply()).status == 200

    talk(app, conversation)


def test_too_many_long_answers_are_refused_and_closed(app, put_below, monkeypatch):
    closed = []

    class Pieces:
        def __iter__(self):
            return iter([b"a"])

        def close(self):
            closed.append(1)

    def answer(environ, start_response):
        start_response("200 OK", [])
        return Pieces()

    put_below("/long", answer)
    monkeypatch.setattr(pages, "MOST_STREAMS", 0)
    (refused,) = replies_to(app, get("/long"), 1)
    assert (refused.status, closed) == (503, [1])


# Answers in order


REFUSED_AFTER = {
    "a bad chunk": (post(b"", JSON, CHUNKED, length=False) + b"zz\r\n", 400),
    "a tunnel": (b"CONNECT /purchase HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "5,000 zeros": (post(b"", JSON, "Content-Length: " + "0" * 5000, length=False), 400),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two hosts": (get("/healthz", "Host: b"), 400),
    "two keys": (purchase(9, "Idempotency-Key: a", "Idempotency-Key: a"), 400),
    "an unknown coding": (post(b"", JSON, "Transfer-Encoding: gzip, chunked", length=False), 501),
    "too many headers": (get("/healthz", *["a:"] * 101), 431),
    "another version": (b"GET /healthz HTTP/3.0\r\nHost: a\r\n\r\n", 400),
    "no version": (b"GET /healthz\r\n\r\n", 400),
    "a body without end": (post(b"", JSON, "Content-Length: 99999999", length=False), 413),
    "trailers without end": (
        post(b"", JSON, CHUNKED, length=False) + b"1\r\n{\r\n0\r\n" + b"a:\r\n" * 200,
        431,
    ),
}


@pytest.mark.parametrize(
    "host", ["", "shop.example", "a:", "a:8000", "[::1]:80", "127.0.0.1", "a_b"]
)
def test_each_host_that_is_one_is_taken(app, host):
    head = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    assert replies_to(app, head, 1)[0].status == 200


@pytest.mark.parametrize(
    "host",
    ["a b", "a/b", "user@a", "a?b", "a#b", "http://a", "[::1", "a:80:1", "a:b", "ä", "<a>"],
)
def test_a_host_that_is_none_is_refused(app, host):
    head = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    refused = replies_to(app, head, 1, closed=True)[0]
    assert (refused.status, refused.json["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("name", REFUSED_AFTER)
def test_what_comes_later_never_changes_an_earlier_answer(app, name):
    later, status = REFUSED_AFTER[name]
    bought, page, refused = replies_to(
        app, purchase(1) + get("/healthz") + later + purchase(2), 3, closed=True
    )
    assert (bought.status, bought.json["status"], page.status) == (200, "queued", 200)
    assert refused.status in {status, 505} if status == 400 else refused.status == status
    assert refused.headers["connection"] == "close"
    assert set(refused.json) >= {"error", "code"}
    assert stock.waiting() == 1


def test_continue_is_said_when_it_is_that_requests_turn(app):
    async def conversation(process):
        wire = await process.connect()
        wire.send(
            get(STYLES)
            + post(b"", JSON, "Expect: 100-continue", "Content-Length: 26", length=False)
        )
        styles = await wire.reply()
        assert styles.status == 200
        assert b"100 Continue" not in styles.body
        assert (await wire.reply()).status == 100
        wire.send(b'{"userId":1,"productId":1}')
        return await wire.reply()

    assert talk(app, conversation).status == 200


@pytest.mark.parametrize("offer", ["h2c", "websocket"])
@pytest.mark.parametrize("coding", ["length", "chunks"])
def test_an_offer_to_upgrade_is_ignored(app, admin_headers, offer, coding):
    upgrade = (f"Upgrade: {offer}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMA")
    token = f"Authorization: {admin_headers['Authorization']}"

    def request(path: str, body: bytes) -> bytes:
        if coding == "length":
            sent = post(body, JSON, token, *upgrade)
        else:
            sent = post(b"", JSON, token, *upgrade, CHUNKED, length=False)
            sent += b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        return sent.replace(b"/purchase", path.encode(), 1)

    buy, restock = b'{"userId":1,"productId":1}', b'{"productId":1,"amount":5}'
    data = (
        request("/purchase", buy)
        + get("/products", *upgrade)
        + request("/products/restock", restock)
    )
    bought, products, restocked = replies_to(app, data, 3)
    assert (bought.status, products.status, restocked.status) == (200, 200, 200)
    assert restocked.json["stock_remaining"] == 104
    assert "connection" not in bought.headers


def test_trailers_are_no_headers(make_app, admin_headers):
    app = make_app(trusted_proxies=1)
    token = admin_headers["Authorization"]

    def chunked(path: str, body: bytes, trailer: str, *headers: str) -> bytes:
        head = post(b"", JSON, CHUNKED, *headers, length=False).replace(b"/purchase", path.encode())
        return head + b"%x\r\n%b\r\n0\r\n%b\r\n\r\n" % (len(body), body, trailer.encode())

    restock = b'{"productId":1,"amount":5}'
    (refused,) = replies_to(
        app, chunked("/products/restock", restock, f"Authorization: {token}"), 1
    )
    assert refused.status == 401
    forged = b"".join(
        chunked(
            "/%70urchase",
            b'{"userId":1,"productId":1}',
            f"Idempotency-Key: k{number}",
            "Idempotency-Key: k",
        )
        for number in range(3)
    )
    replies = replies_to(app, forged, 3)
    assert {reply.json["orderId"] for reply in replies} == {1}
    # The names that were read before the parser saw a trailer are all there is.
    assert stock.waiting() == 1


def test_a_chunked_body_is_a_body_on_every_route(app, admin_headers):
    token = f"Authorization: {admin_headers['Authorization']}"
    body = b'{"productId":1,"amount":5}'
    head = post(b"", JSON, CHUNKED, token, length=False).replace(b"/purchase", b"/products/restock")
    chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in body) + b"0\r\nX: y\r\n\r\n"
    (restocked,) = replies_to(app, head + chunks, 1)
    assert (restocked.status, restocked.json["stock_remaining"]) == (200, 105)


def test_who_sends_no_more_is_still_answered(app):
    async def conversation(process):
        wire = await process.connect()
        wire.send(purchase(1) + get("/healthz") + purchase(2)[:-3])
        wire.writer.write_eof()
        return await wire.reply(), await wire.reply(), await wire.is_closed()

    bought, page, closed = talk(app, conversation)
    assert (bought.status, page.status, page.headers["connection"], closed) == (
        200, 200, "close", True,
    )  # fmt: skip
    assert stock.waiting() == 1


def test_old_versions_are_answered_and_closed(app):
    async def conversation(process):
        statuses = []
        for line in (b"GET /healthz\r\n", b"GET /healthz HTTP/1.0\r\n\r\n"):
            wire = await process.connect()
            wire.send(line)
            statuses.append((await wire.reply()).status)
            assert await wire.is_closed()
        return statuses

    assert talk(app, conversation) == [505, 200]


def test_heads_are_bounded_in_one_write_too(app):
    for size, status in ((65_000, 200), (65_600, 431), (100_000, 431), (200_000, 431)):
        (reply,) = replies_to(app, get("/healthz", "X-A: " + "x" * size), 1, closed=status == 431)
        assert reply.status == status


# What a client can't take


def test_a_page_that_nobody_waits_for_frees_its_thread(app):
    """Clients that ask twice, read a little and go: pages are served as before."""

    async def conversation(process):
        for _ in range(3 * app.config["SETTINGS"].web_threads):
            wire = await process.connect()
            wire.send(get("/openapi.json?x=1") * 3 + get(STYLES) * 2)
            await wire.reader.read(1000)
            wire.writer.transport.abort()
        wire = await process.connect()
        wire.send(get("/healthz"))
        started = time.monotonic()
        reply = await wire.reply()
        return reply.status, time.monotonic() - started

    status, seconds = talk(app, conversation)
    assert (status, seconds < patience(2)) == (200, True)


async def slow_reader(process, data: bytes) -> socket.socket:
    """A connection whose client sends and never reads, with the smallest buffer there is."""
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    wire.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(wire, ("127.0.0.1", process.port))
    with suppress(TimeoutError):
        await asyncio.wait_for(loop.sock_sendall(wire, data), 0.2)
    return wire


@pytest.mark.parametrize("path", [STYLES, "/openapi.json?x=1"])
def test_slow_readers_hold_no_thread(app, path):
    async def conversation(process):
        slow = [await slow_reader(process, get(path) * 60) for _ in range(16)]
        try:
            seconds = []
            for _ in range(5):
                wire = await process.connect()
                started = time.monotonic()
                wire.send(get("/healthz"))
                assert (await wire.reply()).status == 200
                seconds.append(time.monotonic() - started)
            # One answer each is on its way; the others were not made yet.
            assert all(len(each.queue) <= 60 for each in process.server.server_state.connections)
            return max(seconds)
        finally:
            for wire in slow:
                wire.close()

    assert talk(app, conversation) < 3


def test_what_is_sent_ahead_is_bounded(app, held_pages):
    async def conversation(process):
        wire = await process.connect()
        wire.send(get("/held") + get("/healthz") * 2000)
        await until(lambda: held_pages.entered == 1 and the(process).rest)
        connection = the(process)
        piece = protocol.PIECE_BYTES // len(get("/healthz")) + 1
        waiting, rest = len(connection.queue), len(connection.rest)
        held_pages.release()
        statuses = {(await wire.reply()).status for _ in range(2001)}
        return waiting <= MAX_AHEAD + piece, rest <= protocol.READ_BYTES, statuses

    assert talk(app, conversation) == (True, True, {200})


def test_one_page_at_a_time_for_each_connection(app, held_pages):
    async def conversation(process):
        wire = await process.connect()
        wire.send(get("/held") * 5)
        await until(lambda: held_pages.entered == 1)
        other = await process.connect()
        other.send(get("/healthz"))
        assert (await other.reply()).status == 200
        entered = held_pages.entered
        held_pages.release()
        for _ in range(5):
            assert (await wire.reply()).status == 200
        return entered

    assert talk(app, conversation) == 1


def test_addresses_take_turns(app, held_pages):
    """Hundreds of pages for one address: another's is the next but one."""

    async def conversation(process):
        greedy = [await process.connect("127.0.0.2") for _ in range(100)]
        for wire in greedy:
            wire.send(get("/held"))
        threads = app.config["SETTINGS"].web_threads
        await until(lambda: process.server.pages.turns._length == 100 - threads)
        other = await process.connect("127.0.0.3")
        other.send(get("/held"))
        await until(lambda: process.server.pages.turns._length == 101 - threads)
        held_pages.release()
        assert (await other.reply()).status == 200
        # Those that had a thread, the one whose turn it was, and then the other address.
        return held_pages.addresses.index("127.0.0.3") - threads

    assert talk(app, conversation) <= app.config["SETTINGS"].web_threads


def test_too_many_pages_are_refused_at_once(app, held_pages, monkeypatch):
    monkeypatch.setattr(pages, "MOST_WAITING", 2)

    async def conversation(process):
        count = app.config["SETTINGS"].web_threads + 2
        wires = [await process.connect() for _ in range(count + 1)]
        for number, wire in enumerate(wires[:-1], 1):
            wire.send(get("/held"))
            await until(
                lambda n=number: held_pages.entered + process.server.pages.turns._length == n
            )
        wires[-1].send(get("/held"))
        refused = await wires[-1].reply()
        held_pages.release()
        return refused, [(await wire.reply()).status for wire in wires[:-1]]

    refused, others = talk(app, conversation)
    assert (refused.status, refused.json["code"]) == (503, "unavailable")
    assert (refused.headers["retry-after"], set(others)) == ("1", {200})


def test_who_holds_most_has_to_go(app, monkeypatch):
    """Unfinished requests are bounded over all connections: the oldest is refused."""
    monkeypatch.setattr(protocol, "MAX_UNSERVED_BYTES", 100_000)

    async def conversation(process):
        wires = [await process.connect() for _ in range(4)]
        for wire in wires:
            wire.send(get("/healthz", "X-A: " + "x" * 40_000)[:-2])
            await wire.writer.drain()
            await asyncio.sleep(0.05)
        refused = await wires[0].reply()
        wires[-1].send(b"\r\n")
        return refused.status, (await wires[-1].reply()).status

    assert talk(app, conversation) == (503, 200)


def test_holdings_add_up():
    holdings = Holdings(100)
    assert holdings.hold("a", 60) is None
    assert holdings.hold("b", 40) is None
    assert holdings.hold("b", 41) == "a"
    holdings.release("a")
    assert holdings.hold("b", 100) is None
    holdings.release("nobody")


def test_a_body_may_not_be_all_framing(app):
    head = post(b"", JSON, CHUNKED, length=False)
    (reply,) = replies_to(app, head + b"1;x=" + b"x" * 500_000, 1, closed=True)
    assert reply.status == 413


# Files and compression


def test_files_need_no_thread_and_no_cookie(app, held_pages, admin):
    cookie = f"Cookie: {session_of(app, admin)}"

    async def conversation(process):
        for _ in range(app.config["SETTINGS"].web_threads):
            (await process.connect()).send(get("/held"))
        await until(lambda: held_pages.entered == app.config["SETTINGS"].web_threads)
        wire = await process.connect()
        wire.send(get(STYLES, cookie) + get(STYLES, cookie, "Accept-Encoding: gzip"))
        plain, small = await wire.reply(), await wire.reply()
        for tag in (
            plain.headers["etag"],
            small.headers["etag"],
            f'"x", W/{plain.headers["etag"]}',
        ):
            wire.send(get(STYLES, f"If-None-Match: {tag}"))
            again = await wire.reply()
            assert (again.status, again.body, again.headers["etag"]) == (
                304,
                b"",
                plain.headers["etag"],
            )
        wire.send(get(STYLES, method="HEAD"))
        head = await wire.reply(head_only=True)
        wire.send(get("/static/admin.css"))
        return plain, small, head, await wire.reply()

    plain, small, head, changing = talk(app, conversation)
    assert gzip.decompress(small.body) == plain.body
    assert len(small.body) < len(plain.body) / 5
    assert plain.headers["etag"] != small.headers["etag"]
    assert small.headers["content-encoding"] == "gzip"
    for reply in (plain, small, head):
        assert reply.headers["vary"] == "Accept-Encoding"
        assert "immutable" in reply.headers["cache-control"]
        assert "set-cookie" not in reply.headers
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert int(head.headers["content-length"]) == len(plain.body)
    assert changing.headers["cache-control"] == "no-cache"


def test_a_dashboard_is_small(app, admin, client, admin_headers):
    """Sixty products: the first load with everything, and what is polled every second."""
    for number in range(59):
        terms = {"name": f"Item {number}", "priceCents": 100, "currency": "EUR", "stock": 5}
        assert client.post("/products", json=terms, headers=admin_headers).status_code == 201
    headers = (
        f"Cookie: {session_of(app, admin)}",
        f"User-Agent: {admin.environ_base['HTTP_USER_AGENT']}",
        "Accept-Encoding: gzip, deflate, br",
    )

    async def conversation(process):
        wire = await process.connect()

        async def ask(path, *more):
            wire.send(get(path, *headers, *more))
            reply = await wire.reply()
            assert reply.status == 200
            return reply

        page = await ask("/admin/")
        text = gzip.decompress(page.body).decode()
        assert text.count('id="product-') == 60
        files = {part.partition('"')[0].partition("#")[0] for part in text.split('="/static/')[1:]}
        # The font is what the style sheet asks for.
        files.add("vendor/inter-5.3.0-latin.woff2")
        loaded = [await ask("/static/" + file.replace("&amp;", "&")) for file in files]
        polled = await ask("/admin/live", "X-Poll: 1", "HX-Request: true")
        shared = await ask("/admin/live", "X-Poll: 1", "HX-Request: true")
        assert gzip.decompress(shared.body)
        return len(page.body) + sum(len(file.body) for file in loaded), len(polled.body)

    first, poll = talk(app, conversation)
    assert (first < 250_000, poll < 20_000) == (True, True), (first, poll)


def test_a_page_that_repeats_what_was_asked_is_not_compressed(app, admin):
    """It holds the CSRF token: from its compressed size that could be guessed (BREACH)."""
    headers = (
        f"Cookie: {session_of(app, admin)}",
        f"User-Agent: {admin.environ_base['HTTP_USER_AGENT']}",
        "Accept-Encoding: gzip",
    )

    async def conversation(process):
        wire = await process.connect()
        replies = []
        for path in ("/admin/orders/", "/admin/orders/?q=5", "/openapi.json?x=1"):
            wire.send(get(path, *headers))
            replies.append(await wire.reply())
        return replies

    replies = talk(app, conversation)
    assert [reply.headers.get("content-encoding") for reply in replies] == ["gzip", None, "gzip"]
    assert all("Accept-Encoding" in reply.headers["vary"] for reply in (replies[0], replies[2]))


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ("gzip", True), ("", False), ("br, gzip;q=0.5", True), ("gzip;q=0", False),
        ("gzip; q=0.000", False), ("*", True), ("*;q=0", False), ("identity", False),
        ("*;q=0, gzip", True), ("GZIP", True), ("deflate", False),
    ],
)  # fmt: skip
def test_who_understands_gzip(given, allowed):
    assert accepts_gzip(given) is allowed


def test_documents_are_made_once(app):
    async def conversation(process):
        wire = await process.connect()
        bodies = set()
        for path in ("/docs", "/docs?x=1", "/docs?x=2", "/docs?"):
            wire.send(get(path, "X-Request-Id: mine"))
            reply = await wire.reply()
            assert (reply.status, reply.headers["x-request-id"]) == (200, "mine")
            bodies.add(reply.body)
        return bodies, process.server.pages

    bodies, pages = talk(app, conversation)
    assert (len(bodies), set(pages.lasting)) == (1, {("/docs", False)})
    assert pages.taken == 1


def test_a_head_of_a_document_is_as_cheap(app):
    async def conversation(process):
        wire = await process.connect()
        heads = []
        for number in range(3):
            wire.send(get(f"/docs?{number}", method="HEAD"))
            heads.append(await wire.reply(head_only=True))
        wire.send(get("/docs"))
        return heads, await wire.reply(), process.server.pages.taken

    heads, reply, taken = talk(app, conversation)
    length = reply.headers["content-length"]
    assert {(head.status, head.headers["content-length"]) for head in heads} == {(200, length)}
    assert (len(reply.body), taken) == (int(length), 1)


def test_tickets_of_polls_are_small(app, admin):
    """A session's cookies may be 60 KB of junk; what is kept of them is a digest."""
    session = session_of(app, admin)
    agent = f"User-Agent: {admin.environ_base['HTTP_USER_AGENT']}"

    async def conversation(process):
        wire = await process.connect()
        process.server.pages.polls._tickets.clear()
        for number in range(5):
            junk = f"Cookie: {session}; junk={number}" + "x" * 50_000
            wire.send(get("/admin/live", "X-Poll: 1", "HX-Request: true", agent, junk))
            assert (await wire.reply()).status == 200
        return process.server.pages.polls._tickets

    tickets = talk(app, conversation)
    assert {len(ticket) for ticket in tickets} == {32}
    assert len(tickets) == 5


# JSON, the same on every route


SENT_TWICE = [
    b'{"userId":1,"userId":1,"productId":1}',
    b'{"userId":1,"productId":1,"user\\u0049d":2}',
    b'{"userId":1,"productId":1,"more":{"a":1,"a":2}}',
    b'{"productId":1,"amount":1,"amount":2}',
    b'{"name":"a","name":"b","priceCents":1,"currency":"EUR","stock":1}',
]


@pytest.mark.parametrize("route", ["/purchase", "/products/restock", "/products"])
@pytest.mark.parametrize("body", SENT_TWICE)
def test_a_member_that_comes_twice_is_refused(client, admin_headers, route, body):
    answer = client.post(route, data=body, content_type="application/json", headers=admin_headers)
    assert (answer.status_code, answer.json["code"]) == (400, "invalid_request")
    assert "more than once" in answer.json["error"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("route", ["/purchase", "/products/restock", "/products"])
def test_numbers_that_json_lacks_are_refused(client, admin_headers, route, number):
    body = f'{{"userId":1,"productId":1,"amount":1,"unknown":{number}}}'
    answer = client.post(route, data=body, content_type="application/json", headers=admin_headers)
    assert (answer.status_code, number in answer.json["error"]) == (400, True)


def test_a_byte_order_mark_is_ignored(client, admin_headers):
    for route, body in (
        ("/purchase", {"userId": 1, "productId": 1}),
        ("/products/restock", {"productId": 1, "amount": 1}),
    ):
        data = b"\xef\xbb\xbf" + json.dumps(body).encode()
        answer = client.post(
            route, data=data, content_type="application/json", headers=admin_headers
        )
        assert answer.status_code == 200


def test_members_that_a_purchase_does_not_know_are_ignored(client):
    body = {"userId": 1, "productId": 1, "metadata": {"cart": "x"}, "note": 'a "quoted" text'}
    assert client.post("/purchase", json=body).status_code == 200


@pytest.mark.parametrize("route", ["/purchase", "/products/restock", "/products", "/admin/sign-in"])
def test_compressed_bodies_are_refused(client, admin_headers, route):
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json", **admin_headers}
    answer = client.post(route, data=gzip.compress(b"{}"), headers=headers)
    assert answer.status_code == 415


def test_quotation_marks_are_a_part_of_a_key(buy):
    assert len({buy(1, key=key).json["orderId"] for key in ("k-1", '"k-1"', "k-1")}) == 2
