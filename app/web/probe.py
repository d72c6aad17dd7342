"""GET /readyz/sale: whether this process can sell, asked of the very line that its purchases take.

Answered on the event loop, as purchases are: neither PostgreSQL nor a thread for pages has a say.
"""

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from .. import logs
from ..extensions import stock
from ..problems import Unavailable
from ..watch.health import in_words
from .answer import JSON_TYPE, UNAVAILABLE_RETRY, Answer

PATH = "/readyz/sale"
# Anybody may ask, as often as they like; Redis is asked so often.
FRESH_SECONDS = 0.2

Told = tuple[int, dict[str, Any]]


def selling(verified: bool) -> Told:
    """Return status and body of a process that sells; `verified`: it compared the sale."""
    return 200, {"status": "ok"} if verified else {"status": "ok", "unverified": True}


def not_selling(error: Unavailable) -> Told:
    return 503, {"status": "unavailable", "reason": in_words(error)}


def ask_thread_line() -> Told:
    """Return the answer of a process that serves as WSGI."""
    try:
        return selling(stock.thread_line.check())
    except Unavailable as error:
        return not_selling(error)


class Probe:
    """Answers for an event loop."""

    def __init__(self, check: Callable[[], Awaitable[bool]] | None = None) -> None:
        """`check` is LoopLine.check, of the app's own line unless it is given."""
        self._check = check
        self._answer: Told = (503, {})
        self._until = 0.0

    async def answer(self) -> Told:
        if time.monotonic() > self._until:
            try:
                self._answer = selling(await (self._check or stock.loop_line.line.check)())
            except Unavailable as error:
                self._answer = not_selling(error)
            self._until = time.monotonic() + FRESH_SECONDS
        return self._answer

    async def serve(self, identity: str | None) -> Answer:
        """Answer a GET; `identity` is the client's own name for its request."""
        status, found = await self.answer()
        body = json.dumps(found, separators=(",", ":")).encode()
        headers = [
            JSON_TYPE,
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            (logs.HEADER, logs.request_id(identity)),
        ]
        if status == 200:
            return Answer("200 OK", headers, body)
        return Answer("503 Service Unavailable", [*headers, UNAVAILABLE_RETRY], body)
