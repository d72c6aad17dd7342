"""Answers that are given again on the event loop while they are fresh.

Twenty open dashboards ask for the same figures every second. Flask makes an answer, and looks at
each session, only now and then: what it answered to one session, others of the same role get too.
A session that ends (deactivated, another password) is shown the figures for TICKET_SECONDS more.
"""

import hashlib
import time
from collections.abc import Callable
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
        self._answers: dict[tuple[str, bool, str], Shared] = {}
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
        now = time.monotonic()
        group, until = self._tickets.get(poll.session, ("", 0.0))
        shared = self._answers.get((poll.path, poll.coding, group))
        if shared is None or now > until or now - shared.made_at > FRESH_SECONDS:
            return None
        return shared.answer

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
