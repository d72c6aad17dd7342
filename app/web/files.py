"""Static files, from memory, on the event loop: no page's thread is held up by who reads them."""

import gzip
import hashlib
import mimetypes
import re
from pathlib import Path
from typing import NamedTuple

from .answer import Answer
from .headers import DEFAULTS

YEAR_SECONDS = 365 * 24 * 60 * 60
# What is worth to be compressed; fonts and pictures are already.
COMPRESSIBLE = ("text/", "application/json", "application/javascript", "image/svg+xml")
LEAST_COMPRESSED = 1024
REFUSED = re.compile(r"q=0(\.0*)?").fullmatch


class Form(NamedTuple):
    """One of a file's forms, compressed or not, and what tells it from the other."""

    etag: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Files:
    """Every file below a folder, as it was when the process started."""

    def __init__(self, folder: Path, prefix: str) -> None:
        """`prefix` is the path that stands for the folder, such as "/static/"."""
        self._files: dict[str, tuple[str, Form, Form]] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                version = f"v={int(path.stat().st_mtime)}"
                self._files[prefix + name] = version, *_forms(name, path.read_bytes())

    def find(self, method: str, url: str, environ: dict[str, str]) -> Answer | None:
        """Return the answer to a request; None for whatever else than a file it is about."""
        path, _, query = url.partition("?")
        if path not in self._files or method not in ("GET", "HEAD"):
            return None
        version, *forms = self._files[path]
        form = forms[accepts_gzip(environ.get("HTTP_ACCEPT_ENCODING", ""))]
        # A file whose address changes with it may be kept; any other is asked about every time. So
        # is one that a page asks for in another version: this process may be older than the page's.
        lasts = "/vendor/" in path or query == version
        kept = f"public, max-age={YEAR_SECONDS}, immutable" if lasts else "no-cache"
        headers = [*form.headers, ("Cache-Control", kept)]
        if _matches(environ.get("HTTP_IF_NONE_MATCH", ""), forms):
            return Answer("304 Not Modified", headers, b"")
        headers.append(("Content-Length", str(len(form.body))))
        return Answer("200 OK", headers, form.body)


def _forms(name: str, content: bytes) -> tuple[Form, Form]:
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    text = media_type.startswith(COMPRESSIBLE)
    common = [
        ("Content-Type", f"{media_type}; charset=utf-8" if text else media_type),
        *DEFAULTS.items(),
    ]
    tag = hashlib.sha256(content).hexdigest()[:16]
    plain = Form(f'"{tag}"', (("ETag", f'"{tag}"'), *common), content)
    if not text or len(content) < LEAST_COMPRESSED:
        return plain, plain
    # Caches keep both forms apart by it.
    common.append(("Vary", "Accept-Encoding"))
    plain = plain._replace(headers=(("ETag", plain.etag), *common))
    etag = f'"{tag}-gz"'
    headers = (("ETag", etag), ("Content-Encoding", "gzip"), *common)
    return plain, Form(etag, headers, gzip.compress(content, 9, mtime=0))


def accepts_gzip(given: str) -> bool:
    """Tell whether an Accept-Encoding header allows gzip (RFC 9110, 12.5.3)."""
    allowed = {}
    for part in given.lower().split(","):
        coding, _, weight = part.partition(";")
        allowed[coding.strip()] = not REFUSED(weight.strip())
    return allowed.get("gzip", allowed.get("*", False))


def _matches(given: str, forms: list[Form]) -> bool:
    """Tell whether If-None-Match names the file as it is, in either form."""
    tags = {tag.strip().removeprefix("W/") for tag in given.split(",")}
    return "*" in tags or any(form.etag in tags for form in forms)
