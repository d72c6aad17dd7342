"""The rate-limit headers of every route but the purchase, which writes its own (app/lane.py)."""

import time

import redis
from flask import Flask, Response
from limits.errors import StorageError

from .extensions import limiter


def init_app(app: Flask) -> None:
    """Have answers tell the limit applied to them (draft-ietf-httpapi-ratelimit-headers-10)."""

    @app.after_request
    def tell_limit(response: Response) -> Response:
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
