"""Who a shopper is, with SHOPPER_AUTH=jwt: a bearer token whose `sub` is the user's id.

Verified here, without a network call; the rules of RFC 8725 apply: one algorithm for each key,
named by us and never by the token, and issuer, audience and expiry always checked.
"""

import hashlib
import json
import re
import time
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from .config import Settings, SettingsError
from .models import MAX_ID

# Clocks of two machines that keep time differ by less.
LEEWAY_SECONDS = 10
# Longer ones are refused unread: a verification is the dearest thing an unknown client can ask for.
MAX_TOKEN_CHARACTERS = 4096
# RFC 7518, 3.3.
MIN_RSA_BITS = 2048
# Verified tokens remembered in each process: at most twice so many, about 300 bytes each.
REMEMBERED = 50_000
USER_ID = re.compile("[1-9][0-9]{0,15}").fullmatch
CHALLENGE = 'Bearer realm="shop"'


class Unauthenticated(Exception):
    """There is no valid token; `challenge` is the WWW-Authenticate header (RFC 6750, 3)."""

    def __init__(self, reason: str, challenge: str = CHALLENGE) -> None:
        super().__init__(reason)
        self.challenge = challenge


class AnotherShopper(Exception):
    """The token is valid, but its shopper is not the one the request is about."""


class Shoppers:
    """Reads a shopper's id out of an Authorization header."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError when the key can't be used."""
        self._keys = _keys(settings)
        self._issuer, self._audience = settings.jwt_issuer, settings.jwt_audience
        # Two generations: when the young one is full it becomes the old one, which is forgotten.
        self._young: dict[bytes, tuple[int, int]] = {}
        self._old: dict[bytes, tuple[int, int]] = {}

    def identify(self, authorization: str | None) -> int:
        """Return the id of the token's shopper. Raises Unauthenticated."""
        if not authorization or authorization[:7].lower() != "bearer ":
            raise Unauthenticated("A bearer token is required")
        token = authorization[7:].strip()
        # Only a hash is kept: a dump of the memory shows no token that could be used.
        digest = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        known = self._young.get(digest) or self._old.get(digest)
        if known is None:
            known = self._verify(token)
            if len(self._young) >= REMEMBERED:
                self._old, self._young = self._young, {}
            self._young[digest] = known
        shopper, expires = known
        if time.time() >= expires:
            raise _invalid("The token has expired")
        return shopper

    def _verify(self, token: str) -> tuple[int, int]:
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise _invalid("The token is too long")
        try:
            algorithm, key = self._key_of(token)
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise _invalid("The token has expired") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            raise _invalid("The token is not valid") from None
        if not USER_ID(claims["sub"]) or int(claims["sub"]) > MAX_ID:
            raise _invalid("The token's sub is not a user id")
        return int(claims["sub"]), int(claims["exp"]) + LEEWAY_SECONDS

    def _key_of(self, token: str) -> tuple[str, object]:
        """Return the key that the token names, or the only one. Raises jwt.PyJWTError."""
        if len(self._keys) == 1 and None in self._keys:
            return self._keys[None]
        name = jwt.get_unverified_header(token).get("kid")
        if name is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        if not isinstance(name, str) or name not in self._keys:
            raise jwt.InvalidKeyError("unknown key")
        return self._keys[name]


def _invalid(reason: str) -> Unauthenticated:
    return Unauthenticated(
        reason, f'{CHALLENGE}, error="invalid_token", error_description="{reason}"'
    )


def _keys(settings: Settings) -> dict[str | None, tuple[str, object]]:
    """Return {key id, None for a single nameless key: (algorithm, key)}. Raises SettingsError."""
    if settings.jwt_secret:
        return {None: ("HS256", settings.jwt_secret)}
    path = Path(settings.jwt_key_file)
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise SettingsError(f"JWT_KEY_FILE {path} can't be read: {error}") from None
    try:
        if text.lstrip().startswith("{"):
            return _jwks(json.loads(text))
        key = load_pem_public_key(text.encode())
        return {None: (_algorithm(key), key)}
    except (ValueError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise SettingsError(
            f"JWT_KEY_FILE {path} must hold a public key (PEM) or a key set (JWKS): {error}"
        ) from None


def _jwks(document: dict) -> dict[str | None, tuple[str, object]]:
    """Return the signing keys of a key set (RFC 7517) that fit; others are left out."""
    keys = {}
    for entry in document.get("keys", ()):
        if entry.get("kty") not in ("RSA", "EC") or entry.get("use", "sig") != "sig":
            continue
        if entry.get("alg") not in (None, "RS256", "ES256"):
            continue
        if "d" in entry:
            raise ValueError("it holds a private key, which must not be here")
        if entry.get("kid") in keys:
            raise ValueError(f"two keys have the kid {entry.get('kid')}")
        key = jwt.PyJWK(entry, entry.get("alg")).key
        if entry.get("alg") not in (None, _algorithm(key)):
            raise ValueError(f"the key {entry.get('kid')} is not for {entry['alg']}")
        keys[entry.get("kid")] = _algorithm(key), key
    if not keys:
        raise ValueError("it holds no RSA or P-256 key for signatures")
    return keys


def _algorithm(key: object) -> str:
    """Return the one algorithm that the key is used with: what it is decides, not the token."""
    if isinstance(key, RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        return "RS256"
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return "ES256"
    raise ValueError(f"it must be RSA with {MIN_RSA_BITS} bits or more, or EC on P-256")
