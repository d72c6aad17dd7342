"""People who may sign in: their addresses, passwords and roles."""

import secrets
from functools import cache

from sqlalchemy import delete, select
from werkzeug.security import check_password_hash, generate_password_hash

from ..audit import Actor, record
from ..extensions import db
from ..models import Staff, StaffSession
from ..problems import Conflict, InvalidRequest
from .sessions import revoking

# NIST SP 800-63B, 5.1.1.2: at least 8 characters; no rules of composition.
MIN_PASSWORD = 8
MAX_PASSWORD = 200
ROLES = ("admin", "support")


@cache
def _nobody() -> str:
    """Return what is checked when nobody has the address: it takes as long as a wrong password."""
    return generate_password_hash(secrets.token_hex())


def everybody() -> list[Staff]:
    """Return all people, those who may sign in first."""
    return list(db.session.scalars(select(Staff).order_by(Staff.active.desc(), Staff.email)))


def find(email: str) -> Staff | None:
    """Return the person with this address, however it is capitalised."""
    return db.session.scalar(select(Staff).where(Staff.email == email.strip().lower()))


def get(staff_id: int) -> Staff | None:
    return db.session.get(Staff, staff_id)


def is_password_of(person: Staff | None, password: str) -> bool:
    """Return whether the password is this active person's; as slowly where there is nobody."""
    nobody = _nobody()
    matches = check_password_hash(person.password_hash if person else nobody, password)
    return bool(matches and person and person.active)


def check_password(password: str) -> str:
    """Return the password if it may be used. Raises InvalidRequest."""
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise InvalidRequest(
            f"The password must have {MIN_PASSWORD} to {MAX_PASSWORD} characters", "password"
        )
    return password


def check_role(role: str) -> str:
    """Return the role if there is one of this name. Raises InvalidRequest."""
    if role not in ROLES:
        raise InvalidRequest(f"role must be one of {', '.join(ROLES)}", "role")
    return role


def create(email: str, password: str, role: str, actor: Actor) -> Staff:
    """Create a person who may sign in. Raises InvalidRequest, and Conflict for a known address."""
    email = email.strip().lower()
    is_line = email.isprintable() and " " not in email
    if not 3 <= len(email) <= 254 or "@" not in email[1:-1] or not is_line:
        raise InvalidRequest("email must be an e-mail address", "email")
    check_role(role)
    check_password(password)
    if find(email):
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
    """Change a password; every session of this person ends, and so do the counts of wrong ones.

    Raises InvalidRequest, and Unavailable before anything is changed.
    """
    password_hash = generate_password_hash(check_password(password))
    with revoking(person.id):
        person.password_hash = password_hash
        person.session_key = secrets.token_hex(16)
        db.session.execute(delete(StaffSession).where(StaffSession.staff_id == person.id))
        record(actor, "staff.password", f"staff {person.email}")
        db.session.commit()


def set_active(person: Staff, active: bool, actor: Actor) -> None:
    """Let a person in, or no longer; then every session of theirs ends with its next request.

    Raises Unavailable before anything is changed.
    """
    if person.active == active:
        return
    with revoking(person.id):
        person.active = active
        if not active:
            # Who is let in again signs in again.
            db.session.execute(delete(StaffSession).where(StaffSession.staff_id == person.id))
        record(
            actor,
            "staff.activate" if active else "staff.deactivate",
            f"staff {person.email}",
            before={"active": not active},
            after={"active": active},
        )
        db.session.commit()


def set_role(person: Staff, role: str, actor: Actor) -> None:
    """Change what a person may do, from their next request on.

    Raises InvalidRequest, and Unavailable before anything is changed.
    """
    if person.role == check_role(role):
        return
    with revoking(person.id):
        record(
            actor,
            "staff.role",
            f"staff {person.email}",
            before={"role": person.role},
            after={"role": role},
        )
        person.role = role
        db.session.commit()
