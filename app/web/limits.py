"""The rate limits of the JSON routes beside the purchase, whose own are inside the claim.

A limit's scope is its name: the answer's headers and a 429's `limit` tell it.
"""

import time
from typing import NamedTuple

import redis
from flask import current_app, g, request
from limits.errors import StorageError

from ..config import RateLimit
from ..extensions import limited_client, limiter
from .polls import OFFER

# Wrong tokens of one address: guessing is hopeless, this is for the sake of PostgreSQL.
FAILED_TOKEN_LIMIT = "600/minute"  # noqa: S105


class Told(NamedTuple):
    """The limit that was applied to a request, as its answer tells it."""

    name: str
    allowed: int
    window_seconds: int
    left: int
    # Until there is one more, rounded up: who waits so long is surely let in.
    seconds: int
    breached: bool


def told() -> Told | None:
    """Return the limit that was applied to this request, None where there is none to tell."""
    applied = limiter.current_limit
    if applied is None or not limiter.enabled:
        return None
    try:
        left, reset_at = applied.remaining, applied.window.reset_time
    except (redis.RedisError, StorageError):
        return None
    # "api.list_products:lookup", or where a page has no named one "orders.index".
    name = applied.request_args[-1].rpartition(":")[2].rpartition(".")[2]
    seconds = max(1, -int(-(reset_at - time.time()) // 1))
    item = applied.limit
    return Told(name, item.amount, item.get_expiry(), max(0, left), seconds, bool(applied.breached))


def _text(limit: RateLimit) -> str:
    """Return a setting as flask-limiter reads it: nothing where it is off."""
    return f"{limit.count}/{limit.window_ms // 1000} seconds" if limit else ""


# Look-ups of one client address, each route by itself.
lookup_limit = limiter.limit(
    lambda: _text(current_app.config["SETTINGS"].lookup_limit), scope="lookup"
)


def _token_limit() -> str:
    known = g.get("actor") is not None
    return _text(current_app.config["SETTINGS"].api_token_limit) if known else FAILED_TOKEN_LIMIT


# What a valid token may always do, also where a Redis past its maxmemory can count nothing.
ALWAYS = {"api.brake_sale"}

# Behind the check of the token (access.py): a valid one has a limit of its own, so that nobody
# at its address uses that up; the others share their address's.
token_limit = limiter.limit(
    _token_limit,
    key_func=lambda: g.actor.name if g.get("actor") else limited_client(),
    scope=lambda endpoint: "token" if g.get("actor") else "failed_token",
    # A poll that has waited is the same request still.
    exempt_when=lambda: (
        (g.get("actor") is not None and request.endpoint in ALWAYS)
        or getattr(request.environ.get(OFFER), "again", False)
    ),
)
