"""Every change: who, what, from where, and what it was before."""

import json
from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, Response, render_template, request, stream_with_context
from flask.typing import ResponseReturnValue

from .. import audit, sheet
from ..extensions import limiter
from ..models import AuditEntry
from ..problems import InvalidRequest
from ..times import utc_text
from . import forms
from .orders import EXPORT_LIMIT

bp = Blueprint("audit", __name__, url_prefix="/admin/audit")

PAGE_ENTRIES = 50
CSV_HEADER = ("id", "at", "who", "from", "change", "of", "before", "after")


def read_filter() -> tuple[audit.Filter, dict[str, str]]:
    """Return the filter in the URL, and its errors by field."""
    errors: dict[str, str] = {}
    values: dict[str, Any] = {
        name: request.args.get(name, "").strip() or None for name in ("actor", "action", "target")
    }
    for field, name, called in (("from", "since", "The first"), ("to", "until", "The last")):
        try:
            values[name] = forms.moment(field, request.args, called)
        except InvalidRequest as error:
            errors[field] = str(error)
    return audit.Filter(**values), errors


@bp.get("/")
def index() -> ResponseReturnValue:
    wanted, errors = read_filter()
    before = forms.cursor()
    entries = [] if errors else audit.find(wanted, before, PAGE_ENTRIES + 1)
    return render_template(
        "admin/_audit.html"
        if request.headers.get("HX-Target") == "results"
        else "admin/audit.html",
        entries=entries[:PAGE_ENTRIES],
        older=entries[PAGE_ENTRIES - 1].id if len(entries) > PAGE_ENTRIES else None,
        actions=audit.ACTIONS,
        query={name: value for name, value in request.args.items() if value and name != "before"},
        before=before,
        errors=errors,
        times={name: forms.moment_text(name, request.args) for name in ("from", "to")},
    )


@bp.get("/audit.csv")
@limiter.limit(EXPORT_LIMIT)
def export() -> ResponseReturnValue:
    """Stream the filter's entries as CSV, a chunk at a time."""
    wanted, errors = read_filter()
    if errors:
        raise InvalidRequest(next(iter(errors.values())))
    rows = sheet.chunks(CSV_HEADER, map(row_of, audit.export(wanted)))
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Response(
        stream_with_context(rows),
        mimetype="text/csv",
        headers={"Content-Disposition": f'attachment; filename="audit-{stamp}.csv"'},
    )


def row_of(entry: AuditEntry) -> tuple[str, ...]:
    before, after = (
        json.dumps(value, ensure_ascii=False) if value else ""
        for value in (entry.before, entry.after)
    )
    return (
        str(entry.id),
        utc_text(entry.at),
        entry.actor,
        entry.address or "",
        entry.action,
        entry.target,
        before,
        after,
    )
