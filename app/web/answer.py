"""An answer as every road of the web process gives it, and those that need no view."""

import json
from collections.abc import Iterable
from typing import NamedTuple

JSON_TYPE = ("Content-Type", "application/json")
# How long a client had best wait before it asks again about an unknown outcome.
UNAVAILABLE_RETRY = ("Retry-After", "1")


class Answer(NamedTuple):
    """A whole answer; `status` is the status line without the version, as WSGI has it."""

    status: str
    headers: Iterable[tuple[str, str]]
    body: bytes


def error_body(message: str, code: str, **more: object) -> bytes:
    return json.dumps({"error": message, "code": code, **more}, separators=(",", ":")).encode()


def refusal(
    status: str, message: str, code: str, *headers: tuple[str, str], **more: object
) -> Answer:
    """Return an answer in the API's shape to what never reaches a view."""
    body = error_body(message, code, **more)
    return Answer(status, (JSON_TYPE, ("Content-Length", str(len(body))), *headers), body)


BAD_REQUEST = "400 Bad Request"
UNAVAILABLE = error_body("Service unavailable", "unavailable")
# The outcome is known: nothing happened, so that the shopper may well try again without a key.
NOT_EXECUTED = error_body("Service unavailable", "unavailable", executed=False)
INTERNAL_ERROR = error_body("Internal server error", "internal_error")
OVERLOADED = refusal(
    "503 Service Unavailable", "Service unavailable", "unavailable", UNAVAILABLE_RETRY
)
FAILED = refusal("500 Internal Server Error", "Internal server error", "internal_error")
