"""Sends tens of thousands of bad requests to a running system and sees that nothing happens.

Wrong bodies, wrong types, wrong forms, and broken HTTP on raw sockets. No answer of 500 or above,
no hang, no stock change, no process that dies, and memory that stays flat.
"""

import argparse
import html
import http.client
import http.cookies
import json
import random
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from chaos import TOKEN, System
from client import patience

ANSWER_SECONDS = 10
# Caches and arenas fill up at first; after the first part of the run memory is to stay as it is.
WARM_UP = 0.3
MEMORY_GROWTH_BYTES = 24 << 20

WORDS = [
    None, True, False, 0, -1, 1, 2, 10**3, 2**31, 2**53, 2**63, 10**30, 1.5, -0.0, 1e308, "", "1",
    "0", "x" * 300, "\x00", "\ud800", "\u202e", "💥", "' OR 1=1 --", "../../etc",
    "<script>", "%s%n", "NaN", [], {}, [1], {"a": 1}, [[[[]]]],
]  # fmt: skip
PATHS = [
    "/purchase", "/purchase/", "/purchase/orders/1", "/purchase/orders/-1", "/purchase/orders/0",
    "/purchase/orders/99999999999999999999", "/purchase/orders/%00", "/purchase/orders/١",
    "/purchase/orders/1?limit=0", "/purchase/orders/1?limit=x&before=-1", "/purchase/metrics",
    "/purchase/metrics?productId=x", "/purchase/metrics?productId=99999999999999999",
    "/products", "/products/1", "/products/0", "/products/99999999999999999999", "/products/1e5",
    "/products/restock", "/healthz", "/admin", "/admin/", "/admin/sign-in", "/admin/orders",
    "/admin/orders/9999999999999999999999", "/static/../app/config.py", "/static/%2e%2e/wsgi.py",
    "//", "/%ff", "/\u00e4", "/?" + "a" * 4000, "/" + "a/" * 500,
]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "BREW", "purchase"]
FIELDS = ["userId", "productId", "quantity", "amount", "reason", "name", "priceCents", "currency",
          "stock", "opensAt", "closesAt", "perUserLimit", "maxQuantity", "paused"]  # fmt: skip
FORMS = [
    "/admin/products/new", "/admin/products/1/edit", "/admin/products/1/sale",
    "/admin/products/1/restock", "/admin/orders/1/cancel", "/admin/dead-letters/abandon",
    "/admin/dead-letters/replay", "/admin/staff/", "/admin/staff/tokens", "/admin/password",
]  # fmt: skip
RAW = [
    b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    b"POST /purchase HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n{",
    b"POST /purchase HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /purchase HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    b"POST /purchase HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    b"POST /purchase HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /purchase HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"POST /purchase HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 3000 + b"\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"z" * 100_000 + b"\r\n\r\n",
    b"GET /healthz HTTP/1.1\nHost: x\n\n", b"\x00" * 1000, b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n folded: header\r\n\r\n",
    b"POST /purchase HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 60\r\nExpect: 100-continue\r\n\r\n",
]  # fmt: skip


