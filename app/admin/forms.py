"""From what a form sends to what the use cases take, and errors back to their fields."""

import json
import re
import secrets
from datetime import datetime

from flask import Response, flash, make_response, redirect, render_template, request

from ..problems import InvalidRequest

LOCAL_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2})?").fullmatch
OFFSET = re.compile(r"[+-]\d{2}:\d{2}").fullmatch
PRICE = re.compile(r"(\d{1,13})(?:[.,](\d{1,2}))?").fullmatch


def by_htmx() -> bool:
    return request.headers.get("HX-Request") == "true"


def whole_number(text: str) -> int | str:
    """Return the number in a text; a text that holds none is returned as it is, to be refused."""
    text = text.strip().replace(",", "").replace(" ", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 16 else text


def cursor() -> int | None:
    """Return the id that the page's list goes on below, None for its beginning."""
    text = request.args.get("before", "")
    return int(text) if text.isascii() and text.isdigit() and 0 < len(text) <= 16 else None


def cents(text: str) -> int:
    """Return "999.99" as 99999. Raises InvalidRequest."""
    match = PRICE(text.strip().replace(" ", ""))
    if not match:
        raise InvalidRequest("price must be an amount like 999.99", "priceCents")
    return int(match[1]) * 100 + int((match[2] or "").ljust(2, "0"))


def moment(name: str, source=None) -> str | None:
    """Return a datetime-local field as RFC 3339; without the script's offset it is UTC.

    Nothing entered is None. Raises InvalidRequest, with the field's own name.
    """
    source = request.form if source is None else source
    text = source.get(name, "").strip()
    if not text:
        return None
    offset = source.get(f"{name}_offset", "") or "+00:00"
    if not LOCAL_TIME(text) or not OFFSET(offset):
        raise InvalidRequest("This is not a date and time", name)
    if len(text) == len("2026-01-01T00:00"):
        text += ":00"
    return text + offset


def moment_as_datetime(name: str, source) -> datetime | None:
    """Like `moment`, read. Raises InvalidRequest."""
    text = moment(name, source)
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        raise InvalidRequest("This is not a date and time", name) from None


def submission_key() -> str:
    """A form carries one, so that pressing twice, or again after no answer, acts once."""
    return "form-" + secrets.token_urlsafe(12)


def done(message: str, target: str, category: str = "success") -> Response:
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
