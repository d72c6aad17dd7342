"""The sale at a glance: products, rates, queue, health, and the last 15 minutes."""

from flask import Blueprint, jsonify, render_template, request

from .. import monitor
from ..errors import api_error
from ..stock import Unavailable

bp = Blueprint("dashboard", __name__, url_prefix="/admin")


@bp.get("/")
def show():
    return render_template("admin/dashboard.html", board=monitor.board())


@bp.get("/live")
def live():
    """What of the dashboard changes by the second."""
    return render_template("admin/_dashboard.html", board=monitor.board())


@bp.get("/chart.json")
def chart():
    """The samples from `since` (seconds since 1970) on, as columns."""
    since = request.args.get("since", 0, type=int)
    try:
        return jsonify(monitor.chart(max(0, min(since, 2**40))))
    except Unavailable:
        return api_error(503, "Service unavailable")
