"""POST /purchase, past the framework, whose own work per request costs several times a claim.

Reading the request and telling the answer are plain functions; between them stands the claim. As
WSGI middleware, before Flask's router, for any WSGI server and the tests, it blocks its thread. In
web.py it is awaited on the event loop, where the claims of all requests in flight share one write
to Redis.
"""

import logging
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

from ..addresses import client_of
from ..config import RateLimit, Settings
from ..logs import PurchaseLog
from ..problems import (
    AnotherShopper,
    InvalidRequest,
    Unauthenticated,
    Unavailable,
    UnknownCaller,
)
from ..reading import MAX_BODY_BYTES
from ..stock.claims import Claim, Request, Tell, early_limit
from ..stock.gateway import Stock
from ..times import from_ms, utc_text
from ..watch.telemetry import Meter
from .answer import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    JSON_TYPE,
    NOT_EXECUTED,
    UNAVAILABLE,
    UNAVAILABLE_RETRY,
    Answer,
    error_body,
)
from .callers import Callers
from .identity import Shoppers
from .purchase import read_purchase

log = logging.getLogger(__name__)

SOLD = "200 OK"
REPLAYED = ("Idempotent-Replayed", "true")

# The outcomes that are refusals of a limit, and the limit's name.
LIMITS = {
    b"limited": "user",
    b"limited_early": "early",
    b"limited_address": "address",
    b"limited_network": "network",
}

# What the words of these two add: units of orders that are held may come back, and those of a shard
# out of reach will.
REMARKED = (b"sold_out", b"insufficient")
REMARKS = {b"held": b',"mayReturn":true}', b"away": b',"final":false}'}

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
    b"capped_address": (
        "409 Conflict",
        error_body("Purchase limit reached", "purchase_limit", limit="address"),
    ),
    **{
        outcome: (
            "429 Too Many Requests",
            error_body("Too many requests", "rate_limited", limit=limit),
        )
        for outcome, limit in LIMITS.items()
    },
    b"unprepared": ("503 Service Unavailable", NOT_EXECUTED),
    b"overloaded": ("503 Service Unavailable", NOT_EXECUTED),
}


# As WSGI has them (PEP 3333).
Environ = dict[str, Any]
App = Callable[..., Iterable[bytes]]
Headers = Iterable[tuple[str, str]]
# Status line, body, and the headers that not every answer has.
Told = tuple[str, bytes, Headers]


