"""Attacks, each tried: see docs/security.md, which names these tests.

Those on the pages (CSRF, session fixation, open redirect, guessing, roles) are in
test_admin_session.py and test_admin_staff.py, those with tokens in test_identity.py, those with
forged addresses in test_addresses.py.
"""

import ast
import inspect
import itertools
import json
import pickle
import re
import socket
import time
from urllib.parse import urlsplit

import pytest
from call import call
from people import sign_in_once
from sqlalchemy.exc import OperationalError
from waiting import patience
from werkzeug.security import generate_password_hash

from app.audit import CLI
from app.config import ROOT, SettingsError, load_settings, with_secrets
from app.extensions import db, stock
from app.models import ApiToken
from app.run.embedded import EmbeddedError, embedded_servers
from app.staff import people as staff
from app.staff import tokens
from app.staff.signin import sign_in
from app.web import access

STRONG = "0123456789abcdef0123456789abcdef"
PRODUCTION = {
    "APP_ENV": "production",
    "REDIS_URL": "redis://redis:6379",
    "DATABASE_URL": "postgresql://postgres/sale",
    "SECRET_KEY": STRONG,
    "ADMIN_EMAIL": "admin@shop.example",
    "ADMIN_PASSWORD": "correct horse battery staple",
    "ADMIN_API_TOKEN": STRONG,
}


def settings_of(**changed):
    given = {name: value for name, value in (PRODUCTION | changed).items() if value is not None}
    return with_secrets(load_settings(given))


def test_production_starts_with_what_it_needs():
    assert settings_of().app_env == "production"
    assert settings_of(METRICS_TOKEN=STRONG).metrics_token == STRONG


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SECRET_KEY", None), ("SECRET_KEY", "short"), ("SECRET_KEY", "x" * 64),
        ("SECRET_KEY", "abab" * 16), ("ADMIN_API_TOKEN", None), ("ADMIN_API_TOKEN", "token"),
        ("METRICS_TOKEN", "metrics"), ("ADMIN_EMAIL", None),
        ("ADMIN_EMAIL", "admin@example.com"), ("ADMIN_PASSWORD", None), ("ADMIN_PASSWORD", "short"),
    ],
)  # fmt: skip
def test_production_refuses_weak_secrets(name, value, tmp_path):
    with pytest.raises(SettingsError, match=name) as error:
        settings_of(**{name: value}, DATA_DIR=str(tmp_path / "none"))
    assert "\n" not in str(error.value)
    assert not value or value not in str(error.value) or name == "ADMIN_EMAIL"
    assert not (tmp_path / "none").exists(), "nothing is generated"


@pytest.mark.parametrize("name", ["REDIS_URL", "DATABASE_URL"])
def test_production_refuses_embedded_servers(name):
    with pytest.raises(EmbeddedError, match="production"):
        embedded_servers(settings_of(**{name: None}))


def test_a_weak_key_is_refused_at_home_too():
    with pytest.raises(SettingsError, match="SECRET_KEY"):
        with_secrets(load_settings({"SECRET_KEY": "x" * 15}))


def test_generated_secrets_are_for_their_owner_alone(tmp_path):
    with_secrets(load_settings({"DATA_DIR": str(tmp_path)}))
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_cookies_of_production_are_secure_whatever_a_proxy_forgets(make_app):
    client = make_app(app_env="production", **production_secrets()).test_client()
    cookie = client.get("/admin/sign-in").headers["Set-Cookie"]
    for word in ("Secure", "HttpOnly", "SameSite=Lax"):
        assert word in cookie


def production_secrets() -> dict:
    return {
        "secret_key": STRONG,
        "admin_api_token": STRONG,
        "admin_password": PRODUCTION["ADMIN_PASSWORD"],
        "admin_email": PRODUCTION["ADMIN_EMAIL"],
    }


