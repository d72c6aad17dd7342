"""The JSON routes beside the purchase: lookups, metrics, products, restock, health."""

import re
from collections.abc import Sequence
from typing import Any

from flask import Blueprint, Response, current_app, g, jsonify, render_template, request, url_for
from flask.typing import ResponseReturnValue
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import UnsupportedMediaType

from ..extensions import csrf, limiter, stock
from ..models import Product
from ..orders import lookup as orders
from ..orders.lookup import MAX_LISTED
from ..problems import AnotherShopper, InvalidRequest, UnknownProduct, Unprepared
from ..products import catalogue, movements, terms
from ..products.brake import brake
from ..reading import (
    MAX_BODY_BYTES,
    MAX_ID,
    MAX_REASON,
    MAX_RESTOCK,
    check_key,
    check_known,
    read_digits,
    read_integer,
    read_object,
    read_text,
    read_user,
)
from ..stock.figures import can_be_bought
from ..watch import health, telemetry
from . import openapi, probe
from .access import metrics_token_required, token_optional, token_with
from .errors import RETRY_AFTER_SECONDS, api_error
from .limits import lookup_limit

bp = Blueprint("api", __name__)
# No cookie speaks here, so there is nothing that another site could misuse.
csrf.exempt(bp)

# One style sheet of our own, and nothing else.
DOCS_POLICY = "default-src 'none'; style-src 'self'; img-src data:; frame-ancestors 'none'"
VERSION_TAG = re.compile(r'(?:W/)?"([0-9]{1,18})"').fullmatch


def read_json() -> dict[str, Any]:
    """Return the JSON object of the request. Raises InvalidRequest and HTTP 413 and 415."""
    request.max_content_length = MAX_BODY_BYTES
    if request.mimetype != "application/json":
        raise UnsupportedMediaType
    return read_object(request.get_data())


def query_integer(name: str, low: int, high: int) -> int | None:
    """Return a whole number of the query string, None where it is absent. Raises InvalidRequest."""
    text = request.args.get(name)
    if text is None:
        return None
    number = read_digits(text, low, high)
    if number is None:
        raise InvalidRequest(f"{name} must be a whole number from {low} to {high}", name)
    return number


def idempotency_key() -> str | None:
    """Return the request's Idempotency-Key, None where there is none. Raises InvalidRequest."""
    key = request.headers.get("Idempotency-Key")
    if key is not None:
        check_key(key)
    return key


def expected_versions() -> set[int] | None:
    """Return the versions that If-Match allows (RFC 9110, 13.1.1), None where any will do.

    `W/"7"` counts as `"7"`: a proxy that compresses weakens the tags of what it passes on, and
    ours name the terms, whatever bytes they come in. Raises InvalidRequest.
    """
    text = request.headers.get("If-Match")
    if text is None or text.strip() == "*":
        return None
    tags = [VERSION_TAG(tag.strip()) for tag in text.split(",")]
    versions = {int(tag[1]) for tag in tags if tag}
    if None in tags:
        raise InvalidRequest('If-Match must be an ETag as it was answered, like "7"', "If-Match")
    return versions


def with_version(response: Response, version: int) -> Response:
    """Add the version of the product's terms as the ETag, which If-Match takes."""
    response.headers["ETag"] = f'"{version}"'
    return response


@bp.get("/purchase/orders/<user>")
@lookup_limit
def list_orders(user: str) -> ResponseReturnValue:
    """A shopper's orders, newest first; those of the last moment included."""
    shopper = read_user({"userId": user})
    limit = query_integer("limit", 1, MAX_LISTED) or 50
    before = query_integer("before", 1, MAX_ID)
    current_app.extensions["lane"].callers.check(request.remote_addr or "")
    if (shoppers := current_app.extensions["shoppers"]) and shopper != shoppers.identify(
        request.headers.get("Authorization")
    ):
        raise AnotherShopper("The token is another shopper's")
    queued = orders.queued_orders_of(shopper, limit, before)
    try:
        return jsonify(orders.orders_of(queued, shopper, limit, before))
    except SQLAlchemyError:
        # An incomplete list would look like a lost order; what is known is told beside the error.
        return api_error(503, "Service unavailable", queued=queued)


@bp.get("/purchase/metrics")
@lookup_limit
def metrics() -> ResponseReturnValue:
    """The sale in figures, from Redis alone: it costs the same however many orders there are."""
    product_id = query_integer("productId", 1, MAX_ID)
    view = stock.view([], stock.product_ids()) if product_id is None else stock.view([product_id])
    if not view.generation:
        raise Unprepared("the sale is not in Redis")
    # What nobody can buy, a draft or an archived product, is not there to shoppers.
    if product_id is not None and not any(map(can_be_bought, view.products.values())):
        raise UnknownProduct(product_id)
    sums = view.sums()
    return jsonify(
        stock_remaining=sums["on_sale"],
        queue_depth=sums["accepted"] - sums["settled"],
        total_processed=sums["persisted"],
    )


