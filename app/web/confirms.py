"""Confirmations of held orders: gathered on the event loop, and decided together.

One transaction decides those of a moment: each by itself would wait for a commit, and for the one
row of the product's totals. What that can't decide (a wrong token, a hold that has ended, an order
that somebody else has locked) is left to the view, which answers it as any other request.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import msgspec
from flask import Flask

from .. import logs
from ..audit import Actor
from ..database import REQUEST_WAIT_SECONDS, is_unavailable, waiting_at_most
from ..extensions import db
from ..orders import holds
from ..problems import InvalidRequest
from ..reading import MAX_BODY_BYTES, check_key, read_object
from ..staff import tokens
from .answer import JSON_TYPE, UNAVAILABLE, UNAVAILABLE_RETRY, Answer
from .headers import DEFAULTS
from .identity import bearer_of
from .orders import SCOPE, outcome_of, read_confirm
from .request import Request

log = logging.getLogger(__name__)

PATH = re.compile(r"/orders/([1-9][0-9]{0,15})/confirm", re.ASCII).fullmatch
# So many are one transaction, of some 30 ms.
MOST_AT_ONCE = 200
# Programs that were answered together ask for the next together, one after the other: so long the
# first of them waits for the others. Who asks alone never waits.
GATHER_SECONDS = 0.003
# Of those that wait for the one before; the view's own queue takes others, or refuses them.
MOST_WAITING = 2000
STATUS = {200: "200 OK", 202: "202 Accepted", 503: "503 Service Unavailable"}
HEADERS = (JSON_TYPE, *DEFAULTS.items(), ("Cache-Control", "no-store"))


class Asked(NamedTuple):
    """A well-formed request, whose token nobody has looked at."""

    order_id: int
    token: str
    address: str
    payment: str | None
    key: str | None


# Status, body, and whether it is a repeated answer.
Told = tuple[int, bytes, bool]
Gathered = list[tuple[Asked, "asyncio.Future[Told | None]"]]


class Confirms:
    """Those of one process."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        # A limit of tokens counts each request by itself: that is the view's.
        self._gathers = not app.config["SETTINGS"].api_token_limit
        self._thread = ThreadPoolExecutor(1, "confirm")
        self._waiting: Gathered = []
        # How many the last turn answered; and set when as many wait again.
        self._expected = 1
        self._gathered = asyncio.Event()
        self._decides: asyncio.Task[None] | None = None

    async def answer(self, request: Request, address: str) -> Answer | None:
        """Return the answer to a request of a client at an address; None leaves it to the view."""
        asked = self._read(request, address)
        if asked is None or len(self._waiting) >= MOST_WAITING:
            return None
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Told | None] = loop.create_future()
        self._waiting.append((asked, told))
        if len(self._waiting) >= self._expected:
            self._gathered.set()
        if self._decides is None:
            self._decides = loop.create_task(self._decide_all())
        found = await told
        if found is None:
            return None
        status, body, replayed = found
        identity = logs.request_id(request.environ.get("HTTP_X_REQUEST_ID"))
        headers = [*HEADERS, ("Content-Length", str(len(body))), (logs.HEADER, identity)]
        if replayed:
            headers.append(("Idempotent-Replayed", "true"))
        if status == 503:
            headers.append(UNAVAILABLE_RETRY)
        return Answer(STATUS[status], headers, body)

    def _read(self, request: Request, address: str) -> Asked | None:
        if not self._gathers or request.method != "POST" or not (path := PATH(request.url)):
            return None
        headers = dict(request.headers)
        if len(headers) != len(request.headers) or len(request.body) > MAX_BODY_BYTES:
            return None
        token = bearer_of(headers.get(b"authorization", b"").decode("latin-1"))
        media_type = headers.get(b"content-type")
        if not token or b"content-encoding" in headers:
            return None
        if request.body and media_type != b"application/json":
            return None
        key = headers.get(b"idempotency-key")
        try:
            payment = read_confirm(read_object(request.body) if request.body else {})
            if key is not None:
                check_key(key.decode("latin-1"))
        except InvalidRequest:
            return None
        name = None if key is None else key.decode("latin-1")
        return Asked(int(path[1]), token, address, payment, name)

    async def _decide_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            if len(self._waiting) < self._expected:
                self._gathered.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._gathered.wait(), GATHER_SECONDS)
            turn, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
            self._expected = len(turn)
            asked = [each for each, _ in turn]
            found: Sequence[Told | None]
            try:
                found = await loop.run_in_executor(self._thread, self._decide, asked)
            except Exception as error:
                # By itself each would wait as long, and all pages with it. The same key tells what
                # has come of it.
                away = is_unavailable(error)
                log.warning("%d confirmations failed together: %s", len(turn), error)
                found = [(503, UNAVAILABLE, False) if away else None] * len(turn)
            for (_, told), answer in zip(turn, found, strict=True):
                if not told.done():
                    told.set_result(answer)
        self._decides = None

    def _decide(self, asked: list[Asked]) -> list[Told | None]:
        with self._app.app_context(), waiting_at_most(REQUEST_WAIT_SECONDS):
            try:
                known = {token: tokens.find(token) for token in {each.token for each in asked}}
                wishes = {}
                for number, each in enumerate(asked):
                    token = known[each.token]
                    if token and token.may(SCOPE):
                        actor = Actor(token.name, each.address)
                        wish = holds.Confirm(each.order_id, actor, each.payment, each.key)
                        wishes[number] = wish
                outcomes = holds.confirm_together(list(wishes.values()))
                answers: list[Told | None] = [None] * len(asked)
                for number, outcome in zip(wishes, outcomes, strict=True):
                    if isinstance(outcome, holds.Done):
                        status, body = outcome_of(outcome)
                        told = msgspec.json.encode(body) + b"\n"
                        answers[number] = status, told, outcome.replayed
                return answers
            finally:
                db.session.remove()
