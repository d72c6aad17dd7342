"""Who of the staff is asking: the person of the request's session."""

from flask import request
from flask_login import current_user

from .audit import Actor
from .extensions import login
from .staff import sessions

# The session's cookie is signed and names no address, so Flask-Login's look at a browser's name
# and address guards nothing; it would write to the session of whoever changes networks.
login.session_protection = None


@login.user_loader  # type: ignore[untyped-decorator]  # Flask-Login has no types
def load_person(session_id: str) -> sessions.SignedIn | None:
    return sessions.find(session_id)


def staff_actor() -> Actor:
    return Actor(f"staff {current_user.email}", request.remote_addr)
