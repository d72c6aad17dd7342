"""Endpoints of webhooks: where events are sent to, what of them, and signed with which secret."""

import json
import re
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import SplitResult, urlsplit

from flask import current_app
from sqlalchemy import func, select, text, update

from ..audit import Actor, record
from ..events import TYPES
from ..extensions import db
from ..models import RequestKey, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from ..problems import Conflict, InvalidRequest, UnknownEndpoint
from ..reading import read_text
from ..times import utc_text
from . import reading, secret
from .sending import is_public

# Each is looked at several times a second, and may take a sender's time: it is for a shop's own
# systems, not for each of its customers.
MOST_ENDPOINTS = 100
MOST_URL = 2000
MOST_DESCRIPTION = 200
# Both secrets sign for so long after a rotation.
OVERLAP_HOURS = 24
MEMBERS = ("url", "types", "description")
HOST = re.compile(r"[0-9A-Za-z._-]{1,253}|[0-9A-Fa-f:.]{2,45}").fullmatch


def check_url(url: str) -> str:
    """Return an address that events may be sent to. Raises InvalidRequest.

    What a name leads to is looked at when something is sent, each time anew.
    """
    settings = current_app.config["SETTINGS"]
    schemes = ("https",) if settings.app_env == "production" else ("https", "http")
    if len(url) > MOST_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise _wrong_url(f"must be visible ASCII, at most {MOST_URL} characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _wrong_url("is no URL") from None
    if parts.scheme not in schemes:
        raise _wrong_url(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if not parts.hostname or not HOST(parts.hostname) or port == 0:
        raise _wrong_url("must name a host")
    if "@" in parts.netloc:
        raise _wrong_url("must hold no password: the signature is the proof")
    if parts.fragment:
        raise _wrong_url("must have no fragment")
    if not settings.webhook_allow_private and not _may_be_public(parts):
        raise _wrong_url("leads to a private address; WEBHOOK_ALLOW_PRIVATE allows that")
    return url


def _wrong_url(fault: str) -> InvalidRequest:
    return InvalidRequest(f"url {fault}", "url")


def _may_be_public(parts: SplitResult) -> bool:
    host = (parts.hostname or "").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return is_public(host)
    except ValueError:
        pass
    try:
        # 2130706433, 0x7f.1, 0: numbers that every resolver takes for an address (inet_aton(3)).
        return is_public(socket.inet_ntoa(socket.inet_aton(host)))
    except OSError:
        return True  # a name


def read(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of an endpoint that are given. Raises InvalidRequest."""
    values: dict[str, Any] = {}
    if "url" in data:
        values["url"] = check_url(read_text(data, "url", MOST_URL))
    if "types" in data:
        types = data["types"]
        if type(types) is not list or any(name not in TYPES for name in types):
            raise InvalidRequest(f"types must be a list of {', '.join(TYPES)}", "types")
        values["types"] = sorted(set(types))
    if "description" in data:
        empty = data["description"] == ""
        values["description"] = "" if empty else read_text(data, "description", MOST_DESCRIPTION)
    return values


def everything() -> list[WebhookEndpoint]:
    return list(db.session.scalars(select(WebhookEndpoint).order_by(WebhookEndpoint.id)))


def get(endpoint_id: int, lock: bool = False) -> WebhookEndpoint:
    """Return an endpoint. Raises UnknownEndpoint."""
    found = db.session.get(
        WebhookEndpoint, endpoint_id, with_for_update=lock or None, populate_existing=lock
    )
    if found is None:
        raise UnknownEndpoint(endpoint_id)
    return found


def create(
    values: Mapping[str, Any],
    actor: Actor,
    after: str | None = None,
    taken: RequestKey | None = None,
) -> tuple[WebhookEndpoint, str]:
    """Create an endpoint for what happens from now on, or after a cursor; return its secret too.

    The secret is told this once, and again to who repeats the request with its key, which is
    `taken`. Raises InvalidRequest, Conflict, CursorExpired.
    """
    if "url" not in values:
        raise InvalidRequest("url is required", "url")
    # Of two at once the second waits, and counts the first.
    db.session.execute(text("LOCK TABLE webhook_endpoints IN SHARE ROW EXCLUSIVE MODE"))
    if (db.session.scalar(select(func.count(WebhookEndpoint.id))) or 0) >= MOST_ENDPOINTS:
        db.session.rollback()
        raise Conflict(
            f"There are {MOST_ENDPOINTS} endpoints, the most there can be", "too_many_endpoints"
        )
    of = reading.ends()
    made = secret.make()
    endpoint = WebhookEndpoint(
        **values,
        secret=secret.seal(made),
        epoch=of.epoch,
        number=of.head if after is None else reading.number_of(after, of),
        created_by=actor.name,
    )
    db.session.add(endpoint)
    db.session.flush()
    _note(actor, "webhook.create", endpoint, after=_audited(endpoint))
    _answer(taken, endpoint=endpoint.id, sealed=endpoint.secret)
    db.session.commit()
    return endpoint, made


def change(endpoint_id: int, values: Mapping[str, Any], actor: Actor) -> WebhookEndpoint:
    """Change where an endpoint is, or what is sent there; what is on its way stays as it is.

    Raises UnknownEndpoint.
    """
    endpoint = get(endpoint_id, lock=True)
    former, before = endpoint.url, _audited(endpoint)
    for name, value in values.items():
        setattr(endpoint, name, value)
    if "url" in values:
        # Another address may well answer at once.
        endpoint.next_at = func.now()
    now = _audited(endpoint)
    if endpoint.url != former and now["url"] == before["url"]:
        now["url"] += " (another query)"
    if now != before:
        _note(actor, "webhook.change", endpoint, before=before, after=now)
    db.session.commit()
    return endpoint


def switch(endpoint_id: int, on: bool, actor: Actor) -> WebhookEndpoint:
    """Switch an endpoint on, where it goes on with what it has not had, or off.

    Raises UnknownEndpoint.
    """
    endpoint = get(endpoint_id, lock=True)
    if (endpoint.state == "on") is not on:
        endpoint.state, endpoint.off_reason = ("on" if on else "off"), None
        endpoint.failures, endpoint.failing_since = 0, None
        endpoint.next_at = func.now()
        _note(actor, "webhook.on" if on else "webhook.off", endpoint)
    db.session.commit()
    return endpoint


def remove(endpoint_id: int, actor: Actor) -> None:
    """Remove an endpoint and what was sent to it. Raises UnknownEndpoint."""
    endpoint = get(endpoint_id, lock=True)
    _note(actor, "webhook.remove", endpoint, before=_audited(endpoint))
    db.session.delete(endpoint)
    db.session.commit()


def rotate(
    endpoint_id: int, actor: Actor, taken: RequestKey | None = None
) -> tuple[WebhookEndpoint, str]:
    """Make a new secret; the former one signs too for OVERLAP_HOURS. Raises UnknownEndpoint."""
    endpoint = get(endpoint_id, lock=True)
    made = secret.make()
    endpoint.former_secret = endpoint.secret
    # By PostgreSQL's clock, as every moment that senders on other machines look at.
    endpoint.former_until = func.clock_timestamp() + timedelta(hours=OVERLAP_HOURS)
    endpoint.secret = secret.seal(made)
    _note(actor, "webhook.rotate", endpoint)
    _answer(taken, endpoint=endpoint.id, sealed=endpoint.secret)
    db.session.commit()
    return endpoint, made


def made_before(answer: Mapping[str, Any]) -> tuple[WebhookEndpoint, str]:
    """Return what a request with the same key has made: the endpoint, and the secret of then.

    Raises UnknownEndpoint when it is removed.
    """
    try:
        return get(answer["endpoint"]), secret.unseal(answer["sealed"])
    except secret.Unreadable:
        raise Conflict(
            "SECRET_KEY was changed since: make a new secret", "secret_unreadable"
        ) from None


def _answer(taken: RequestKey | None, **answer: Any) -> None:
    """Keep, in the transaction of the act, what a request with the same key is to be told."""
    if taken:
        taken.answer = answer


def secrets_of(endpoint: WebhookEndpoint, now: datetime) -> list[str]:
    """Return the secrets that are in force now, by PostgreSQL's clock, the newest first.

    Raises secret.Unreadable.
    """
    found = [secret.unseal(endpoint.secret)]
    if endpoint.former_secret and endpoint.former_until and endpoint.former_until > now:
        # From before SECRET_KEY was changed: the new one is enough.
        with suppress(secret.Unreadable):
            found.append(secret.unseal(endpoint.former_secret))
    return found


def send_test(endpoint_id: int, actor: Actor, taken: RequestKey | None = None) -> WebhookDelivery:
    """Have a test sent, once, whether the endpoint is on or off. Raises UnknownEndpoint."""
    endpoint = get(endpoint_id)
    now = db.session.scalars(select(func.clock_timestamp())).one()
    event = {"id": "test", "type": "test", "at": utc_text(now)}
    delivery = WebhookDelivery(
        endpoint_id=endpoint.id,
        kind="test",
        message_id=new_message_id(),
        events=1,
        body=message(now, [json.dumps(event).encode()]).decode(),
        created_at=now,
        wanted_at=now,
    )
    db.session.add(delivery)
    db.session.flush()
    _note(actor, "webhook.test", endpoint)
    _answer(taken, delivery=delivery.id)
    db.session.commit()
    return delivery


def redeliver(
    endpoint_id: int, delivery_id: int, actor: Actor, taken: RequestKey | None = None
) -> WebhookDelivery:
    """Have a delivery sent once more, with the same id and contents. Raises UnknownEndpoint."""
    endpoint, delivery = get(endpoint_id), delivery_of(endpoint_id, delivery_id)
    delivery.wanted_at = func.clock_timestamp()
    _note(actor, "webhook.redeliver", endpoint, after={"delivery": delivery_id})
    _answer(taken, delivery=delivery.id)
    db.session.commit()
    return delivery


def new_message_id() -> str:
    return "msg_" + secrets.token_urlsafe(18)


def message(moment: datetime, events: list[bytes]) -> bytes:
    """Return the body of a delivery, of events in JSON."""
    timestamp = utc_text(moment).encode()
    return b'{"type":"events","timestamp":"%b","data":{"events":[%b]}}' % (
        timestamp,
        b",".join(events),
    )


def delivery_of(endpoint_id: int, delivery_id: int) -> WebhookDelivery:
    """Return a delivery to an endpoint. Raises UnknownEndpoint."""
    found = db.session.get(WebhookDelivery, delivery_id)
    if found is None or found.endpoint_id != endpoint_id:
        raise UnknownEndpoint(delivery_id)
    return found


def deliveries(
    endpoint_id: int, before: int | None = None, limit: int = 50
) -> list[WebhookDelivery]:
    """Return what was, or is to be, sent to an endpoint, the newest first."""
    query = (
        select(WebhookDelivery)
        .where(WebhookDelivery.endpoint_id == endpoint_id)
        .order_by(WebhookDelivery.id.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(WebhookDelivery.id < before)
    return list(db.session.scalars(query))


def attempts(delivery_id: int, limit: int = 100) -> list[WebhookAttempt]:
    """Return the newest attempts of a delivery."""
    query = select(WebhookAttempt).where(WebhookAttempt.delivery_id == delivery_id)
    return list(db.session.scalars(query.order_by(WebhookAttempt.id.desc()).limit(limit)))


# Of each endpoint the one delivery that may hold the number; it holds what was wanted then.
HOLDING = text("""
    SELECT DISTINCT d.id
    FROM webhook_endpoints e CROSS JOIN unnest(CAST(:numbers AS bigint[])) AS n,
      LATERAL (SELECT id, first_number FROM webhook_deliveries
               WHERE endpoint_id = e.id AND last_number >= n ORDER BY last_number LIMIT 1) AS d
    WHERE d.first_number <= n
""")


def deliveries_of(numbers: list[int]) -> list[tuple[WebhookEndpoint, WebhookDelivery]]:
    """Return the deliveries that hold any of these events of the present sale."""
    of = reading.ends()
    ids = list(db.session.scalars(HOLDING, {"numbers": numbers}))
    found = db.session.execute(
        select(WebhookEndpoint, WebhookDelivery)
        .join(WebhookDelivery, WebhookDelivery.endpoint_id == WebhookEndpoint.id)
        .where(WebhookDelivery.id.in_(ids))
        .order_by(WebhookEndpoint.id, WebhookDelivery.id)
    )
    named = [f'"{of.cursor(number)}"' for number in numbers]
    return [
        (endpoint, delivery)
        for endpoint, delivery in found
        if any(name in delivery.body for name in named)
    ]


def begin_anew(epoch: str) -> None:
    """Let every endpoint follow another sale from its beginning, in the current transaction."""
    db.session.execute(
        update(WebhookEndpoint).values(
            epoch=epoch, number=0, failures=0, failing_since=None, next_at=func.now()
        )
    )


def describe(endpoint: WebhookEndpoint) -> dict[str, Any]:
    """Return the endpoint as the API shows it; no secret is in it."""
    failing = endpoint.state == "on" and endpoint.failures
    return {
        "id": endpoint.id,
        "url": endpoint.url,
        "types": endpoint.types or [],
        "description": endpoint.description or "",
        "enabled": endpoint.state == "on",
        "offReason": endpoint.off_reason,
        "after": f"{endpoint.epoch}-{endpoint.number}",
        "failures": endpoint.failures,
        "failingSince": endpoint.failing_since and utc_text(endpoint.failing_since),
        "nextAttemptAt": utc_text(endpoint.next_at) if failing else None,
        "createdAt": utc_text(endpoint.created_at),
    }


def describe_delivery(delivery: WebhookDelivery) -> dict[str, Any]:
    """Return a delivery as the API shows it, without its contents."""
    return {
        "id": delivery.id,
        "messageId": delivery.message_id,
        "kind": delivery.kind,
        "events": delivery.events,
        "state": state_of(delivery),
        "attempts": delivery.attempts,
        "createdAt": utc_text(delivery.created_at),
        "deliveredAt": delivery.delivered_at and utc_text(delivery.delivered_at),
    }


def describe_attempt(attempt: WebhookAttempt) -> dict[str, Any]:
    return {
        "at": utc_text(attempt.at),
        "milliseconds": attempt.milliseconds,
        "status": attempt.status,
        "error": attempt.error,
    }


def state_of(delivery: WebhookDelivery) -> str:
    if delivery.delivered_at:
        return "delivered"
    return "waiting" if delivery.pending or delivery.wanted_at else "failed"


def _audited(endpoint: WebhookEndpoint) -> dict[str, Any]:
    members = {name: getattr(endpoint, name) for name in MEMBERS}
    return members | {"url": endpoint.shown_url}


def _note(actor: Actor, action: str, endpoint: WebhookEndpoint, **more: Any) -> None:
    record(actor, action, f"webhook {endpoint.id}", **more)
