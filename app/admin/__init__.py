"""The pages of the people who run a sale. Nothing below /admin is seen without signing in."""

from flask import Flask

from . import (
    audit,
    bulk_cancels,
    dashboard,
    dead_letters,
    display,
    guard,
    jobs,
    ledger,
    orders,
    products,
    session,
    staff,
    webhooks,
)

PAGES = (
    session, dashboard, products, orders, bulk_cancels, dead_letters, ledger, staff, webhooks,
    audit,
)  # fmt: skip


def init_app(app: Flask) -> None:
    """Register the guard first, then the pages."""
    guard.init_app(app)
    display.init_app(app)
    for page in PAGES:
        app.register_blueprint(page.bp)
    jobs.init_app(app)
