"""Headers that every answer has but the purchase's, which writes its own (lane.py)."""

from urllib.parse import urlsplit, urlunsplit

from flask import Flask, Response, request
from werkzeug.exceptions import UnsupportedMediaType

from . import limits
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
    def stay_here(response: Response) -> Response:
        """Lead to paths only (RFC 9110, 10.2.2): a client's Host chooses nobody's next server."""
        if location := response.headers.get("Location"):
            url = urlsplit(location)
            path = "/" + url.path.lstrip("/")
            response.headers["Location"] = urlunsplit(("", "", path, url.query, url.fragment))
        return response

    @app.after_request
    def tell_limit(response: Response) -> Response:
        """Tell the limit that was applied (draft-ietf-httpapi-ratelimit-headers-10)."""
        if limit := limits.told():
            policy = f'"{limit.name}";q={limit.allowed};w={limit.window_seconds}'
            response.headers["RateLimit-Policy"] = policy
            response.headers["RateLimit"] = f'"{limit.name}";r={limit.left};t={limit.seconds}'
            if limit.breached:
                response.headers["Retry-After"] = str(limit.seconds)
        return response
