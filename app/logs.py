"""Log lines for people or machines, and the id by which a request is found again.

A sale refuses thousands of requests a second, so what is written is bounded: one line a second for
refusals and ten for each kind of failure, in each process, with the number of those left out.
"""

import itertools
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime

from flask import Flask, Response, g, has_request_context, request

from .config import Settings

log = logging.getLogger("app.requests")

HEADER = "X-Request-Id"
VALID_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}").fullmatch
CODE = re.compile(rb'"code":"([a-z_]+)"').search
PROBES = ("/readyz", "/readyz/sale", "/health")
REFUSALS_PER_SECOND = 1
SAME_LINES_PER_SECOND = 10
# Nothing that a client sent may begin a new line or move a terminal's cursor.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}

_process = secrets.token_hex(4)
_count = itertools.count(1)


def request_id(given: str | None) -> str:
    """Return the client's id of the request if it can be used, else a new one."""
    if given and VALID_ID(given):
        return given
    return f"{_process}-{next(_count):x}"


class Bound:
    """Lets so many lines a second through and counts the others."""

    def __init__(self, per_second: int) -> None:
        self._allowed = per_second
        self._second = 0
        self._seen = 0

    def left_out(self) -> int | None:
        """Return the number left out since the last line; None when this one is left out too."""
        self._seen += 1
        second = int(time.monotonic())
        if second == self._second and self._seen > self._allowed:
            return None
        left_out = 0
        if second != self._second:
            left_out = max(0, self._seen - 1 - self._allowed)
            self._second, self._seen = second, 1
        return left_out


_refusals = Bound(REFUSALS_PER_SECOND)


def tell(method: str, path: str, status: int, fields: Callable[[], dict]) -> None:
    """Write the line of a refused or failed request, unless there are too many."""
    level = logging.WARNING if status >= 500 else logging.INFO
    if not log.isEnabledFor(level):
        return
    left_out = _refusals.left_out() if status < 500 else 0
    if left_out is None:
        return
    told = {"status": status, **fields(), "left_out": left_out or None}
    log.log(level, "%s %s", method, path[:200], extra={"fields": told})


class PurchaseLog:
    """The lane's side: called for what was not sold, or where a client names the request."""

    def __init__(self, settings: Settings) -> None:
        self.every = settings.log_level == "debug"

    def note(self, environ: dict, status: str, body: bytes) -> tuple[str, str]:
        """Log the request if it is to be logged; return the header that names it."""
        identity = request_id(environ.get("HTTP_X_REQUEST_ID"))
        number, method = int(status[:3]), environ["REQUEST_METHOD"]

        def fields() -> dict:
            return {"client": environ.get("REMOTE_ADDR", ""), "request_id": identity}

        if number >= 400:
            tell(method, "/purchase", number, lambda: {"code": _code(body), **fields()})
        elif self.every:
            told = fields() | {"status": number, "answer": body.decode()}
            log.debug("%s /purchase", method, extra={"fields": told})
        return HEADER, identity


def _code(body: bytes) -> str | None:
    found = CODE(body)
    return found and found[1].decode()


def init_app(app: Flask) -> None:
    """Name every request of the Flask routes, and tell those that failed."""

    @app.before_request
    def name_request() -> None:
        g.request_id = request_id(request.headers.get(HEADER))

    @app.after_request
    def tell_failure(response: Response) -> Response:
        identity = g.get("request_id") or request_id(None)
        response.headers[HEADER] = identity
        # A probe that says "not yet" every second is no news; who watches it sees it.
        if response.status_code >= 400 and request.path not in PROBES:
            body = response.get_json(silent=True) if response.is_json else None
            code = body.get("code") if isinstance(body, dict) else None
            fields = {"code": code, "client": request.remote_addr, "request_id": identity}
            # The path alone: what stands behind the question mark may be a secret.
            tell(request.method, request.path, response.status_code, lambda: fields)
        return response


class BoundLines(logging.Filter):
    """Bounds the lines of one kind, whatever module writes them."""

    def __init__(self) -> None:
        super().__init__()
        self._bounds: dict[tuple[str, object], Bound] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if len(self._bounds) > 1000:
            self._bounds.clear()
        kind = (record.name, record.msg if isinstance(record.msg, str) else type(record.msg))
        bound = self._bounds.setdefault(kind, Bound(SAME_LINES_PER_SECOND))
        if record.levelno < logging.INFO:
            return True
        left_out = bound.left_out()
        if left_out:
            record.fields = getattr(record, "fields", {}) | {"left_out": left_out}
        return left_out is not None


def _fields(record: logging.LogRecord) -> dict:
    fields = {k: v for k, v in getattr(record, "fields", {}).items() if v is not None}
    if "request_id" not in fields and has_request_context() and "request_id" in g:
        fields["request_id"] = g.request_id
    return fields


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class ConsoleLines(logging.Formatter):
    """One line for a person; a stack trace below it."""

    def format(self, record: logging.LogRecord) -> str:
        words = [f"{name}={value}" for name, value in _fields(record).items()]
        text = " ".join([record.getMessage(), *words]).translate(CONTROLS)
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{moment} {record.levelname.lower():7} {record.name}  {text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(settings: Settings) -> None:
    """Set up the lines of this process."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if settings.log_format == "json" else ConsoleLines())
    handler.addFilter(BoundLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = settings.log_level.upper()
    root.setLevel(level)
    # RQ tells every job, several a second; Alembic and flask-limiter what is told here already.
    for noisy in ("rq.worker", "alembic", "flask-limiter", "werkzeug"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
