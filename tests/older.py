"""A database as an earlier version left it, on which migrations are tried."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import flask_migrate
from flask import Flask
from sqlalchemy import create_engine, text

from app import create_app
from app.config import Settings
from app.extensions import db, stock


@contextmanager
def database_of(settings: Settings, revision: str) -> Iterator[Flask]:
    """Yield an app, in its context, on a database of its own with the tables of a revision.

    It has product 1, whose price is one cent.
    """
    server = create_engine(settings.database_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text("CREATE DATABASE older"))
    app = create_app(
        replace(settings, database_url=settings.database_url.replace("/flashsale?", "/older?"))
    )
    with app.app_context():
        flask_migrate.upgrade(revision=revision)
        db.session.execute(
            text("INSERT INTO products (name, price_cents, currency) VALUES ('Lamp', 1, 'USD')")
        )
        db.session.commit()
        yield app
        db.session.remove()
        db.engine.dispose()
    with server.connect() as connection:
        connection.execute(text("DROP DATABASE older"))
    server.dispose()
    # The one stock of all apps belongs to the tests' own again.
    stock.init_app(settings)
