"""The parts as in production, one by one: Debian's Redis and PostgreSQL with passwords and TLS, the
web server and a worker as processes of their own, and nginx in front.

Skipped where these are not installed: apt-get install redis-server postgresql nginx-light openssl
"""

import gzip
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from urllib.parse import quote

import psycopg2
import pytest
import redis
from call import call
from client import free_port
from front import make_certificate, nginx_config
from system import PRODUCTION
from waiting import wait_until

from app.config import ROOT, SettingsError, load_settings, with_secrets

pytestmark = pytest.mark.drill

# Both have to be quoted in a URL.
REDIS_PASSWORD, POSTGRES_PASSWORD = "re/dis:p@ss %41 word", "post/gres:p@ss %41 word"


def installed(name: str, *places: str) -> str:
    found = [place for place in places if os.access(place, os.X_OK)] or [shutil.which(name)]
    if not found[-1]:
        pytest.skip(f"{name} is not installed")
    return found[-1]


class Processes:
    """Processes that end with the test, the last started first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen] = []

    def start(self, name: str, *words: str, **options) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                words, stdout=log, stderr=log, start_new_session=True, **options
            )
        self.running.append(process)
        return process

    def stop(self) -> None:
        for process in reversed(self.running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def start_redis(processes: Processes, folder: Path) -> str:
    port = free_port()
    config = folder / "redis.conf"
    config.write_text(
        f"""
        bind 127.0.0.1
        port 0
        tls-port {port}
        tls-cert-file {folder}/tls.crt
        tls-key-file {folder}/tls.key
        tls-ca-cert-file {folder}/tls.crt
        tls-auth-clients no
        requirepass "{REDIS_PASSWORD}"
        dir {folder}
        appendonly yes
        appendfsync always
        save ""
        maxmemory-policy noeviction
        """
    )
    processes.start("redis", installed("redis-server", "/usr/bin/redis-server"), str(config))
    certificate = quote(str(folder / "tls.crt"), safe="")
    url = (
        f"rediss://:{quote(REDIS_PASSWORD, safe='')}@127.0.0.1:{port}/1?ssl_ca_certs={certificate}"
    )

    def answers() -> bool:
        try:
            return redis.Redis.from_url(url).ping()
        except redis.RedisError:
            return False

    wait_until(answers, 15, "Redis")
    return url


def start_postgres(processes: Processes, folder: Path) -> str:
    place = sorted(glob("/usr/lib/postgresql/*/bin"))
    if not place:
        pytest.skip("PostgreSQL is not installed")
    port, data = free_port(), folder / "postgres"
    data.mkdir()
    # PostgreSQL refuses root.
    who = {"user": "nobody"} if os.geteuid() == 0 else {}
    for name in ("tls.crt", "tls.key"):
        shutil.copy(folder / name, data.with_name(f"pg-{name}"))
        data.with_name(f"pg-{name}").chmod(0o600)
    (folder / "password").write_text(POSTGRES_PASSWORD)
    if who:
        for path in (data, folder / "pg-tls.crt", folder / "pg-tls.key", folder / "password"):
            shutil.chown(path, "nobody")
        for parent in (folder, *folder.parents[: len(folder.parents) - 2]):
            parent.chmod(parent.stat().st_mode | 0o011)
    subprocess.run(
        [
            *(f"{place[-1]}/initdb", "-D", data, "-U", "flashsale", "--auth=scram-sha-256"),
            f"--pwfile={folder}/password",
        ],
        check=True,
        capture_output=True,
        cwd="/",
        timeout=60,
        **who,
    )
    (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
    processes.start(
        "postgres",
        *(f"{place[-1]}/postgres", "-D", str(data), "-p", str(port), "-c", "ssl=on"),
        *("-c", f"ssl_cert_file={folder}/pg-tls.crt", "-c", f"ssl_key_file={folder}/pg-tls.key"),
        *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
        cwd="/",
        **who,
    )
    base = f"postgresql://flashsale:{quote(POSTGRES_PASSWORD, safe='')}@127.0.0.1:{port}"
    options = f"?sslmode=verify-full&sslrootcert={folder}/tls.crt"

    def answers():
        try:
            return psycopg2.connect(f"{base}/postgres{options}")
        except psycopg2.OperationalError:
            return None

    connection = wait_until(answers, 15, "PostgreSQL")
    connection.autocommit = True
    connection.cursor().execute("CREATE DATABASE flashsale")
    connection.close()
    return f"{base}/flashsale{options}"


@dataclass
class Deployed:
    url: str
    plain_url: str
    direct_url: str
    tls: ssl.SSLContext
    folder: Path
    environ: dict[str, str]
    web: subprocess.Popen


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    installed("openssl")
    nginx = installed("nginx", "/usr/sbin/nginx")
    make_certificate(folder)
    processes = Processes(folder)
    try:
        port = free_port()
        environ = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        environ |= PRODUCTION | {
            "REDIS_URL": start_redis(processes, folder),
            "DATABASE_URL": start_postgres(processes, folder),
            "DATA_DIR": str(folder / "data"),
            "PORT": str(port),
        }
        run = {"cwd": ROOT, "env": environ}
        prepared = subprocess.run(
            [sys.executable, "-m", "flask", "--app", "wsgi", "prepare"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **run,
        )
        assert prepared.returncode == 0, prepared.stdout + prepared.stderr
        (folder / "prepare.log").write_text(prepared.stdout + prepared.stderr)
        web = processes.start("web", sys.executable, "-m", "app.run.serve", **run)
        processes.start("worker", sys.executable, "worker.py", **run)
        tls_port, plain_port = free_port(), free_port()
        (folder / "nginx.conf").write_text(nginx_config(folder, port, tls_port, plain_port))
        processes.start("nginx", nginx, "-c", f"{folder}/nginx.conf", "-p", str(folder))
        tls = ssl.create_default_context(cafile=folder / "tls.crt")
        url = f"https://localhost:{tls_port}"

        def ready() -> bool:
            try:
                return call(f"{url}/readyz", tls=tls).status == 200
            except OSError:
                return False

        wait_until(ready, 30, f"the system to be ready; see {folder}")
        direct = f"http://127.0.0.1:{port}"
        yield Deployed(url, f"http://127.0.0.1:{plain_port}", direct, tls, folder, environ, web)
    finally:
        processes.stop()


def test_every_part_is_ready(deployed):
    answer = call(f"{deployed.url}/readyz", tls=deployed.tls)
    assert all(part["ok"] for part in answer.json["checks"].values())


def test_an_order_goes_all_the_way(deployed):
    headers = {"Idempotency-Key": "one"}
    bought = call(
        f"{deployed.url}/purchase", {"userId": 1, "productId": 1}, None, headers, deployed.tls
    )
    assert bought.status == 200
    again = call(
        f"{deployed.url}/purchase", {"userId": 1, "productId": 1}, None, headers, deployed.tls
    )
    assert again.json == bought.json

    def orders():
        found = call(f"{deployed.url}/purchase/orders/1", tls=deployed.tls).json
        return found if found[0]["status"] == "CONFIRMED" else None

    (order,) = wait_until(orders, 15, "the order to be stored")
    assert order["id"] == bought.json["orderId"]


def test_redis_is_as_durable_as_it_should_be(deployed):
    bearer = {"Authorization": f"Bearer {PRODUCTION['METRICS_TOKEN']}"}
    figures = call(f"{deployed.url}/metrics", None, None, bearer, deployed.tls)
    assert "flashsale_redis_durable 1.0" in figures.body.decode()


def test_what_nginx_adds(deployed):
    given = {"X-Request-Id": "checkout-1"}
    answer = call(f"{deployed.url}/products", None, None, given, deployed.tls)
    assert "max-age" in answer.headers["Strict-Transport-Security"]
    assert answer.headers["X-Request-Id"] == "checkout-1"
    assert "nginx/" not in answer.headers["Server"]
    answer = call(f"{deployed.url}/purchase", {"userId": 9, "productId": 1}, tls=deployed.tls)
    assert len(answer.headers["X-Request-Id"]) == 32
    large = call(f"{deployed.url}/purchase", "x" * 70_000, tls=deployed.tls)
    assert (large.status, large.json["code"]) == (413, "body_too_large")


def test_plain_http_only_leads_to_https(deployed):
    with socket.create_connection(deployed.plain_url.removeprefix("http://").split(":")) as plain:
        plain.sendall(b"GET /products HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n")
        answer = plain.recv(1000)
    assert answer.startswith(b"HTTP/1.1 308")
    assert b"Location: https://shop.example/products" in answer


def test_a_forged_address_counts_for_nothing(deployed):
    """Each answer tells what is left for the address that the application sees."""
    left = []
    for number in range(3):
        headers = {"X-Forwarded-For": f"203.0.113.{number}", "X-Real-IP": f"203.0.113.{number}"}
        answer = call(f"{deployed.url}/purchase/metrics", None, None, headers, deployed.tls)
        left.append(int(answer.headers["RateLimit"].split("r=")[1].split(";")[0]))
    assert left == [left[0], left[0] - 1, left[0] - 2]


def test_cookies_are_for_tls_only(deployed):
    answer = call(f"{deployed.url}/admin/sign-in", tls=deployed.tls)
    cookie = answer.headers["Set-Cookie"]
    for word in ("Secure", "HttpOnly", "SameSite=Lax"):
        assert word in cookie


def test_an_admin_signs_in_on_a_port_that_is_not_443(deployed):
    """A form's origin is compared with the Host that arrives, port included."""
    browser = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=deployed.tls), urllib.request.HTTPCookieProcessor()
    )
    address = f"{deployed.url}/admin/sign-in"
    browser.addheaders = [("Referer", address), ("Origin", deployed.url)]
    page = browser.open(address, timeout=15).read().decode()
    form = {
        "csrf_token": re.search(r'name="csrf_token"[^>]*value="([^"]+)"', page)[1],
        "email": PRODUCTION["ADMIN_EMAIL"],
        "password": PRODUCTION["ADMIN_PASSWORD"],
    }
    with browser.open(address, urllib.parse.urlencode(form).encode(), timeout=15) as answer:
        assert answer.url == f"{deployed.url}/admin/"
        assert answer.status == 200


