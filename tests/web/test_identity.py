"""SHOPPER_AUTH=jwt: who may buy and look up, and the ways to cheat that fail."""

import base64
import hashlib
import hmac
import json
import math
import random
import time
from dataclasses import replace

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from app.config import SettingsError, load_settings, with_secrets
from app.problems import Unauthenticated
from app.web import identity
from app.web.identity import LEEWAY_SECONDS, Shoppers

SECRET = "a shared secret of more than thirty-two bytes"
ISSUER, AUDIENCE = "https://shop.example", "flash-sale"
HS256 = {"shopper_auth": "jwt", "jwt_secret": SECRET, "jwt_issuer": ISSUER}
HS256 |= {"jwt_audience": AUDIENCE}


def claims(**changed):
    now = int(time.time())
    told = {"sub": "1", "iss": ISSUER, "aud": AUDIENCE, "exp": now + 60, "iat": now} | changed
    return {name: value for name, value in told.items() if value is not None}


def token(key=SECRET, algorithm="HS256", headers=None, **changed):
    return jwt.encode(claims(**changed), key, algorithm, headers=headers)


def bearer(text):
    return {"Authorization": f"Bearer {text}"}


@pytest.fixture(scope="module")
def rsa_key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module")
def ec_key():
    return ec.generate_private_key(ec.SECP256R1())


def pem(key):
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def shoppers(path=None, **changed):
    given = HS256 | ({"jwt_secret": None, "jwt_key_file": path} if path else {}) | changed
    return Shoppers(replace(load_settings({}), **given))


@pytest.fixture
def client(make_app):
    return make_app(**HS256).test_client()


def buy(client, headers=None, **body):
    return client.post("/purchase", json={"userId": 1, "productId": 1} | body, headers=headers)


def test_buys_and_looks_up_with_ones_own_token(client):
    headers = bearer(token())
    assert buy(client, headers).json["orderId"] == 1
    assert len(client.get("/purchase/orders/1", headers=headers).json) == 1


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Basic eDp5"}, bearer(""), bearer("x")])
def test_without_a_token(client, headers):
    for answer in (buy(client, headers), client.get("/purchase/orders/1", headers=headers)):
        assert (answer.status_code, answer.json["code"]) == (401, "unauthorized")
        assert answer.headers["WWW-Authenticate"].startswith('Bearer realm="shop"')
        assert answer.mimetype == "application/json"


def test_with_anothers_token(client):
    headers = bearer(token(sub="2"))
    for answer in (buy(client, headers), client.get("/purchase/orders/1", headers=headers)):
        assert (answer.status_code, answer.json["code"]) == (403, "forbidden")
    assert client.get("/purchase/metrics").json["stock_remaining"] == 100


def test_who_asks_comes_before_what_is_asked(client):
    assert buy(client, userId="a b").status_code == 401
    assert buy(client, bearer(token()), userId="a b").status_code == 400


def test_an_admin_token_is_no_shoppers(client, admin_headers):
    assert buy(client, admin_headers).status_code == 401


def test_other_routes_ask_no_shopper(client):
    for path in ("/products", "/purchase/metrics", "/healthz"):
        assert client.get(path).status_code == 200


def test_trusted_is_the_default(app):
    assert buy(app.test_client()).status_code == 200


def refused(wrong, by=None):
    with pytest.raises(Unauthenticated) as error:
        (by or shoppers()).identify(f"Bearer {wrong}")
    assert "error=" in error.value.challenge
    return str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"exp": None}, {"exp": int(time.time()) - LEEWAY_SECONDS - 1}, {"exp": "soon"},
        {"exp": math.inf}, {"nbf": int(time.time()) + 9999}, {"iat": int(time.time()) + 9999},
        {"iss": None}, {"iss": "https://evil.example"}, {"aud": None}, {"aud": "another"},
        {"aud": ["another"]}, {"sub": None}, {"sub": ""}, {"sub": 0}, {"sub": -1},
        {"sub": 2**53}, {"sub": 1.0}, {"sub": True}, {"sub": [1]}, {"sub": {"id": 1}},
        {"sub": "1 "}, {"sub": "a b"}, {"sub": "９"}, {"sub": "."}, {"sub": ".."}, {"sub": "a/b"},
        {"sub": "x" * 65}, {"sub": "ü"}, {"sub": "a\n"},
    ],
    ids=lambda wrong: "".join(wrong),
)  # fmt: skip
def test_claims_that_are_refused(wrong):
    if wrong == {"exp": math.inf} or type(wrong.get("sub", "")) is not str:
        refused(unchecked_token(**wrong))
    else:
        refused(token(**wrong))


