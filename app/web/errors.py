"""One shape for every error: JSON for the API, a page for people, and never a stack trace."""

import logging

import redis
from flask import Flask, Response, current_app, g, jsonify, render_template, request, session
from flask.typing import ResponseReturnValue
from flask_wtf.csrf import CSRFError
from werkzeug.exceptions import HTTPException, TooManyRequests

from ..database import is_unavailable
from ..extensions import db
from ..problems import (
    AnotherShopper,
    Conflict,
    CursorExpired,
    InvalidRequest,
    KeyMismatch,
    Unauthenticated,
    Unavailable,
    UnknownCaller,
    UnknownEndpoint,
    UnknownOrder,
    UnknownProduct,
)
from ..times import in_words
from . import limits

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
# By Flask-WTF's own words.
CSRF_PROBLEMS = {
    "The CSRF session token is missing.": (
        "Your browser sent no session with this form. Allow cookies for this address, reload the "
        "page and try again."
    ),
    "The CSRF token is missing.": (
        "This form came without its token. Go back, reload the page and try again."
    ),
    "The CSRF tokens do not match.": (
        "This form has expired: you have signed in or out since it was opened. Go back, reload the "
        "page and try again."
    ),
    "The CSRF token is invalid.": (
        "This form's token is not one of ours. Go back, reload the page and try again."
    ),
}


def api_error(status: int, message: str, code: str | None = None, **more: object) -> Response:
    """Return an error in the API's shape: {"error": …, "code": …} and what else helps."""
    response = jsonify(error=message, code=code or CODES.get(status, "error"), **more)
    response.status_code = status
    if status == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return response


def below_admin() -> bool:
    """Return whether the path is a page's: its clients are people, and need an account."""
    return request.path == "/admin" or request.path.startswith("/admin/")


def show_error(
    status: int, message: str, code: str | None = None, **more: object
) -> ResponseReturnValue:
    """Answer with an error in the form that this path's clients read."""
    if not below_admin():
        return api_error(status, message, code, **more)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else {}
    if request.headers.get("HX-Request"):
        # The page shows the words as a note; another whole page has no place inside it.
        return message, status, headers | {"Content-Type": "text/plain; charset=utf-8"}
    return _error_page(status, message), status, headers


def _error_page(status: int, message: str) -> str:
    """Return the page, with the menu where it is known, without asking anybody, whose it is."""
    limit = limits.told() if status == 429 else None
    wait = in_words(limit.seconds) if limit else "in a minute"
    person = g.get("_login_user")
    if status in (*range(500), 503) and person is not None and person.is_authenticated:
        return render_template(
            "error.html", status=status, message=message, wait=wait, person=person
        )
    # Past Flask's context processors: one of them asks PostgreSQL who is signed in.
    page = current_app.jinja_env.get_template("error.html")
    return page.render(status=status, message=message, wait=wait)


def init_app(app: Flask) -> None:
    """Register the handlers, on the app: blueprints never see a routing 404 or 405."""

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> ResponseReturnValue:
        if error.response is not None:
            return error.response
        response = app.make_response(show_error(error.code or 500, error.name))
        for name, value in error.get_headers():
            if name not in ("Content-Type", "Content-Length"):
                response.headers[name] = value
        return response

    @app.errorhandler(CSRFError)
    def csrf_error(error: CSRFError) -> ResponseReturnValue:
        problem = error.description or ""
        if problem == "The CSRF session token is missing." and session:
            # There is a session, but a newer one than the form's.
            problem = "The CSRF tokens do not match."
        return show_error(400, CSRF_PROBLEMS.get(problem, problem))

    @app.errorhandler(TooManyRequests)
    def too_many(error: TooManyRequests) -> ResponseReturnValue:
        limit = limits.told()
        return show_error(429, "Too many requests", **({"limit": limit.name} if limit else {}))

    @app.errorhandler(InvalidRequest)
    def invalid(error: InvalidRequest) -> ResponseReturnValue:
        return show_error(400, str(error), **({"field": error.field} if error.field else {}))

    @app.errorhandler(Unauthenticated)
    def unauthenticated(error: Unauthenticated) -> ResponseReturnValue:
        response = api_error(401, str(error))
        response.headers["WWW-Authenticate"] = error.challenge
        return response

    @app.errorhandler(AnotherShopper)
    @app.errorhandler(UnknownCaller)
    def another_shopper(error: Exception) -> ResponseReturnValue:
        return show_error(403, str(error))

    @app.errorhandler(UnknownProduct)
    def unknown_product(error: UnknownProduct) -> ResponseReturnValue:
        return show_error(404, "Unknown product", "unknown_product")

    @app.errorhandler(UnknownOrder)
    def unknown_order(error: UnknownOrder) -> ResponseReturnValue:
        return show_error(404, "Unknown order", "unknown_order")

    @app.errorhandler(UnknownEndpoint)
    def unknown_endpoint(error: UnknownEndpoint) -> ResponseReturnValue:
        return show_error(404, "Unknown webhook endpoint or delivery", "unknown_webhook")

    @app.errorhandler(Conflict)
    def conflict(error: Conflict) -> ResponseReturnValue:
        return show_error(409, str(error), error.code)

    @app.errorhandler(CursorExpired)
    def cursor_expired(error: CursorExpired) -> ResponseReturnValue:
        return show_error(410, str(error), "cursor_expired")

    @app.errorhandler(KeyMismatch)
    def mismatch(error: KeyMismatch) -> ResponseReturnValue:
        message = "Idempotency-Key was used with another request"
        return show_error(422, message, "idempotency_mismatch")

    @app.errorhandler(Unavailable)
    @app.errorhandler(redis.RedisError)
    def unavailable(error: Exception) -> ResponseReturnValue:
        log.warning("%s %s: unavailable: %s", request.method, request.path, error)
        db.session.rollback()
        return show_error(503, "Service unavailable")

    @app.errorhandler(Exception)
    def internal(error: Exception) -> ResponseReturnValue:
        if is_unavailable(error):
            return unavailable(error)
        log.exception("%s %s failed", request.method, request.path)
        return show_error(500, "Internal server error")
