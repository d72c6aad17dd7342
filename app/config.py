"""Every setting of the system: its name, default, check and meaning, in one place.

Settings come from the environment (and `.env`, which never overrides it). A wrong value raises
`SettingsError` with one line that names the setting, before anything is started.
"""

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dotenv import dotenv_values
from psycopg2 import ProgrammingError
from psycopg2.extensions import parse_dsn

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.1.0"  # pyproject.toml says the same


class SettingsError(ValueError):
    """A setting has a value that can't be used; the message is one line fit for an operator."""


@dataclass(frozen=True)
class RateLimit:
    """`count` attempts in any `window_ms` milliseconds; a count of 0 means no limit."""

    count: int
    window_ms: int

    def __bool__(self) -> bool:
        return self.count > 0


NO_LIMIT = RateLimit(0, 0)

# With so many, a sale's shards lie evenly on any number of nodes that divides them.
SHARD_COUNTS = (1, 2, 3, 4, 6, 8, 12, 24)

# The exact sliding window stores one timestamp per attempt; past this it would be slow and large.
MAX_USER_LIMIT = 1000
# The claim that names a token's subject (RFC 7519, 4.1.2), and those that name none.
SUBJECT = "sub"
CHECKED_CLAIMS = ("iss", "aud", "exp", "nbf", "iat")


def _text(value: str) -> str:
    return value


def _claim(value: str) -> str:
    # Refusals name it between quotation marks (RFC 6750, 3).
    if not re.fullmatch(r"[\x21\x23-\x5b\x5d-\x7e]{1,100}", value):
        raise ValueError("must be 1 to 100 visible ASCII characters, without quotation marks")
    if value in CHECKED_CLAIMS:
        raise ValueError("must be a claim that names a user")
    return value


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return parse


def _shards(value: str) -> int:
    if value not in map(str, SHARD_COUNTS):
        raise ValueError(f"must be one of {', '.join(map(str, SHARD_COUNTS))}")
    return int(value)


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value

    return parse


def _limit(highest: int) -> Callable[[str], RateLimit]:
    def parse(value: str) -> RateLimit:
        if value.lower() == "off":
            return NO_LIMIT
        import limits  # takes a tenth of a second, and few runs set a limit

        try:
            item = limits.parse(value)
        except ValueError:
            raise ValueError('must look like "5/minute", or be "off"') from None
        if not 1 <= item.amount <= highest:
            raise ValueError(f"must allow from 1 to {highest} attempts")
        return RateLimit(item.amount, item.get_expiry() * 1000)

    return parse


def _units(value: str) -> int:
    return 0 if value.lower() == "off" else _integer(1, 1_000_000_000)(value)


def _networks(value: str) -> tuple[IPv4Network | IPv6Network, ...]:
    networks = []
    for text in value.split(","):
        try:
            networks.append(ip_network(text.strip()))
        except ValueError as error:
            raise ValueError(f"must be networks with commas between them: {error}") from None
    return tuple(networks)


def _origins(value: str) -> tuple[str, ...]:
    """Read origins as browsers send them (RFC 6454, 6.2): no path, no usual port, no capitals."""
    found = tuple(text.strip() for text in value.split(","))
    for text in found:
        match = re.fullmatch(
            r"(https?)://([a-z0-9-]+(?:\.[a-z0-9-]+)*|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?", text
        )
        if not match or match[3] == {"http": "80", "https": "443"}[match[1]]:
            raise ValueError(
                "must be origins as browsers send them, like https://shop.example, with commas "
                f"between them, not {text[:100]}"
            )
    return found


def _switch(value: str) -> bool:
    return _choice("on", "off")(value.lower()) == "on"


def _redis_url(value: str) -> str:
    if not re.match(r"(rediss?(\+(sentinel|cluster))?|unix)://", value):
        raise ValueError(
            "must start with redis://, rediss://, redis+sentinel://, redis+cluster:// or unix://"
        )
    if "+cluster:" in value and not re.match(
        r"[a-z+]+://([^/@]*@)?[^/@?,]+(,[^/@?,]+)*/?(\?|$)", value
    ):
        raise ValueError(
            "must name nodes of the cluster alone, like redis+cluster://host:6379,host2:6379"
        )
    sentinels = r"[a-z+]+://([^/@]*@)?[^/@?,]+(,[^/@?,]+)*/[^/?]"
    if "+sentinel:" in value and not re.match(sentinels, value):
        raise ValueError(
            "must name Sentinels and their primary, like redis+sentinel://host:26379,host2:26379/name"
        )
    if not value.startswith("unix:"):
        _check_redis_parts(value)
    return value


