"""The JSON routes beside the purchase: lookups, metrics, products, restock, health."""

from flask import Blueprint, Response, current_app, g, jsonify, render_template, request, url_for
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import UnsupportedMediaType

from ..auth import metrics_token_required, token_required
from ..extensions import csrf, limiter, stock
from ..orders import lookup as orders
from ..problems import AnotherShopper, InvalidRequest, UnknownProduct, Unprepared
from ..products import inventory
from ..reading import (
    MAX_BODY_BYTES,
    MAX_ID,
    MAX_REASON,
    MAX_RESTOCK,
    check_key,
    read_integer,
    read_object,
    read_text,
)
from ..watch import health, telemetry
from . import openapi
from .errors import api_error

bp = Blueprint("api", __name__)
# No cookie speaks here, so there is nothing that another site could misuse.
csrf.exempt(bp)

# One style sheet of our own, and nothing else.
DOCS_POLICY = "default-src 'none'; style-src 'self'; img-src data:; frame-ancestors 'none'"
LOOKUP_LIMIT = "600/minute"
ADMIN_LIMIT = "600/minute"


def read_json() -> dict:
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
    if not text.isascii() or not text.isdigit() or len(text) > 16 or not low <= int(text) <= high:
        raise InvalidRequest(f"{name} must be a whole number from {low} to {high}", name)
    return int(text)


@bp.get("/purchase/orders/<user>")
@limiter.limit(LOOKUP_LIMIT)
def list_orders(user: str):
    """A shopper's orders, newest first; those of the last moment included."""
    if not user.isascii() or not user.isdigit() or len(user) > 16 or not 1 <= int(user) <= MAX_ID:
        raise InvalidRequest(f"userId must be a whole number from 1 to {MAX_ID}", "userId")
    limit = query_integer("limit", 1, orders.MAX_LISTED) or 50
    before = query_integer("before", 1, MAX_ID)
    if (shoppers := current_app.extensions["shoppers"]) and int(user) != shoppers.identify(
        request.headers.get("Authorization")
    ):
        raise AnotherShopper("The token is another shopper's")
    queued = orders.queued_orders_of(int(user), limit, before)
    try:
        return jsonify(orders.orders_of(queued, int(user), limit, before))
    except SQLAlchemyError:
        # An incomplete list would look like a lost order; what is known is told beside the error.
        return api_error(503, "Service unavailable", queued=queued)


@bp.get("/purchase/metrics")
@limiter.limit(LOOKUP_LIMIT)
def metrics():
    """The sale in figures, from Redis alone: it costs the same however many orders there are."""
    product_id = query_integer("productId", 1, MAX_ID)
    ids = stock.product_ids() if product_id is None else [product_id]
    view = stock.view(ids)
    if not view.generation:
        raise Unprepared("the sale is not in Redis")
    if product_id is not None and not view.products:
        raise UnknownProduct(product_id)
    figures = list(view.products.values())
    return jsonify(
        stock_remaining=sum(figure["free"] for figure in figures),
        queue_depth=sum(figure["accepted"] - figure["settled"] for figure in figures),
        total_processed=sum(figure["persisted"] for figure in figures),
    )


@bp.get("/products")
@limiter.limit(LOOKUP_LIMIT)
def list_products():
    return jsonify([inventory.describe(*pair) for pair in inventory.products_with_stock()])


@bp.get("/products/<int:product_id>")
@limiter.limit(LOOKUP_LIMIT)
def show_product(product_id: int):
    if not 1 <= product_id <= MAX_ID:
        raise UnknownProduct(product_id)
    return jsonify(inventory.describe(*inventory.products_with_stock(product_id)[0]))


@bp.post("/products")
@limiter.limit(ADMIN_LIMIT)
@token_required
def create_product():
    product, free = inventory.create_product(read_json(), g.actor)
    response = jsonify(inventory.describe(product, free))
    response.status_code = 201
    response.location = url_for("api.show_product", product_id=product.id)
    return response


@bp.patch("/products/<int:product_id>")
@limiter.limit(ADMIN_LIMIT)
@token_required
def change_product(product_id: int):
    data = read_json()
    if not 1 <= product_id <= MAX_ID:
        raise UnknownProduct(product_id)
    return jsonify(inventory.describe(*inventory.change_product(product_id, data, g.actor)))


@bp.post("/products/restock")
@limiter.limit(ADMIN_LIMIT)
@token_required
def restock():
    data = read_json()
    product_id = read_integer(data, "productId", 1, MAX_ID)
    amount = read_integer(data, "amount", 1, MAX_RESTOCK)
    reason = None
    if data.get("reason") is not None:
        reason = read_text(data, "reason", MAX_REASON)
    key = request.headers.get("Idempotency-Key")
    if key is not None:
        check_key(key)
    done = inventory.restock(product_id, amount, reason, g.actor, key)
    response = jsonify(productId=product_id, amount=amount, stock_remaining=done.free)
    if done.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


@bp.get("/openapi.json")
@limiter.exempt
def openapi_document():
    """The API for programs."""
    return Response(openapi.document_bytes(), mimetype="application/json")


@bp.get("/docs")
@limiter.exempt
def docs():
    """The API for people."""
    page = render_template(
        "docs.html", document=openapi.document(), operations=openapi.operations()
    )
    return page, {"Content-Security-Policy": DOCS_POLICY}


@bp.get("/metrics")
@limiter.exempt
@metrics_token_required
def prometheus_metrics():
    """Every figure in Prometheus's text format; of the whole sale, whichever process answers."""
    return Response(telemetry.exposition(), content_type=CONTENT_TYPE_LATEST)


@bp.get("/healthz")
@limiter.exempt
def alive():
    """The process answers; nothing else is asked."""
    return jsonify(status="ok")


@bp.get("/readyz")
@bp.get("/health")
@limiter.exempt
def ready():
    """Each part that a sale needs, named with its state; 503 while one is missing."""
    parts = health.check(current_app)
    ok = all(part["ok"] for part in parts.values())
    return jsonify(status="ok" if ok else "unavailable", checks=parts), 200 if ok else 503
