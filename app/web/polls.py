"""Answers to pages that poll, given again on the event loop while they are fresh.

Twenty open dashboards ask for the same figures every second. Flask makes an answer, and looks at
each session, only now and then: what it answered to one session, others of the same role get too.
A session that ends (deactivated, another password) is shown the figures for TICKET_SECONDS more.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from .. import logs

# How old an answer may be; the pages know that theirs may be (static/admin.js).
FRESH_SECONDS = 0.8
TICKET_SECONDS = 5.0
MOST_TICKETS = 10_000
# The paths that pages poll, and for which a view may name a group: see `share`.
PATHS = {"/admin/live"}


class Answer(NamedTuple):
    """A response as ASGI has it."""

    made_at: float
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Polls:
    """The answers and sessions of one process."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str], Answer] = {}
        # The group of a Cookie header that Flask accepted, and until when it is believed.
        self._tickets: dict[bytes, tuple[str, float]] = {}

    def find(self, path: str, cookie: bytes) -> Answer | None:
        """Return what this session may be given again."""
        now = time.monotonic()
        group, until = self._tickets.get(cookie, ("", 0.0))
        answer = self._answers.get((path, group))
        if answer is None or now > until or now - answer.made_at > FRESH_SECONDS:
            return None
        return answer

    def keep(self, path: str, cookie: bytes, group: str, until: float, answer: Answer) -> None:
        """Remember what Flask answered to a session, and until when that is believed."""
        if len(self._tickets) >= MOST_TICKETS:
            self._tickets.clear()
        self._tickets[cookie] = group, until
        self._answers[path, group] = answer


def cookie_of(scope: dict) -> bytes | None:
    """Return the Cookie header of a request that polls, None for any other request."""
    if scope["path"] not in PATHS or scope["method"] != "GET" or scope["query_string"]:
        return None
    headers = dict(scope["headers"])
    return headers.get(b"cookie") if headers.get(b"x-poll") == b"1" else None


def share(environ: dict, group: str, made_at: float) -> None:
    """Let everybody of a group have the answer to this request; a view says so.

    `made_at` is when its figures were read, monotonic.
    """
    environ.get("asgi.scope", {})["share"] = group, made_at


async def serve(polls: Polls, scope: dict, cookie: bytes, flask: Callable, send: Callable) -> None:
    """Answer a request that polls; `flask` is called with a `send` when there is nothing fresh."""
    path = scope["path"]
    if answer := polls.find(path, cookie):
        named = (logs.HEADER.lower().encode(), logs.request_id(None).encode())
        headers = [*answer.headers, named]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})
        return
    asked_at, status, headers, body = time.monotonic(), 0, [], []

    async def watch(event: dict) -> None:
        nonlocal status, headers
        if event["type"] == "http.response.start":
            status, headers = event["status"], event["headers"]
        else:
            body.append(event.get("body", b""))
        await send(event)

    await flask(watch)
    if status == 200 and "share" in scope and b"set-cookie" not in dict(headers):
        own = (b"date", logs.HEADER.lower().encode())
        shared = [(name, value) for name, value in headers if name not in own]
        group, made_at = scope["share"]
        answer = Answer(made_at, shared, b"".join(body))
        polls.keep(path, cookie, group, asked_at + TICKET_SECONDS, answer)