def unchecked_token(**changed):
    """Return a token that PyJWT would not write."""
    body = base64.urlsafe_b64encode(json.dumps(claims(**changed)).encode()).rstrip(b"=")
    head = base64.urlsafe_b64encode(b'{"alg":"HS256"}').rstrip(b"=")
    return sign(head + b"." + body)


@pytest.mark.parametrize(
    ("sub", "user"),
    [
        ("1", 1), (1, 1), ("01", "01"), ("0", "0"), ("-1", "-1"), ("+1", "+1"), ("1.0", "1.0"),
        (str(2**53 - 1), 2**53 - 1), (2**53 - 1, 2**53 - 1), (str(2**53), str(2**53)),
        ("auth0|42", "auth0|42"), ("Shop:a@b.example", "Shop:a@b.example"),
    ],
)  # fmt: skip
def test_a_shopper_is_a_number_or_a_text(sub, user):
    found = shoppers().identify(f"Bearer {unchecked_token(sub=sub)}")
    assert (found, type(found)) == (user, type(user))


def test_another_claim_may_name_the_shopper():
    name = "https://shop.example/customer"
    by = shoppers(jwt_user_claim=name)
    assert by.identify(f"Bearer {token(**{name: 'c-7'}, sub='1')}") == "c-7"
    assert "customer is not a user id" in refused(token(**{name: "c 7"}), by)
    refused(token(), by)


def sign(text, secret=None):
    secret = secret or SECRET.encode()
    mark = base64.urlsafe_b64encode(hmac.digest(secret, text, hashlib.sha256)).rstrip(b"=")
    return (text + b"." + mark).decode()


def test_an_expiry_in_the_far_future():
    assert shoppers().identify(f"Bearer {token(exp=10**400)}") == 1


def test_several_audiences_and_a_clock_that_is_slow():
    assert shoppers().identify(f"bearer {token(aud=['another', AUDIENCE])}") == 1
    assert shoppers().identify(f"Bearer {token(exp=int(time.time()) - 1)}") == 1
    assert shoppers().identify(f"Bearer {token(sub=str(2**53 - 1))}") == 2**53 - 1


def test_a_token_that_was_changed():
    head, body, mark = token().split(".")
    other = base64.urlsafe_b64encode(json.dumps(claims(sub="2")).encode()).rstrip(b"=").decode()
    for wrong in (
        f"{head}.{other}.{mark}",
        f"{head}.{body}.",
        f"{head}.{body}",
        f"{head}.{body}.{mark[:-4]}AAAA",
        token(key="another secret of more than thirty-two bytes"),
        "..",
        "a" * 5000,
        "é.é.é",
    ):
        refused(wrong)


HEADERS = [
    {"alg": "HS256"}, {"alg": "hs256"}, {"alg": "none"}, {"alg": None}, {"alg": ["HS256"]}, {},
    {"alg": "HS256", "kid": "any"}, {"alg": "HS256", "kid": ["x"]}, {"alg": "HS256", "kid": None},
    {"alg": "HS256", "crit": ["exp"]}, {"alg": "HS256", "crit": []}, {"alg": "HS256", "b64": False},
    [], "HS256", 1, None, {"alg": "HS384"}, {"alg": "RS256"},
]  # fmt: skip


def test_nothing_is_accepted_that_pyjwt_refuses():
    """Signed by the right key, but odd in every other way; and right ones with single bytes off."""

    def pyjwt_accepts(text):
        rules = {"audience": AUDIENCE, "issuer": ISSUER, "leeway": LEEWAY_SECONDS}
        require = {"require": ["exp", "iss", "aud", "sub"]}
        try:
            return bool(jwt.decode(text, SECRET, algorithms=["HS256"], options=require, **rules))
        except (jwt.PyJWTError, ValueError, TypeError, AttributeError):
            return False

    def ours_accepts(text):
        try:
            return bool(shoppers().identify(f"Bearer {text}"))
        except Unauthenticated:
            return False

    def encoded(value):
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    odd = [None, True, False, 0, -1, 1.5, "", "1", [], {}, [1], math.nan, 2**70, -(2**70)]
    payloads = [claims()] + [claims() | {name: value} for name in claims() for value in odd]
    payloads += [[], "text", 1, None, claims(nbf="1"), claims(aud=[AUDIENCE, 1])]
    texts = [sign(encoded(HEADERS[0]) + b"." + encoded(payload)) for payload in payloads]
    texts += [sign(encoded(header) + b"." + encoded(claims())) for header in HEADERS]
    good, chance = token(), random.Random(6)
    for _ in range(500):
        place = chance.randrange(len(good))
        texts.append(
            good[:place] + chance.choice(".-_A=+/ é\n") + good[place + chance.randrange(2) :]
        )
    accepted = [text for text in texts if ours_accepts(text)]
    assert len(accepted) > 3
    for text in accepted:
        assert pyjwt_accepts(text.strip()), text


