"""The errors that every edge knows how to answer, whoever raises them."""

from collections.abc import Mapping

CHALLENGE = 'Bearer realm="shop"'


class InvalidRequest(ValueError):
    """The request has a wrong shape; `field` names the part that is wrong, if one is."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def told(self, names: Mapping[str, str]) -> str:
        """Return the words for a page, which may call a field by another name than programs do."""
        field, _, fault = str(self).partition(" ")
        return f"{names[field]} {fault}" if field == self.field and field in names else str(self)


class Unauthenticated(Exception):
    """There is no valid token; `challenge` is the WWW-Authenticate header (RFC 6750, 3)."""

    def __init__(self, reason: str, challenge: str = CHALLENGE) -> None:
        super().__init__(reason)
        self.challenge = challenge


class AnotherShopper(Exception):
    """The token is valid, but its shopper is not the one the request is about."""


class UnknownProduct(LookupError):
    """There is no product with this id."""


class UnknownOrder(LookupError):
    """There is no order with this id."""


class UnknownEndpoint(LookupError):
    """There is no endpoint of webhooks, or no delivery to it, with this id."""


class Conflict(Exception):
    """The change can't be made as things stand; `code` names why."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class CursorExpired(Exception):
    """The events that would come next were kept for their time, and are dropped."""


class KeyMismatch(Exception):
    """The Idempotency-Key belongs to another request."""


class UnknownCaller(Exception):
    """The address is none of those that may name the shopper of a request."""


class Unavailable(Exception):
    """Redis can't be reached or did not answer: the outcome is unknown, nothing is retried.

    `executed` is False where surely nothing was done.
    """

    def __init__(self, message: str = "", executed: bool | None = None) -> None:
        super().__init__(message)
        self.executed = executed


class Unprepared(Unavailable):
    """Redis answers but does not hold this sale (new, flushed, or being rebuilt)."""
