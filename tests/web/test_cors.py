"""Pages of other origins: which may call what, with a preflight that is answered on the loop."""

import asyncio
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jwt
import pytest
from people import API_TOKEN
from system import start_system, stop_system
from wire import ask as ask_app
from wire import post, serving

from app.config import SettingsError, load_settings, with_secrets

SHOP = "https://shop.example"
SECRET = "0123456789abcdef0123456789abcdef"
JWT = {
    "shopper_auth": "jwt",
    "jwt_secret": SECRET,
    "jwt_issuer": "https://id.example",
    "jwt_audience": "shop",
}
TOKEN = jwt.encode(
    {"iss": "https://id.example", "aud": "shop", "sub": "7", "exp": int(time.time()) + 3600}, SECRET
)


@pytest.fixture
def ask(make_app):
    """Send requests to a process that knows the origins; return the replies."""
    return partial(ask_app, make_app(**JWT, cors_origins=(SHOP, "http://localhost:3000")))


def request(method: str, path: str, origin: str | None = SHOP, *lines: str) -> bytes:
    given = [f"{method} {path} HTTP/1.1", "Host: a", *lines]
    if origin:
        given.append(f"Origin: {origin}")
    return ("\r\n".join(given) + "\r\n\r\n").encode()


def preflight(path: str, method: str, origin: str | None = SHOP) -> bytes:
    lines = f"Access-Control-Request-Method: {method}", "Access-Control-Request-Headers: x"
    return request("OPTIONS", path, origin, *lines)


def allowed(reply) -> str | None:
    return reply.headers.get("access-control-allow-origin")


OPEN = [
    ("/purchase", "POST"), ("/purchase?utm=1", "POST"), ("/purchase/orders/7", "GET"),
    ("/purchase/orders/auth0%7C7?limit=1", "GET"), ("/purchase/metrics", "GET"),
    ("/products", "GET"), ("/products?limit=5", "GET"), ("/products/1", "GET"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "method"), OPEN)
def test_a_preflight_of_the_shoppers_routes(ask, path, method):
    (reply,) = ask(preflight(path, method))
    assert (reply.status, reply.body) == (204, b"")
    assert allowed(reply) == SHOP
    assert method in reply.headers["access-control-allow-methods"].split(", ")
    headers = reply.headers["access-control-allow-headers"].lower()
    for name in ("authorization", "content-type", "idempotency-key"):
        assert name in headers
    assert reply.headers["access-control-max-age"] == "600"
    assert reply.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/products", "POST"), ("/products/1", "PATCH"), ("/products/restock", "POST"),
        ("/products/restock", "GET"), ("/sale/brake", "POST"), ("/admin/", "GET"),
        ("/admin/sign-in", "POST"), ("/metrics", "GET"), ("/orders/1", "GET"),
        ("/orders/events", "GET"), ("/purchase", "DELETE"), ("/purchase/orders/7/x", "GET"),
        ("/purchases", "POST"), ("/static/shop.js", "GET"), ("/readyz", "GET"), ("/", "GET"),
        ("/products", ""), ("/products", "get"),
    ],
)  # fmt: skip
def test_no_leave_for_anything_else(ask, path, method):
    reply, plain = ask(preflight(path, method), request(method or "GET", path))
    assert allowed(reply) is None
    if (path, method) not in (("/products", ""),):
        assert allowed(plain) is None


@pytest.mark.parametrize(
    "origin",
    [
        "https://shop.example.evil", "https://evilshop.example", "http://shop.example",
        "https://shop.example:8443", "https://SHOP.example", "https://shop.example/", "null", "*",
        "", "https://shop.example, https://shop.example",
    ],
)  # fmt: skip
def test_origins_are_compared_to_the_letter(ask, origin):
    for reply in ask(preflight("/purchase", "POST", origin), request("GET", "/products", origin)):
        assert allowed(reply) is None


def test_every_answer_can_be_read_refusals_too(ask):
    auth = f"Authorization: Bearer {TOKEN}"
    json = "Content-Type: application/json"
    origin = f"Origin: {SHOP}"
    buy = b'{"userId":7,"productId":1}'
    replies = ask(
        post(buy, json, auth, origin, "Idempotency-Key: k"),
        post(buy, json, auth, origin, "Idempotency-Key: k"),
        post(buy, json, origin),
        post(b"{", json, auth, origin),
        post(b"x" * 20_000, json, auth, origin),
        post(buy, "Content-Type: text/plain", auth, origin),
        request("GET", "/products"),
        request("GET", "/products/77"),
        request("GET", "/purchase/orders/7", SHOP, auth),
        request("GET", "/purchase/orders/8", SHOP, auth),
    )
    assert [reply.status for reply in replies] == [
        200, 200, 401, 400, 413, 415, 200, 404, 200, 403,
    ]  # fmt: skip
    for reply in replies:
        assert allowed(reply) == SHOP
        exposed = reply.headers["access-control-expose-headers"]
        for name in ("Retry-After", "RateLimit", "Idempotent-Replayed", "Link"):
            assert name in exposed.split(", ")
    assert replies[1].headers["idempotent-replayed"] == "true"


def test_without_an_origin_nothing_is_said(ask):
    (reply,) = ask(request("GET", "/products", None))
    assert (reply.status, allowed(reply)) == (200, None)


