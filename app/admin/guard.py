"""What stands before every page: the sign-in, the roles, and the headers that browsers enforce."""

import hashlib
from collections.abc import Callable
from datetime import timedelta
from urllib.parse import SplitResult, urlsplit

from flask import Flask, Request, Response, abort, current_app, redirect, request, session, url_for
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface, SessionMixin
from flask.typing import ResponseReturnValue
from flask_login import current_user
from flask_wtf.csrf import CSRFError
from itsdangerous import BadSignature
from werkzeug.routing import IntegerConverter, Map
from werkzeug.wrappers import Response as AnyResponse

from ..problems import Unavailable
from ..reading import MAX_ID
from ..web.errors import below_admin

# Everything below /admin needs a person, but for the page where one becomes known.
OPEN_ENDPOINTS = {"session.sign_in"}
# What `support` may see; every page that is not named here is for admins.
SUPPORT_PAGES = {"session", "dashboard", "orders"}
# After so long without a click the person signs in again. A page that polls does not count.
SESSION_LIFETIME = timedelta(hours=8)

CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none';"
    " form-action 'self'; frame-ancestors 'none'"
)
# rq-dashboard compiles its templates in the browser, from scripts inside its pages.
RQ_DASHBOARD_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none';"
    " script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " form-action 'self'; frame-ancestors 'none'"
)
READING = {"GET", "HEAD", "OPTIONS"}
YEAR_SECONDS = 365 * 24 * 60 * 60


class IdConverter(IntegerConverter):
    """An id that fits a bigint; anything else is a page that does not exist."""

    def __init__(self, url_map: Map) -> None:
        super().__init__(url_map, min=1, max=MAX_ID)


class Sessions(SecureCookieSessionInterface):
    """Cookies of our own, given and taken below /admin alone, and not kept alive by polling.

    On https the name begins with `__Host-` (RFC 6265bis, 4.1.3.2): a browser takes such a cookie
    from this very host only, so that no other site of the domain can plant one. That asks for
    `Path=/`, which guards nothing anyway (8.6); what matters is that no answer outside of /admin
    sets a cookie. A digest of the key keeps systems on two ports of one host apart.
    """

    def get_cookie_name(self, app: Flask) -> str:
        key = hashlib.sha256(b"cookie-name" + app.config["SECRET_KEY"].encode()).hexdigest()[:8]
        return f"{'__Host-' if self.get_cookie_secure(app) else ''}flash-sale-{key}"

    def get_cookie_path(self, app: Flask) -> str:
        return "/" if self.get_cookie_secure(app) else "/admin"

    def get_cookie_secure(self, app: Flask) -> bool:
        return bool(app.config["SESSION_COOKIE_SECURE"]) or request.is_secure

    def open_session(self, app: Flask, request: Request) -> SecureCookieSession | None:
        if not below_admin():
            return None
        serializer = self.get_signing_serializer(app)
        if serializer is None:
            return None
        max_age = int(app.permanent_session_lifetime.total_seconds())
        # Of several cookies of this name the browser sends them all; one may be ours.
        for value in request.cookies.getlist(self.get_cookie_name(app)):
            try:
                return SecureCookieSession(serializer.loads(value, max_age=max_age))
            except BadSignature:
                continue
        return SecureCookieSession()

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        # What a browser may keep, and what a page fetches by itself, carries nobody's cookie.
        if not is_poll() and not is_file():
            super().save_session(app, session, response)


def is_poll() -> bool:
    """Return whether a page asks by itself, without a person having done anything."""
    return request.headers.get("X-Poll") == "1" or (
        # rq-dashboard's pages ask for their figures every few seconds, and don't say so.
        request.blueprint == "rq_dashboard"
        and request.method == "GET"
        and request.path.endswith(".json")
    )


def is_file() -> bool:
    return (request.endpoint or "").rpartition(".")[2] == "static"


View = Callable[..., ResponseReturnValue]
WITHOUT_POSTGRES: set[View] = set()


