"""Cancelling many orders at once: count them, confirm the count, watch it go on, stop it."""

from datetime import datetime
from typing import Any

from flask import Blueprint, render_template, request, url_for
from flask.typing import ResponseReturnValue
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import NotFound

from ..auth import staff_actor
from ..extensions import limiter
from ..orders import bulk
from ..problems import InvalidRequest, KeyMismatch, UnknownProduct
from ..products import catalogue
from ..reading import MAX_ID, VALID_KEY, User, canonical, read_digits, read_reference
from . import forms

bp = Blueprint("bulk_cancels", __name__, url_prefix="/admin/bulk-cancels")
CHANGE_LIMIT = "60/minute"
limiter.limit(CHANGE_LIMIT, methods=["POST"])(bp)


def read_wanted(values: MultiDict[str, str]) -> bulk.Wanted | None:
    """Return which orders are meant, None while no product is chosen. Raises InvalidRequest."""
    product_id = read_digits(values.get("product", ""), 1, MAX_ID)
    if product_id is None:
        return None

    def moment(name: str, called: str) -> datetime | None:
        return forms.moment(name, values, called)

    user: User | None = None
    if text := values.get("user", "").strip():
        try:
            user = canonical(text)
        except ValueError:
            raise InvalidRequest("This is nobody's name", "user") from None
    reference = values.get("reference", "").strip() or None
    return bulk.Wanted(
        product_id,
        user,
        read_reference({"reference": reference}),
        moment("from", "The first"),
        moment("to", "The last"),
    )


def ask(
    values: MultiDict[str, str], errors: dict[str, str] | None = None, status: int = 200
) -> ResponseReturnValue:
    """The form: which orders; and with a product how many these are, to be confirmed."""
    errors = dict(errors or {})
    plan = None
    try:
        wanted = read_wanted(values)
        if wanted is not None:
            plan = bulk.plan(wanted)
    except InvalidRequest as error:
        errors[error.field or "product"] = str(error)
    except UnknownProduct:
        errors["product"] = "There is no such product"
    names = catalogue.names()
    return render_template(
        "admin/bulk_cancel_new.html",
        values=values,
        errors=errors,
        plan=plan,
        names=names,
        times={name: forms.moment_text(name, values) for name in ("from", "to")},
    ), status


@bp.get("/")
def index() -> ResponseReturnValue:
    return render_template("admin/bulk_cancels.html", bulks=bulk.newest(), names=catalogue.names())


@bp.get("/new")
def new() -> ResponseReturnValue:
    return ask(request.args)


@bp.post("/")
def start() -> ResponseReturnValue:
    """Begin, if the count that was typed in is the one there is."""
    form = request.form
    try:
        wanted = read_wanted(form)
        if wanted is None:
            raise InvalidRequest("Choose a product", "product")
        key = form.get("key") or None
        if key and not VALID_KEY(key):
            raise InvalidRequest(forms.USED_UP, "count")
        through = read_digits(form.get("through", ""), 0, MAX_ID)
        count = read_digits(form.get("count", "").strip(), 1, MAX_ID)
        if count is None:
            raise InvalidRequest("Type how many orders are cancelled, as it is told here", "count")
        begun, _ = bulk.start(wanted, count, forms.reason(), staff_actor(), through, key)
    except InvalidRequest as error:
        return ask(form, {error.field or "count": str(error)}, 422)
    except KeyMismatch:
        return ask(form, {"count": forms.USED_UP}, 422)
    except bulk.CountChanged as changed:
        return ask(form, {"count": str(changed) + ", nothing was cancelled"}, 422)
    return forms.done("The orders are being cancelled.", url_for(".show", bulk_id=begun.id))


def told(bulk_id: int, template: str) -> ResponseReturnValue:
    try:
        found = bulk.get(bulk_id)
    except LookupError:
        raise NotFound from None
    context: dict[str, Any] = {"bulk": found, "product": catalogue.names().get(found.product_id)}
    return render_template(template, **context)


@bp.get("/<id:bulk_id>")
def show(bulk_id: int) -> ResponseReturnValue:
    return told(bulk_id, "admin/bulk_cancel.html")


@bp.get("/<id:bulk_id>/live")
def live(bulk_id: int) -> ResponseReturnValue:
    """How far it is; the page asks while it goes on."""
    return told(bulk_id, "admin/_bulk_cancel.html")


@bp.post("/<id:bulk_id>/stop")
def stop(bulk_id: int) -> ResponseReturnValue:
    """Let no further batch begin; what is cancelled stays so."""
    try:
        found = bulk.stop(bulk_id, staff_actor())
    except LookupError:
        raise NotFound from None
    words = "Stopped" if found.state == "stopped" else "It had ended before"
    page = url_for(".show", bulk_id=bulk_id)
    return forms.done(f"{words}: {found.cancelled_orders} orders are cancelled.", page)
