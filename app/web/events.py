"""GET /orders/events: the feed of what happened, for the shop's back end."""

from flask import Blueprint, Response, request
from flask.typing import ResponseReturnValue

from ..extensions import csrf, db
from ..feed import reading
from ..problems import InvalidRequest
from . import polls
from .access import token_with
from .api import query_integer
from .parked import Wait

bp = Blueprint("events", __name__)
csrf.exempt(bp)

QUERY = {"after", "limit", "wait"}
DEFAULT_EVENTS = 100
# Below what proxies and clients commonly wait for an answer.
MOST_WAIT_SECONDS = 20


@bp.get("/orders/events")
@token_with("orders:read")
def follow() -> ResponseReturnValue:
    """Events after a cursor; with `wait`, and none there, once one is there or the time is up.

    Another server than ours (`flask run`) answers at once.
    """
    for name in request.args:
        # Left out in silence it would mean all.
        if name not in QUERY or len(request.args.getlist(name)) > 1:
            raise InvalidRequest(f"{name} is not known here, or given twice", name)
    limit = query_integer("limit", 1, reading.MOST_EVENTS) or DEFAULT_EVENTS
    seconds = query_integer("wait", 0, MOST_WAIT_SECONDS) or 0
    of = reading.ends()
    page = reading.read(reading.number_of(request.args.get("after"), of), limit, of)
    db.session.rollback()
    offer: polls.Offer | None = request.environ.get(polls.OFFER)
    if not page.events and seconds and offer and not offer.again:
        offer.wait = Wait(of.epoch, page.next, seconds)
    return told(page)


def told(page: reading.Page) -> Response:
    events = b",".join([event.json for event in page.events])
    body = b'{"events":[%b],"next":"%b"}' % (events, page.ends.cursor(page.next).encode())
    response = Response(body, mimetype="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response