def test_pages_and_styles_are_compressed(deployed):
    for path in ("/docs", "/openapi.json", "/static/docs.css"):
        for wanted in ("gzip", "identity"):
            headers = {"Accept-Encoding": wanted}
            answer = call(f"{deployed.url}{path}", None, None, headers, deployed.tls)
            encoded = answer.headers.get("Content-Encoding", "identity")
            assert encoded == wanted, path
            assert "Accept-Encoding" in answer.headers.get("Vary", ""), path
            if wanted == "gzip":
                small, body = len(answer.body), gzip.decompress(answer.body)
            else:
                assert answer.body == body
                assert small < len(body) / 2


def test_no_secret_is_in_any_log(deployed):
    text = "".join(path.read_text(errors="replace") for path in deployed.folder.glob("*.log"))
    assert text
    secrets = [
        PRODUCTION[name] for name in PRODUCTION if name.endswith(("KEY", "TOKEN", "PASSWORD"))
    ]
    for secret in (*secrets, REDIS_PASSWORD, POSTGRES_PASSWORD, quote(REDIS_PASSWORD, safe="")):
        assert secret not in text


def test_without_tls_or_password_nobody_gets_in(deployed):
    url = deployed.environ["REDIS_URL"]
    with pytest.raises(redis.RedisError):
        redis.Redis.from_url(url.replace("rediss", "redis").split("?")[0]).ping()
    with pytest.raises(redis.RedisError):
        redis.Redis.from_url(url.replace(quote(REDIS_PASSWORD, safe=""), "wrong")).ping()
    plain = deployed.environ["DATABASE_URL"].split("?")[0] + "?sslmode=disable"
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(plain)


def test_renewed_behind_nginx(deployed):
    """systemctl reload, as the unit does it, while somebody buys through kept connections."""
    deployed.web.send_signal(signal.SIGHUP)
    for user in range(100, 160):
        body = {"userId": user, "productId": 77}
        assert call(f"{deployed.url}/purchase", body, tls=deployed.tls).status == 404
    assert deployed.web.poll() is None


def test_the_servers_settings_are_what_is_tested():
    with pytest.raises(SettingsError):
        with_secrets(load_settings({"APP_ENV": "production"}))
