"""The JSON routes by which the shop's own programs read orders and give them back."""

import re
from datetime import datetime
from typing import Any

from flask import Blueprint, Response, current_app, g, jsonify, request, url_for
from flask.typing import ResponseReturnValue

from ..extensions import csrf
from ..models import MAX_HOLD_SECONDS
from ..orders import bulk, cancelling, holds, listing, search
from ..orders.states import HoldExpired
from ..problems import InvalidRequest, UnknownOrder
from ..products import terms
from ..reading import (
    MAX_ID,
    MAX_QUANTITY,
    MAX_REASON,
    check_known,
    read_digits,
    read_integer,
    read_reference,
    read_text,
    read_user,
)
from .access import token_with
from .api import idempotency_key, query_integer, read_json
from .errors import api_error

bp = Blueprint("orders_api", __name__)
csrf.exempt(bp)

FILTERS = ("userId", "reference", "productId", "status", "limit", "cursor")
CANCEL = ("quantity", "reason")
SCOPE = "orders:write"
CONFIRM = ("payment",)
RELEASE = ("reason",)
EXTEND = ("seconds",)
PAYMENT = re.compile(rf"[\x21-\x7e]{{1,{holds.MAX_PAYMENT}}}").fullmatch
BULK = (
    "productId", "userId", "reference", "claimedFrom", "claimedUntil", "reason", "orders",
    "throughOrderId", "dryRun",
)  # fmt: skip


def read_id(order_id: int) -> int:
    if not 1 <= order_id <= MAX_ID:
        raise UnknownOrder(order_id)
    return order_id


@bp.get("/orders")
@token_with("orders:read")
def list_orders() -> ResponseReturnValue:
    """Orders, newest first; those of the last moment included."""
    args = request.args
    check_known(args, FILTERS)
    if twice := next((name for name in args if len(args.getlist(name)) > 1), None):
        raise InvalidRequest(f"{twice} came more than once", twice)
    status = args.get("status")
    if status is not None and status not in search.STATUSES:
        raise InvalidRequest(f"status must be one of {', '.join(search.STATUSES)}", "status")
    wanted = search.Filter(
        user=read_user(args) if "userId" in args else None,
        product_id=query_integer("productId", 1, MAX_ID),
        status=status,
        reference=read_reference(args),
    )
    cursor = args.get("cursor")
    before = None if cursor is None else read_digits(cursor, 1, MAX_ID)
    if cursor is not None and before is None:
        raise InvalidRequest("cursor must be one that an answer had as next", "cursor")
    limit = query_integer("limit", 1, listing.MOST_ORDERS) or listing.PAGE_ORDERS
    page = listing.listed(wanted, before, limit)
    return jsonify(orders=page.orders, next=page.next)


@bp.get("/orders/<int:order_id>")
@token_with("orders:read")
def show_order(order_id: int) -> ResponseReturnValue:
    return jsonify(listing.one(read_id(order_id)))


@bp.post("/orders/<int:order_id>/cancel")
@token_with("orders:write")
def cancel_order(order_id: int) -> ResponseReturnValue:
    """Give an order back, whole or in part; one that still waits as soon as it is stored."""
    data = read_json()
    check_known(data, CANCEL)
    units = None
    if data.get("quantity") is not None:
        units = read_integer(data, "quantity", 1, MAX_QUANTITY)
    reason = read_reason(data)
    done = cancelling.cancel(read_id(order_id), reason, g.actor, units, idempotency_key())
    response = jsonify(done.order)
    response.status_code = 202 if done.waits else 200
    return replayed(response, done.replayed)


@bp.post("/orders/<int:order_id>/confirm")
@token_with("orders:write")
def confirm_order(order_id: int) -> ResponseReturnValue:
    """Say that an order is paid; one that still waits is confirmed as soon as it is stored."""
    payment = read_confirm(read_json_if_any())
    wish = holds.Confirm(read_id(order_id), g.actor, payment, idempotency_key())
    try:
        return told(holds.confirm(wish))
    except HoldExpired as late:
        current_app.extensions["lane"].meter.count("hold_expired")
        more = {"reason": late.reason} if late.reason else {}
        return api_error(409, str(late), late.code, **more)


def read_confirm(data: dict[str, Any]) -> str | None:
    """Return the payment that a confirmation names. Raises InvalidRequest."""
    check_known(data, CONFIRM)
    payment = data.get("payment")
    if payment is not None and (not isinstance(payment, str) or not PAYMENT(payment)):
        raise InvalidRequest(
            f"payment must be 1 to {holds.MAX_PAYMENT} visible ASCII characters", "payment"
        )
    return payment