# What a password may hold in a URL as %2F and its like only. The words of whoever reads the URL
# otherwise repeat a part of it, in the place of a port or a host.
ENCODED = "special characters of names and passwords percent-encoded (RFC 3986, 2.1)"


def _check_redis_parts(value: str) -> None:
    """Raise ValueError, which repeats nothing of the value, unless it has hosts and ports."""
    authority, _, path = value.partition("://")[2].partition("?")[0].partition("/")
    user, _, listed = authority.rpartition("@")
    hosts = listed.split(",") if "+" in value.partition("://")[0] else [listed]
    if (
        not all(_is_host(host) for host in hosts)
        or "#" in value
        or "@" in path
        or set("[]") & set(user)
    ):
        raise ValueError(f"must have hosts with ports from 1 to 65535, and {ENCODED}")
    if "+sentinel:" not in value and not re.fullmatch(r"[0-9]*", path):
        raise ValueError("must end with the number of a database, or without one")


def _is_host(text: str) -> bool:
    """Tell whether it is a host, which may be left out, with or without a port."""
    try:
        parts = urlsplit(f"//{text}")
        return parts.netloc == text and "@" not in text and parts.port != 0
    except ValueError:
        return False


def _one_redis_url(value: str) -> str:
    if "+cluster:" in value:
        raise ValueError("must be one server: RQ's commands span the slots of a cluster")
    return _redis_url(value)


def _database_url(value: str) -> str:
    """SQLAlchemy 2.1 reads a bare postgresql:// as psycopg 3; this project uses psycopg2."""
    match = re.match(r"(postgres|postgresql|postgresql\+psycopg2)://", value)
    if not match:
        raise ValueError("must start with postgresql://")
    # As SQLAlchemy parts it: a password goes as far as the first @.
    authority = re.match(r"(?:[^:/]*(?::[^@]*)?@)?([^/?]*)", value[match.end() :])
    if not authority or not _is_host(authority[1]):
        raise ValueError(f"must have one host, a port from 1 to 65535, and {ENCODED}")
    try:
        parse_dsn("postgresql://?" + value.partition("?")[2])
    except ProgrammingError as error:
        raise ValueError(f"has no such option: {str(error).strip()}") from None
    return "postgresql+psycopg2://" + value[match.end() :]


def _path(value: str) -> Path:
    if not value:
        raise ValueError("must name a path")
    return Path(value).expanduser().absolute()


