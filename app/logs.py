"""The lines about requests, and the id by which a request is found again.

A sale refuses thousands of requests a second, so what is written is bounded: one line a second for
refusals and ten for each kind of failure, in each process, with the number of those left out.
"""

import itertools
import logging
import re
import secrets
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, g, has_request_context, request

from . import telling
from .config import Settings
from .telling import Bound

log = logging.getLogger("app.requests")

HEADER = "X-Request-Id"
VALID_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}").fullmatch
CODE = re.compile(rb'"code":"([a-z_]+)"').search
PROBES = ("/readyz", "/readyz/sale", "/health")
REFUSALS_PER_SECOND = 1

_process = secrets.token_hex(4)
_count = itertools.count(1)


def request_id(given: str | None) -> str:
    """Return the client's id of the request if it can be used, else a new one."""
    if given and VALID_ID(given):
        return given
    return f"{_process}-{next(_count):x}"


_refusals = Bound(REFUSALS_PER_SECOND)


def tell(method: str, path: str, status: int, fields: Callable[[], dict[str, Any]]) -> None:
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

    def note(self, environ: dict[str, Any], status: str, body: bytes) -> tuple[str, str]:
        """Log the request if it is to be logged; return the header that names it."""
        identity = request_id(environ.get("HTTP_X_REQUEST_ID"))
        number, method = int(status[:3]), environ["REQUEST_METHOD"]

        def fields() -> dict[str, Any]:
            return {"client": environ.get("REMOTE_ADDR", ""), "request_id": identity}

        if number >= 400:
            tell(method, "/purchase", number, lambda: {"code": _code(body), **fields()})
        elif self.every:
            told = fields() | {"status": number, "answer": body.decode()}
            log.debug("%s /purchase", method, extra={"fields": told})
        return HEADER, identity


def _code(body: bytes) -> str | None:
    found = CODE(body)
    return found[1].decode() if found else None


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


class NamedLines(logging.Filter):
    """Puts the id of the request, within one, on every line."""

    def filter(self, record: logging.LogRecord) -> bool:
        fields = getattr(record, "fields", {})
        if "request_id" not in fields and has_request_context() and "request_id" in g:
            record.fields = fields | {"request_id": g.request_id}
        return True


def configure(settings: Settings) -> None:
    """Set up the lines of a process that serves requests."""
    telling.configure(settings)
    for handler in logging.getLogger().handlers:
        handler.addFilter(NamedLines())
