"""What the stress programs share: a server to talk to, a rush of shoppers, promises to check.

Standard library only, so that they run from any machine that reaches the server.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import secrets
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ANSWER_SECONDS = 30  # far beyond any honest answer: what is slower counts as none
THREAD_STACK_BYTES = 256 * 1024  # thousands of shoppers, each a thread with little to remember


class CannotRun(Exception):
    """The test can't be done at all: no server, no token; the message is one line."""


@dataclass(frozen=True)
class Answer:
    """One answer; a status of 0 means there was none, and `failure` says why."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes = b""
    failure: str = ""
    sent_at: float = 0.0
    answered_at: float = 0.0

    @property
    def body(self) -> dict | list:
        """The JSON body; an empty object when it is none."""
        try:
            return json.loads(self.raw)
        except ValueError:
            return {}

    @property
    def outcome(self) -> str:
        """The answer in two words: "200 queued", "409 sold_out"."""
        if not self.status:
            return f"no answer ({self.failure})"
        body = self.body if isinstance(self.body, dict) else {}
        return f"{self.status} {body.get('code') or body.get('status') or ''}".strip()


class Server:
    """The server under test."""

    def __init__(self, url: str, token: str):
        self.url = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        self.token = token
        if self.url.scheme not in ("http", "https") or not self.url.hostname:
            raise CannotRun(f"not an http URL: {url}")

    def connect(self, source: str | None = None) -> http.client.HTTPConnection:
        """Open a connection, from the address `source` if given."""
        https = self.url.scheme == "https"
        connection = (http.client.HTTPSConnection if https else http.client.HTTPConnection)(
            self.url.hostname,
            self.url.port,
            timeout=ANSWER_SECONDS,
            source_address=(source, 0) if source else None,
        )
        try:
            connection.connect()
        except OSError as error:
            origin = f" from {source}" if source else ""
            raise CannotRun(f"can't reach {self.url.geturl()}{origin}: {error}") from None
        return connection

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        source: str | None = None,
        **headers: str,
    ) -> Answer:
        """Send one request over a connection of its own."""
        with contextlib.closing(self.connect(source)) as connection:
            return self.prepare(connection, method, path, body, headers)()

    def prepare(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: object,
        headers: dict[str, str],
    ) -> Callable[[], Answer]:
        """Compose a request on an open connection; calling the result sends it."""
        content = b"" if body is None else json.dumps(body).encode()
        connection.putrequest(method, self.url.path.rstrip("/") + path)
        if content:
            headers = {"Content-Type": "application/json", **headers}
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            connection.putheader(name, value)

        def send() -> Answer:
            sent_at = time.perf_counter()
            try:
                connection.endheaders(content)
                response = connection.getresponse()
                raw = response.read()
            except (OSError, http.client.HTTPException) as error:
                failure = type(error).__name__
                return Answer(failure=failure, sent_at=sent_at, answered_at=time.perf_counter())
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, raw, "", sent_at, time.perf_counter())

        return send

    def read(self, path: str, source: str | None = None) -> dict | list:
        """GET what must be there, waiting as told when we ask too often."""
        while (answer := self.call("GET", path, source=source)).status == 429:
            wait = int(answer.headers.get("retry-after", "1"))
            print(f"GET {path} answered 429: waiting {wait} s", file=sys.stderr)
            time.sleep(wait)
        if answer.status != 200:
            raise CannotRun(f"GET {path} answered {answer.outcome}")
        return answer.body

    def buy(self, purchase: dict, key: str | None = None) -> Answer:
        return self.call("POST", "/purchase", purchase, **_key_header(key))

    def stock(self, product: int) -> int:
        return self.read(f"/purchase/metrics?productId={product}")["stock_remaining"]

    @contextlib.contextmanager
    def product(self, name: str, stock: int) -> Iterator[int]:
        """Make a product to sell; end its sale and archive it after the test. Gives its id."""
        admin = {"Authorization": f"Bearer {self.token}"}
        body = {"name": name, "priceCents": 100, "currency": "USD", "stock": stock}
        made = self.call("POST", "/products", body, **admin)
        if made.status in (401, 403):
            raise CannotRun(f"the token is refused by {self.url.geturl()} ({made.outcome})")
        if made.status != 201:
            raise CannotRun(f"POST /products answered {made.outcome}")
        path = f"/products/{made.body['id']}"
        try:
            yield made.body["id"]
        finally:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            ended = self.call("PATCH", path, {"closesAt": now, "archived": True}, **admin)
            if ended.status != 200:
                print(f"PATCH {path} answered {ended.outcome}: still on sale", file=sys.stderr)


def _key_header(key: str | None) -> dict[str, str]:
    return {"Idempotency-Key": key} if key else {}


def sign_in(url: str, password: str, agent: str = "stress") -> str:
    """Sign the first admin in as a browser does, named `agent`; return the Cookie header."""
    browser = urllib.request.build_opener(jar := urllib.request.HTTPCookieProcessor())
    browser.addheaders = [("User-Agent", agent)]
    page = browser.open(f"{url}/admin/sign-in", timeout=ANSWER_SECONDS).read().decode()
    body = urllib.parse.urlencode(sign_in_form(page, password)).encode()
    browser.open(f"{url}/admin/sign-in", body, timeout=ANSWER_SECONDS)
    return "; ".join(f"{cookie.name}={cookie.value}" for cookie in jar.cookiejar)


def sign_in_form(page: str, password: str) -> dict[str, str]:
    """Return what signs the first admin in on this page."""
    return {
        "csrf_token": re.search(r'name="csrf_token"[^>]*value="([^"]+)"', page)[1],
        "email": "admin@example.com",
        "password": password,
    }


def slowness() -> float:
    """Return how many times longer things take now than on an idle machine; 1 or more.

    The processes that want a core, for each core: now (which sees a burst begin) or in the last
    minute, whichever is more. TEST_PATIENCE multiplies it, for machines that are slow by nature.
    """
    cores = os.cpu_count() or 1
    wanting = os.getloadavg()[0]
    if (now := Path("/proc/loadavg")).exists():  # proc(5): running/all, behind the three averages
        wanting = max(wanting, int(now.read_text().split()[3].split("/")[0]))
    return max(1.0, wanting / cores) * float(os.environ.get("TEST_PATIENCE") or 1)


def patience(seconds: float) -> float:
    """Return the deadline for what takes at most `seconds` on an idle machine."""
    return seconds * slowness()


def free_port() -> int:
    """Return a port that nothing listens on.

    Not one that the kernel deals out by itself: as long as nobody listens there yet, any
    connection of anybody's could get it.
    """
    while True:
        port = 10_240 + secrets.randbelow(22_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def fresh_user() -> int:
    """Return a user id that leaves room for thousands after it and that no run met before."""
    return random.randrange(10**9, 2**52)


def fresh_addresses(count: int) -> list[str]:
    """Return addresses of this machine that no run met before, of 127.0.0.0/8."""
    first = IPv4Address("127.1.0.0") + random.randrange(2**23)
    return [str(first + number) for number in range(count)]


def rush(
    server: Server,
    purchases: list[dict],
    key: str | None = None,
    sources: list[str | None] | None = None,
) -> list[Answer]:
    """Send all purchases at the same moment: connected and composed first, then let go together.

    `sources` are the addresses they come from, when not all from the usual one.
    """
    _allow_open_files(len(purchases))
    start = threading.Barrier(len(purchases))
    answers = [Answer(failure="not sent")] * len(purchases)

    def shop(number: int, send: Callable[[], Answer]) -> None:
        start.wait()
        answers[number] = send()

    with contextlib.ExitStack() as stack:
        shoppers = []
        threading.stack_size(THREAD_STACK_BYTES)
        for number, purchase in enumerate(purchases):
            connection = server.connect(sources[number] if sources else None)
            stack.enter_context(contextlib.closing(connection))
            send = server.prepare(connection, "POST", "/purchase", purchase, _key_header(key))
            shoppers.append(threading.Thread(target=shop, args=(number, send), daemon=True))
        try:
            for shopper in shoppers:
                shopper.start()
        except RuntimeError as error:
            raise CannotRun(f"{len(shoppers)} shoppers are too many here: {error}") from None
        for shopper in shoppers:
            shopper.join()
    return answers


def counted(answers: list[Answer]) -> str:
    """Return how many answers came out how: "100 × 200 queued, 100 × 409 sold_out"."""
    outcomes = Counter(answer.outcome for answer in answers)
    return ", ".join(f"{count} × {outcome}" for outcome, count in sorted(outcomes.items()))


def _allow_open_files(count: int) -> None:
    """Raise our own limit of open files, where there is one, to fit `count` connections."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < count + 100:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, hard))


