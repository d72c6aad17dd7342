"""The flash-sale system: a JSON purchase API and HTMX admin pages on one Flask app."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from flask import Flask
    from flask.json.provider import DefaultJSONProvider

    from .config import Settings


def create_app(
    settings: Settings | None = None, *, pages: bool = True, commands: bool = True
) -> Flask:
    """Build the app. The servers need not be up: nothing is connected before the first request.

    A program asks for what it needs, for importing takes most of its start: `pages` are all that
    answers requests, `commands` those of cli.py, a worker has neither. Raises SettingsError for
    settings that can't work. What makes an app is imported only here: programs that start others
    do without.
    """
    from flask import Flask, has_request_context

    from . import database
    from .books import recovery
    from .config import ROOT, load_settings, with_secrets
    from .extensions import db, limiter, stock

    settings = with_secrets(settings or load_settings())
    app = Flask(
        __name__,
        template_folder=str(ROOT / "templates"),
        static_folder=str(ROOT / "static"),
    )
    app.config.from_mapping(flask_config(settings))
    database.limit_waits(has_request_context)

    db.init_app(app)
    stock.init_app(settings, lambda: recovery.sale_on_record(app))
    app.config["RATELIMIT_STORAGE_OPTIONS"] = {
        "connection_pool": stock.jobs_server.pool(decode=False)
    }
    if pages:
        _serve_requests(app, settings)
    if commands:
        from . import cli

        cli.init_app(app)
        if not pages:
            limiter.init_app(app)  # a new password ends the count of wrong ones
    return app


def _serve_requests(app: Flask, settings: Settings) -> None:
    """Add the pages, the API and the purchase lane."""
    from werkzeug.middleware.proxy_fix import ProxyFix

    from . import admin, logs
    from .breaker import one_request
    from .extensions import csrf, limiter, login, stock
    from .web import api, errors, events, front, headers, orders, webhooks
    from .web.identity import Shoppers
    from .web.lane import PurchaseLane
    from .web.polls import Polls

    cast("DefaultJSONProvider", app.json).sort_keys = False
    # Such a path is not there; a redirect to the right one would be built from the client's Host.
    app.url_map.merge_slashes = False

    csrf.init_app(app)
    login.init_app(app)
    limiter.init_app(app)
    headers.init_app(app)
    logs.init_app(app)
    errors.init_app(app)

    app.register_blueprint(api.bp)
    app.register_blueprint(events.bp)
    app.register_blueprint(webhooks.bp)
    app.register_blueprint(orders.bp)
    app.register_blueprint(front.bp)
    admin.init_app(app)

    app.extensions["polls"] = Polls()
    shoppers = Shoppers(settings) if settings.shopper_auth == "jwt" else None
    app.extensions["shoppers"] = shoppers
    # What a page waits for a server has a bound for all its questions together.
    lane = PurchaseLane(one_request()(app.wsgi_app), stock, settings, shoppers)
    app.extensions["lane"] = lane
    app.wsgi_app = lane  # type: ignore[method-assign]  # Flask's own way for middleware
    if settings.trusted_proxies:
        # Each hop adds to X-Forwarded-For. X-Forwarded-Proto is set anew by the last one, and the
        # host is taken from Host alone, so that a client can't choose it.
        proxied = ProxyFix(lane, x_for=settings.trusted_proxies, x_proto=1, x_host=0)
        app.wsgi_app = proxied  # type: ignore[method-assign]  # the same


def flask_config(settings: Settings) -> dict[str, Any]:
    """Return what Flask and its extensions read, derived from our settings."""
    from . import database

    return {
        "SETTINGS": settings,
        "SECRET_KEY": settings.secret_key,
        "ADMIN_API_TOKEN": settings.admin_api_token,
        "SQLALCHEMY_DATABASE_URI": settings.database_url,
        "SQLALCHEMY_ENGINE_OPTIONS": database.ENGINE_OPTIONS,
        # It gets connections of ours, so nothing else of a URL counts.
        "RATELIMIT_STORAGE_URI": "redis://",
        # Its own headers are an older draft's, with a Retry-After on answers that are no refusal.
        "RATELIMIT_HEADERS_ENABLED": False,
        "RATELIMIT_KEY_PREFIX": "limits",
        "SESSION_COOKIE_HTTPONLY": True,
        "SESSION_COOKIE_SECURE": settings.app_env == "production",
        "SESSION_COOKIE_SAMESITE": "Lax",
        # The purchase API has its own, tighter bound; this one is for the forms.
        "MAX_CONTENT_LENGTH": 64 * 1024,
        "WTF_CSRF_TIME_LIMIT": None,
        # The token is the lock. A Referer may be missing for good reasons; what browsers say of
        # where a request comes from is looked at in admin/guard.py.
        "WTF_CSRF_SSL_STRICT": False,
    }