PATHS = [
    "/purchase/orders/1", "/products", "/docs", "/openapi.json", "/healthz", "/nowhere",
    "/admin/sign-in", "/purchase/orders/x", "/metrics",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_headers_against_sniffing_framing_and_leaking(client, path):
    answer = client.get(path)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Referrer-Policy"] in ("no-referrer", "same-origin")
    assert "no-store" in answer.headers["Cache-Control"]
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert "Werkzeug" not in answer.headers.get("Server", "")


INJECTIONS = [
    "1'; DROP TABLE orders; --", "1 OR 1=1", "\" OR \"\"=\"", "1;SELECT pg_sleep(9)", "$$", "%s",
    "%(user)s", ":limit", "{0}", "{{7*7}}", "'..os.exit()..'", "]] return 1 --", "\\x00",
    "*\r\nFLUSHALL\r\n", "1\r\n$3\r\nDEL", "../../etc/passwd", "<script>alert(1)</script>",
]  # fmt: skip


def test_sql_and_lua_injection(client, admin_headers, buy, drain):
    """Texts arrive where a text belongs, as they are, and are refused where a number does."""
    for text in INJECTIONS:
        # ":limit" is a text that a shop may call a user by.
        sold = client.post("/purchase", json={"userId": text, "productId": 1}).status_code == 200
        assert sold == (text == ":limit"), text
        assert client.post("/purchase", json={"userId": 1, "productId": text}).status_code == 400
        assert client.get("/purchase/orders/1", query_string={"before": text}).status_code == 400
        assert client.get("/purchase/metrics", query_string={"productId": text}).status_code == 400
        token = {"Authorization": f"Bearer {text}".replace("\r\n", " ")}
        assert client.post("/products/restock", json={}, headers=token).status_code == 401
        product = {"priceCents": 1, "currency": "USD", "stock": 1}
        restock = {"amount": 1}
        line = text.replace("\r\n", " ")
        if line != text:
            # A name and a reason are one line.
            for path, body, field in (
                ("/products", product | {"name": text}, "name"),
                ("/products/restock", restock | {"productId": 1, "reason": text}, "reason"),
            ):
                refused = client.post(path, json=body, headers=admin_headers)
                assert (refused.status_code, refused.json["field"]) == (400, field)
        created = client.post("/products", json=product | {"name": line}, headers=admin_headers)
        assert created.status_code == 201, text
        assert client.get(created.headers["Location"]).json["name"] == line.strip()
        restock |= {"productId": created.json["id"], "reason": line}
        done = client.post("/products/restock", json=restock, headers=admin_headers)
        assert done.json["stock_remaining"] == 2
    # A key is the one text of a shopper's that reaches Redis and the outbox: no space, no control.
    keys = ["1'--", "{0}", "*", "sale:{0}:outbox", "%s", "]]", "\\", '"', "$(id)"]
    for user, key in enumerate(keys, 1):
        assert buy(user, key=key).status_code == 200
        assert buy(user, key=key).headers["Idempotent-Replayed"] == "true"
    sold = len(keys) + 1
    assert drain() == sold
    assert client.get("/purchase/metrics?productId=1").json == {
        "stock_remaining": 100 - sold,
        "queue_depth": 0,
        "total_processed": sold,
    }


def test_statements_are_never_put_together_from_data():
    """Every f-string or % that becomes SQL holds constants only; scripts get KEYS and ARGV."""
    allowed = {"DRAIN_LOCK", "PREPARE_LOCK"}
    looked_at = 0
    for path in (ROOT / "app").rglob("*.py"):
        # What is put together while a module is imported has met nobody's data yet.
        functions = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        ]
        for node in (node for function in functions for node in ast.walk(function)):
            if isinstance(node, ast.JoinedStr):
                text = "".join(p.value for p in node.values if isinstance(p, ast.Constant))
                if re.search(r"\b(SELECT|INSERT INTO|UPDATE \w+ SET|DELETE FROM|TRUNCATE)\b", text):
                    looked_at += 1
                    names = {
                        n.id
                        for part in node.values
                        for n in ast.walk(part)
                        if isinstance(n, ast.Name)
                    }
                    assert all(n.isupper() for n in names - allowed), f"{path.name}: {text[:60]}"
    assert looked_at
    scripts = list((ROOT / "app").rglob("*.lua"))
    assert scripts
    for path in scripts:
        source = re.sub(r"--.*", "", path.read_text())
        assert not re.search(r"loadstring|load\s*\(|dofile|setfenv", source), path.name


def test_header_injection(client):
    for value in ("a\r\nSet-Cookie: x=1", "a\nb", "a\rb"):
        answer = client.get("/admin/sign-in", query_string={"next": f"/admin/{value}"})
        assert "x=1" not in str(answer.headers)
        answer = client.get(f"/products/{value}")
        assert "Set-Cookie: x" not in str(answer.headers)