def setting(name: str, default: object, parse: Callable[..., Any], meaning: str) -> Any:
    """Declare a setting; `default` is a value, or a function for one that is computed."""
    metadata = {"name": name, "parse": parse, "meaning": meaning}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The settings of one run. `redis_url` and `database_url` are None in embedded mode."""

    app_env: str = setting(
        "APP_ENV",
        "development",
        _choice("development", "production"),
        "`production` refuses embedded servers, generated secrets and weak ones",
    )
    host: str = setting("HOST", "127.0.0.1", _text, "address to listen on")
    port: int = setting("PORT", 8000, _integer(1, 65535), "port to listen on")
    data_dir: Path = setting(
        "DATA_DIR",
        lambda: ROOT / ".data",
        _path,
        "embedded servers' files and generated secrets (mode 0600)",
    )
    redis_url: str | None = setting(
        "REDIS_URL", None, _redis_url, "a real Redis or Valkey; embedded when not set"
    )
    jobs_redis_url: str | None = setting(
        "JOBS_REDIS_URL",
        None,
        _one_redis_url,
        "a Redis for RQ, the limits of other routes than the purchase, and sessions; `REDIS_URL` "
        "when not set, unless that is a cluster",
    )
    redis_replicas: int = setting(
        "REDIS_REPLICAS",
        0,
        _integer(0, 5),
        "replicas of Redis that must have an order before it is answered 200; with fewer, nothing "
        "is sold",
    )
    shards: int = setting(
        "SHARDS",
        1,
        _shards,
        "shards that a sale is dealt to, so that nodes of a cluster share it: 1, 2, 3, 4, 6, 8, 12 "
        "or 24; to change it takes `flask rebuild`",
    )
    database_url: str | None = setting(
        "DATABASE_URL", None, _database_url, "a real PostgreSQL; embedded when not set"
    )
    secret_key: str | None = setting(
        "SECRET_KEY", None, _text, "signs sessions; generated into `DATA_DIR` in embedded mode"
    )
    admin_email: str = setting("ADMIN_EMAIL", "admin@example.com", _text, "the first admin")
    admin_password: str | None = setting(
        "ADMIN_PASSWORD", None, _text, "the first admin's password; generated when not set"
    )
    admin_api_token: str | None = setting(
        "ADMIN_API_TOKEN", None, _text, "bearer token of the admin API; generated when not set"
    )
    purchase_user_limit: RateLimit = setting(
        "PURCHASE_USER_LIMIT",
        RateLimit(5, 60_000),
        _limit(MAX_USER_LIMIT),
        "purchase attempts of one user, exact sliding window; `off` disables",
    )
    purchase_address_limit: RateLimit = setting(
        "PURCHASE_ADDRESS_LIMIT",
        RateLimit(3000, 60_000),
        _limit(10_000_000),
        "purchase attempts of one client address (many shoppers share one behind a carrier); "
        "`off` disables",
    )
    purchase_network_limit: RateLimit = setting(
        "PURCHASE_NETWORK_LIMIT",
        NO_LIMIT,
        _limit(10_000_000),
        "purchase attempts of one network, IPv6 /48 or IPv4 /24; `off` by default: a carrier's or "
        "an office's shoppers share one",
    )
    purchase_address_units: int = setting(
        "PURCHASE_ADDRESS_UNITS",
        0,
        _units,
        "units of one product that one client address may buy in all, whatever users it names; "
        "`off` by default",
    )
    lookup_limit: RateLimit = setting(
        "LOOKUP_LIMIT",
        RateLimit(600, 60_000),
        _limit(10_000_000),
        "look-ups (orders, products, figures) of one client address, each route by itself; "
        "`off` disables",
    )
    api_token_limit: RateLimit = setting(
        "API_TOKEN_LIMIT",
        NO_LIMIT,
        _limit(10_000_000),
        "requests of one API token, each route by itself; `off` disables",
    )
    shopper_auth: str = setting(
        "SHOPPER_AUTH",
        "trusted",
        _choice("trusted", "jwt"),
        "`trusted` believes the `userId` of a request (behind a shop that vouches for it); `jwt` "
        "asks each shopper for a bearer token whose `sub` (or `JWT_USER_CLAIM`) is the `userId`",
    )
    trusted_callers: tuple[IPv4Network | IPv6Network, ...] = setting(
        "TRUSTED_CALLERS",
        (),
        _networks,
        "networks whose addresses may buy and look up in trusted mode, such as `10.0.0.0/24, "
        "2001:db8::/48`: the shop's servers; anybody when not set",
    )
    cors_origins: tuple[str, ...] = setting(
        "CORS_ORIGINS",
        (),
        _origins,
        "origins whose pages may call the shoppers' routes, such as `https://shop.example, "
        "https://m.shop.example`; with `SHOPPER_AUTH=jwt` only",
    )
    shop_page: bool | None = setting(
        "SHOP_PAGE",
        None,
        _switch,
        "`on` or `off`: the example page for shoppers at `/shop`; on when not set, but off with "
        "`APP_ENV=production`",
    )
    jwt_secret: str | None = setting(
        "JWT_SECRET", None, _text, "shared secret of HS256 tokens, 32 bytes or more"
    )
    jwt_key_file: Path | None = setting(
        "JWT_KEY_FILE",
        None,
        _path,
        "public key (PEM) or key set (JWKS) of RS256 or ES256 tokens, instead of `JWT_SECRET`",
    )
    jwt_issuer: str | None = setting("JWT_ISSUER", None, _text, "`iss` that a token must have")
    jwt_audience: str | None = setting("JWT_AUDIENCE", None, _text, "`aud` that a token must have")
    jwt_user_claim: str = setting(
        "JWT_USER_CLAIM", SUBJECT, _claim, "claim of a token that holds the `userId`"
    )
    metrics_token: str | None = setting(
        "METRICS_TOKEN", None, _text, "bearer token of `/metrics`; `ADMIN_API_TOKEN` when not set"
    )
    log_format: str = setting(
        "LOG_FORMAT", "console", _choice("console", "json"), "form of the log lines"
    )
    log_level: str = setting(
        "LOG_LEVEL",
        "info",
        _choice("debug", "info", "warning", "error"),
        "least level that is logged; `debug` writes a line for every purchase",
    )
    webhook_allow_private: bool = setting(
        "WEBHOOK_ALLOW_PRIVATE",
        False,
        _switch,
        "`on` lets webhooks be sent to private and loopback addresses: for a shop in the same "
        "network; anybody who may make endpoints can then reach into it",
    )
    trusted_proxies: int = setting(
        "TRUSTED_PROXIES", 0, _integer(0, 10), "hops of X-Forwarded-For to believe"
    )
    web_workers: int = setting(
        "WEB_WORKERS", lambda: os.cpu_count() or 1, _integer(1, 256), "web processes"
    )
    web_threads: int = setting(
        "WEB_THREADS",
        4,
        _integer(1, 64),
        "threads of each web process for everything but purchases, which need none",
    )

    outbox_limit: int = setting(
        "OUTBOX_LIMIT",
        5_000_000,
        _integer(1, 10**12),
        "orders that may wait to be persisted; beyond it purchases are answered 503",
    )

    @property
    def has_shop_page(self) -> bool:
        return self.app_env != "production" if self.shop_page is None else self.shop_page

    @property
    def embedded_redis(self) -> bool:
        return self.redis_url is None

    @property
    def embedded_postgres(self) -> bool:
        return self.database_url is None


def _environ() -> dict[str, str | None]:
    return {**dotenv_values(ROOT / ".env"), **os.environ}


def wanted_log_format() -> str:
    """Return LOG_FORMAT, whatever else may be wrong with the settings."""
    return (_environ().get("LOG_FORMAT") or "").strip()


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from `environ` (by default `.env` below the process environment).

    Raises SettingsError for the first value that can't be used. An empty value counts as not set.
    """
    given: Mapping[str, str | None] = _environ() if environ is None else environ
    values: dict[str, Any] = {}
    for entry in fields(Settings):
        if "name" not in entry.metadata:
            continue
        raw = (given.get(entry.metadata["name"]) or "").strip()
        if raw:
            try:
                values[entry.name] = entry.metadata["parse"](raw)
            except ValueError as error:
                raise SettingsError(f"{entry.metadata['name']} {error}") from None
    return Settings(**values)


