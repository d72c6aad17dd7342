"""The bearer tokens of programs; of each only a hash is kept."""

import hashlib
import hmac
import logging
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from flask import current_app
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError

from ..audit import Actor, record
from ..extensions import db
from ..models import ApiToken
from ..problems import InvalidRequest
from ..reading import read_text

log = logging.getLogger(__name__)

# What a token may be for, and what each is called on pages.
SCOPES = {
    "orders:read": "Read orders, and follow what happens to them",
    "orders:write": "Confirm, release and cancel orders",
    "products:write": "Create, change and restock products, and stop the sale",
}
# Everything, later scopes included. Tokens of 0.1.0 are of this kind.
ALL = "*"
PREFIX = "fst_"
MAX_NAME = 100
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


@dataclass(frozen=True)
class Known:
    """A token that is in force: the name under which it acts, and what it may do."""

    name: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        return ALL in self.scopes or scope in self.scopes


def find(token: str) -> Known | None:
    """Return whose token this is, None for one that is not in force.

    Raises SQLAlchemyError when nobody can tell.
    """
    expected = current_app.config["ADMIN_API_TOKEN"]
    if expected and hmac.compare_digest(token.encode(), expected.encode()):
        return Known("token ADMIN_API_TOKEN", frozenset([ALL]))
    found = db.session.scalar(
        select(ApiToken).where(
            ApiToken.token_hash == hash_token(token), ApiToken.revoked_at.is_(None)
        )
    )
    if found is None:
        return None
    known = Known(f"token {found.id} {found.name}", frozenset(found.scopes.split()))
    _note_use(found)
    return known


def name_of(token: str) -> str | None:
    """Return the name under which this token acts, None for one that is not in force."""
    known = find(token)
    return known.name if known else None


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


def create(name: str, scopes: Collection[str], actor: Actor) -> tuple[ApiToken, str]:
    """Create a token that may do what `scopes` say: some of SCOPES, or ALL.

    The text is returned this once and never stored. Raises InvalidRequest.
    """
    name = read_text({"name": name}, "name", MAX_NAME)
    if not scopes or not set(scopes) <= {ALL, *SCOPES}:
        raise InvalidRequest(f"scopes must be some of {', '.join(SCOPES)}, or {ALL}", "scopes")
    granted = [ALL] if ALL in scopes else [scope for scope in SCOPES if scope in scopes]
    text = PREFIX + secrets.token_urlsafe(32)
    token = ApiToken(
        name=name,
        token_hash=hash_token(text),
        hint=text[: len(PREFIX) + HINT_CHARACTERS],
        scopes=" ".join(granted),
        created_by=actor.name,
    )
    db.session.add(token)
    db.session.flush()
    after = {"name": name, "begins": token.hint, "scopes": granted}
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