def test_a_preflight_needs_no_thread_and_keeps_the_connection(make_app):
    app = make_app(**JWT, cors_origins=(SHOP,))

    async def go():
        async with serving(app) as process:
            wire = await process.connect()
            wire.send(preflight("/products", "GET") * 20 + request("GET", "/healthz"))
            return [await wire.reply() for _ in range(21)], process

    replies, _ = asyncio.run(go())
    assert [reply.status for reply in replies] == [204] * 20 + [200]


def test_off_unless_set(app):
    async def go():
        async with serving(app) as process:
            wire = await process.connect()
            wire.send(preflight("/purchase", "POST") + request("GET", "/products"))
            return await wire.reply(), await wire.reply()

    refused, plain = asyncio.run(go())
    assert (refused.status, allowed(refused), allowed(plain)) == (405, None, None)


@pytest.mark.parametrize(
    "value",
    [
        "*", "null", "shop.example", "https://shop.example/", "https://*.example",
        "https://shop.example:443", "http://shop.example:80", "https://Shop.example",
        "https://user@shop.example", "ftp://shop.example", "https://shop.example,,",
        "https://shop.example https://x.example", "https://", "https://a_b.example",
    ],
)  # fmt: skip
def test_wrong_origins_stop_the_start(value):
    with pytest.raises(SettingsError, match=r"^CORS_ORIGINS must be origins"):
        load_settings({"CORS_ORIGINS": value})


def test_origins_that_browsers_send():
    value = "https://shop.example, http://localhost:3000,http://[::1]:8080"
    assert load_settings({"CORS_ORIGINS": value}).cors_origins == (
        "https://shop.example", "http://localhost:3000", "http://[::1]:8080",
    )  # fmt: skip


def test_nobody_may_buy_as_anybody_from_another_page(tmp_path):
    given = load_settings({"CORS_ORIGINS": SHOP, "DATA_DIR": str(tmp_path)})
    with pytest.raises(SettingsError, match="CORS_ORIGINS needs SHOPPER_AUTH=jwt"):
        with_secrets(given)


def test_an_api_token_is_of_no_use_from_another_origin(ask):
    """Reading is open; what changes something gets no leave, token or not."""
    token = f"Authorization: Bearer {API_TOKEN}"
    read, change = ask(
        request("GET", "/products", SHOP, token), request("PATCH", "/products/1", SHOP, token)
    )
    assert (read.status, allowed(read)) == (200, SHOP)
    assert allowed(change) is None


class OtherPage(BaseHTTPRequestHandler):
    """A page of another origin, with nothing on it."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>Elsewhere</title>")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def elsewhere():
    """The origin of such a page."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), OtherPage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


CALL = """async ([url, method, token, body]) => {
  try {
    const answer = await fetch(url, {
      method,
      headers: {
        ...(token && { Authorization: `Bearer ${token}` }),
        ...(body && { "Content-Type": "application/json", "Idempotency-Key": "one-intent" }),
      },
      body: body && JSON.stringify(body),
    });
    const shown = ["RateLimit", "Retry-After", "Idempotent-Replayed", "ETag"];
    return [answer.status, shown.filter((name) => answer.headers.has(name)), await answer.json()];
  } catch (error) {
    return String(error.name);
  }
}"""


@pytest.mark.drill
def test_what_runs_in_a_page_of_another_origin(chromium, elsewhere, tmp_path):
    names = {"shopper_auth": "SHOPPER_AUTH", "jwt_secret": "JWT_SECRET"}
    names |= {"jwt_issuer": "JWT_ISSUER", "jwt_audience": "JWT_AUDIENCE"}
    environ = {names[name]: value for name, value in JWT.items()}
    server = start_system(tmp_path, CORS_ORIGINS=elsewhere, **environ)
    context = chromium.new_context()
    try:
        page = context.new_page()
        page.goto(elsewhere)

        def ask(path, method="GET", token=TOKEN, body=None):
            return page.evaluate(CALL, [server.url + path, method, token, body])

        buy = {"userId": 7, "productId": 1}
        status, shown, bought = ask("/purchase", "POST", body=buy)
        assert (status, shown, bought["status"]) == (200, ["RateLimit"], "queued")
        status, shown, again = ask("/purchase", "POST", body=buy)
        assert (status, shown, again) == (200, ["Idempotent-Replayed"], bought)
        # The key is another request's: refusals can be read, too.
        status, _, refused = ask("/purchase", "POST", body=buy | {"quantity": 2})
        assert (status, refused["code"]) == (422, "idempotency_mismatch")
        assert ask("/purchase", "POST", token=None, body=buy)[0] == 401
        assert ask("/purchase/orders/7")[2][0]["id"] == bought["orderId"]
        assert ask("/purchase/orders/8")[0] == 403
        assert ask("/purchase/metrics")[0] == 200
        assert ask("/products", token=None)[2][0]["id"] == 1
        assert "ETag" in ask("/products/1", token=None)[1]
        # No leave: the browser itself doesn't give the answer to the page, or doesn't even ask.
        change = {"paused": True}
        for path, method in (
            ("/products/1", "PATCH"),
            ("/products/restock", "POST"),
            ("/sale/brake", "POST"),
        ):
            assert ask(path, method, server.api_token, change) == "TypeError"
        for path in ("/metrics", "/readyz", "/admin/", "/openapi.json"):
            assert ask(path, token=None) == "TypeError"
        assert ask("/products/1", token=None)[2]["paused"] is False
        # A page of an origin that nobody has named.
        page.goto(elsewhere.replace("127.0.0.1", "localhost"))
        assert ask("/products", token=None) == "TypeError"
        assert ask("/purchase", "POST", body=buy) == "TypeError"
    finally:
        context.close()
        stop_system(server)