# Below this a session cookie could be forged by trying keys.
MIN_SECRET_LENGTH = 16
# In production a secret is a random one: 128 bits have 32 characters in hexadecimal.
MIN_PRODUCTION_SECRET_LENGTH = 32
MIN_DISTINCT_CHARACTERS = 8
MIN_PRODUCTION_PASSWORD = 12
DEFAULT_ADMIN_EMAIL = "admin@example.com"
# RFC 7518, 3.2: a key of HS256 has at least the size of the hash.
MIN_JWT_SECRET_BYTES = 32


def with_secrets(settings: Settings) -> Settings:
    """Fill in the secrets that were not given: generated once, and kept in DATA_DIR.

    Raises SettingsError when SECRET_KEY is too short, or missing although both servers are given:
    several machines would then each have generated a different one; and for settings that don't go
    together.
    """
    check_shopper_auth(settings)
    if "+cluster:" in (settings.redis_url or "") and settings.jobs_redis_url is None:
        raise SettingsError("REDIS_URL=redis+cluster://… needs JOBS_REDIS_URL, one small Redis")
    if settings.redis_replicas and settings.embedded_redis:
        raise SettingsError("REDIS_REPLICAS needs REDIS_URL: the embedded Redis has no replicas")
    if settings.app_env == "production":
        check_production(settings)
    key = settings.secret_key
    if key is None and not (settings.embedded_redis or settings.embedded_postgres):
        raise SettingsError("SECRET_KEY is required when REDIS_URL and DATABASE_URL are set")
    if key is not None and len(key) < MIN_SECRET_LENGTH:
        raise SettingsError(f"SECRET_KEY must have at least {MIN_SECRET_LENGTH} characters")
    generate = {
        "secret_key": secrets.token_hex,
        "admin_password": lambda: secrets.token_urlsafe(12),
        "admin_api_token": lambda: "fst_" + secrets.token_urlsafe(32),
    }
    missing: dict[str, Any] = {
        name: kept_secret(settings.data_dir / name, new)
        for name, new in generate.items()
        if getattr(settings, name) is None
    }
    return replace(settings, **missing)