def wait_for(look: Callable, done: Callable[[object], bool], seconds: float) -> object:
    """Look until `done`; return the last thing seen, also when the time is up."""
    deadline = time.monotonic() + seconds
    while not done(seen := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return seen


class Promises:
    """What was promised and what was seen, for a table."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []

    def check(self, promise: str, expected: object, seen: object) -> None:
        verdict = "kept" if seen == expected else "BROKEN"
        self.rows.append((promise, str(expected), str(seen), verdict))

    @property
    def broken(self) -> int:
        return sum(row[-1] == "BROKEN" for row in self.rows)

    def __str__(self) -> str:
        rows = [("promise", "expected", "seen", "verdict"), *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that every program takes."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Without arguments the system that `make run` started here is tested. "
        "Exits 0 when every promise was kept, 1 when one was broken, 2 when it can't run.",
    )
    parser.add_argument("--url", help="the server (env URL, or PORT)")
    parser.add_argument("--token", help="admin token (env ADMIN_API_TOKEN)")
    return parser


def find_server(url: str | None, token: str | None) -> Server:
    """Return the server that was named, or else the one that runs here. Raises CannotRun."""
    given = _settings()
    url = url or given.get("URL")
    token = token or given.get("ADMIN_API_TOKEN")
    data_dir = given.get("DATA_DIR") and Path(given["DATA_DIR"]).expanduser().absolute()
    if not url and given.get("PORT"):
        url = f"http://{given.get('HOST') or '127.0.0.1'}:{given['PORT']}"
    runs = [
        run
        for run in _running()
        if url in (None, run["url"]) and data_dir in (None, *_told_as(Path(run["data_dir"])))
    ]
    if len(runs) > 1 and not (url and token):
        found = ", ".join(f"{run['url']} (DATA_DIR={run['data_dir']})" for run in runs)
        raise CannotRun(f"several systems run here: name one with --url or DATA_DIR: {found}")
    if runs:
        url, data_dir = runs[0]["url"], Path(runs[0]["data_dir"])
    if not url:
        raise CannotRun("no running system found: start `make run`, or give --url and --token")
    return Server(url, token or _token_of(data_dir or ROOT / ".data"))


def _settings() -> dict[str, str]:
    """Return the environment over `.env`; the latter only where the system's own reader is."""
    settings = {}
    with contextlib.suppress(ImportError):
        from dotenv import dotenv_values

        settings = {name: value for name, value in dotenv_values(ROOT / ".env").items() if value}
    return settings | {name: value for name, value in os.environ.items() if value}


def _running() -> Iterator[dict[str, str]]:
    """Find the notes that each `make run` of this directory leaves for as long as it is ready."""
    for note in sorted((ROOT / ".runs").glob("[0-9]*")):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(note.name), 0)  # one that was killed could not take its note away
            yield json.loads(note.read_text())


def _told_as(data_dir: Path) -> tuple[Path, ...]:
    """Return what DATA_DIR may be for a run of it: that of `make cluster` lies one level below."""
    return (data_dir, data_dir.parent) if data_dir.name == "cluster" else (data_dir,)


def _token_of(data_dir: Path) -> str:
    path = data_dir / "admin_api_token"
    try:
        return path.read_text().strip()
    except OSError as error:
        hint = f"give --token, ADMIN_API_TOKEN or its DATA_DIR ({path}: {error.strerror})"
        raise CannotRun(f"no admin token: {hint}") from None


def run(test: Callable[[Server, argparse.Namespace, Promises], None], parser) -> None:
    """Run a test as a program: print what it saw, exit 0, 1 or 2."""
    options = parser.parse_args()
    promises = Promises()
    try:
        test(find_server(options.url, options.token), options, promises)
    except CannotRun as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    print(promises)
    sys.exit(1 if promises.broken else 0)
