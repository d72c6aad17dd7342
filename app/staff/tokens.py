"""The bearer tokens of programs; of each only a hash is kept."""

import hashlib
import hmac
import logging
import secrets
from datetime import UTC, datetime, timedelta

from flask import current_app
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError

from ..audit import Actor, record
from ..extensions import db
from ..models import ApiToken
from ..problems import InvalidRequest

log = logging.getLogger(__name__)

PREFIX = "fst_"
# Of a token's 43 random characters so many are kept, to tell two of one name apart: what is left
# has 216 bits.
HINT_CHARACTERS = 6
# Written at most so often, so that a busy program does not write a row per request.
LAST_USED_RESOLUTION = timedelta(minutes=1)


def hash_token(token: str) -> str:
    """Return what is stored of a token. It is random and long, so a plain hash can't be guessed."""
    return hashlib.sha256(token.encode()).hexdigest()


def all_tokens() -> list[ApiToken]:
    """Return all tokens: those in force first, the newest of them first."""
    order = ApiToken.revoked_at.is_not(None), ApiToken.id.desc()
    return list(db.session.scalars(select(ApiToken).order_by(*order)))


def name_of(token: str) -> str | None:
    """Return the name under which this token acts, None for one that is not in force.

    Raises SQLAlchemyError when nobody can tell.
    """
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
    name = f"token {found.id} {found.name}"
    _note_use(found)
    return name


def _note_use(token: ApiToken) -> None:
    now = datetime.now(UTC)
    if token.last_used_at and now - token.last_used_at <= LAST_USED_RESOLUTION:
        return
    try:
        db.session.execute(update(ApiToken).where(ApiToken.id == token.id).values(last_used_at=now))
        db.session.commit()
    except SQLAlchemyError as error:
        # A PostgreSQL that only reads still tells that the token is good.
        db.session.rollback()
        log.info("the use of a token could not be noted: %s", error)


def create(name: str, actor: Actor) -> tuple[ApiToken, str]:
    """Create a token; the text is returned this once and never stored. Raises InvalidRequest."""
    name = name.strip()
    if not 1 <= len(name) <= 100:
        raise InvalidRequest("name must be a text of 1 to 100 characters", "name")
    text = PREFIX + secrets.token_urlsafe(32)
    token = ApiToken(
        name=name,
        token_hash=hash_token(text),
        hint=text[: len(PREFIX) + HINT_CHARACTERS],
        created_by=actor.name,
    )
    db.session.add(token)
    db.session.flush()
    after = {"name": name, "begins": token.hint}
    record(actor, "token.create", f"token {token.id}", after=after)
    db.session.commit()
    return token, text


def revoke(token_id: int, actor: Actor) -> ApiToken:
    """Revoke a token at once. Raises LookupError; a second time changes nothing."""
    token = db.session.get(ApiToken, token_id, with_for_update=True)
    if token is None:
        raise LookupError(f"There is no token {token_id}")
    if token.revoked_at is None:
        token.revoked_at = datetime.now(UTC)
        record(actor, "token.revoke", f"token {token.id}", before={"name": token.name})
    db.session.commit()
    return token
