"""Who may sign in, and the tokens of programs."""

import secrets

from flask import Blueprint, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user
from werkzeug.exceptions import NotFound

from ..auth import staff_actor
from ..extensions import limiter
from ..models import Staff
from ..problems import Conflict, InvalidRequest
from ..staff import people, tokens
from . import forms

bp = Blueprint("staff", __name__, url_prefix="/admin/staff")
CHANGE_LIMIT = "60/minute"
limiter.limit(CHANGE_LIMIT, methods=["POST"])(bp)


def page(status: int = 200, **more: object) -> ResponseReturnValue:
    """The page; secrets are shown in the very answer that made them, and stored nowhere."""
    shown = {"errors": {}, "token_errors": {}, "values": {}, "secret": None, "ticked": []} | more
    return render_template(
        "admin/staff.html",
        people=people.everybody(),
        tokens=tokens.all_tokens(),
        roles=people.ROLES,
        scopes=tokens.SCOPES,
        **shown,
    ), status


@bp.get("/")
def index() -> ResponseReturnValue:
    return page()


@bp.post("/")
def create() -> ResponseReturnValue:
    """Let somebody sign in, with a password made here and shown once."""
    password = secrets.token_urlsafe(12)
    try:
        if forms.used_before("staff.create", "email", "role"):
            return shown_once(f"{request.form['email']} was added already, and the password")
        person = people.create(
            request.form.get("email", ""),
            password,
            request.form.get("role", ""),
            staff_actor(),
        )
    except InvalidRequest as error:
        field = "email" if error.field == "key" else error.field
        return page(422, errors={field: str(error)}, values=request.form)
    except Conflict as error:
        return page(422, errors={"email": str(error)}, values=request.form)
    return page(secret=("password", person.email, password))


def shown_once(what: str) -> ResponseReturnValue:
    """Answer a form that was sent again: what the first answer showed is nowhere to be found."""
    told = f"{what} was shown once. If nobody has noted it, make a new one; nothing was made twice."
    return forms.done(told, url_for("staff.index"), "warning")


def colleague(staff_id: int) -> Staff:
    """Return somebody else: nobody locks themselves out, so one admin is always left."""
    person = people.get(staff_id)
    if person is None:
        raise NotFound
    if person.id == current_user.id:
        raise Conflict("You can't do this to yourself", "own_account")
    return person


@bp.post("/<id:staff_id>/active")
def set_active(staff_id: int) -> ResponseReturnValue:
    person = colleague(staff_id)
    active = request.form.get("active") == "yes"
    if not active and (
        question := forms.unconfirmed(
            f"Deactivate {person.email}?",
            "They are signed out at once and can't sign in again.",
            "Deactivate",
            url_for("staff.index"),
        )
    ):
        return question
    people.set_active(person, active, staff_actor())
    told = "may sign in again" if active else "can no longer sign in"
    return forms.done(f"{person.email} {told}.", url_for("staff.index"))


@bp.post("/<id:staff_id>/role")
def set_role(staff_id: int) -> ResponseReturnValue:
    person = colleague(staff_id)
    people.set_role(person, request.form.get("role", ""), staff_actor())
    return forms.done(f"{person.email} is now {person.role}.", url_for("staff.index"))


@bp.post("/<id:staff_id>/password")
def reset_password(staff_id: int) -> ResponseReturnValue:
    """Give somebody a new password, shown once; their sessions end."""
    person = colleague(staff_id)
    if question := forms.unconfirmed(
        f"Reset the password of {person.email}?",
        "They are signed out everywhere. You see the new password once.",
        "Reset the password",
        url_for("staff.index"),
    ):
        return question
    if forms.used_before(f"staff.reset_password {staff_id}"):
        return shown_once(f"The new password of {person.email}")
    password = secrets.token_urlsafe(12)
    people.set_password(person, password, staff_actor())
    return page(secret=("password", person.email, password))


@bp.post("/tokens")
def create_token() -> ResponseReturnValue:
    ticked = request.form.getlist("scope")
    try:
        if forms.used_before("staff.create_token", "name"):
            return shown_once(f"The token {request.form['name']} was created already, and its text")
        token, text = tokens.create(request.form.get("name", ""), ticked, staff_actor())
    except InvalidRequest as error:
        if error.field == "scopes":
            errors = {"scopes": "Choose what the token may do"}
        else:
            errors = {"name": error.told({"name": "The name"})}
        return page(422, token_errors=errors, values=request.form, ticked=ticked)
    return page(secret=("token", token.name, text))


@bp.post("/tokens/<id:token_id>/revoke")
def revoke_token(token_id: int) -> ResponseReturnValue:
    if question := forms.unconfirmed(
        "Revoke this token?",
        "Programs that use it are refused at once. A revoked token can't be brought back.",
        "Revoke",
        url_for("staff.index"),
    ):
        return question
    try:
        token = tokens.revoke(token_id, staff_actor())
    except LookupError:
        raise NotFound from None
    return forms.done(f"The token {token.name} is revoked.", url_for("staff.index"))
