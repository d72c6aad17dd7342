"""POST /purchase, past the framework, whose own work per request costs several times a claim.

One implementation, two ways in. As WSGI middleware it stands in front of Flask's router, for any
WSGI server and the tests; there a claim blocks its thread. In web.py it awaits the claim on the
event loop, where those of all requests in flight share one write to Redis.
"""

import json
import logging
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from time import perf_counter

from ..addresses import client_of
from ..config import RateLimit, Settings
from ..logs import PurchaseLog
from ..problems import AnotherShopper, InvalidRequest, Unauthenticated, Unavailable
from ..reading import MAX_BODY_BYTES
from ..stock.gateway import Stock
from ..stock.lines import Claim
from ..times import from_ms, utc_text
from ..watch.telemetry import Meter
from .identity import Shoppers
from .purchase import purchase

log = logging.getLogger(__name__)

SOLD = "200 OK"
JSON_TYPE = ("Content-Type", "application/json")
# How long a client had best wait before it asks again about an unknown outcome.
UNAVAILABLE_RETRY = ("Retry-After", "1")


def error_body(message: str, code: str, **more: object) -> bytes:
    return json.dumps({"error": message, "code": code, **more}, separators=(",", ":")).encode()


UNAVAILABLE = error_body("Service unavailable", "unavailable")
INTERNAL_ERROR = error_body("Internal server error", "internal_error")

# What each refusal of the claim script is answered with; a function where the detail is told.
REFUSALS: dict[bytes, tuple[str, bytes | Callable[[int], bytes]]] = {
    b"sold_out": ("409 Conflict", error_body("Stock problem", "sold_out")),
    b"insufficient": (
        "409 Conflict",
        lambda left: error_body("Stock problem", "insufficient_stock", remaining=left),
    ),
    b"not_open": (
        "409 Conflict",
        lambda opens: error_body("Sale not open", "not_open", opensAt=utc_text(from_ms(opens))),
    ),
    b"paused": ("409 Conflict", error_body("Sale not open", "paused")),
    b"ended": ("409 Conflict", error_body("Sale not open", "ended")),
    b"capped": ("409 Conflict", error_body("Purchase limit reached", "purchase_limit")),
    b"unknown": ("404 Not Found", error_body("Unknown product", "unknown_product")),
    b"too_many": (
        "400 Bad Request",
        lambda most: error_body(
            f"quantity must be from 1 to {most}", "invalid_request", field="quantity"
        ),
    ),
    b"mismatched": (
        "422 Unprocessable Content",
        error_body("Idempotency-Key was used with another request", "idempotency_mismatch"),
    ),
    b"limited": (
        "429 Too Many Requests",
        error_body("Too many requests", "rate_limited", limit="user"),
    ),
    b"limited_address": (
        "429 Too Many Requests",
        error_body("Too many requests", "rate_limited", limit="address"),
    ),
    b"unprepared": ("503 Service Unavailable", UNAVAILABLE),
    b"overloaded": ("503 Service Unavailable", UNAVAILABLE),
}


