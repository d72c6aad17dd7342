"""Signing in and out, and one's own password."""

from flask import (
    Blueprint,
    flash,
    make_response,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask.typing import ResponseReturnValue
from flask_login import current_user, login_user, logout_user

from ..auth import staff_actor
from ..problems import InvalidRequest
from ..staff import people, sessions, signin
from ..staff.guesses import TooManyGuesses
from ..times import in_words
from . import devices
from .guard import safe_target

bp = Blueprint("session", __name__, url_prefix="/admin")

WRONG = "The e-mail address and the password do not match."
MISSING = "Enter your e-mail address and your password."


@bp.route("/sign-in", methods=["GET", "POST"])
def sign_in() -> ResponseReturnValue:
    target = safe_target(request.values.get("next")) or url_for("dashboard.show")
    if request.method == "GET":
        if current_user.is_authenticated:
            return redirect(target)
        return render_template("admin/sign_in.html", target=target)
    email, password = request.form.get("email", "").strip(), request.form.get("password", "")
    if not email or not password:
        return render_template("admin/sign_in.html", target=target, problem=MISSING), 422
    try:
        person = signin.sign_in(email, password, request.remote_addr or "", devices.known())
    except TooManyGuesses as error:
        return _wait("admin/sign_in.html", error, target=target)
    if person is None:
        return render_template("admin/sign_in.html", target=target, problem=WRONG), 401
    _begin(person)
    response = make_response(redirect(target))
    devices.remember(response, person.id)
    return response


def _wait(page: str, error: TooManyGuesses, **more: object) -> ResponseReturnValue:
    """Return a page that tells how long no password is looked at."""
    problem = f"Too many wrong passwords. Try again {in_words(error.seconds)}."
    return render_template(page, problem=problem, **more), 429, {"Retry-After": str(error.seconds)}


def _begin(person: sessions.SignedIn) -> None:
    """Start a session from nothing, so that none that was planted before can be used."""
    session.clear()
    login_user(person)
    session.permanent = True


@bp.post("/sign-out")
def sign_out() -> ResponseReturnValue:
    sessions.end(current_user, staff_actor())
    logout_user()
    session.clear()
    return redirect(url_for("session.sign_in"))


@bp.get("/password")
def show_password() -> ResponseReturnValue:
    return render_template("admin/password.html", errors={})


@bp.post("/password")
def change_password() -> ResponseReturnValue:
    """Change one's own password; every other session of this person ends."""
    current, new = request.form.get("current", ""), request.form.get("new", "")
    errors = {}
    try:
        people.check_password(new)
    except InvalidRequest as error:
        errors["new"] = str(error)
    if new != request.form.get("repeated"):
        errors["repeated"] = "The two do not match"
    try:
        person = signin.confirm_password(current_user, current, request.remote_addr or "")
    except TooManyGuesses as error:
        return _wait("admin/password.html", error, errors={})
    if person is None:
        errors["current"] = "This is not your password"
    if errors or person is None:
        return render_template("admin/password.html", errors=errors), 422
    people.set_password(person, new, staff_actor())
    _begin(sessions.renew(person))
    flash("Your password is changed. Your other sessions are signed out.", "success")
    return redirect(url_for("session.show_password"))