@bp.get("/products")
@lookup_limit
@token_optional
def list_products() -> ResponseReturnValue:
    """The products that shoppers are shown; with an API token every product."""
    limit = query_integer("limit", 1, catalogue.MOST_LISTED)
    after = query_integer("after", 0, MAX_ID) or 0
    found = catalogue.listed(g.actor is not None, limit, after)
    response = jsonify([terms.describe(*pair) for pair in found.products])
    if found.after is not None:
        # Without a value, `limit` is left out.
        target = url_for("api.list_products", limit=limit, after=found.after)
        response.headers["Link"] = f'<{target}>; rel="next"'
    return response


@bp.get("/products/<int:product_id>")
@lookup_limit
@token_optional
def show_product(product_id: int) -> ResponseReturnValue:
    if not 1 <= product_id <= MAX_ID:
        raise UnknownProduct(product_id)
    return show(*catalogue.product_with_stock(product_id, g.actor is not None))


def show(product: Product, free: int, pending: Sequence[int] = ()) -> Response:
    return with_version(changed(terms.describe(product, free), pending), product.version)


def changed(answer: dict[str, Any], pending: Sequence[int]) -> Response:
    """Return what a change came to: 202 where it waits for shards that can't be reached."""
    response = jsonify(answer | ({"pendingShards": pending} if pending else {}))
    response.status_code = 202 if pending else 200
    return response


@bp.post("/products")
@token_with("products:write")
def create_product() -> ResponseReturnValue:
    created = catalogue.create(terms.read_new(read_json()), g.actor, idempotency_key())
    response = with_version(jsonify(created.product), created.version)
    response.status_code = 201
    response.location = url_for("api.show_product", product_id=created.product["id"])
    if created.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


@bp.patch("/products/<int:product_id>")
@token_with("products:write")
def change_product(product_id: int) -> ResponseReturnValue:
    values = terms.read(read_json())
    if not 1 <= product_id <= MAX_ID:
        raise UnknownProduct(product_id)
    try:
        return show(*catalogue.change(product_id, values, g.actor, expected_versions()))
    except catalogue.StaleVersion as stale:
        product, free = catalogue.product_with_stock(product_id)
        now = terms.describe(product, free)
        return with_version(api_error(409, str(stale), stale.code, product=now), product.version)


@bp.post("/products/restock")
@token_with("products:write")
def restock() -> ResponseReturnValue:
    data = read_json()
    check_known(data, ("productId", "amount", "reason"))
    product_id = read_integer(data, "productId", 1, MAX_ID)
    amount = read_integer(data, "amount", 1, MAX_RESTOCK)
    reason = None
    if data.get("reason") is not None:
        reason = read_text(data, "reason", MAX_REASON)
    done = movements.restock(product_id, amount, reason, g.actor, idempotency_key())
    response = jsonify(productId=product_id, amount=amount, stock_remaining=done.free)
    if done.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


@bp.post("/sale/brake")
@token_with("products:write")
def brake_sale() -> ResponseReturnValue:
    """Stop one product or every one at once, or release them; Redis alone is asked."""
    data = read_json()
    check_known(data, ("on", "productId"))
    if type(data.get("on")) is not bool:
        raise InvalidRequest("on must be true or false", "on")
    product_id = None
    if data.get("productId") is not None:
        product_id = read_integer(data, "productId", 1, MAX_ID)
    done = brake(data["on"], product_id, g.actor, idempotency_key())
    told = {
        "on": done.on,
        "products": done.products,
        "saleBraked": done.sale,
        "stillBraked": done.still,
    }
    response = changed(told, done.pending)
    if done.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


@bp.get("/openapi.json")
@limiter.exempt
def openapi_document() -> ResponseReturnValue:
    """The API for programs."""
    return Response(openapi.document_bytes(), mimetype="application/json")


@bp.get("/docs")
@limiter.exempt
def docs() -> ResponseReturnValue:
    """The API for people."""
    page = render_template(
        "docs.html", document=openapi.document(), operations=openapi.operations()
    )
    return page, {"Content-Security-Policy": DOCS_POLICY}


@bp.get("/metrics")
@limiter.exempt
@metrics_token_required
def prometheus_metrics() -> ResponseReturnValue:
    """Every figure in Prometheus's text format; of the whole sale, whichever process answers."""
    return Response(telemetry.exposition(), content_type=CONTENT_TYPE_LATEST)


@bp.get("/healthz")
@limiter.exempt
def alive() -> ResponseReturnValue:
    """The process answers; nothing else is asked."""
    return jsonify(status="ok")


@bp.get("/readyz")
@bp.get("/health")
@limiter.exempt
def ready() -> ResponseReturnValue:
    """Each part that a sale needs, named with its state; 503 while one is missing."""
    parts = health.check(current_app)
    ok = all(part["ok"] for part in parts.values())
    answer = jsonify(status="ok" if ok else "unavailable", checks=parts)
    answer.headers["Cache-Control"] = "no-store"
    return _when_unavailable(answer, 200 if ok else 503)


@bp.get(probe.PATH)
@limiter.exempt
def ready_to_sell() -> ResponseReturnValue:
    """Whether this process can sell, whatever PostgreSQL and workers do."""
    status, found = probe.ask_thread_line()
    answer = jsonify(found)
    answer.headers["Cache-Control"] = "no-store"
    return _when_unavailable(answer, status)


def _when_unavailable(answer: Response, status: int) -> Response:
    answer.status_code = status
    if status == 503:
        answer.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return answer
