"""Which pages of other origins may call the shoppers' routes (CORS, the Fetch standard).

All on the event loop: a preflight is answered there, and the headers are added where an answer is
written, so that a refusal can be read as well as a view's answer. No route of the staff is here.
"""

import re

from .answer import Answer

# So long a browser may act on a preflight: an origin that is taken away is out after it.
MAX_AGE_SECONDS = 600
REQUEST_HEADERS = "Authorization, Content-Type, Idempotency-Key, X-Request-Id"
EXPOSED = "ETag, Idempotent-Replayed, Link, RateLimit, RateLimit-Policy, Retry-After, X-Request-Id"
BUY, READ = ("POST",), ("GET", "HEAD")
ROUTES = [
    (re.compile(rb"/purchase").fullmatch, BUY),
    (re.compile(rb"/purchase/orders/[^/]+|/purchase/metrics").fullmatch, READ),
    (re.compile(rb"/products(/[0-9]+)?").fullmatch, READ),
]

Headers = tuple[tuple[str, str], ...]


class Cors:
    """The origins of CORS_ORIGINS, compared to the letter."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._headers: dict[str, Headers] = {
            origin: (
                ("Access-Control-Allow-Origin", origin),
                ("Access-Control-Expose-Headers", EXPOSED),
                ("Vary", "Origin"),
            )
            for origin in origins
        }

    def headers(self, origin: str, method: str, url: bytes) -> Headers:
        """Return what lets a page of this origin read the answer, nothing where it may not."""
        return self._headers.get(origin, ()) if method in _methods(url) else ()

    def preflight(self, environ: dict[str, str], url: bytes) -> Answer | None:
        """Return the answer to an OPTIONS that asks for leave; None where none is given."""
        wanted = environ.get("HTTP_ACCESS_CONTROL_REQUEST_METHOD", "")
        allowed = self.headers(environ.get("HTTP_ORIGIN", ""), wanted, url)
        if not allowed:
            return None
        origin, _, vary = allowed
        return Answer(
            "204 No Content",
            (
                origin,
                vary,
                ("Access-Control-Allow-Methods", ", ".join(_methods(url))),
                ("Access-Control-Allow-Headers", REQUEST_HEADERS),
                ("Access-Control-Max-Age", str(MAX_AGE_SECONDS)),
            ),
            b"",
        )


def _methods(url: bytes) -> tuple[str, ...]:
    path = url.partition(b"?")[0]
    return next((methods for matches, methods in ROUTES if matches(path)), ())
