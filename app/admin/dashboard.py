"""The sale at a glance: products, rates, queue, health, and charts."""

import re

from flask import Blueprint, abort, current_app, jsonify, render_template, request, url_for
from flask.sansio.blueprints import BlueprintSetupState
from flask.typing import ResponseReturnValue
from flask_login import current_user
from markupsafe import Markup

from .. import auth
from ..problems import InvalidRequest, Unavailable
from ..products import brake as brakes
from ..products.sale import to_follow
from ..watch import monitor, samples
from ..web.errors import api_error
from ..web.polls import share
from . import forms, products
from .guard import is_poll, without_postgres

MOST_ROWS = 1000
PRODUCT_ID = re.compile(r"[1-9][0-9]{0,14}", re.ASCII).fullmatch
bp = Blueprint("dashboard", __name__, url_prefix="/admin")


@bp.get("/")
def show() -> ResponseReturnValue:
    return render_template("admin/dashboard.html", board=monitor.board())


@bp.get("/live")
def live() -> ResponseReturnValue:
    """What of the dashboard changes by the second."""
    if not is_poll():
        return render_template("admin/_dashboard.html", board=monitor.board())
    # Twenty open dashboards cost what one does.
    return share(current_user.role, _fragment)


def _fragment() -> str:
    """Return it without anybody's CSRF token: a page that polls sends its own in a header."""
    rows: Rows = current_app.extensions["dashboard_rows"]
    board = monitor.board()
    return render_template("admin/_dashboard.html", board=board, row=rows.row, shared=True)


class Rows:
    """Rows that look as they did a moment ago: most of a big sale's products stand still."""

    def __init__(self) -> None:
        self._rows: dict[tuple[object, ...], Markup] = {}

    def row(self, item: monitor.Item) -> Markup:
        """Return a product's row, rendered anew only when something in it has changed."""
        key = (current_user.role, item.product.id, item.product.version, *item.figures)
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= MOST_ROWS:
                self._rows.clear()
            row = Markup(render_template("admin/_product.html", item=item, shared=True))  # noqa: S704
            self._rows[key] = row
        return row


@bp.record_once
def _keep_rows(state: BlueprintSetupState) -> None:
    state.app.extensions["dashboard_rows"] = Rows()


@bp.post("/brake")
@without_postgres
def brake() -> ResponseReturnValue:
    """Stop selling one product or everything at once, or let them in again; needs Redis alone."""
    if not current_user.is_admin:
        abort(403)
    on, product = request.form.get("on"), request.form.get("product", "")
    if on not in ("0", "1") or (product and not PRODUCT_ID(product)):
        raise InvalidRequest("There is no such brake", "on")
    product_id = int(product) if product else None
    what = f"product {product_id}" if product_id else "everything"
    if on == "1" and (
        question := forms.unconfirmed(
            f"Stop selling {what} now?",
            "The next purchase is refused as paused, until you release the brake.",
            f"Stop {what}",
            url_for("dashboard.show"),
        )
    ):
        return question
    done = brakes.brake(on == "1", product_id, auth.staff_actor())
    message = told(done, product_id) + to_follow(done.pending)
    if product_id and forms.by_htmx():
        return products.changed(product_id, message)
    if forms.by_htmx():
        board = monitor.board()
        return forms.with_note(render_template("admin/_dashboard.html", board=board), message)
    return forms.done(message, url_for("dashboard.show"))


def told(done: brakes.Braked, product_id: int | None) -> str:
    """Return what a brake did, in words."""
    what = f"Product {product_id}" if product_id else "The whole sale"
    if done.on:
        return f"{what} is braked: the next purchase is refused."
    if product_id and done.sale:
        return f"{what} has no brake of its own any more, but the whole sale's is on."
    if not product_id and done.still:
        return f"{what} is released. Still braked: product {', '.join(map(str, done.still))}."
    return f"{what} is released."


@bp.get("/chart.json")
def chart() -> ResponseReturnValue:
    """The samples from `since` (seconds since 1970) on, as columns; of all products or of one."""
    since = request.args.get("since", 0, type=int)
    span = samples.SPANS.get(request.args.get("span", "15m"))
    product = request.args.get("product", "")
    if span is None or (product and not PRODUCT_ID(product)):
        abort(404)
    product_id = int(product) if product else None
    try:
        return jsonify(samples.chart(max(0, min(since, 2**40)), span, product_id))
    except Unavailable:
        return api_error(503, "Service unavailable")