def exchange(server, text: bytes, seconds: float = 5) -> bytes:
    """Send bytes as they are; return what comes back until the connection is closed."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=seconds) as wire:
        wire.sendall(text)
        answer = b""
        try:
            while part := wire.recv(65536):
                answer += part
        except TimeoutError:
            pass
        return answer


def test_smuggled_and_malformed_requests(server):
    """What two servers could read in two ways is refused, or read in one way, and sells nothing."""
    before = call(f"{server.url}/purchase/metrics").json["stock_remaining"]
    body = b'{"userId":7000000001,"productId":1}'
    head = b"POST /purchase HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    requests = {
        "two lengths": head + b"Content-Length: 5\r\nContent-Length: 35\r\n\r\n" + body,
        "length and chunks": head
        + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        + body,
        "a wrong coding": head + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "a negative length": head + b"Content-Length: -1\r\n\r\n" + body,
        "a folded header": head + b"X-A: 1\r\n Content-Length: 35\r\n\r\n" + body,
        "a space before the colon": head + b"Content-Length : 35\r\n\r\n" + body,
        "no request": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        "a header with NUL": head + b"Idempotency-Key: a\x00b\r\nContent-Length: 35\r\n\r\n" + body,
    }
    for name, text in requests.items():
        answer = exchange(server, text, seconds=1)
        statuses = re.findall(rb"^HTTP/1.1 (\d+)", answer, re.MULTILINE)
        assert set(statuses) <= {b"400", b"408", b"413", b"415", b"501"}, (name, answer[:300])
    assert call(f"{server.url}/purchase/metrics").json["stock_remaining"] == before


def test_oversized_requests(server):
    head = b"POST /purchase HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    huge = exchange(server, head + b"Content-Length: 9999999999\r\n\r\n", patience(2))
    assert huge.startswith(b"HTTP/1.1 413")
    chunks = (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 4
    chunked = exchange(
        server,
        head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n",
        patience(2),
    )
    assert chunked.startswith(b"HTTP/1.1 413")
    for text in (b"GET /" + b"a" * 10**6 + b" HTTP/1.1\r\n\r\n", b"X-A: " + b"a" * 10**6):
        answer = exchange(server, b"GET / HTTP/1.1\r\nHost: a\r\n" + text + b"\r\n\r\n", 2)
        assert answer.startswith((b"HTTP/1.1 4", b"")), answer[:100]
        assert b"HTTP/1.1 500" not in answer
    assert call(f"{server.url}/healthz").status == 200


def test_slow_requests_hold_nobody_up(server):
    """Two hundred clients that never finish: purchases go on as fast as before."""
    address = urlsplit(server.url)
    slow = []
    try:
        for number in range(200):
            wire = socket.create_connection((address.hostname, address.port), timeout=patience(5))
            head = b"POST /purchase HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            wire.sendall(head + (b"Content-Length: 40\r\n\r\n{" if number % 2 else b"X-"))
            slow.append(wire)
        started = time.monotonic()
        for number in range(20):
            body = {"userId": 7_100_000_000 + number, "productId": 9_000_000_000}
            assert call(f"{server.url}/purchase", body).status == 404
        assert time.monotonic() - started < patience(5)
    finally:
        for wire in slow:
            wire.close()


def test_nothing_in_redis_is_unpickled(app, buy, client):
    """RQ would unpickle by default: whoever can write to Redis could run code."""
    for path in [*(ROOT / "app").rglob("*.py"), ROOT / "worker.py", ROOT / "wsgi.py"]:
        names = {
            n.id
            if isinstance(n, ast.Name)
            else n.names[0].name
            if isinstance(n, ast.Import)
            else ""
            for n in ast.walk(ast.parse(path.read_text()))
        }
        assert not names & {"pickle", "marshal", "shelve", "dill"}, path.name
    buy(1)
    client.get("/products")
    from app.worker.jobs import enqueue_drain

    with app.app_context():
        job = enqueue_drain()
        assert json.loads(job.data)
        for key in stock.raw_client.scan_iter("*"):
            kind = stock.raw_client.type(key)
            values = {
                b"string": lambda key: [stock.raw_client.get(key)],
                b"hash": lambda key: stock.raw_client.hgetall(key).values(),
            }.get(kind, lambda key: [])(key)
            for value in values:
                assert not value.startswith(b"\x80") or not is_pickle(value), key


def is_pickle(value: bytes) -> bool:
    try:
        pickle.loads(value)
    except Exception:
        return False
    return True


RQ_PATHS = [
    "/admin/rq/", "/admin/rq/0/view/jobs", "/admin/rq/0/view/workers",
    "/admin/rq/0/data/queues.json", "/admin/rq/0/data/workers.json",
    "/admin/rq/static/css/main.css",
]  # fmt: skip


@pytest.mark.parametrize("path", RQ_PATHS)
def test_rq_dashboard_is_for_admins(app, client, admin, path):
    assert client.get(path).status_code == 302
    support = app.test_client()
    sign_in_once(app, support, "support")
    assert support.get(path).status_code == 403
    # It is there: the refusals are no 404 in disguise.
    assert admin.get(path, follow_redirects=True).status_code == 200


OPEN_ROUTES = {
    "static", "front.show", "front.shop", "api.list_orders", "api.metrics", "api.list_products",
    "api.show_product", "api.docs", "api.openapi_document", "api.alive", "api.ready",
    "api.ready_to_sell",
}  # fmt: skip


def test_no_route_but_the_known_is_open(app, client):
    """Every other one asks for a token; those of the pages stand in test_admin_session.py."""
    rules = [rule for rule in app.url_map.iter_rules() if not rule.rule.startswith("/admin")]
    assert {rule.endpoint for rule in rules} > OPEN_ROUTES
    for rule in rules:
        path = re.sub(r"<[^>]+>", "1", rule.rule)
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            if rule.endpoint not in OPEN_ROUTES:
                answer = client.open(path, method=method)
                assert answer.status_code == 401, (method, path)
                assert answer.headers["WWW-Authenticate"].startswith("Bearer "), (method, path)


def test_a_token_is_good_though_its_use_cannot_be_noted(app, client, monkeypatch):
    """As where PostgreSQL only reads."""
    with app.app_context():
        _, text = tokens.create("program", ["orders:read"], CLI)

    def refuse(*_):
        raise OperationalError("UPDATE", {}, Exception("cannot execute in a read-only transaction"))

    monkeypatch.setattr(tokens, "update", refuse)
    bearer = {"Authorization": f"Bearer {text}"}
    assert client.get("/orders", headers=bearer).json["orders"] == []
    assert client.post("/orders/1/cancel", headers=bearer).status_code == 403


def test_tokens_are_stored_as_hashes_and_never_shown_again(app, client, admin_headers):
    with app.app_context():
        token, text = tokens.create("leak", ["products:write"], CLI)
        assert text not in repr(vars(token))
        stored = db.session.get(ApiToken, token.id)
        assert text not in (stored.token_hash, stored.name)
        number = token.id
    bearer = {"Authorization": f"Bearer {text}"}
    body = {"productId": 1, "amount": 1}
    assert client.post("/products/restock", json=body, headers=bearer).status_code == 200
    # In a query string it would end up in logs and histories, so it is not looked for there.
    assert client.post(f"/products/restock?token={text}", json=body).status_code == 401
    assert client.post("/products/restock", json=body, headers={"X-Token": text}).status_code == 401
    with app.app_context():
        tokens.revoke(number, CLI)
    assert client.post("/products/restock", json=body, headers=bearer).status_code == 401


def test_secrets_are_compared_in_constant_time():
    """By the function made for it: differences of time could hardly be measured here."""
    for function in (tokens.find, access.metrics_token_required):
        assert "compare_digest" in inspect.getsource(function)


def test_an_unknown_person_takes_as_long_as_a_wrong_password(app, monkeypatch):
    # As slow as they are in truth: what else a sign-in takes must not hide a difference.
    monkeypatch.setattr("app.staff.people.generate_password_hash", generate_password_hash)
    staff._nobody.cache_clear()

    # Each from an address of its own, whose limit is not what is measured.
    addresses = (f"192.0.2.{number}" for number in itertools.count())

    def seconds(email):
        started = time.perf_counter()
        with app.app_context():
            assert sign_in(email, "wrong", next(addresses), {}) is None
        return time.perf_counter() - started

    with app.app_context():
        email = f"timing-{time.time_ns()}@example.com"
        staff.create(email, "correct horse battery", "support", CLI)
    # By turns, and the quickest: what else the machine does hits both.
    pairs = [(seconds(email), seconds("nobody@example.com")) for _ in range(7)]
    known, unknown = map(min, zip(*pairs, strict=True))
    assert 0.5 < known / unknown < 2


def test_a_failed_request_tells_nothing_of_the_inside(app, client, monkeypatch):
    def fail(*_):
        raise RuntimeError("/home/sale/app.py line 7: password=hunter2")

    monkeypatch.setattr("app.products.catalogue.listed", fail)
    monkeypatch.setattr(stock.thread_line, "claim", fail)
    for answer in (
        client.get("/products"),
        client.post("/purchase", json={"userId": 1, "productId": 1}),
    ):
        assert answer.status_code == 500
        assert answer.json == {"error": "Internal server error", "code": "internal_error"}


def test_nothing_secret_is_committed():
    found = []
    pattern = re.compile(
        r"fst_[A-Za-z0-9_-]{43}|-----BEGIN [A-Z ]*PRIVATE KEY-----\n[A-Za-z0-9+/]{40}"
    )
    for path in ROOT.rglob("*"):
        hidden = any(part.startswith(".") or part == "node_modules" for part in path.parts[1:])
        if path.is_file() and not hidden and path.stat().st_size < 10**6:
            text = path.read_text(errors="ignore")
            found += [f"{path}: {match}" for match in pattern.findall(text)]
    assert not found


def test_the_settings_repr_is_never_logged():
    """Settings hold secrets; nothing formats them."""
    for path in (ROOT / "app").rglob("*.py"):
        for line in path.read_text().splitlines():
            if re.search(r"\b(log\.|print\(|say\(|click\.echo\()", line):
                assert not re.search(r"\{settings\}|, settings\)|database_url|redis_url", line), (
                    line
                )
