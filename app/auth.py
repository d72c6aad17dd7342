"""Who is asking: staff by their session, programs by a bearer token."""

import functools
import hashlib
import hmac
import secrets
from datetime import UTC, datetime, timedelta
from functools import cache

from flask import current_app, g, request
from flask_login import current_user
from sqlalchemy import select, update
from werkzeug.exceptions import Forbidden
from werkzeug.security import check_password_hash, generate_password_hash

from .audit import Actor, record
from .extensions import db, login
from .models import ApiToken, Staff
from .problems import Conflict, InvalidRequest
from .web.errors import api_error

# NIST SP 800-63B, 5.1.1.2: at least 8 characters; no rules of composition.
MIN_PASSWORD = 8
MAX_PASSWORD = 200
ROLES = ("admin", "support")
# Written at most so often, so that a busy program does not write a row per request.
LAST_USED_RESOLUTION = timedelta(minutes=1)


@login.user_loader
def load_staff(session_id: str) -> Staff | None:
    """Return the person of a session, unless deactivated or signed in with an older password."""
    staff_id, _, session_key = session_id.partition(":")
    staff = db.session.get(Staff, int(staff_id)) if staff_id.isdigit() else None
    if staff and staff.active and hmac.compare_digest(staff.session_key, session_key):
        return staff
    return None


def staff_actor() -> Actor:
    return Actor(f"staff {current_user.email}", request.remote_addr)


def admin_only(view):
    """Let only admins in; the blueprint has made sure that somebody is signed in."""

    @functools.wraps(view)
    def guarded(*args, **kwargs):
        if not current_user.is_admin:
            raise Forbidden
        return view(*args, **kwargs)

    return guarded


def hash_token(token: str) -> str:
    """Return what is stored of a token. It is random and long, so a plain hash can't be guessed."""
    return hashlib.sha256(token.encode()).hexdigest()


def token_required(view):
    """Let only a valid `Authorization: Bearer` in; the actor is then in `g.actor`."""

    @functools.wraps(view)
    def guarded(*args, **kwargs):
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        name = _token_name(token.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            response = api_error(401, "A valid API token is required")
            response.headers["WWW-Authenticate"] = 'Bearer realm="admin"'
            return response
        g.actor = Actor(name, request.remote_addr)
        return view(*args, **kwargs)

    return guarded


def metrics_token_required(view):
    """Let only METRICS_TOKEN in, or ADMIN_API_TOKEN where there is none. No server is asked."""

    @functools.wraps(view)
    def guarded(*args, **kwargs):
        settings = current_app.config["SETTINGS"]
        expected = settings.metrics_token or settings.admin_api_token
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            token.strip().encode(), expected.encode()
        ):
            response = api_error(401, "The metrics token is required")
            response.headers["WWW-Authenticate"] = 'Bearer realm="metrics"'
            return response
        return view(*args, **kwargs)

    return guarded


def _token_name(token: str) -> str | None:
    expected = current_app.config["ADMIN_API_TOKEN"]
    if expected and hmac.compare_digest(token.encode(), expected.encode()):
        return "token ADMIN_API_TOKEN"
    found = db.session.scalar(
        select(ApiToken).where(
            ApiToken.token_hash == hash_token(token), ApiToken.revoked_at.is_(None)
        )
    )
    if found is None:
        return None
    now = datetime.now(UTC)
    if found.last_used_at is None or now - found.last_used_at > LAST_USED_RESOLUTION:
        db.session.execute(update(ApiToken).where(ApiToken.id == found.id).values(last_used_at=now))
        db.session.commit()
    return f"token {found.id} {found.name}"


def create_token(name: str, actor: Actor) -> tuple[ApiToken, str]:
    """Create a token; the text is returned this once and never stored."""
    name = name.strip()
    if not 1 <= len(name) <= 100:
        raise InvalidRequest("name must be a text of 1 to 100 characters", "name")
    text = "fst_" + secrets.token_urlsafe(32)
    token = ApiToken(name=name, token_hash=hash_token(text), created_by=actor.name)
    db.session.add(token)
    db.session.flush()
    record(actor, "token.create", f"token {token.id}", after={"name": name})
    db.session.commit()
    return token, text


def revoke_token(token_id: int, actor: Actor) -> ApiToken:
    """Revoke a token at once. Raises LookupError; a second time changes nothing."""
    token = db.session.get(ApiToken, token_id, with_for_update=True)
    if token is None:
        raise LookupError(f"There is no token {token_id}")
    if token.revoked_at is None:
        token.revoked_at = datetime.now(UTC)
        record(actor, "token.revoke", f"token {token.id}", before={"name": token.name})
    db.session.commit()
    return token


def check_password(password: str) -> str:
    """Return the password if it may be used. Raises InvalidRequest."""
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise InvalidRequest(
            f"The password must have {MIN_PASSWORD} to {MAX_PASSWORD} characters", "password"
        )
    return password


def create_staff(email: str, password: str, role: str, actor: Actor) -> Staff:
    """Create a person who may sign in. Raises InvalidRequest, and Conflict for a known address."""
    email = email.strip().lower()
    if not 3 <= len(email) <= 254 or "@" not in email[1:-1] or any(c.isspace() for c in email):
        raise InvalidRequest("email must be an e-mail address", "email")
    if role not in ROLES:
        raise InvalidRequest(f"role must be one of {', '.join(ROLES)}", "role")
    check_password(password)
    if db.session.scalar(select(Staff).where(Staff.email == email)):
        raise Conflict("There is somebody with this address already", "email_taken")
    person = Staff(
        email=email,
        password_hash=generate_password_hash(password),
        role=role,
        session_key=secrets.token_hex(16),
    )
    db.session.add(person)
    record(actor, "staff.create", f"staff {email}", after={"role": role})
    db.session.commit()
    return person


def set_password(person: Staff, password: str, actor: Actor) -> None:
    """Change a password; every session of this person ends. Raises InvalidRequest."""
    person.password_hash = generate_password_hash(check_password(password))
    person.session_key = secrets.token_hex(16)
    record(actor, "staff.password", f"staff {person.email}")
    db.session.commit()


def set_active(person: Staff, active: bool, actor: Actor) -> None:
    """Let a person in, or no longer; then every session of theirs ends with its next request."""
    if person.active == active:
        return
    person.active = active
    record(
        actor,
        "staff.activate" if active else "staff.deactivate",
        f"staff {person.email}",
        before={"active": not active},
        after={"active": active},
    )
    db.session.commit()


def set_role(person: Staff, role: str, actor: Actor) -> None:
    """Change what a person may do, from their next request on. Raises InvalidRequest."""
    if role not in ROLES:
        raise InvalidRequest(f"role must be one of {', '.join(ROLES)}", "role")
    if person.role == role:
        return
    record(
        actor,
        "staff.role",
        f"staff {person.email}",
        before={"role": person.role},
        after={"role": role},
    )
    person.role = role
    db.session.commit()


@cache
def _nobody() -> str:
    """Return what is checked when nobody has the address: it takes as long as a wrong password."""
    return generate_password_hash(secrets.token_hex())


def sign_in(email: str, password: str) -> Staff | None:
    """Return the person with this address and password, None when they don't match."""
    person = db.session.scalar(select(Staff).where(Staff.email == email.strip().lower()))
    nobody = _nobody()
    matches = check_password_hash(person.password_hash if person else nobody, password)
    if not person or not matches or not person.active:
        return None
    person.last_sign_in_at = datetime.now(UTC)
    db.session.commit()
    return person
