"""The cookie by which a browser is known to people who have signed in with it (OWASP's device
cookie): it lets nobody in, but keeps a count of wrong passwords of its own."""

import secrets
from datetime import timedelta

from flask import Response, current_app, request
from itsdangerous import BadSignature, URLSafeTimedSerializer

LIFETIME = timedelta(days=180)
# People who share a browser; the ones who signed in last are remembered.
MOST_PEOPLE = 8


def known() -> dict[int, str]:
    """Return the browser's name by the id of each person who has signed in with it."""
    for value in request.cookies.getlist(_name()):
        try:
            pairs = _serializer().loads(value, max_age=int(LIFETIME.total_seconds()))
        except BadSignature:
            continue
        return dict(pairs)
    return {}


def remember(response: Response, staff_id: int) -> None:
    """Let the browser know this person from now on."""
    others = [pair for pair in known().items() if pair[0] != staff_id]
    own = (staff_id, known().get(staff_id) or secrets.token_hex(8))
    interface = current_app.session_interface
    response.set_cookie(
        _name(),
        _serializer().dumps([own, *others][:MOST_PEOPLE]),
        max_age=LIFETIME,
        path=interface.get_cookie_path(current_app),
        secure=interface.get_cookie_secure(current_app),
        httponly=True,
        samesite="Strict",
    )


def _name() -> str:
    return current_app.session_interface.get_cookie_name(current_app) + "-device"


def _serializer() -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(current_app.config["SECRET_KEY"], salt="device")
