"""A shop whose webhooks may be sent to this machine, and somebody who takes them."""

from dataclasses import replace
from unittest.mock import patch

import pytest
from consumer import Consumer, number
from sqlalchemy import text

from app.extensions import db
from app.orders.drain import drain_batch


@pytest.fixture
def consumer():
    started = Consumer()
    yield started
    started.close()


def forget() -> None:
    """Delete every endpoint, and what was sent there; their ids begin with 1 again."""
    for table in ("webhook_attempts", "webhook_deliveries", "webhook_endpoints"):
        db.session.execute(text(f"DELETE FROM {table}"))
        counter = {"name": f"{table}_id_seq"}
        db.session.execute(text("SELECT setval(:name, 1, false)"), counter)
    db.session.commit()


@pytest.fixture
def shop(app, settings):
    """The app, whose webhooks may be sent to this machine; its endpoints' ids begin with 1."""
    allowed = {"SETTINGS": replace(settings, webhook_allow_private=True)}
    with app.app_context(), patch.dict(app.config, allowed):
        forget()
        yield app
        db.session.remove()
        forget()


@pytest.fixture
def sell(shop):
    """Have so many orders stored, and their events numbered."""
    users = iter(range(1, 100_000))

    def run(count: int = 1) -> None:
        client = shop.test_client()
        for _ in range(count):
            client.post("/purchase", json={"userId": next(users), "productId": 1, "quantity": 1})
        drain_batch("test", "test")
        number()

    return run