class PurchaseLane:
    """Answers POST /purchase completely, errors included; the rest is the app's."""

    def __init__(
        self, app: App, stock: Stock, settings: Settings, shoppers: Shoppers | None = None
    ) -> None:
        """`shoppers` tells who is asking by the request's token; None believes its userId."""
        self.app = app
        self.stock = stock
        self.shoppers = shoppers
        self.meter = Meter("web")
        self.log = PurchaseLog(settings)
        user = settings.purchase_user_limit
        policies = {
            "user": _policy("user", user),
            "early": _policy("early", early_limit(user)),
            "address": _policy("address", settings.purchase_address_limit),
            "network": _policy("network", settings.purchase_network_limit),
        }
        self.user_policy = policies["user"]
        self.policies = {outcome: policies[limit] for outcome, limit in LIMITS.items()}
        self.callers = Callers(settings.trusted_callers)

    def __call__(self, environ: Environ, start_response: Callable[..., object]) -> Iterable[bytes]:
        """Serve as WSGI."""
        if environ["PATH_INFO"] != "/purchase":
            return self.app(environ, start_response)
        started = perf_counter()
        try:
            length = self.check(environ)
            request = self.read(environ, environ["wsgi.input"].read(length))
            told = self.tell(self.stock.thread_line.claim(request))
        except Exception as error:
            told = self.refuse(error)
        status, headers, body = self.finish(environ, *told, started)
        start_response(status, headers)
        return (body,)

    def serve(
        self,
        environ: Environ,
        body: bytearray,
        ask: Callable[[Request, Tell], None],
        answer: Callable[[Answer], None],
    ) -> None:
        """Answer one request, by calling `answer`; `ask` is the road to Redis.

        Of `environ` only what WSGI names the request's method, address and headers is looked at.
        """
        started = perf_counter()

        def tell(claim: Claim | Exception) -> None:
            told = self.refuse(claim) if isinstance(claim, Exception) else self.tell(claim)
            answer(self.finish(environ, *told, started))

        try:
            self.check(environ)
            request = self.read(environ, body)
        except Exception as error:
            tell(error)
        else:
            ask(request, tell)

    def check(self, environ: Environ) -> int:
        """Return how much of the body is to be read. Raises Refused for what need not be read."""
        if environ["REQUEST_METHOD"] != "POST":
            raise Refused(
                "405 Method Not Allowed",
                "Method not allowed",
                "method_not_allowed",
                ("Allow", "POST"),
            )
        if self.shoppers:
            environ["shopper"] = self.shoppers.identify(environ.get("HTTP_AUTHORIZATION"))
        self.callers.check(environ.get("REMOTE_ADDR", ""))
        return check_body(environ)

    def read(self, environ: Environ, body: bytes | bytearray) -> Request:
        """Return what is to be claimed, as the roads to Redis take it."""
        if len(body) > MAX_BODY_BYTES:
            raise Refused(*TOO_LARGE)
        address = environ.get("REMOTE_ADDR", "")
        return read_purchase(
            body,
            environ.get("HTTP_IDEMPOTENCY_KEY"),
            client_of(address) if ":" in address else address,
            environ.get("shopper"),
        )

    def tell(self, claim: Claim) -> Told:
        """Return what the shopper is told of a decision."""
        outcome = claim.outcome
        if outcome == b"accepted":
            return SOLD, bought_body(claim), self.limits(claim)
        if outcome == b"replayed":
            return SOLD, bought_body(claim), (REPLAYED,)
        if outcome == b"order_ended":
            body = error_body(
                "Order ended",
                "order_ended",
                orderId=claim.detail,
                orderStatus=claim.text.decode(),
            )
            return "409 Conflict", body, (REPLAYED,)
        if outcome == b"price_changed":
            cents, currency = claim.text.decode().split()
            body = error_body(
                "Price changed", "price_changed", priceCents=int(cents), currency=currency
            )
            return "409 Conflict", body, self.limits(claim)
        status, told = REFUSALS[outcome]
        body = told(claim.detail) if callable(told) else told
        if outcome in REMARKED:
            for word in claim.text.split():
                body = body[:-1] + REMARKS[word]
        return status, body, self.limits(claim)

    def refuse(self, error: Exception) -> Told:
        """Return what the shopper is told when nothing was decided."""
        match error:
            case InvalidRequest():
                field = {"field": error.field} if error.field else {}
                return BAD_REQUEST, error_body(str(error), "invalid_request", **field), ()
            case Unauthenticated():
                headers = (("WWW-Authenticate", error.challenge),)
                return "401 Unauthorized", error_body(str(error), "unauthorized"), headers
            case AnotherShopper() | UnknownCaller():
                return "403 Forbidden", error_body(str(error), "forbidden"), ()
            case Refused():
                return error.told
            case Unavailable():
                body = NOT_EXECUTED if error.executed is False else UNAVAILABLE
                return "503 Service Unavailable", body, (UNAVAILABLE_RETRY,)
        log.error("POST /purchase failed", exc_info=error)
        return "500 Internal Server Error", INTERNAL_ERROR, ()

    def finish(
        self, environ: Environ, status: str, body: bytes, more: Headers, started: float
    ) -> Answer:
        """Return the answer with its other headers; count and log it."""
        headers = [JSON_TYPE, ("Content-Length", str(len(body))), *more]
        if status != SOLD or "HTTP_X_REQUEST_ID" in environ or self.log.every:
            headers.append(self.log.note(environ, status, body))
        self.meter.observe(status, perf_counter() - started)
        return Answer(status, headers, body)

    def limits(self, claim: Claim) -> list[tuple[str, str]]:
        """Return the rate-limit headers of an answer (draft-ietf-httpapi-ratelimit-headers-10)."""
        outcome, _, left, reset_ms, text = claim
        # Rounded up: who waits so long is surely let in.
        seconds = -(-reset_ms // 1000)
        headers = []
        if left >= 0:
            name, policy = self.policies.get(outcome, self.user_policy)
            headers = [
                ("RateLimit-Policy", policy),
                ("RateLimit", f'"{name}";r={left};t={seconds}'),
            ]
        if outcome in LIMITS:
            headers.append(("Retry-After", str(seconds)))
        elif outcome in (b"unprepared", b"overloaded"):
            headers.append(UNAVAILABLE_RETRY)
        elif outcome == b"not_open":
            # By Redis's clock, which opens the sale; this machine's may be wrong.
            headers.append(("Retry-After", str(-(-int(text) // 1000))))
        return headers


def bought_body(claim: Claim) -> bytes:
    """Return what a buyer is told; records of 0.1.0, which a replay may meet, know no price."""
    if not claim.text:
        return b'{"status":"queued","orderId":%d}' % claim.detail
    cents, _, currency = claim.text.partition(b" ")
    # A code of three letters, and of an order that is held the end of its hold.
    if len(currency) > 3:
        currency, _, until = currency.partition(b" ")
        return (
            b'{"status":"held","orderId":%d,"heldUntil":"%b","unitPriceCents":%b,"currency":"%b"}'
            % (
                claim.detail,
                utc_text(from_ms(int(until))).encode(),
                cents,
                currency,
            )
        )
    return b'{"status":"queued","orderId":%d,"unitPriceCents":%b,"currency":"%b"}' % (
        claim.detail,
        cents,
        currency,
    )


def _policy(name: str, limit: RateLimit) -> tuple[str, str]:
    return name, f'"{name}";q={limit.count};w={limit.window_ms // 1000}'


class Refused(Exception):
    """The request was refused before its body was looked at."""

    def __init__(self, status: str, message: str, code: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.told = status, error_body(message, code), headers


CODED = "The body must not be compressed or otherwise coded"
IDENTITY = ("Accept-Encoding", "identity")


def is_coded(environ: Environ) -> bool:
    """Tell whether the body is compressed, which nobody here undoes (RFC 9110, 15.5.16)."""
    return environ.get("HTTP_CONTENT_ENCODING", "").strip().lower() not in ("", "identity")


TOO_LARGE = ("413 Content Too Large", "The body is larger than 16 KiB", "body_too_large")


def check_body(environ: Environ) -> int:
    """Return how much to read: the announced length, or for a chunked body one byte too many.

    Raises Refused for a wrong media type, coding or size, before anything is read.
    """
    media_type = environ.get("CONTENT_TYPE", "")
    if media_type != "application/json" and (
        media_type.partition(";")[0].strip().lower() != "application/json"
    ):
        raise Refused(
            "415 Unsupported Media Type",
            "Content-Type must be application/json",
            "unsupported_media_type",
        )
    if "HTTP_CONTENT_ENCODING" in environ and is_coded(environ):
        raise Refused("415 Unsupported Media Type", CODED, "unsupported_media_type", IDENTITY)
    announced = environ.get("CONTENT_LENGTH")
    if not announced:
        return MAX_BODY_BYTES + 1 if environ.get("HTTP_TRANSFER_ENCODING") else 0
    if not announced.isascii() or not announced.isdigit() or len(announced) > 18:
        raise Refused(BAD_REQUEST, "Content-Length is not a number", "invalid_request")
    if int(announced) > MAX_BODY_BYTES:
        raise Refused(*TOO_LARGE)
    return int(announced)