def without_postgres(view: View) -> View:
    """Mark a change that a person may make though PostgreSQL can't confirm their session."""
    WITHOUT_POSTGRES.add(view)
    return view


def init_app(app: Flask) -> None:
    app.config["PERMANENT_SESSION_LIFETIME"] = SESSION_LIFETIME
    app.session_interface = Sessions()
    app.url_map.converters["id"] = IdConverter
    # Before the check of CSRF tokens, which an expired session would fail: it leads to the sign-in.
    app.before_request_funcs.setdefault(None, []).insert(0, require_person)
    app.after_request(add_headers)


def require_person() -> AnyResponse | None:
    """Refuse whoever is not signed in, or not in the role that the page asks for."""
    if not below_admin():
        return None
    # PostgreSQL's texts can't hold it, so no form or filter of ours can either.
    if any(
        "\0" in value
        for source in (request.args, request.form)
        for _, value in source.items(multi=True)
    ):
        abort(400)
    if request.method not in READING:
        require_own_page()
    if request.endpoint in OPEN_ENDPOINTS:
        return None
    if not current_user.is_authenticated:
        return to_sign_in()
    if request.blueprint and request.blueprint not in SUPPORT_PAGES and not current_user.is_admin:
        abort(403)
    if not current_user.confirmed and request.method not in READING:
        view = current_app.view_functions.get(request.endpoint or "")
        if view not in WITHOUT_POSTGRES:
            raise Unavailable("PostgreSQL can't confirm who is asking")
    return None


def require_own_page() -> None:
    """Refuse a change that a browser says another site asks for. Raises CSRFError.

    A second lock beside the token, so silence is no reason to refuse. Ports and schemes are not
    compared with Host, which a proxy may have written anew.
    """
    site: str | None = request.headers.get("Sec-Fetch-Site")
    if site is None:
        host = urlsplit(request.headers.get("Origin", "")).hostname
        site = "cross-site" if host and host != urlsplit(f"//{request.host}").hostname else None
    if site not in (None, "same-origin", "none"):
        raise CSRFError("This form was sent from a page of another site. Open the page here.")


def to_sign_in() -> AnyResponse:
    """Send the browser to the sign-in page, the whole page even if a fragment was asked for."""
    session.clear()
    if request.headers.get("HX-Request"):
        came_from = urlsplit(request.headers.get("HX-Current-URL", ""))
        target = url_for("session.sign_in", next=safe_target(_path_of(came_from)))
        return Response(status=401, headers={"HX-Redirect": target})
    page = request.full_path.rstrip("?") if request.method == "GET" else None
    return redirect(url_for("session.sign_in", next=safe_target(page)))


def _path_of(url: SplitResult) -> str:
    return f"{url.path}?{url.query}" if url.query else url.path


def safe_target(target: str | None) -> str | None:
    """Return the page to go to after signing in if it is one of ours, else None."""
    if not target or not (target == "/admin" or target.startswith("/admin/")):
        return None
    # Browsers take a backslash for a slash and drop control characters.
    if "\\" in target or any(character < " " for character in target):
        return None
    return target


def add_headers(response: Response) -> Response:
    """Set what web/headers.py leaves to the pages, and let browsers keep files with a version."""
    if below_admin():
        rq_dashboard = request.blueprint == "rq_dashboard"
        policy = RQ_DASHBOARD_POLICY if rq_dashboard else CONTENT_SECURITY_POLICY
        response.headers.setdefault("Content-Security-Policy", policy)
        # Without any, browsers would send `Origin: null` with our own forms too.
        response.headers.setdefault("Referrer-Policy", "same-origin")
        response.headers.setdefault("Cache-Control", "no-store")
        response.vary.add("HX-Request")
    elif request.path.startswith("/static/vendor/") and response.status_code == 200:
        response.headers["Cache-Control"] = f"public, max-age={YEAR_SECONDS}, immutable"
    return response