def check_shopper_auth(settings: Settings) -> None:
    """Raise SettingsError for token settings that contradict each other or leave a check out."""
    given = {
        "JWT_SECRET": settings.jwt_secret,
        "JWT_KEY_FILE": settings.jwt_key_file,
        "JWT_ISSUER": settings.jwt_issuer,
        "JWT_AUDIENCE": settings.jwt_audience,
        "JWT_USER_CLAIM": None if settings.jwt_user_claim == SUBJECT else settings.jwt_user_claim,
    }
    if settings.shopper_auth == "trusted":
        if settings.cors_origins:
            # Any script of those pages could buy as anybody.
            raise SettingsError("CORS_ORIGINS needs SHOPPER_AUTH=jwt: nobody vouches for a userId")
        for name, value in given.items():
            if value is not None:
                # Whoever sets it believes that tokens are checked.
                raise SettingsError(f"{name} is of no use without SHOPPER_AUTH=jwt")
        return
    if settings.trusted_callers:
        # Whoever sets it believes that others are kept out.
        raise SettingsError("TRUSTED_CALLERS is of no use with SHOPPER_AUTH=jwt")
    if (settings.jwt_secret is None) == (settings.jwt_key_file is None):
        raise SettingsError("SHOPPER_AUTH=jwt needs JWT_SECRET or JWT_KEY_FILE, one of them")
    for name in ("JWT_ISSUER", "JWT_AUDIENCE"):
        if given[name] is None:
            raise SettingsError(f"SHOPPER_AUTH=jwt needs {name}")
    if settings.jwt_secret and len(settings.jwt_secret.encode()) < MIN_JWT_SECRET_BYTES:
        raise SettingsError(f"JWT_SECRET must have at least {MIN_JWT_SECRET_BYTES} bytes")


def check_production(settings: Settings) -> None:
    """Raise SettingsError for what is fine at home and dangerous in public."""
    secrets_given = {
        "SECRET_KEY": settings.secret_key,
        "ADMIN_API_TOKEN": settings.admin_api_token,
        "METRICS_TOKEN": settings.metrics_token,
    }
    for name, value in secrets_given.items():
        if value is None:
            if name != "METRICS_TOKEN":
                raise SettingsError(f"APP_ENV=production needs {name}: none is generated")
        elif len(value) < MIN_PRODUCTION_SECRET_LENGTH or len(set(value)) < MIN_DISTINCT_CHARACTERS:
            raise SettingsError(
                f"{name} is too weak for APP_ENV=production: use a random one, such as "
                "`openssl rand -hex 32` prints"
            )
    if settings.admin_email == DEFAULT_ADMIN_EMAIL:
        raise SettingsError("APP_ENV=production needs ADMIN_EMAIL: the first admin's own address")
    if settings.admin_password is None or len(settings.admin_password) < MIN_PRODUCTION_PASSWORD:
        raise SettingsError(
            "APP_ENV=production needs ADMIN_PASSWORD of at least "
            f"{MIN_PRODUCTION_PASSWORD} characters: none is generated"
        )


def was_generated(settings: Settings, name: str) -> bool:
    """Return whether a secret is the one kept in DATA_DIR, and not one that was given."""
    path = settings.data_dir / name
    return path.exists() and path.read_text().strip() == getattr(settings, name)


def kept_secret(path: Path, generate: Callable[[], str]) -> str:
    """Return the secret stored at `path` (mode 0600), generating it once, whoever comes first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "w") as file:
            file.write(generate() + "\n")
        # A link appears whole or not at all, and only for the first of several processes.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        os.unlink(draft)
    return path.read_text().strip()
