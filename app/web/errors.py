"""One shape for every error: JSON for the API, a page for people, and never a stack trace."""

import logging

import redis
from flask import Flask, Response, current_app, g, jsonify, render_template, request
from flask_wtf.csrf import CSRFError
from sqlalchemy.exc import (
    DatabaseError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
)
from werkzeug.exceptions import HTTPException, TooManyRequests

from ..extensions import db
from ..problems import (
    AnotherShopper,
    Conflict,
    InvalidRequest,
    KeyMismatch,
    Unauthenticated,
    Unavailable,
    UnknownOrder,
    UnknownProduct,
)

log = logging.getLogger(__name__)

CODES = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "rate_limited",
    500: "internal_error",
    503: "unavailable",
}
RETRY_AFTER_SECONDS = 1


def _is_lost_connection(error: Exception) -> bool:
    """Tell a PostgreSQL that went away in mid-sentence from one that refuses.

    psycopg2 raises a bare DatabaseError, without a code, for an answer that was cut off.
    """
    if isinstance(error, PendingRollbackError):
        return True
    return isinstance(error, DBAPIError) and (
        error.connection_invalidated or type(error) is DatabaseError
    )


def api_error(status: int, message: str, code: str | None = None, **more: object) -> Response:
    """Return an error in the API's shape: {"error": …, "code": …} and what else helps."""
    response = jsonify(error=message, code=code or CODES.get(status, "error"), **more)
    response.status_code = status
    if status == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return response


def wants_page() -> bool:
    return request.path == "/admin" or request.path.startswith("/admin/")


def show_error(status: int, message: str, code: str | None = None, **more: object):
    """Answer with an error in the form that this path's clients read."""
    if not wants_page():
        return api_error(status, message, code, **more)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else {}
    if request.headers.get("HX-Request"):
        # The page shows the words as a note; another whole page has no place inside it.
        return message, status, headers | {"Content-Type": "text/plain; charset=utf-8"}
    return _error_page(status, message), status, headers


def _error_page(status: int, message: str) -> str:
    """Return the page, with the menu where it is known, without asking anybody, whose it is."""
    person = g.get("_login_user")
    if status < 500 and person is not None and person.is_authenticated:
        return render_template("error.html", status=status, message=message, person=person)
    # Past Flask's context processors: one of them asks PostgreSQL who is signed in.
    return current_app.jinja_env.get_template("error.html").render(status=status, message=message)


def init_app(app: Flask) -> None:
    """Register the handlers, on the app: blueprints never see a routing 404 or 405."""

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException):
        if error.response is not None:
            return error.response
        response = app.make_response(
            show_error(error.code, error.name if error.code != 429 else "Too many requests")
        )
        for name, value in error.get_headers():
            if name not in ("Content-Type", "Content-Length"):
                response.headers[name] = value
        return response

    @app.errorhandler(CSRFError)
    def csrf_error(error: CSRFError):
        return show_error(400, "This form has expired. Go back, reload the page and try again.")

    @app.errorhandler(TooManyRequests)
    def too_many(error: TooManyRequests):
        return show_error(429, "Too many requests")

    @app.errorhandler(InvalidRequest)
    def invalid(error: InvalidRequest):
        return show_error(400, str(error), **({"field": error.field} if error.field else {}))

    @app.errorhandler(Unauthenticated)
    def unauthenticated(error: Unauthenticated):
        response = api_error(401, str(error))
        response.headers["WWW-Authenticate"] = error.challenge
        return response

    @app.errorhandler(AnotherShopper)
    def another_shopper(error: AnotherShopper):
        return show_error(403, str(error))

    @app.errorhandler(UnknownProduct)
    def unknown_product(error: UnknownProduct):
        return show_error(404, "Unknown product", "unknown_product")

    @app.errorhandler(UnknownOrder)
    def unknown_order(error: UnknownOrder):
        return show_error(404, "Unknown order", "unknown_order")

    @app.errorhandler(Conflict)
    def conflict(error: Conflict):
        return show_error(409, str(error), error.code)

    @app.errorhandler(KeyMismatch)
    def mismatch(error: KeyMismatch):
        message = "Idempotency-Key was used with another request"
        return show_error(422, message, "idempotency_mismatch")

    @app.errorhandler(Unavailable)
    @app.errorhandler(OperationalError)
    @app.errorhandler(InterfaceError)
    @app.errorhandler(redis.RedisError)
    def unavailable(error: Exception):
        log.warning("%s %s: unavailable: %s", request.method, request.path, error)
        db.session.rollback()
        return show_error(503, "Service unavailable")

    @app.errorhandler(Exception)
    def internal(error: Exception):
        if _is_lost_connection(error):
            return unavailable(error)
        log.exception("%s %s failed", request.method, request.path)
        return show_error(500, "Internal server error")