class PurchaseLane:
    """Answers POST /purchase completely, errors included; the rest is the app's."""

    def __init__(
        self, app: Callable, stock: Stock, settings: Settings, shoppers: Shoppers | None = None
    ) -> None:
        """`shoppers` tells who is asking by the request's token; None believes its userId."""
        self.app = app
        self.stock = stock
        self.shoppers = shoppers
        self.meter = Meter("web")
        self.log = PurchaseLog(settings)
        self.user_policy = _policy("user", settings.purchase_user_limit)
        self.address_policy = _policy("address", settings.purchase_address_limit)

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        """Serve as WSGI."""
        if environ["PATH_INFO"] != "/purchase":
            return self.app(environ, start_response)

        def body() -> bytes:
            return environ["wsgi.input"].read(_content_length(environ))

        async def claim(*request) -> Claim:
            return self.stock.claim(*request)

        # Nothing in it ever waits for an event loop, so the first step is the whole way.
        try:
            self.serve(environ, body, claim).send(None)
        except StopIteration as done:
            status, body, headers = done.value
        start_response(status, headers)
        return (body,)

    async def serve(
        self, environ: dict, read: Callable, claim: Callable
    ) -> tuple[str, bytes, list[tuple[str, str]]]:
        """Return status line, body and headers.

        Of `environ` only what WSGI names the request's method, address and headers is looked at.
        """
        started = perf_counter()
        status, body, more = await self.answer(environ, read, claim)
        headers = [JSON_TYPE, ("Content-Length", str(len(body))), *more]
        if status != SOLD or "HTTP_X_REQUEST_ID" in environ or self.log.every:
            headers.append(self.log.note(environ, status, body))
        self.meter.observe(status, perf_counter() - started)
        return status, body, headers

    async def answer(
        self, environ: dict, read: Callable, claim: Callable
    ) -> tuple[str, bytes, Iterable[tuple[str, str]]]:
        """Return status line, body and further headers."""
        if environ["REQUEST_METHOD"] != "POST":
            return (
                "405 Method Not Allowed",
                error_body("Method not allowed", "method_not_allowed"),
                (("Allow", "POST"),),
            )
        try:
            shopper = self.shoppers and self.shoppers.identify(environ.get("HTTP_AUTHORIZATION"))
            address = environ.get("REMOTE_ADDR", "")
            check_body(environ)
            body = read()
            if len(body) > MAX_BODY_BYTES:
                raise UnreadableBody(*TOO_LARGE)
            decided = await purchase(
                claim,
                body,
                environ.get("HTTP_IDEMPOTENCY_KEY"),
                client_of(address) if ":" in address else address,
                shopper,
            )
        except InvalidRequest as error:
            field = {"field": error.field} if error.field else {}
            return "400 Bad Request", error_body(str(error), "invalid_request", **field), ()
        except Unauthenticated as error:
            headers = (("WWW-Authenticate", error.challenge),)
            return "401 Unauthorized", error_body(str(error), "unauthorized"), headers
        except AnotherShopper as error:
            return "403 Forbidden", error_body(str(error), "forbidden"), ()
        except UnreadableBody as error:
            return error.status, error.body, ()
        except Unavailable:
            return "503 Service Unavailable", UNAVAILABLE, (UNAVAILABLE_RETRY,)
        except Exception:
            log.exception("POST /purchase failed")
            return "500 Internal Server Error", INTERNAL_ERROR, ()
        outcome = decided.outcome
        if outcome == b"accepted":
            body = b'{"status":"queued","orderId":%d}' % decided.detail
            return SOLD, body, self.limits(decided)
        if outcome == b"replayed":
            body = b'{"status":"queued","orderId":%d}' % decided.detail
            return SOLD, body, (("Idempotent-Replayed", "true"),)
        status, body = REFUSALS[outcome]
        if callable(body):
            body = body(decided.detail)
        return status, body, self.limits(decided)

    def limits(self, claim: Claim) -> list[tuple[str, str]]:
        """Return the rate-limit headers of an answer (draft-ietf-httpapi-ratelimit-headers-10)."""
        outcome, detail, left, reset_ms = claim
        # Rounded up: who waits so long is surely let in.
        seconds = -(-reset_ms // 1000)
        headers = []
        if left >= 0:
            name, policy = (
                self.address_policy if outcome == b"limited_address" else self.user_policy
            )
            headers = [
                ("RateLimit-Policy", policy),
                ("RateLimit", f'"{name}";r={left};t={seconds}'),
            ]
        if outcome in (b"limited", b"limited_address"):
            headers.append(("Retry-After", str(seconds)))
        elif outcome in (b"unprepared", b"overloaded"):
            headers.append(UNAVAILABLE_RETRY)
        elif outcome == b"not_open":
            wait_ms = detail - datetime.now(UTC).timestamp() * 1000
            headers.append(("Retry-After", str(max(1, -int(-wait_ms // 1000)))))
        return headers


def _policy(name: str, limit: RateLimit) -> tuple[str, str]:
    return name, f'"{name}";q={limit.count};w={limit.window_ms // 1000}'


class UnreadableBody(Exception):
    """The body was refused before it was read."""

    def __init__(self, status: str, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, code)


def check_body(environ: dict) -> None:
    """Raise UnreadableBody for a wrong media type or size, before anything is read."""
    media_type = environ.get("CONTENT_TYPE", "")
    if media_type != "application/json" and (
        media_type.partition(";")[0].strip().lower() != "application/json"
    ):
        raise UnreadableBody(
            "415 Unsupported Media Type",
            "Content-Type must be application/json",
            "unsupported_media_type",
        )
    _content_length(environ)


TOO_LARGE = ("413 Content Too Large", "The body is larger than 16 KiB", "body_too_large")


def _content_length(environ: dict) -> int:
    """Return how much to read: the announced length, or for a chunked body one byte too many."""
    announced = environ.get("CONTENT_LENGTH")
    if not announced:
        return MAX_BODY_BYTES + 1 if environ.get("HTTP_TRANSFER_ENCODING") else 0
    if not announced.isascii() or not announced.isdigit() or len(announced) > 18:
        raise UnreadableBody("400 Bad Request", "Content-Length is not a number", "invalid_request")
    if int(announced) > MAX_BODY_BYTES:
        raise UnreadableBody(*TOO_LARGE)
    return int(announced)
