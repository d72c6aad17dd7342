"""The JSON routes of webhooks: endpoints, their secrets, and what was sent to them."""

from typing import Any

from flask import Blueprint, Response, g, jsonify, request, url_for
from flask.typing import ResponseReturnValue

from .. import idempotency
from ..extensions import csrf
from ..feed import webhooks
from ..models import RequestKey, WebhookDelivery, WebhookEndpoint
from ..problems import InvalidRequest, UnknownEndpoint
from ..reading import MAX_ID, check_known
from .access import token_required
from .api import idempotency_key, query_integer, read_json

bp = Blueprint("webhooks", __name__, url_prefix="/webhooks")
csrf.exempt(bp)

MEMBERS = ("url", "types", "description")
MOST_LISTED = 100
# The identity column of endpoints is an integer.
MAX_ENDPOINT = 2**31 - 1


def members(*known: str) -> dict[str, Any]:
    """Return the request's members. Raises InvalidRequest for one that is not known here.

    A body is needed only where there are members.
    """
    data = read_json() if known or request.content_length or request.mimetype else {}
    check_known(data, known)
    return data


def keyed(resource: str, content: object = None) -> tuple[RequestKey | None, Any]:
    """Take the request's Idempotency-Key for its act; return also what it has answered before.

    Raises InvalidRequest and KeyMismatch.
    """
    key = idempotency_key()
    if key is None:
        return None, None
    route = f"{request.method} {request.url_rule.rule if request.url_rule else ''}"
    taken = idempotency.take(route, resource, key, content)
    return taken, taken.answer


def with_secret(endpoint: WebhookEndpoint, secret: str, replayed: bool = False) -> Response:
    """Show an endpoint with the secret that was just made, and is never shown again."""
    response = jsonify(webhooks.describe(endpoint) | {"secret": secret})
    response.headers["Cache-Control"] = "no-store"
    return _marked(response, replayed)


def accepted(delivery: WebhookDelivery, replayed: bool = False) -> Response:
    response = jsonify(webhooks.describe_delivery(delivery))
    response.status_code = 202
    return _marked(response, replayed)


def _marked(response: Response, replayed: bool) -> Response:
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def known(endpoint_id: int) -> int:
    if not 1 <= endpoint_id <= MAX_ENDPOINT:
        raise UnknownEndpoint(endpoint_id)
    return endpoint_id


@bp.get("")
@token_required
def index() -> ResponseReturnValue:
    return jsonify([webhooks.describe(endpoint) for endpoint in webhooks.everything()])


@bp.post("")
@token_required
def create() -> ResponseReturnValue:
    data = members(*MEMBERS, "after")
    if type(data.get("after", "")) is not str:
        raise InvalidRequest("after must be the id of an event, or what next was", "after")
    after = data.pop("after", None)
    values = webhooks.read(data)
    taken, answer = keyed("", values | {"after": after})
    if answer is None:
        endpoint, secret = webhooks.create(values, g.actor, after, taken)
    else:
        endpoint, secret = webhooks.made_before(answer)
    response = with_secret(endpoint, secret, answer is not None)
    response.status_code = 201
    response.location = url_for("webhooks.show", endpoint_id=endpoint.id)
    return response


@bp.get("/<int:endpoint_id>")
@token_required
def show(endpoint_id: int) -> ResponseReturnValue:
    return jsonify(webhooks.describe(webhooks.get(known(endpoint_id))))


@bp.patch("/<int:endpoint_id>")
@token_required
def change(endpoint_id: int) -> ResponseReturnValue:
    data = members(*MEMBERS, "enabled")
    if type(data.get("enabled", True)) is not bool:
        raise InvalidRequest("enabled must be true or false", "enabled")
    enabled = data.pop("enabled", None)
    endpoint = webhooks.change(known(endpoint_id), webhooks.read(data), g.actor)
    if enabled is not None:
        endpoint = webhooks.switch(endpoint_id, enabled, g.actor)
    return jsonify(webhooks.describe(endpoint))


@bp.delete("/<int:endpoint_id>")
@token_required
def remove(endpoint_id: int) -> ResponseReturnValue:
    webhooks.remove(known(endpoint_id), g.actor)
    return "", 204


@bp.post("/<int:endpoint_id>/secret")
@token_required
def rotate(endpoint_id: int) -> ResponseReturnValue:
    """Make a new secret; the former one signs too for a day."""
    members()
    taken, answer = keyed(str(known(endpoint_id)))
    if answer is not None:
        return with_secret(*webhooks.made_before(answer), replayed=True)
    return with_secret(*webhooks.rotate(endpoint_id, g.actor, taken))


@bp.post("/<int:endpoint_id>/test")
@token_required
def test(endpoint_id: int) -> ResponseReturnValue:
    members()
    taken, answer = keyed(str(known(endpoint_id)))
    if answer is not None:
        return accepted(webhooks.delivery_of(endpoint_id, answer["delivery"]), replayed=True)
    return accepted(webhooks.send_test(endpoint_id, g.actor, taken))


@bp.get("/<int:endpoint_id>/deliveries")
@token_required
def list_deliveries(endpoint_id: int) -> ResponseReturnValue:
    limit = query_integer("limit", 1, MOST_LISTED) or 50
    before = query_integer("before", 1, MAX_ID)
    webhooks.get(known(endpoint_id))
    found = webhooks.deliveries(endpoint_id, before, limit)
    return jsonify([webhooks.describe_delivery(delivery) for delivery in found])


@bp.get("/<int:endpoint_id>/deliveries/<int:delivery_id>")
@token_required
def show_delivery(endpoint_id: int, delivery_id: int) -> ResponseReturnValue:
    delivery = found_delivery(endpoint_id, delivery_id)
    return jsonify(
        webhooks.describe_delivery(delivery)
        | {"attemptList": [webhooks.describe_attempt(a) for a in webhooks.attempts(delivery_id)]}
    )


@bp.post("/<int:endpoint_id>/deliveries/<int:delivery_id>/redeliver")
@token_required
def redeliver(endpoint_id: int, delivery_id: int) -> ResponseReturnValue:
    """Have it sent once more, as it was."""
    members()
    delivery = found_delivery(endpoint_id, delivery_id)
    taken, answer = keyed(f"{endpoint_id}/{delivery_id}")
    if answer is not None:
        return accepted(delivery, replayed=True)
    return accepted(webhooks.redeliver(endpoint_id, delivery_id, g.actor, taken))


def found_delivery(endpoint_id: int, delivery_id: int) -> WebhookDelivery:
    if not 1 <= delivery_id <= MAX_ID:
        raise UnknownEndpoint(delivery_id)
    return webhooks.delivery_of(known(endpoint_id), delivery_id)
