"""Every change: who, what, from where, and what it was before."""

from flask import Blueprint, render_template, request
from sqlalchemy import select

from ..extensions import db
from ..models import AuditEntry
from . import forms

bp = Blueprint("audit", __name__, url_prefix="/admin/audit")

PAGE_ENTRIES = 50
ACTIONS = (
    "product.create", "product.change", "product.restock", "product.correct", "movement.refused",
    "order.cancel", "staff.create", "staff.activate", "staff.deactivate", "staff.role",
    "staff.password", "token.create", "token.revoke", "sale.reset",
    "sale.brake", "sale.release",
)  # fmt: skip


@bp.get("/")
def index():
    actor, action, target = (
        request.args.get(name, "").strip() for name in ("actor", "action", "target")
    )
    before = forms.cursor()
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(PAGE_ENTRIES + 1)
    if actor:
        query = query.where(AuditEntry.actor == actor)
    if action:
        query = query.where(AuditEntry.action == action)
    if target:
        query = query.where(AuditEntry.target == target)
    if before:
        query = query.where(AuditEntry.id < before)
    entries = list(db.session.scalars(query))
    return render_template(
        "admin/_audit.html"
        if request.headers.get("HX-Target") == "results"
        else "admin/audit.html",
        entries=entries[:PAGE_ENTRIES],
        older=entries[PAGE_ENTRIES - 1].id if len(entries) > PAGE_ENTRIES else None,
        actions=ACTIONS,
        query={name: value for name, value in request.args.items() if value and name != "before"},
        before=before,
    )
