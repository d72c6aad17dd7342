"""The sale at a glance: products, rates, queue, health, and the last 15 minutes."""

import time

from flask import Blueprint, jsonify, render_template, request
from flask_login import current_user

from .. import monitor
from ..errors import api_error
from ..stock import Unavailable
from .guard import is_poll

bp = Blueprint("dashboard", __name__, url_prefix="/admin")


@bp.get("/")
def show():
    return render_template("admin/dashboard.html", board=monitor.board())


# Pages that poll share an answer for so long: twenty open dashboards cost what one does.
SHARED_SECONDS = 0.8
_shared: dict[bool, tuple[float, str]] = {}


@bp.get("/live")
def live():
    """What of the dashboard changes by the second."""
    if not is_poll():
        return render_template("admin/_dashboard.html", board=monitor.board())
    made_at, fragment = _shared.get(current_user.is_admin, (float("-inf"), ""))
    if time.monotonic() - made_at > SHARED_SECONDS:
        # Without anybody's CSRF token: a page that polls sends its own in a header.
        fragment = render_template("admin/_dashboard.html", board=monitor.board(), shared=True)
        _shared[current_user.is_admin] = (time.monotonic(), fragment)
    return fragment


@bp.get("/chart.json")
def chart():
    """The samples from `since` (seconds since 1970) on, as columns."""
    since = request.args.get("since", 0, type=int)
    try:
        return jsonify(monitor.chart(max(0, min(since, 2**40))))
    except Unavailable:
        return api_error(503, "Service unavailable")
