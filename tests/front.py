"""nginx in front of the system as deploy/ has it, with ports and a certificate of the test."""

import subprocess

from app.config import ROOT


def make_certificate(folder) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    command += " -keyout tls.key -out tls.crt -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)


def nginx_config(folder, upstream: int, tls: int, plain: int) -> str:
    """Return the example as the http context of an nginx that listens on free ports."""
    site = (ROOT / "deploy" / "nginx" / "flash-sale.conf").read_text()
    for old, new in {
        "server web:8000": f"server 127.0.0.1:{upstream}",
        "listen 443": f"listen 127.0.0.1:{tls}",
        "    listen [::]:443 ssl http2 backlog=4096;\n": "",
        "listen 80;": f"listen 127.0.0.1:{plain};",
        "    listen [::]:80;\n": "",
        "/etc/nginx/tls": str(folder),
    }.items():
        assert old in site
        site = site.replace(old, new)
    paths = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return (
        f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log warn;\n"
        f"worker_processes 1;\nevents {{ worker_connections 2048; }}\nhttp {{\n{paths}{site}}}\n"
    )
