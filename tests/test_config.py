"""Settings: defaults, and a clear line for each wrong value."""

import stat
from itertools import product
from types import SimpleNamespace

import pytest
from sqlalchemy import make_url

from app.config import RateLimit, Settings, SettingsError, kept_secret, load_settings, with_secrets
from app.stock.servers import read_url


def test_defaults():
    settings = load_settings({})
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.purchase_user_limit == RateLimit(5, 60_000)
    assert settings.purchase_address_limit == RateLimit(3000, 60_000)
    assert settings.redis_url is settings.database_url is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "0"), ("PORT", "65536"), ("PORT", "http"), ("PORT", "-1"), ("PORT", "8_000"),
        ("PURCHASE_USER_LIMIT", "5"), ("PURCHASE_USER_LIMIT", "0/minute"),
        ("PURCHASE_USER_LIMIT", "5/fortnight"), ("PURCHASE_USER_LIMIT", "1001/minute"),
        ("PURCHASE_ADDRESS_LIMIT", "many"), ("TRUSTED_PROXIES", "11"), ("WEB_WORKERS", "0"),
        ("REDIS_URL", "localhost:6379"), ("DATABASE_URL", "mysql://x"),
        ("DATABASE_URL", "postgresql://h/x?sslmod=require"), ("APP_ENV", "prod"),
        ("OUTBOX_LIMIT", "0"),
        ("REDIS_REPLICAS", "6"), ("REDIS_URL", "redis+sentinel://host:26379"),
        ("REDIS_URL", "redis+sentinel:///name"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(SettingsError, match=name) as error:
        load_settings({name: value})
    assert "\n" not in str(error.value)


PASSWORD = "Hunter-2"
AWKWARD = ("{}", "{}/1", "1/{}", "{}?1", "{}#1", "#{}", "1@{}", "[{}", "{}]", "%{}")
HOSTS = ("h:x", "h:70000", "h:0", "[::1", "h:1:1", "h")


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("REDIS_URL", "redis", "/0"), ("REDIS_URL", "rediss", ""), ("REDIS_URL", "redis", "/x"),
        ("REDIS_URL", "redis+sentinel", "/name"), ("REDIS_URL", "redis+cluster", ""),
        ("JOBS_REDIS_URL", "redis", "/1"), ("DATABASE_URL", "postgresql", "/shop"),
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_read_shows_nothing_of_its_password(name, start, end):
    """Neither when it is refused nor, where it can be read, as a host or a port."""
    for password, host in product(AWKWARD, HOSTS):
        url = f"{start}://shop:{password.format(PASSWORD)}@{host}{end}"
        refused = ""
        try:
            value = getattr(load_settings({name: url}), name.lower())
        except SettingsError as error:
            refused = str(error)
        if refused:
            assert name in refused
            assert "\n" not in refused
            assert PASSWORD not in refused
        else:
            parts = make_url(value) if name == "DATABASE_URL" else find_parts(value)
            assert (parts.host, host) == ("h", "h")
            assert PASSWORD in parts.password


def find_parts(url):
    options, find = read_url(url)
    host = "h" if find else options.get("host", "localhost")
    return SimpleNamespace(host=host, password=options.get("password", ""))


@pytest.mark.parametrize(
    "url",
    [
        "redis://", "redis://h", "redis://h/", "redis://h:6379/15", "redis://:a%2Fb%40@h/0",
        "redis://:a@b@h", "redis://[::1]:6379", "rediss://u:p@h?ssl_cert_reqs=none",
        "redis+sentinel://:p@h,h2:1/name?db=1", "redis+cluster://u:p@h:1,[::1]:2/", "unix:///a@b",
    ],
)  # fmt: skip
def test_right_redis_urls(url):
    assert load_settings({"REDIS_URL": url}).redis_url == url


def test_database_urls_are_normalised():
    for url in ("postgres://h/d", "postgresql://h/d", "postgresql+psycopg2://h/d"):
        assert load_settings({"DATABASE_URL": url}).database_url == "postgresql+psycopg2://h/d"


def test_empty_means_not_set():
    assert load_settings({"PORT": " ", "REDIS_URL": ""}) == load_settings({})


def test_limits_in_words():
    settings = load_settings({"PURCHASE_USER_LIMIT": "10 per 2 minute"})
    assert settings.purchase_user_limit == RateLimit(10, 120_000)
    assert not load_settings({"PURCHASE_USER_LIMIT": "off"}).purchase_user_limit


def test_secrets(tmp_path):
    settings = Settings(data_dir=tmp_path)
    first = with_secrets(settings)
    assert first.secret_key
    assert with_secrets(settings) == first
    for name in ("secret_key", "admin_password", "admin_api_token"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    with pytest.raises(SettingsError, match="SECRET_KEY"):
        with_secrets(Settings(data_dir=tmp_path, secret_key="short"))
    external = {"REDIS_URL": "redis://h", "DATABASE_URL": "postgresql://h/d"}
    with pytest.raises(SettingsError, match="SECRET_KEY"):
        with_secrets(load_settings(external))


def test_a_secret_is_generated_once_by_many(tmp_path):
    import secrets

    from crowd import at_once

    path = tmp_path / "deep" / "secret"
    assert len(set(at_once(lambda _: kept_secret(path, secrets.token_hex), range(20)))) == 1
    assert len(list(path.parent.iterdir())) == 1