@bp.post("/orders/<int:order_id>/release")
@token_with("orders:write")
def release_order(order_id: int) -> ResponseReturnValue:
    """Give a hold up; its units are on sale again at once."""
    data = read_json_if_any()
    check_known(data, RELEASE)
    reason = None if data.get("reason") is None else read_reason(data)
    return told(holds.release(read_id(order_id), reason, g.actor, idempotency_key()))


@bp.post("/orders/<int:order_id>/extend")
@token_with("orders:write")
def extend_order(order_id: int) -> ResponseReturnValue:
    """Hold an order for longer, once."""
    data = read_json()
    check_known(data, EXTEND)
    seconds = read_integer(data, "seconds", 1, MAX_HOLD_SECONDS)
    return told(holds.extend(read_id(order_id), seconds, g.actor, idempotency_key()))


def read_json_if_any() -> dict[str, Any]:
    """Return the JSON object of the request, an empty one where there is no body."""
    if not request.content_length and "Transfer-Encoding" not in request.headers:
        return {}
    return read_json()


def outcome_of(done: holds.Done) -> tuple[int, dict[str, Any]]:
    """Return status and body."""
    more = {"reclaimed": True} if done.reclaimed else {}
    return 202 if done.waits else 200, done.order | more


def told(done: holds.Done) -> Response:
    status, body = outcome_of(done)
    response = jsonify(body)
    response.status_code = status
    return replayed(response, done.replayed)


def read_reason(data: dict[str, Any]) -> str:
    return read_text(data, "reason", MAX_REASON)


def replayed(response: Response, yes: bool) -> Response:
    if yes:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def read_wanted(data: dict[str, Any]) -> bulk.Wanted:
    """Return which orders a bulk cancel is for. Raises InvalidRequest."""

    def moment(name: str) -> datetime | None:
        value = data.get(name)
        return None if value is None else terms.moment(value, name)

    return bulk.Wanted(
        product_id=read_integer(data, "productId", 1, MAX_ID),
        user=None if data.get("userId") is None else read_user(data),
        reference=read_reference(data),
        since=moment("claimedFrom"),
        until=moment("claimedUntil"),
    )


@bp.post("/orders/bulk-cancels")
@token_with("orders:write")
def start_bulk_cancel() -> ResponseReturnValue:
    """Have all orders of a product cancelled, or those of a filter; a worker does it."""
    data = read_json()
    check_known(data, BULK)
    key = idempotency_key()
    wanted = read_wanted(data)
    through = None
    if data.get("throughOrderId") is not None:
        through = read_integer(data, "throughOrderId", 0, MAX_ID)
    dry = data.get("dryRun", False)
    if type(dry) is not bool:
        raise InvalidRequest("dryRun must be true or false", "dryRun")
    # What a dry run does without is still checked, so that what passes there passes in earnest.
    expected = read_integer(data, "orders", 1, MAX_ID) if "orders" in data or not dry else 0
    reason = read_reason(data) if "reason" in data or not dry else ""
    if dry:
        return jsonify(planned(bulk.plan(wanted, through)))
    try:
        begun, repeated = bulk.start(wanted, expected, reason, g.actor, through, key)
    except bulk.CountChanged as changed:
        return api_error(409, str(changed), changed.code, **planned(changed.plan))
    response = jsonify(bulk.describe(begun))
    response.status_code = 202
    response.location = url_for("orders_api.show_bulk_cancel", bulk_id=begun.id)
    return replayed(response, repeated)


def planned(plan: bulk.Plan) -> dict[str, int]:
    return {
        "orders": plan.orders,
        "units": plan.units,
        "throughOrderId": plan.through_order_id,
    }


@bp.get("/orders/bulk-cancels/<int:bulk_id>")
@token_with("orders:read")
def show_bulk_cancel(bulk_id: int) -> ResponseReturnValue:
    try:
        return jsonify(bulk.describe(bulk.get(min(bulk_id, MAX_ID))))
    except LookupError:
        return api_error(404, "Unknown bulk cancel", "not_found")


@bp.delete("/orders/bulk-cancels/<int:bulk_id>")
@token_with("orders:write")
def stop_bulk_cancel(bulk_id: int) -> ResponseReturnValue:
    """Let no further batch begin; what is cancelled stays so. Sent again, it changes nothing."""
    try:
        return jsonify(bulk.describe(bulk.stop(min(bulk_id, MAX_ID), g.actor)))
    except LookupError:
        return api_error(404, "Unknown bulk cancel", "not_found")
