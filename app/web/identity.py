"""Who a shopper is, with SHOPPER_AUTH=jwt: a bearer token whose claim `sub` is the user's id.

Verified here, without a network call; the rules of RFC 8725 apply: one algorithm for each key,
named by us and never by the token, and issuer, audience and expiry always checked.
"""

import hashlib
import json
import logging
import time
from binascii import a2b_base64
from functools import lru_cache
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import Algorithm, get_default_algorithms

from ..config import Settings, SettingsError
from ..problems import CHALLENGE, Unauthenticated
from ..reading import User, canonical

log = logging.getLogger(__name__)

# Clocks of two machines that keep time differ by less.
LEEWAY_SECONDS = 10
# Longer ones are refused unread: a verification is the dearest thing an unknown client can ask for.
MAX_TOKEN_CHARACTERS = 4096
# RFC 7518, 3.3.
MIN_RSA_BITS = 2048
# Verified tokens remembered in each process: at most twice so many, about 300 bytes each.
REMEMBERED = 50_000
# Keys and signatures are PyJWT's. Its decode() takes several times as long as what is done here,
# and a sale begins with as many new tokens as shoppers; a test holds one against the other.
ALGORITHMS = {name: get_default_algorithms()[name] for name in ("HS256", "RS256", "ES256")}
# Of the two alphabets only the URL's is let through (RFC 7515, 2).
URL_SAFE = bytes.maketrans(b"-_+/=", b"+/!!!")
# By the key's id (None where it has none) and its algorithm: two of one id differ in that.
Keys = dict[tuple[str | None, str], object]


def bearer_of(authorization: str | None) -> str | None:
    """Return the token of an Authorization header, None where it holds none."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


class Shoppers:
    """Reads a shopper's id out of an Authorization header."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError when the key can't be used."""
        self._keys = _keys(settings)
        # The header is the same text in all tokens of an issuer.
        self._key_of = lru_cache(maxsize=64)(self._find_key)
        self._issuer, self._audience = settings.jwt_issuer, settings.jwt_audience
        self._claim = settings.jwt_user_claim
        # Two generations: when the young one is full it becomes the old one, which is forgotten.
        self._young: dict[bytes, tuple[User, int]] = {}
        self._old: dict[bytes, tuple[User, int]] = {}

    def identify(self, authorization: str | None) -> User:
        """Return the id of the token's shopper. Raises Unauthenticated."""
        token = bearer_of(authorization)
        if token is None:
            raise Unauthenticated("A bearer token is required")
        # Only a hash is kept: a dump of the memory shows no token that could be used.
        digest = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        known = self._young.get(digest) or self._old.get(digest)
        if known is None:
            known = self._verify(token)
            if len(self._young) >= REMEMBERED:
                self._old, self._young = self._young, {}
            self._young[digest] = known
        shopper, expires = known
        # Of a token just verified as well: this is the one place where its age is looked at.
        if time.time() >= expires:
            raise _invalid("The token has expired")
        return shopper

    def _verify(self, token: str) -> tuple[User, int]:
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise _invalid("The token is too long")
        try:
            signed, _, mark = token.encode("ascii").rpartition(b".")
            head, _, body = signed.partition(b".")
            algorithm, key = self._key_of(head)
            if not algorithm.verify(signed, key, _decode(mark)):
                raise ValueError
            claims = json.loads(_decode(body))
            return self._read(claims, time.time())
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, jwt.PyJWTError):
            raise _invalid("The token is not valid") from None

    def _read(self, claims: dict[str, Any], now: float) -> tuple[User, int]:
        """Return the shopper and the moment of expiry. Raises what a wrong claim leads to."""
        for name in ("nbf", "iat"):
            if name in claims and int(claims[name]) > now + LEEWAY_SECONDS:
                raise _invalid("The token is not valid yet")
        audience = claims["aud"]
        if type(audience) is list and all(type(name) is str for name in audience):
            meant = self._audience in audience
        else:
            meant = audience == self._audience
        if claims["iss"] != self._issuer or not meant:
            raise _invalid("The token is not meant for here")
        return self._shopper(claims[self._claim]), int(claims["exp"]) + LEEWAY_SECONDS

    def _shopper(self, value: object) -> User:
        """Return the shopper in a claim: a text (RFC 7519, 4.1.2), or a number all the same."""
        try:
            return canonical(value)
        except ValueError:
            raise _invalid(f"The token's {self._claim} is not a user id") from None

    def _find_key(self, head: bytes) -> tuple[Algorithm, object]:
        """Return what a token with this header is verified with. Raises ValueError."""
        header = json.loads(_decode(head))
        # Extensions that must be understood (RFC 7515, 4.1.11) are not understood here.
        if type(header) is not dict or "crit" in header or "b64" in header:
            raise ValueError
        name, algorithm = header.get("kid"), header["alg"]
        if "kid" in header and type(name) is not str:
            raise ValueError
        if len(self._keys) == 1:
            ((only, _),) = self._keys
            if name is None or only is None:
                name = only
        return ALGORITHMS[algorithm], self._keys[name, algorithm]


