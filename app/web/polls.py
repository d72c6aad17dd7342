"""Answers that are given again on the event loop while they are fresh.

Twenty open dashboards ask for the same figures every second. Flask makes an answer, and looks at
each session, only now and then: what it answered to one session, others of the same role get too.
A session that ends (deactivated, another password) is shown the figures for TICKET_SECONDS more.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from flask import current_app, request

from .answer import Answer
from .parked import Wait

# How old an answer may be; the pages know that theirs may be (static/admin.js).
FRESH_SECONDS = 0.8
TICKET_SECONDS = 5.0
# Some 2 MB: a ticket is a digest, whatever a client sends as a cookie.
MOST_TICKETS = 10_000
# The paths that pages poll, and for which a view may name a group: see `share`.
PATHS = {"/admin/live"}
# Where a view finds the Offer, in the WSGI environment.
OFFER = "flashsale.offer"


class Poll(NamedTuple):
    """A request that polls: what is asked, and by which session."""

    path: str
    coding: bool
    session: bytes


# What an answer is kept under: the path, whether it is compressed, the group.
Key = tuple[str, bool, str]


class Offer:
    """What a view says of its answer to a poll: who else may have it, and how old it is.

    Or that it had best be asked again later, once (parked.py), which a view then sees by `again`.
    """

    group: str | None = None
    made_at = 0.0
    wait: Wait | None = None

    def __init__(self, again: bool = False) -> None:
        self.again = again


class Shared(NamedTuple):
    made_at: float
    answer: Answer


class Polls:
    """The answers and sessions of one process: `app.extensions["polls"]`."""

    def __init__(self) -> None:
        self._answers: dict[Key, Shared] = {}
        # Those that are being made, each with what those who wait for it look at.
        self._making: dict[Key, asyncio.Event] = {}
        # What they are made of, for whoever comes with a session that is not known here.
        self._texts: dict[tuple[str, str], tuple[float, str]] = {}
        # The group of a session that Flask accepted, and until when it is believed.
        self._tickets: dict[bytes, tuple[str, float]] = {}

    def text(self, path: str, group: str, make: Callable[[], str]) -> tuple[float, str]:
        """Return when what a group is shown was begun to be made, monotonic; and it."""
        made_at, text = self._texts.get((path, group), (float("-inf"), ""))
        if time.monotonic() - made_at > FRESH_SECONDS:
            made_at = time.monotonic()
            text = make()
            self._texts[path, group] = made_at, text
        return made_at, text

    def find(self, poll: Poll) -> Answer | None:
        """Return what this session may be given again."""
        key = self._key(poll)
        shared = self._answers.get(key) if key else None
        if shared is None or time.monotonic() - shared.made_at > FRESH_SECONDS:
            return None
        return shared.answer

    async def made(self, poll: Poll) -> None:
        """Wait for the answer that is just being made for another one of the group, if one is."""
        if (key := self._key(poll)) and (done := self._making.get(key)):
            await done.wait()

    @contextmanager
    def making(self, poll: Poll) -> Iterator[None]:
        """Have others of the group wait for what is made meanwhile; of several, for the first."""
        key = self._key(poll)
        if key is None or key in self._making:
            yield
            return
        done = self._making[key] = asyncio.Event()
        try:
            yield
        finally:
            del self._making[key]
            done.set()

    def _key(self, poll: Poll) -> Key | None:
        """Return where to look for a session's answer, None for a session that is not known."""
        group, until = self._tickets.get(poll.session, ("", 0.0))
        return (poll.path, poll.coding, group) if time.monotonic() <= until else None

    def keep(self, poll: Poll, offer: Offer, asked_at: float, answer: Answer) -> None:
        """Remember what Flask answered to a session, where the view has offered to share it."""
        if offer.group is None:
            return
        if len(self._tickets) >= MOST_TICKETS:
            self._tickets.clear()
        self._tickets[poll.session] = offer.group, asked_at + TICKET_SECONDS
        self._answers[poll.path, poll.coding, offer.group] = Shared(offer.made_at, answer)


def poll_of(method: str, url: str, environ: dict[str, str], coding: bool) -> Poll | None:
    """Return what a request polls, None for any other; `coding` is whether gzip is understood."""
    if url not in PATHS or method != "GET" or environ.get("HTTP_X_POLL") != "1":
        return None
    cookies = environ.get("HTTP_COOKIE")
    if not cookies:
        return None
    return Poll(url, coding, hashlib.sha256(cookies.encode("latin-1")).digest())


def share(group: str, make: Callable[[], str]) -> str:
    """Return what everybody of a group may have as the answer to this request; a view asks for it.

    `make` is called when what was made last is no longer fresh.
    """
    polls: Polls = current_app.extensions["polls"]
    made_at, text = polls.text(request.path, group, make)
    if offer := request.environ.get(OFFER):
        offer.group, offer.made_at = group, made_at
    return text
