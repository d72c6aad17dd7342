"""Headers that every answer has but the purchase's, which writes its own (lane.py)."""

import time

import redis
from flask import Flask, Response, request
from limits.errors import StorageError
from werkzeug.exceptions import UnsupportedMediaType

from ..extensions import limiter
from .lane import CODED, is_coded

# JSON needs nothing of a browser; a page brings a policy of its own.
DEFAULTS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def init_app(app: Flask) -> None:
    """Add the headers after every request, and refuse what one of a request's asks in vain."""

    def refuse_coded_body() -> None:
        if is_coded(request.environ):
            raise UnsupportedMediaType(CODED)

    # Before anything looks into the body.
    app.before_request_funcs.setdefault(None, []).insert(0, refuse_coded_body)

    @app.after_request
    def protect(response: Response) -> Response:
        for name, value in DEFAULTS.items():
            response.headers.setdefault(name, value)
        if request.endpoint != "static":
            # Stock, orders and errors are of this moment, and some are for one reader alone.
            response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.after_request
    def tell_limit(response: Response) -> Response:
        """Tell the limit that was applied (draft-ietf-httpapi-ratelimit-headers-10)."""
        applied = limiter.current_limit
        if applied is None or not limiter.enabled:
            return response
        try:
            left, reset_at = applied.remaining, applied.window.reset_time
        except (redis.RedisError, StorageError):
            return response
        # Rounded up: who waits so long is surely let in.
        seconds = max(1, -int(-(reset_at - time.time()) // 1))
        name = applied.request_args[-1].rpartition(".")[2]
        item = applied.limit
        response.headers["RateLimit-Policy"] = f'"{name}";q={item.amount};w={item.get_expiry()}'
        response.headers["RateLimit"] = f'"{name}";r={max(0, left)};t={seconds}'
        if applied.breached:
            response.headers["Retry-After"] = str(seconds)
        return response
