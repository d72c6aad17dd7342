"""The sale at a glance: products, rates, queue, health, and the last 15 minutes."""

import time

from flask import Blueprint, jsonify, render_template, request
from flask_login import current_user
from markupsafe import Markup

from ..problems import Unavailable
from ..watch import monitor, samples
from ..web.errors import api_error
from ..web.polls import FRESH_SECONDS, share
from .guard import is_poll

bp = Blueprint("dashboard", __name__, url_prefix="/admin")


@bp.get("/")
def show():
    return render_template("admin/dashboard.html", board=monitor.board())


# Twenty open dashboards cost what one does.
_shared: dict[str, tuple[float, str]] = {}
# In it, the rows that look as they did a moment ago: most of a big sale's products stand still.
MOST_ROWS = 1000
_rows: dict[tuple, Markup] = {}


@bp.get("/live")
def live():
    """What of the dashboard changes by the second."""
    if not is_poll():
        return render_template("admin/_dashboard.html", board=monitor.board())
    role = current_user.role
    made_at, fragment = _shared.get(role, (float("-inf"), ""))
    if time.monotonic() - made_at > FRESH_SECONDS:
        made_at, board = time.monotonic(), monitor.board()
        # Without anybody's CSRF token: a page that polls sends its own in a header.
        fragment = render_template("admin/_dashboard.html", board=board, row=_row, shared=True)
        _shared[role] = made_at, fragment
    share(request.environ, role, made_at)
    return fragment


def _row(item: monitor.Item) -> Markup:
    """Return a product's row, rendered anew only when something in it has changed."""
    key = (current_user.role, item.product.id, item.product.version, *item.figures)
    row = _rows.get(key)
    if row is None:
        if len(_rows) >= MOST_ROWS:
            _rows.clear()
        row = Markup(render_template("admin/_product.html", item=item, shared=True))  # noqa: S704
        _rows[key] = row
    return row


@bp.get("/chart.json")
def chart():
    """The samples from `since` (seconds since 1970) on, as columns."""
    since = request.args.get("since", 0, type=int)
    try:
        return jsonify(samples.chart(max(0, min(since, 2**40))))
    except Unavailable:
        return api_error(503, "Service unavailable")
