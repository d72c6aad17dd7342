"""How long a drill goes on, and copies of the system that are broken on purpose."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from app.config import ROOT

# `make drills` in CI, `make drills LONG=1` by hand.
LONG = os.environ.get("LONG") == "1"

PARTS = (
    "app", "migrations", "stress", "templates", "web.py", "wsgi.py", "worker.py", "webhooks.py",
)  # fmt: skip


def drill(*values: object) -> object:
    """Return one set of a test's parameters with which it is a drill."""
    return pytest.param(*values, marks=pytest.mark.drill)


def often(usual: int, long: int) -> int:
    return long if LONG else usual


def break_copy(tree: Path, changes: Iterable[tuple[str, str, str]]) -> None:
    """Copy what the system needs to an empty directory; there, put other text in pieces' place.

    A change is a path, the piece, which must occur once, and what replaces it.
    """
    tree.chmod(0o755)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / part)
    for path, piece, replacement in changes:
        text = (tree / path).read_text()
        assert text.count(piece) == 1, f"{path} has changed: {piece}"
        (tree / path).write_text(text.replace(piece, replacement))
