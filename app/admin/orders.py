"""The support desk: find an order, read its story, cancel it, take a list away."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from flask import (
    Blueprint,
    Response,
    flash,
    redirect,
    render_template,
    request,
    stream_with_context,
    url_for,
)
from flask.typing import ResponseReturnValue

from .. import auth, numbers
from ..extensions import limiter
from ..feed import reading, webhooks
from ..models import ENDED_STATUSES, MAX_HOLD_SECONDS
from ..orders import cancelling, holds, intents, search, sheet
from ..problems import Conflict, InvalidRequest, KeyMismatch, Unavailable, UnknownOrder
from ..products import catalogue
from ..reading import (
    MAX_ID,
    MAX_QUANTITY,
    MAX_REASON,
    VALID_KEY,
    canonical,
    read_digits,
    read_text,
)
from . import forms, jobs

bp = Blueprint("orders", __name__, url_prefix="/admin/orders")
CHANGE_LIMIT = "120/minute"
limiter.limit(CHANGE_LIMIT, methods=["POST"])(bp)

EXPORT_LIMIT = "10/minute"
PAYMENT = re.compile(rf"[\x21-\x7e]{{1,{holds.MAX_PAYMENT}}}").fullmatch


def read_filter() -> tuple[search.Filter, dict[str, str]]:
    """Return the filter in the URL, and its errors by field."""
    errors: dict[str, str] = {}
    args = request.args
    values: dict[str, Any] = {}
    if text := args.get("q", "").strip():
        values["text"] = text
        # All that is looked for is visible ASCII, and a key may be the longest.
        if not VALID_KEY(text):
            errors["q"] = "Ids, keys and references are of at most 255 visible characters"
    values["product_id"] = read_digits(args.get("product", ""), 0, 10**16)
    if args.get("status") in search.STATUSES:
        values["status"] = args["status"]
    for field, name, called in (("from", "since", "The first"), ("to", "until", "The last")):
        try:
            values[name] = forms.moment(field, args, called)
        except InvalidRequest as error:
            errors[field] = str(error)
    return search.Filter(**values), errors


def find() -> dict[str, Any]:
    """Return what the list shows for this request."""
    wanted, errors = read_filter()
    before = forms.cursor()
    text = wanted.text or ""
    # The number may be an order's as well.
    order_id = read_digits(text.removeprefix("#"), 1, MAX_ID)
    only_order = order_id is not None and text.startswith("#")
    hit = None
    if order_id is not None and not before:
        with suppress(UnknownOrder, Unavailable):
            hit = search.story(order_id).order
    page = search.Page([])
    unpaid = 0
    if not errors and not only_order:
        page = search.search(wanted, before)
        with suppress(ValueError):
            unpaid = search.unpaid_holds(canonical(text))
    return {
        "unpaid": unpaid,
        "wanted": wanted,
        "times": {name: forms.moment_text(name, request.args) for name in ("from", "to")},
        "errors": errors,
        "hit": hit,
        "only_order": only_order,
        "page": page,
        "before": before,
        "names": catalogue.names(),
        "query": {
            name: value for name, value in request.args.items() if value and name != "before"
        },
    }


@bp.get("/")
def index() -> ResponseReturnValue:
    found = find()
    if request.headers.get("HX-Target") == "results":
        return render_template("admin/_orders.html", **found)
    return render_template("admin/orders.html", statuses=search.STATUSES, **found)


@bp.get("/orders.csv")
@limiter.limit(EXPORT_LIMIT)
def export() -> ResponseReturnValue:
    """Stream the filter's orders as CSV, a chunk at a time."""
    wanted, errors = read_filter()
    if errors:
        raise InvalidRequest(next(iter(errors.values())))
    names = catalogue.names()
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Response(
        stream_with_context(sheet.chunks(search.Export(wanted), names)),
        mimetype="text/csv",
        headers={"Content-Disposition": f'attachment; filename="orders-{stamp}.csv"'},
    )


@bp.get("/<id:order_id>")
def show(order_id: int) -> ResponseReturnValue:
    return show_story(order_id)


@bp.get("/<id:order_id>/live")
def live(order_id: int) -> ResponseReturnValue:
    """The story again; the page asks while the order is on its way."""
    return show_story(order_id, "admin/_order.html")