def _decode(text: bytes) -> bytes:
    """Return the bytes of unpadded base64url. Raises ValueError for anything else."""
    return a2b_base64(text.translate(URL_SAFE) + b"=" * (-len(text) % 4), strict_mode=True)


def _invalid(reason: str) -> Unauthenticated:
    return Unauthenticated(
        reason, f'{CHALLENGE}, error="invalid_token", error_description="{reason}"'
    )


def _keys(settings: Settings) -> Keys:
    """Return the keys that tokens may be verified with. Raises SettingsError."""
    if settings.jwt_secret:
        return {(None, "HS256"): ALGORITHMS["HS256"].prepare_key(settings.jwt_secret)}
    # One of the two is there: config.check_shopper_auth.
    path = Path(settings.jwt_key_file or "")
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise SettingsError(f"JWT_KEY_FILE {path} can't be read: {error}") from None
    try:
        if text.lstrip().startswith("{"):
            return _jwks(json.loads(text))
        key = load_pem_public_key(text.encode())
        return {(None, _algorithm(key)): key}
    except (ValueError, TypeError, KeyError, AttributeError, jwt.PyJWTError) as error:
        raise SettingsError(
            f"JWT_KEY_FILE {path} must hold a public key (PEM) or a key set (JWKS): {error}"
        ) from None


def _jwks(document: dict[str, Any]) -> Keys:
    """Return the keys of a key set that can be used here.

    Others are left out and named in the log (RFC 7517, 5): an issuer may add what it likes. Raises
    ValueError when there is none left.
    """
    keys: Keys = {}
    for number, entry in enumerate(document["keys"], 1):
        try:
            name, algorithm, key = _jwk(entry)
            if (name, algorithm) in keys:
                raise ValueError(f"another {algorithm} key has this kid")
        except (ValueError, TypeError, KeyError, AttributeError, jwt.PyJWTError) as error:
            named = entry.get("kid") if isinstance(entry, dict) else None
            log.warning("JWT_KEY_FILE: key %s (%.64r) is left out: %s", number, named, error)
            continue
        keys[name, algorithm] = key
    if not keys:
        raise ValueError("it holds no RSA or P-256 key for signatures")
    return keys


def _jwk(entry: dict[str, Any]) -> tuple[str | None, str, object]:
    """Return kid, algorithm and key of a key set's entry. Raises what makes it unfit."""
    name = entry.get("kid")
    if name is not None and type(name) is not str:
        raise ValueError("its kid is not a text")
    if entry.get("kty") not in ("RSA", "EC"):
        raise ValueError("it is neither RSA nor EC")
    if entry.get("use", "sig") != "sig" or "verify" not in entry.get("key_ops", ["verify"]):
        raise ValueError("it is not for signatures")
    if "d" in entry:
        raise ValueError("it is a private key, which must not be here")
    if entry.get("alg") not in (None, "RS256", "ES256"):
        raise ValueError("its alg is neither RS256 nor ES256")
    key = jwt.PyJWK(entry, entry.get("alg")).key
    algorithm = _algorithm(key)
    if entry.get("alg") not in (None, algorithm):
        raise ValueError(f"it is not for {entry['alg']}")
    return name, algorithm, key


def _algorithm(key: object) -> str:
    """Return the one algorithm that the key is used with: what it is decides, not the token."""
    if isinstance(key, RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        return "RS256"
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return "ES256"
    raise ValueError(f"it must be RSA with {MIN_RSA_BITS} bits or more, or EC on P-256")
