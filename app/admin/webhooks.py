"""Webhooks: where events are sent to, how that goes, and doing it once more."""

import json
from typing import Any

from flask import Blueprint, render_template, request, url_for
from flask.typing import ResponseReturnValue

from ..auth import staff_actor
from ..events import TYPES
from ..extensions import limiter
from ..feed import webhooks
from ..models import WebhookEndpoint
from ..problems import Conflict, InvalidRequest
from . import forms

bp = Blueprint("webhooks_page", __name__, url_prefix="/admin/webhooks")
CHANGE_LIMIT = "60/minute"
limiter.limit(CHANGE_LIMIT, methods=["POST"])(bp)

PAGE_DELIVERIES = 50
# What the pages call an endpoint's members.
ON_PAGES = {"url": "The address", "description": "The note"}


def values(former: WebhookEndpoint | None = None) -> dict[str, Any]:
    """Return what the form says of an endpoint. Raises InvalidRequest, with words for the page."""
    url = request.form.get("url", "").strip()
    data = {
        # As the page shows it: left as it was.
        "url": former.url if former and url == former.shown_url else url,
        "types": request.form.getlist("types"),
        "description": request.form.get("description", "").strip(),
    }
    try:
        return webhooks.read(data)
    except InvalidRequest as error:
        raise InvalidRequest(error.told(ON_PAGES), error.field) from None


@bp.get("/")
def index() -> ResponseReturnValue:
    return page()


def page(status: int = 200, **more: object) -> ResponseReturnValue:
    shown = {"errors": {}, "values": {}, "chosen": [], "secret": None} | more
    return render_template(
        "admin/webhooks.html",
        endpoints=webhooks.everything(),
        most=webhooks.MOST_ENDPOINTS,
        types=TYPES,
        **shown,
    ), status


@bp.post("/")
def create() -> ResponseReturnValue:
    """Make an endpoint; its secret is shown in this very answer, and nowhere else."""
    try:
        wanted = values()
        if forms.used_before("webhooks.create", "url", "description"):
            return shown_once()
        endpoint, secret = webhooks.create(wanted, staff_actor())
    except InvalidRequest as error:
        field = "url" if error.field == "key" else str(error.field)
        return page(
            422,
            errors={field: str(error)},
            values=request.form,
            chosen=request.form.getlist("types"),
        )
    except Conflict as error:
        return page(422, errors={"url": str(error)}, values=request.form)
    return page(secret=(endpoint, secret))


def shown_once() -> ResponseReturnValue:
    """Answer a form that was sent again: what the first answer showed is nowhere to be found."""
    told = "The secret was shown once. If nobody has noted it, make a new one of that endpoint."
    return forms.done(told, url_for("webhooks_page.index"), "warning")


@bp.get("/<id:endpoint_id>")
def show(endpoint_id: int) -> ResponseReturnValue:
    return one(endpoint_id)


@bp.get("/<id:endpoint_id>/live")
def live(endpoint_id: int) -> ResponseReturnValue:
    return render_template("admin/_deliveries.html", **_deliveries(endpoint_id))


def one(endpoint_id: int, status: int = 200, **more: object) -> ResponseReturnValue:
    shown = {"errors": {}, "values": None, "chosen": None, "secret": None} | more
    return render_template(
        "admin/webhook.html", types=TYPES, **_deliveries(endpoint_id), **shown
    ), status


def _deliveries(endpoint_id: int) -> dict[str, Any]:
    before = forms.cursor()
    found = webhooks.deliveries(endpoint_id, before, PAGE_DELIVERIES + 1)
    return {
        "endpoint": webhooks.get(endpoint_id),
        "deliveries": found[:PAGE_DELIVERIES],
        "older": found[PAGE_DELIVERIES - 1].id if len(found) > PAGE_DELIVERIES else None,
        "before": before,
        "state_of": webhooks.state_of,
    }


@bp.post("/<id:endpoint_id>")
def change(endpoint_id: int) -> ResponseReturnValue:
    try:
        webhooks.change(endpoint_id, values(webhooks.get(endpoint_id)), staff_actor())
    except InvalidRequest as error:
        return one(
            endpoint_id,
            422,
            errors={str(error.field): str(error)},
            values=request.form,
            chosen=request.form.getlist("types"),
        )
    return _back(endpoint_id, "The endpoint is changed.")


@bp.post("/<id:endpoint_id>/enabled")
def switch(endpoint_id: int) -> ResponseReturnValue:
    on = request.form.get("on") == "yes"
    if not on and (
        question := forms.unconfirmed(
            "Switch this endpoint off?",
            "Nothing is sent to it until it is switched on; then it goes on where it was, as far "
            "as events are kept (30 days).",
            "Switch off",
            url_for("webhooks_page.show", endpoint_id=endpoint_id),
        )
    ):
        return question
    webhooks.switch(endpoint_id, on, staff_actor())
    told = "It goes on with the first event that it has not had." if on else "It is switched off."
    return _back(endpoint_id, told)


@bp.post("/<id:endpoint_id>/secret")
def rotate(endpoint_id: int) -> ResponseReturnValue:
    if question := forms.unconfirmed(
        "Make a new secret?",
        f"The former one stays valid beside it for {webhooks.OVERLAP_HOURS} hours. You see the new "
        "one once.",
        "Make a new secret",
        url_for("webhooks_page.show", endpoint_id=endpoint_id),
    ):
        return question
    if forms.used_before(f"webhooks.rotate {endpoint_id}"):
        return shown_once()
    _, secret = webhooks.rotate(endpoint_id, staff_actor())
    return one(endpoint_id, secret=secret)


@bp.post("/<id:endpoint_id>/test")
def test(endpoint_id: int) -> ResponseReturnValue:
    webhooks.send_test(endpoint_id, staff_actor())
    return _back(endpoint_id, "A test event is on its way.")


@bp.post("/<id:endpoint_id>/remove")
def remove(endpoint_id: int) -> ResponseReturnValue:
    if question := forms.unconfirmed(
        "Remove this endpoint?",
        "Nothing is sent to it any more, and what was sent to it is forgotten. That can't be "
        "undone.",
        "Remove",
        url_for("webhooks_page.show", endpoint_id=endpoint_id),
    ):
        return question
    webhooks.remove(endpoint_id, staff_actor())
    return forms.done("The endpoint is removed.", url_for("webhooks_page.index"))


@bp.get("/<id:endpoint_id>/deliveries/<id:delivery_id>")
def show_delivery(endpoint_id: int, delivery_id: int) -> ResponseReturnValue:
    delivery = webhooks.delivery_of(endpoint_id, delivery_id)
    return render_template(
        "admin/delivery.html",
        endpoint=webhooks.get(endpoint_id),
        delivery=delivery,
        contents=json.dumps(json.loads(delivery.body), indent=2, ensure_ascii=False),
        attempts=webhooks.attempts(delivery_id),
        state=webhooks.state_of(delivery),
    )


@bp.post("/<id:endpoint_id>/deliveries/<id:delivery_id>/redeliver")
def redeliver(endpoint_id: int, delivery_id: int) -> ResponseReturnValue:
    webhooks.redeliver(endpoint_id, delivery_id, staff_actor())
    return _back(endpoint_id, "It is on its way once more, with the same id.")


def _back(endpoint_id: int, told: str) -> ResponseReturnValue:
    return forms.done(told, url_for("webhooks_page.show", endpoint_id=endpoint_id))