def test_no_algorithm_but_ours(rsa_key, tmp_path):
    head = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').rstrip(b"=").decode()
    refused(f"{head}.{token().split('.')[1]}.")
    refused(token(key=SECRET * 2, algorithm="HS512"))
    refused(token(key=rsa_key, algorithm="RS256"))
    # The classic: the public key, which everybody knows, used as a shared secret.
    path = tmp_path / "key.pem"
    path.write_bytes(pem(rsa_key))
    head = base64.urlsafe_b64encode(b'{"alg":"HS256"}').rstrip(b"=")
    body = base64.urlsafe_b64encode(json.dumps(claims()).encode()).rstrip(b"=")
    refused(sign(head + b"." + body, pem(rsa_key)), by=shoppers(path))
    refused(token(key=rsa_key, algorithm="PS256"), by=shoppers(path))


@pytest.mark.parametrize("kind", ["rsa", "ec"])
def test_public_keys(kind, rsa_key, ec_key, tmp_path):
    key, other, name = (rsa_key, ec_key, "RS256") if kind == "rsa" else (ec_key, rsa_key, "ES256")
    path = tmp_path / "key.pem"
    path.write_bytes(pem(key))
    assert shoppers(path).identify(f"Bearer {token(key, name)}") == 1
    refused(token(other, "ES256" if kind == "rsa" else "RS256"), by=shoppers(path))


def jwk(key, name, **more):
    kind = jwt.algorithms.RSAAlgorithm if name == "RS256" else jwt.algorithms.ECAlgorithm
    return json.loads(kind.to_jwk(key.public_key())) | {"kid": name, **more}


def test_a_key_set(rsa_key, ec_key, tmp_path):
    path = tmp_path / "keys.json"
    unfit = [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"},
        jwk(ec_key, "ES256", use="enc", kid="e"),
    ]
    keys = [jwk(rsa_key, "RS256", alg="RS256"), jwk(ec_key, "ES256"), *unfit]
    path.write_text(json.dumps({"keys": keys}))
    by = shoppers(path)
    assert by.identify(f"Bearer {token(rsa_key, 'RS256', {'kid': 'RS256'}, sub='7')}") == 7
    assert by.identify(f"Bearer {token(ec_key, 'ES256', {'kid': 'ES256'}, sub='8')}") == 8
    for headers in ({}, {"kid": "unknown"}, {"kid": "ES256"}, {"kid": "secret"}, {"kid": "e"}):
        refused(token(rsa_key, "RS256", headers), by=by)
    # A key that the token itself brings or points to is of no interest.
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    own = jwk(stranger, "RS256")
    for more in ({"jwk": own}, {"jku": "https://evil.example/keys.json"}):
        refused(token(stranger, "RS256", {"kid": "RS256"} | more), by=by)


