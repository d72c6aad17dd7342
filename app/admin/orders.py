"""The support desk: find an order, read its story, cancel it, take a list away."""

import csv
import io
from collections.abc import Iterator
from datetime import UTC, datetime

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

from .. import auth
from ..extensions import limiter
from ..orders import lookup as orders
from ..orders import search
from ..problems import Conflict, InvalidRequest, Unavailable, UnknownOrder
from ..products import catalogue
from ..reading import MAX_ID, read_digits
from ..times import utc_text
from . import forms

bp = Blueprint("orders", __name__, url_prefix="/admin/orders")
CHANGE_LIMIT = "120/minute"
limiter.limit(CHANGE_LIMIT, methods=["POST"])(bp)

EXPORT_LIMIT = "10/minute"
CSV_HEADER = (
    "order", "status", "user", "product", "product name", "quantity", "unit price", "currency",
    "total", "claimed at", "persisted at", "cancelled at", "cancelled by", "cancel reason",
)  # fmt: skip
# A spreadsheet takes a cell that begins like this for a formula (OWASP, CSV injection).
FORMULA = ("=", "+", "-", "@", "\t", "\r")
# A file may be so many rows before it is sent on: few system calls, little memory.
CSV_CHUNK_ROWS = 500


def read_filter() -> tuple[search.Filter, dict[str, str]]:
    """Return the filter in the URL, and its errors by field."""
    errors: dict[str, str] = {}
    args = request.args
    values: dict[str, object] = {}
    text = args.get("q", "").strip().lstrip("#")
    if text:
        values["user_id"] = read_digits(text, 1, MAX_ID)
        if values["user_id"] is None:
            errors["q"] = "A user id or an order id is a whole number"
    values["product_id"] = read_digits(args.get("product", ""), 0, 10**16)
    if args.get("status") in search.STATUSES:
        values["status"] = args["status"]
    for field, name, called in (("from", "since", "The first"), ("to", "until", "The last")):
        try:
            values[name] = forms.moment(field, args, called)
        except InvalidRequest as error:
            errors[field] = str(error)
    return search.Filter(**values), errors


def find() -> dict:
    """Return what the list shows for this request."""
    wanted, errors = read_filter()
    before = forms.cursor()
    hit = None
    text = request.args.get("q", "").strip()
    only_order = text.startswith("#")
    if wanted.user_id and not before:
        # The number may be an order's as well.
        try:
            hit = search.story(wanted.user_id).order
        except (UnknownOrder, Unavailable):
            hit = None
    page = search.Page([])
    if not errors and not only_order:
        page = search.search(wanted, before)
    return {
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
def index():
    found = find()
    if request.headers.get("HX-Target") == "results":
        return render_template("admin/_orders.html", **found)
    return render_template("admin/orders.html", statuses=search.STATUSES, **found)


@bp.get("/orders.csv")
@limiter.limit(EXPORT_LIMIT)
def export():
    """Stream the filter's orders as CSV, a chunk at a time."""
    wanted, errors = read_filter()
    if errors:
        raise InvalidRequest(next(iter(errors.values())))
    names = catalogue.names()
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Response(
        stream_with_context(csv_chunks(search.export(wanted), names)),
        mimetype="text/csv",
        headers={"Content-Disposition": f'attachment; filename="orders-{stamp}.csv"'},
    )


def csv_chunks(found: Iterator[search.Found], names: dict[int, str]) -> Iterator[str]:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(CSV_HEADER)
    for count, order in enumerate(found, 1):
        writer.writerow([safe_cell(value) for value in row_of(order, names)])
        if count % CSV_CHUNK_ROWS == 0:
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


def row_of(order: search.Found, names: dict[int, str]) -> tuple:
    return (
        order.id,
        order.status,
        order.user_id,
        order.product_id,
        names.get(order.product_id, ""),
        order.quantity,
        decimal(order.unit_price_cents),
        order.currency,
        decimal(order.total_cents),
        utc_text(order.claimed_at),
        (order.persisted_at and utc_text(order.persisted_at)) or "",
        (order.cancelled_at and utc_text(order.cancelled_at)) or "",
        order.cancelled_by or "",
        order.cancel_reason or "",
    )


def decimal(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"


def safe_cell(value: object) -> object:
    return "'" + value if isinstance(value, str) and value.startswith(FORMULA) else value


@bp.get("/<id:order_id>")
def show(order_id: int):
    story = search.story(order_id)
    product = catalogue.names().get(story.order.product_id)
    return render_template("admin/order.html", story=story, product=product, errors={})


@bp.get("/<id:order_id>/live")
def live(order_id: int):
    """The story again; the page asks while the order is on its way."""
    story = search.story(order_id)
    product = catalogue.names().get(story.order.product_id)
    return render_template("admin/_order.html", story=story, product=product, errors={})


@bp.post("/<id:order_id>/cancel")
def cancel(order_id: int):
    """Cancel an order; its units go back on sale exactly once."""
    page = url_for("orders.show", order_id=order_id)
    try:
        reason = forms.reason()
    except InvalidRequest as error:
        story = search.story(order_id)
        product = catalogue.names().get(story.order.product_id)
        errors = {"reason": str(error)}
        return render_template("admin/order.html", story=story, product=product, errors=errors), 422
    try:
        order = orders.cancel(order_id, reason, auth.staff_actor())
    except Conflict as error:
        flash(str(error) + ".", "error")
        return redirect(page)
    except Unavailable:
        flash("Cancelled, if the page says so. The units return when Redis is back.", "warning")
        return redirect(page)
    units = "unit is" if order.quantity == 1 else "units are"
    flash(f"Order {order_id} is cancelled; {order.quantity} {units} free again.", "success")
    return redirect(page)
