"""Secrets of webhooks: made here, shown once, and kept encrypted under a key made of SECRET_KEY."""

import base64
import secrets
from functools import lru_cache

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flask import current_app

# Standard Webhooks: 24 to 64 random bytes, in base64, behind this.
PREFIX = "whsec_"
BYTES = 32


class Unreadable(Exception):
    """The secret was encrypted under another SECRET_KEY; a new one has to be made."""


def make() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(BYTES)).decode()


def seal(secret: str) -> str:
    """Return what is stored of a secret."""
    return _fernet(current_app.config["SECRET_KEY"]).encrypt(secret.encode()).decode()


def unseal(sealed: str) -> str:
    """Return the secret. Raises Unreadable."""
    try:
        return _fernet(current_app.config["SECRET_KEY"]).decrypt(sealed.encode()).decode()
    except InvalidToken:
        raise Unreadable from None


@lru_cache(maxsize=4)
def _fernet(key: str) -> Fernet:
    # A key of its own, so that what is signed with SECRET_KEY elsewhere tells nothing about it.
    derived = HKDF(SHA256(), 32, salt=None, info=b"webhook secrets").derive(key.encode())
    return Fernet(base64.urlsafe_b64encode(derived))