def test_keys_that_are_of_no_use_are_left_out_and_named(rsa_key, ec_key, tmp_path, caplog):
    """An issuer adds what it likes to its key set (RFC 7517, 5); ours go on."""
    p384 = jwk(ec.generate_private_key(ec.SECP384R1()), "ES256", kid="p384")
    good = jwk(rsa_key, "RS256")
    private = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rsa_key)) | {"kid": "private"}
    weak = jwk(rsa.generate_private_key(public_exponent=65537, key_size=1024), "RS256", kid="weak")
    unfit = {
        "p384": p384,
        "p384 with alg": p384 | {"alg": "ES384", "kid": "p384 with alg"},
        "enc": good | {"kid": "enc", "use": "enc"},
        "oaep": good | {"kid": "oaep", "alg": "RSA-OAEP"},
        "sign only": good | {"kid": "sign only", "key_ops": ["sign"]},
        "wrong alg": good | {"kid": "wrong alg", "alg": "ES256"},
        "okp": {"kty": "OKP", "crv": "Ed25519", "kid": "okp", "x": "11qYAYKxCrfVS_7TyWQHOg"},
        "oct": {"kty": "oct", "k": "c2VjcmV0", "kid": "oct"},
        "broken": {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
        "no numbers": {"kty": "EC", "kid": "no numbers", "crv": "P-256"},
        "unknown": {"kty": "LATTICE", "kid": "unknown"},
        "no kty": {"kid": "no kty"},
        "private": private,
        "bare private": private | {"kid": "bare private", "key_ops": ["verify"]},
        "weak": weak,
        "RS256": good,
    }  # fmt: skip
    path = tmp_path / "keys.json"
    keys = [good, jwk(ec_key, "ES256", kid="RS256"), *unfit.values(), {**good, "kid": 5}, "x", None]
    path.write_text(json.dumps({"keys": keys}))
    by = shoppers(path)
    assert by.identify(f"Bearer {token(rsa_key, 'RS256', {'kid': 'RS256'}, sub='7')}") == 7
    # Two keys of one id, for different algorithms.
    assert by.identify(f"Bearer {token(ec_key, 'ES256', {'kid': 'RS256'}, sub='8')}") == 8
    for name in unfit:
        assert f"({name!r}) is left out" in caplog.text
        if name != "RS256":
            refused(token(rsa_key, "RS256", {"kid": name}), by=by)
    assert caplog.text.count("is left out") == len(unfit) + 3
    path.write_text(json.dumps({"keys": list(unfit.values())[:-1]}))
    assert "no RSA or P-256 key" in wrong_settings(
        **HS256 | {"jwt_secret": None, "jwt_key_file": path}
    )


def test_a_verified_token_is_remembered_until_it_expires(monkeypatch):
    by, text = shoppers(), token()
    verified = []
    real = by._verify
    monkeypatch.setattr(by, "_verify", lambda found: verified.append(found) or real(found))
    assert [by.identify(f"Bearer {text}") for _ in range(3)] == [1, 1, 1]
    assert verified == [text]
    assert not any(text in repr(part) for part in (by._young, by._old))
    later = time.time() + 60 + LEEWAY_SECONDS
    monkeypatch.setattr(identity.time, "time", lambda: later)
    assert refused(text, by) == "The token has expired"


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(identity, "REMEMBERED", 10)
    by = shoppers()
    for user in range(1, 100):
        assert by.identify(f"Bearer {token(sub=str(user))}") == user
        assert len(by._young) + len(by._old) <= 20
    for _ in range(3):
        refused("not.a.token", by)
    assert len(by._young) + len(by._old) <= 20


def wrong_settings(**given):
    settings = replace(load_settings({}), secret_key="x" * 16, **given)
    with pytest.raises(SettingsError) as error:
        Shoppers(with_secrets(settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_settings_that_contradict_each_other(tmp_path):
    assert "of no use" in wrong_settings(jwt_secret=SECRET)
    assert "one of them" in wrong_settings(shopper_auth="jwt")
    both = HS256 | {"jwt_key_file": tmp_path / "key"}
    assert "one of them" in wrong_settings(**both)
    assert "JWT_ISSUER" in wrong_settings(**HS256 | {"jwt_issuer": None})
    assert "JWT_AUDIENCE" in wrong_settings(**HS256 | {"jwt_audience": None})
    assert "32 bytes" in wrong_settings(**HS256 | {"jwt_secret": "short"})


def test_keys_that_cannot_be_used(tmp_path, rsa_key):
    path = tmp_path / "key"
    given = HS256 | {"jwt_secret": None, "jwt_key_file": path}
    assert "can't be read" in wrong_settings(**given)
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    other = ec.generate_private_key(ec.SECP384R1())
    private = rsa_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    secret = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rsa_key)) | {"kid": "1"}
    texts = (b"", b"hello", pem(weak), pem(other), private, b"{}", b'{"keys": []}', b'{"keys": 1}')
    texts += (b"{", json.dumps({"keys": [secret]}).encode(), b"\xff\xfe")
    for text in texts:
        path.write_bytes(text)
        assert "JWT_KEY_FILE" in wrong_settings(**given), text[:40]