class Fuzzer:
    """Sends the requests of one seed."""

    def __init__(self, port: int, seed: int, password: str):
        self.port, self.password = port, password
        self.choose = random.Random(seed)
        self.connection: http.client.HTTPConnection | None = None
        self.cookies: dict[str, str] = {}
        self.token = ""
        self.seen: Counter = Counter()
        self.faults: list[str] = []

    def run(self, count: int) -> None:
        self.sign_in()
        for _ in range(count):
            kind = self.choose.choices(
                (self.purchase, self.json_api, self.anything, self.form, self.raw),
                (40, 25, 20, 10, 5),
            )[0]
            try:
                kind()
            except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
                self.drop()
                self.seen[type(error).__name__] += 1
                if isinstance(error, TimeoutError):
                    self.faults.append(f"no answer within {ANSWER_SECONDS} s: {kind.__name__}")
        self.drop()

    def drop(self) -> None:
        if self.connection:
            self.connection.close()
        self.connection = None

    def send(self, method, path, body=b"", headers=None) -> tuple[int, bytes]:
        if self.connection is None:
            self.connection = http.client.HTTPConnection(
                "127.0.0.1", self.port, timeout=patience(ANSWER_SECONDS)
            )
        path = urllib.parse.quote(path, safe="/?&=%.-+")
        sent = headers or {}
        self.connection.request(method, path, body, sent)
        response = self.connection.getresponse()
        content = response.read()
        self.seen[response.status] += 1
        # Only the browser keeps cookies; an answer to somebody else would sign it out.
        for cookie in (response.headers.get_all("Set-Cookie") or ()) if "Cookie" in sent else ():
            for name, morsel in http.cookies.SimpleCookie(cookie).items():
                self.cookies[name] = morsel.value
        if response.status >= 500:
            self.faults.append(f"{response.status} for {method} {path[:80]} {body[:200]!r}")
        return response.status, content

    def value(self, depth: int = 0):
        if depth < 3 and self.choose.random() < 0.1:
            return [self.value(depth + 1) for _ in range(self.choose.randrange(5))]
        if self.choose.random() < 0.2:
            return self.choose.getrandbits(self.choose.randrange(1, 80))
        return self.choose.choice(WORDS)

    def body(self, needed: tuple[str, ...] = ()) -> bytes:
        data = {name: self.value() for name in self.choose.sample(FIELDS, self.choose.randrange(6))}
        data |= {name: self.choose.choice((1, self.value())) for name in needed}
        # No product with this id: whatever else is right, nothing can be sold.
        if "productId" in data and data["productId"] in (1, True, "1"):
            data["productId"] = 424_242
        if "name" in data and "stock" in data:
            data["currency"] = "wrong"
        text = json.dumps(data).encode()
        mangle = self.choose.random()
        if mangle < 0.1:
            text = text[: self.choose.randrange(len(text))]
        elif mangle < 0.15:
            text = self.choose.randbytes(self.choose.randrange(200))
        elif mangle < 0.17:
            text = b"[" * 5000
        elif mangle < 0.18:
            text = b"{" + b" " * 20_000 + b"}"
        return text

    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.choose.random() < 0.1:
            headers["Content-Type"] = self.choose.choice(
                (
                    "",
                    "text/plain",
                    "application/json; charset=x",
                    "multipart/form-data",
                    "/",
                    "a",
                )
            )
        if self.choose.random() < 0.3:
            headers["Idempotency-Key"] = self.choose.choice(
                ("", "k", " ", "a" * 255, "a" * 256, "\x7f", "é", "a b", '"quoted"')
            )
        if self.choose.random() < 0.5:
            headers["Authorization"] = self.choose.choice(
                (f"Bearer {TOKEN}", f"Bearer {TOKEN}", "Bearer", "Bearer x", "Basic eDp5", "é")
            )
        if self.choose.random() < 0.1:
            headers["X-Forwarded-For"] = self.choose.choice(("1.2.3.4", "x" * 500, "::1, é"))
        return headers

    def purchase(self) -> None:
        self.send("POST", "/purchase", self.body(("userId", "productId")), self.headers())

    def json_api(self) -> None:
        method, path, needed = self.choose.choice(
            (
                ("POST", "/products/restock", ("productId", "amount")),
                ("POST", "/products", ("name", "stock")),
                ("PATCH", "/products/424242", ()),
                ("PATCH", "/products/x", ()),
            )
        )
        self.send(method, path, self.body(needed), self.headers())

    def anything(self) -> None:
        method = self.choose.choice(METHODS)
        body = self.body() if method not in ("GET", "HEAD") else b""
        self.send(method, self.choose.choice(PATHS), body, self.headers())

    def sign_in(self) -> None:
        _, page = self.send("GET", "/admin/sign-in", headers=self.browser())
        self.find_token(page)
        form = {"email": "admin@example.com", "password": self.password, "csrf_token": self.token}
        self.post_form("/admin/sign-in", form)
        _, page = self.send("GET", "/admin/products/new", headers=self.browser())
        self.find_token(page)

    def find_token(self, page: bytes) -> None:
        if found := re.search(rb'name="csrf_token"[^>]*value="([^"]+)"', page):
            self.token = html.unescape(found[1].decode())

    def browser(self) -> dict[str, str]:
        return {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}

    def post_form(self, path: str, form: dict) -> int:
        body = urllib.parse.urlencode(form, errors="replace").encode()
        headers = self.browser() | {"Content-Type": "application/x-www-form-urlencoded"}
        return self.send("POST", path, body, headers)[0]

    def form(self) -> None:
        path = self.choose.choice(FORMS)
        names = ["name", "price", "currency", "stock", "units", "reason", "opens", "closes", "cap",
                 "max_quantity", "act", "ids", "email", "role", "password"]  # fmt: skip
        # Texts only, none of them a number above 0: no form of these can move stock.
        texts = [str(word) for word in WORDS if not str(word).strip().isdigit()]
        form = {name: self.choose.choice(texts) for name in self.choose.sample(names, 6)}
        if self.choose.random() < 0.9:
            form["csrf_token"] = self.token
        self.post_form(path, form)

    def raw(self) -> None:
        data = self.choose.choice(RAW)
        if self.choose.random() < 0.3:
            data = data[: self.choose.randrange(len(data))]
        with socket.create_connection(
            ("127.0.0.1", self.port), timeout=patience(ANSWER_SECONDS)
        ) as raw:
            raw.sendall(data)
            if self.choose.random() < 0.5:
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(65536):
                    pass
        self.seen["raw"] += 1


