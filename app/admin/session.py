"""Signing in and out, and one's own password."""

import hashlib

from flask import Blueprint, flash, redirect, render_template, request, session, url_for
from flask_login import current_user, login_user, logout_user

from ..auth import staff_actor
from ..extensions import limiter
from ..problems import InvalidRequest
from ..staff import people, sessions
from ..staff.signin import sign_in as open_session
from .guard import safe_target

bp = Blueprint("session", __name__, url_prefix="/admin")

# Failures only: who gets in at once is not counted. The second limit slows down guessing at one
# person from many addresses.
ADDRESS_LIMIT = "20/minute"
EMAIL_LIMIT = "10/15 minutes"


def _email() -> str:
    """The key of the limit: hashed, since an empty key would skip it and a long one fill Redis."""
    email = request.form.get("email", "").strip().lower()
    return "email " + hashlib.sha256(email.encode()).hexdigest()


def _failed(response) -> bool:
    return response.status_code != 302


@bp.route("/sign-in", methods=["GET", "POST"])
@limiter.limit(ADDRESS_LIMIT, methods=["POST"], deduct_when=_failed)
@limiter.limit(EMAIL_LIMIT, methods=["POST"], key_func=_email, deduct_when=_failed)
def sign_in():
    target = safe_target(request.values.get("next")) or url_for("dashboard.show")
    if request.method == "GET":
        if current_user.is_authenticated:
            return redirect(target)
        return render_template("admin/sign_in.html", target=target)
    person = open_session(request.form.get("email", ""), request.form.get("password", ""))
    if person is None:
        return render_template("admin/sign_in.html", target=target, failed=True), 401
    _begin(person)
    return redirect(target)


def _begin(person) -> None:
    """Start a session from nothing, so that none that was planted before can be used."""
    session.clear()
    login_user(person)
    session.permanent = True


@bp.post("/sign-out")
def sign_out():
    sessions.end(current_user, staff_actor())
    logout_user()
    session.clear()
    return redirect(url_for("session.sign_in"))


@bp.get("/password")
def show_password():
    return render_template("admin/password.html", errors={})


@bp.post("/password")
@limiter.limit(EMAIL_LIMIT, key_func=lambda: f"password {current_user.get_id()}")
def change_password():
    """Change one's own password; every other session of this person ends."""
    new = request.form.get("new", "")
    errors = {}
    try:
        people.check_password(new)
    except InvalidRequest as error:
        errors["new"] = str(error)
    if new != request.form.get("repeated"):
        errors["repeated"] = "The two do not match"
    person = people.get(current_user.id)
    if not people.is_password_of(person, request.form.get("current", "")):
        errors["current"] = "This is not your password"
    if errors:
        return render_template("admin/password.html", errors=errors), 422
    people.set_password(person, new, staff_actor())
    _begin(open_session(person.email, new))
    flash("Your password is changed. Your other sessions are signed out.", "success")
    return redirect(url_for("session.show_password"))