def show_story(
    order_id: int,
    template: str = "admin/order.html",
    errors: dict[str, str] | None = None,
    typed: dict[str, Any] | None = None,
) -> str:
    story = search.story(order_id)
    held_until = story.order.held_until
    events = reading.of_order(order_id)
    shown = [_shown(event) for event in events]
    # When it was stored an order that is held was told as that.
    paid_at = (event["at"] for event in shown if event["type"] == "order.confirmed")
    return render_template(
        template,
        events=shown,
        confirmed_at=next(paid_at, None),
        deliveries=webhooks.deliveries_of([event.number for event in events]),
        state_of=webhooks.state_of,
        story=story,
        product=catalogue.names().sold(story.order.product_id, story.order.claimed_at),
        cancelling=0 if story.order.persisted_at else intents.units_given_back(order_id),
        job_is_known=story.batch is not None and jobs.is_known(story.batch.job_id),
        errors=errors or {},
        seconds_left=(held_until - datetime.now(UTC)).total_seconds() if held_until else 0,
        extended=story.extended,
        **typed or {},
    )


@bp.post("/<id:order_id>/confirm")
def confirm(order_id: int) -> ResponseReturnValue:
    """Say that a held order is paid; one whose hold has ended gets its units anew, if it can."""

    def act(reason: str, key: str | None) -> str:
        payment = request.form.get("payment", "").strip() or None
        if payment and not PAYMENT(payment):
            raise InvalidRequest("A payment is 1 to 128 visible ASCII characters", "payment")
        wish = holds.Confirm(order_id, auth.staff_actor(), payment, key, reason)
        done = holds.confirm(wish)
        if done.waits:
            return "Accepted: it is confirmed as soon as it is stored."
        return "Confirmed, with units taken anew." if done.reclaimed else "Confirmed."

    return act_of_hold(order_id, "confirm_reason", "paid", act)


@bp.post("/<id:order_id>/extend")
def extend(order_id: int) -> ResponseReturnValue:
    """Hold an order for longer, once."""

    def act(reason: str, key: str | None) -> str:
        seconds = numbers.whole(
            request.form.get("seconds", ""), "seconds", "The time", 1, MAX_HOLD_SECONDS
        )
        done = holds.extend(order_id, seconds, auth.staff_actor(), key, reason)
        if done.waits:
            return "Accepted: it is extended as soon as it is stored."
        # A whole hold from now at most, whatever was asked for.
        return f"Extended: held until {done.order['heldUntil'][11:19]} UTC."

    return act_of_hold(order_id, "extend_reason", "longer", act)


def act_of_hold(
    order_id: int, reason_field: str, form: str, act: Callable[[str, str | None], str]
) -> ResponseReturnValue:
    """Do an act that a form of the order's page asks for; `form` is what its fields are from."""
    page = url_for("orders.show", order_id=order_id)
    key = request.form.get("key")
    try:
        reason = read_text(request.form, reason_field, MAX_REASON, "The reason")
        if key and not VALID_KEY(key):
            raise InvalidRequest(forms.USED_UP, reason_field)
        told = act(reason, key)
    except InvalidRequest as error:
        errors = {error.field or reason_field: str(error)}
        return show_story(order_id, errors=errors, typed={form: request.form}), 422
    except KeyMismatch:
        errors = {reason_field: forms.USED_UP}
        return show_story(order_id, errors=errors, typed={form: request.form}), 422
    except Conflict as error:
        flash(str(error) + ".", "error")
        return redirect(page)
    return forms.done(told, page)


def _shown(event: reading.Event) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(event.json)
    return told | {"at": datetime.fromisoformat(told["at"])}


@bp.post("/<id:order_id>/cancel")
def cancel(order_id: int) -> ResponseReturnValue:
    """Give an order back, whole or in part; its units go on sale again exactly once."""
    page = url_for("orders.show", order_id=order_id)
    key = request.form.get("key")
    try:
        reason = forms.reason()
        units = read_units()
        if key and not VALID_KEY(key):
            raise InvalidRequest(forms.USED_UP, "key")
        done = cancelling.cancel(order_id, reason, auth.staff_actor(), units, key)
    except InvalidRequest as error:
        return show_story(order_id, errors={error.field or "reason": str(error)}), 422
    except KeyMismatch:
        return show_story(order_id, errors={"reason": forms.USED_UP}), 422
    except Conflict as error:
        flash(str(error) + ".", "error")
        return redirect(page)
    units_are = "1 unit is" if done.units == 1 else f"{done.units} units are"
    ended = done.status in ENDED_STATUSES
    what = f"Order {order_id} is {done.status.lower()}" if ended else "A part is cancelled"
    when = "again" if done.free else "as soon as Redis is back"
    if done.waits:
        what, when = "Accepted", "as soon as the order is stored"
    told = f"{what}; {units_are} free {when}."
    return forms.done(told, page, "success" if done.free else "warning")


def read_units() -> int | None:
    """Return how many units the form gives back, None for all. Raises InvalidRequest."""
    text = request.form.get("quantity", "").strip()
    if not text:
        return None
    units = read_digits(text, 1, MAX_QUANTITY)
    if units is None:
        raise InvalidRequest("The quantity is a whole number, 1 or more", "quantity")
    return units