def fuzz(count: int, seed: int, threads: int = 4) -> list[str]:
    """Run against a system of its own; return what went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.chmod(0o755)
    system = System(folder, seed, quick=False)
    faults: list[str] = []
    try:
        system.start(proxied=False)
        wait_ready(system)
        password = (system.data / "admin_password").read_text().strip()
        before = look(system)
        fuzzers = [Fuzzer(system.port, seed + number, password) for number in range(threads)]
        warm = run_all(fuzzers, int(count * WARM_UP))
        memory = rss(system)
        seen = run_all(fuzzers, count - warm)
        grown = {pid: now - memory[pid] for pid, now in rss(system).items() if pid in memory}
        for fuzzer in fuzzers:
            faults += fuzzer.faults
        after = look(system)
        if after != before:
            faults.append(f"before {before}, after {after}")
        if set(memory) != set(rss(system)):
            faults.append("a web process died")
        if max(grown.values(), default=0) > MEMORY_GROWTH_BYTES:
            faults.append(f"memory grew by {grown} bytes")
        total = sum((fuzzer.seen for fuzzer in fuzzers), Counter())
        print(f"seed {seed}: {warm + seen} requests, answers {dict(total.most_common())}")
        print(f"memory of the web processes after warm-up: {grown} bytes more")
    finally:
        system.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return faults


def run_all(fuzzers: list[Fuzzer], count: int) -> int:
    each = count // len(fuzzers)
    threads = [threading.Thread(target=fuzzer.run, args=(each,)) for fuzzer in fuzzers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return each * len(fuzzers)


def wait_ready(system: System) -> None:
    deadline = time.monotonic() + patience(60)
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", system.port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise SystemExit("the system did not start")


def look(system: System) -> dict:
    """Return what must not change: stock, and how many orders there are."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", system.port, timeout=patience(ANSWER_SECONDS)
    )
    connection.request("GET", "/purchase/metrics")
    figures = json.loads(connection.getresponse().read())
    connection.close()
    return {name: figures[name] for name in ("stock_remaining", "queue_depth", "total_processed")}


def rss(system: System) -> dict[int, int]:
    found = {}
    for process in system.processes("web"):
        try:
            found[process.pid] = process.memory_info().rss
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=50_000, help="%(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    words = parser.parse_args()
    problems = fuzz(words.requests, words.seed)
    for problem in problems[:20]:
        print(f"WRONG: {problem}")
    print(f"{len(problems)} problems" if problems else "Nothing happened, as it should.")
    sys.exit(1 if problems else 0)
