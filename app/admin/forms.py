"""From what a form sends to what the use cases take, and errors back to their fields."""

import json
import re
import secrets
from collections.abc import Mapping
from datetime import datetime

from flask import Response, flash, make_response, redirect, render_template, request
from flask.typing import ResponseReturnValue

from .. import idempotency
from ..extensions import db
from ..problems import InvalidRequest, KeyMismatch
from ..products import terms
from ..reading import MAX_ID, MAX_REASON, VALID_KEY, read_digits, read_text

# What a datetime-local field sends; seconds are left out where they are none.
WALL_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2})?", re.ASCII).fullmatch
USED_UP = "This form has been sent before, with something else in it. Send it once more to go on."


def by_htmx() -> bool:
    return request.headers.get("HX-Request") == "true"


def cursor() -> int | None:
    """Return the id that the page's list goes on below, None for its beginning."""
    return read_digits(request.args.get("before", ""), 0, MAX_ID)


def moment_text(name: str, source: Mapping[str, str]) -> str:
    """Return the instant that a time field sends, as RFC 3339; empty for none.

    The field is in UTC, to the second. Beside it, as `<name>_at`, comes the exact instant: what was
    shown, or what the page's script has made of the local time that was typed. Where the two don't
    agree there was no script, and somebody typed in UTC.
    """
    wall, exact = source.get(name, "").strip(), source.get(f"{name}_at", "").strip()
    if not WALL_TIME(wall):
        return wall
    if len(wall) == len("2026-01-01T00:00"):
        wall += ":00"
    # A page of 0.1.0 sends local time, and the browser's offset along.
    typed = wall + (source.get(f"{name}_offset") or "Z")
    try:
        return terms.moment(exact if wall_time(exact) == wall else typed, name).isoformat()
    except InvalidRequest:
        return typed


def wall_time(instant: str) -> str:
    """Return what a time field shows of an instant: UTC, for the page's script to make local."""
    try:
        shown = terms.moment(instant, "").replace(tzinfo=None)
    except InvalidRequest:
        return ""
    return shown.isoformat(timespec="seconds")


def moment(name: str, source: Mapping[str, str], called: str) -> datetime | None:
    """Return the moment in a time field, None for none. Raises InvalidRequest."""
    text = moment_text(name, source)
    if not text:
        return None
    if not terms.RFC3339(text):
        raise InvalidRequest(f"{called} is not a date and time", name)
    return terms.moment(text, name, called)


def submission_key() -> str:
    """A form carries one, so that pressing twice, or again after no answer, acts once."""
    return "form-" + secrets.token_urlsafe(12)


def used_before(act: str, *fields: str) -> bool:
    """Take this form's key, in the transaction of the act that follows; tell whether it has acted.

    `fields` are what a person chooses in it. A form without a key (of 0.1.0, still open) acts.
    Raises InvalidRequest when it has acted with other content.
    """
    key = request.form.get("key")
    if not key:
        return False
    if not VALID_KEY(key):
        raise InvalidRequest(USED_UP, "key")
    try:
        taken = idempotency.take(act, "", key, [request.form.get(name) for name in fields])
    except KeyMismatch:
        raise InvalidRequest(USED_UP, "key") from None
    if taken.answer is None:
        taken.answer = {}
        return False
    db.session.rollback()
    return True


def reason() -> str:
    """Return the form's reason. Raises InvalidRequest, with words for the page."""
    return read_text(request.form, "reason", MAX_REASON, "The reason")


def optional_reason() -> str | None:
    return reason() if request.form.get("reason", "").strip() else None


def done(message: str, target: str, category: str = "success") -> ResponseReturnValue:
    """Tell what was done, and show the page where it is seen."""
    flash(message, category)
    return redirect(target)


def with_note(fragment: str, message: str, category: str = "success") -> Response:
    """Return a fragment, with the words that the page shows as a note."""
    response = make_response(fragment)
    response.headers["HX-Trigger"] = json.dumps({"note": {"category": category, "text": message}})
    return response


def unconfirmed(title: str, text: str, yes: str, back: str) -> Response | None:
    """Return a page that asks first, None when the person has said yes.

    The page's script asks in a dialog and says so; this is for whoever has no script.
    """
    if request.form.get("confirmed") == "yes":
        return None
    page = render_template("admin/confirm.html", title=title, text=text, yes=yes, back=back)
    return make_response(page, 409 if by_htmx() else 200)
